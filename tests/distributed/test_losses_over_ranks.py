"""Over ranks with different and uneven rows, terms and gradients are one process's."""

import cases
import pytest
import torch
from rows import rows

SIZES = ([11, 5], [13, 7, 4], [4, 0])
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def one_process(shards, options):
    return cases.vicreg(None, torch.cat(shards), dict(options))


def combined(results, how):
    parts = [gradients for _, gradients in results]
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    return total if how == "sum" else {name: g / len(parts) for name, g in total.items()}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("how", ["mean", "sum"])
@pytest.mark.parametrize(
    "options",
    [
        {"covariance_path": "covariance", "dim": 5},
        {"covariance_path": "gram", "dim": 5},
        {"covariance_path": "gram", "dim": 2},  # fewer columns than three ranks
        {"covariance_path": "auto", "dim": 60, "variance_views": "mean", "gamma": 3.0},
        {"covariance_path": "covariance", "dim": 300},  # two strips
    ],
    ids=str,
)
def test_vicreg(ranks, sizes, how, options):
    shards = rows(sizes)
    expected, gradients = one_process(shards, options)
    results = ranks(cases.vicreg, shards, [{**options, "grad_reduction": how} for _ in shards])
    for terms, _ in results:
        torch.testing.assert_close(terms, expected, **EXACT)
    scale = max(g.abs().max().item() for g in gradients.values())
    torch.testing.assert_close(
        combined(results, how), gradients, rtol=1e-12, atol=1e-12 * max(scale, 1)
    )


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("path", ["covariance", "gram"])
@pytest.mark.parametrize("trainer", [cases.vicreg_ddp, cases.vicreg_fsdp], ids=["ddp", "fsdp2"])
def test_vicreg_under_a_trainer(ranks, trainer, sizes, path):
    shards, options = rows(sizes), {"covariance_path": path}
    expected, gradients = one_process(shards, options)
    for terms, reduced in ranks(trainer, shards, [dict(options) for _ in shards]):
        torch.testing.assert_close(terms, expected, **EXACT)
        torch.testing.assert_close(reduced, gradients, rtol=1e-12, atol=1e-11)


def test_ddp_with_a_static_graph_really_reduces(ranks):
    shards = rows([11, 5])
    expected, gradients = one_process(shards, {})
    for terms, reduced in ranks(cases.vicreg_ddp_static_graph, shards):
        torch.testing.assert_close(terms, expected, **EXACT)
        torch.testing.assert_close(reduced, gradients, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("path", ["covariance", "gram"])
def test_vicreg_compiles_whole_with_a_group(ranks, path):
    shards, options = rows([11, 5]), {"covariance_path": path}
    expected, gradients = one_process(shards, options)
    results = ranks(cases.vicreg_compiled, shards, [options, options])
    for terms, _ in results:
        torch.testing.assert_close(terms, expected, **EXACT)
    torch.testing.assert_close(combined(results, "mean"), gradients, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("path", ["covariance", "gram"])
def test_ranks_may_differ_in_grad_mode(ranks, path):
    shards = rows([11, 5])
    whole = torch.cat(shards)
    expected = cases.values(cases.vicreg_loss(whole, whole.flip(1)))
    for terms in ranks(cases.vicreg_without_gradients_on_one_rank, shards, [path, path]):
        torch.testing.assert_close(terms, expected, **EXACT)


@pytest.mark.parametrize(("sizes", "total"), [([1, 0], 1), ([0, 0, 0], 0)])
def test_a_global_batch_under_two_is_refused_on_every_rank(ranks, sizes, total):
    message = f"vicreg_loss needs at least 2 rows over all ranks, got {total}"
    assert ranks(cases.vicreg_refusal, rows(sizes)) == [message] * len(sizes)


def test_one_row_on_each_rank_is_a_batch_of_two(ranks):
    shards = rows([1, 1])
    expected, _ = one_process(shards, {})
    for terms, _ in ranks(cases.vicreg, shards, [{}, {}]):
        torch.testing.assert_close(terms, expected, **EXACT)


def test_second_derivatives_over_ranks_are_refused_by_name(ranks):
    for said in ranks(cases.vicreg_second_derivatives, rows([11, 5])):
        assert all("a loss over a process group has no second derivative" in s for s in said)
    for said in ranks(cases.variance_second_derivative, rows([3, 2])):
        assert "a loss over a process group has no second derivative" in said


def test_traffic_is_what_the_docstring_says(ranks):
    n, d, world = [6, 2], 40, 2
    total = sum(n)
    shards = rows(n, columns=d)
    for sent in ranks(cases.vicreg_traffic, shards, ["covariance"] * 2):
        assert sent["out"] == sent["in"] == 0
        assert sent["sums"] == world + 1 + 2 * (2 * d + d * d)  # one strip: no triangle saved
    for rank, sent in enumerate(ranks(cases.vicreg_traffic, shards, ["gram"] * 2)):
        assert sent["sums"] == world + 1 + 2 * (2 * d + total * total)
        share = total * d // world
        assert sent["out"] == 2 * (n[rank] * d + share)
        assert sent["in"] == 2 * (share + n[rank] * d)
        assert sent["in"] < 2 * 2 * total * d  # two gathers of both views


def test_traffic_of_many_strips_is_half_the_square(ranks):
    d = 1024
    (sent, _) = ranks(cases.vicreg_traffic, rows([3, 2], columns=d), ["covariance"] * 2)
    assert sent["sums"] == 2 + 1 + 2 * (2 * d + d * (d + 256) // 2)


# --- targeted variance ----------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [*SIZES, [9, 1], [0, 3, 0]], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_targeted_variance(ranks, sizes, masked):
    shards = rows(sizes)
    masks = [torch.arange(n) % 3 != 2 if masked else None for n in sizes]
    options = {"coefficient": 0.7, "target": 0.3}
    expected, gradient = cases.variance(
        None, torch.cat(shards), torch.cat(masks) if masked else None, options
    )
    results = ranks(cases.variance, shards, masks, [options for _ in shards])
    for (terms, own), whole in zip(results, gradient.split(sizes), strict=True):
        torch.testing.assert_close(terms, expected, **EXACT)
        torch.testing.assert_close(own, whole, **EXACT)


def test_uneven_shards_are_weighed_by_their_rows(ranks):
    # 900 rows of variance 1/4 and 100 of 9: the mean over rows is 1.125, the mean of means 4.625.
    shards = [
        torch.tensor([[0.5, -0.5]]).repeat(900, 1),
        torch.tensor([[3.0, -3.0]]).repeat(100, 1),
    ]
    for terms, _ in ranks(cases.variance, shards, [None, None], [{}, {}]):
        assert terms["variance"].item() == pytest.approx(1.125)
        assert terms["loss"].item() == pytest.approx(0.1 * 0.125**2)


def test_targeted_variance_compiles_whole_with_a_group(ranks):
    shards = rows([3, 2])
    expected, gradient = cases.variance(None, torch.cat(shards), None, {"target": 0.3})
    results = ranks(cases.variance_compiled, shards)
    for (terms, own), whole in zip(results, gradient.split([3, 2]), strict=True):
        torch.testing.assert_close(terms, expected, **EXACT)
        torch.testing.assert_close(own, whole, **EXACT)


# --- the sums themselves --------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
def test_a_sum_that_is_not_terminal_sums_its_gradient_too(ranks, world):
    shards = rows([4] * world)
    weights = [1.0, -2.0, 0.5][:world]
    total = sum(shards)
    results = ranks(cases.sums, shards, weights)
    for (own, gradient, second, batched), weight in zip(results, weights, strict=True):
        # The sum of the ranks' values, sum(weights) * total^3, differentiated once and twice.
        torch.testing.assert_close(own, weight * total.pow(3).sum(), **EXACT)
        torch.testing.assert_close(gradient, sum(weights) * 3 * total.square(), rtol=1e-12, atol=0)
        torch.testing.assert_close(second, sum(weights) * world * 6 * total, rtol=1e-12, atol=0)
        torch.testing.assert_close(batched, total, **EXACT)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_terminal_sum_scales_its_gradient(ranks, scale):
    shards = rows([4, 4])
    total = sum(shards)
    for value, gradient, batched in ranks(cases.terminal_sums, shards, [scale, scale]):
        torch.testing.assert_close(value, total, **EXACT)
        torch.testing.assert_close(gradient, scale * 2 * total, **EXACT)
        torch.testing.assert_close(batched, total, **EXACT)


@pytest.mark.parametrize("sizes", [[11, 5], [4, 0], [0, 7, 3]], ids=str)
def test_rows_are_counted_and_exchanged(ranks, sizes):
    shards = rows(sizes, columns=5)
    whole = torch.cat(shards)
    for counted in ranks(cases.counts, shards):
        assert counted.tolist() == sizes
        assert counted.dtype == torch.int64
    results = ranks(cases.exchange, shards)
    assert torch.equal(torch.cat([columns for columns, _ in results], 1), whole)
    assert torch.equal(torch.cat([back for _, back in results]), whole)
