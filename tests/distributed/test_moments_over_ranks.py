"""Barlow Twins, MMCR and VICReg of many views over uneven ranks, on every path."""

import moment_cases as cases
import pytest
import torch
from rows import rows

SIZES = ([11, 5], [5, 0, 11])
EXACT = {"rtol": 1e-12, "atol": 1e-12}
# Columns: fewer than rows, and so many that Gram matrices of the 16 rows are smaller.
CALLS = [
    ("barlow", 5, {}),
    ("barlow", 40, {}),
    ("barlow", 40, {"correction": 1, "eps_added_to": "deviation", "off_weight": 0.5}),
    ("mmcr", 5, {"local_weight": 0.3}),
    ("mmcr", 40, {"local_weight": 0.3}),
    ("multi_view", 40, {"num_global": 2, "gamma": 3.0}),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("how", ["mean", "sum"])
@pytest.mark.parametrize(("name", "columns", "options"), CALLS, ids=str)
def test_one_process(ranks, name, columns, options, how, sizes):
    shards, world = rows(sizes, columns=columns), len(sizes)
    expected, gradient = cases.terms_and_gradient(None, name, torch.cat(shards), options)
    given = [{**options, "grad_reduction": how}] * world
    results = ranks(cases.terms_and_gradient, [name] * world, shards, given)
    for terms, _ in results:
        torch.testing.assert_close(terms, expected, **EXACT)
    combined = torch.cat([own for _, own in results]) / (world if how == "mean" else 1)
    scale = max(gradient.abs().max().item(), 1)
    torch.testing.assert_close(combined, gradient, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize(("name", "columns", "options"), CALLS, ids=str)
def test_ranks_may_differ_in_grad_mode(ranks, name, columns, options):
    shards = rows([11, 5], columns=columns)
    expected, _ = cases.terms_and_gradient(None, name, torch.cat(shards), options)
    given = [name] * 2, shards, [options] * 2
    for terms in ranks(cases.without_gradients_on_one_rank, *given):
        torch.testing.assert_close(terms, expected, **EXACT)


@pytest.mark.parametrize(("name", "columns", "options"), CALLS, ids=str)
def test_second_derivatives_are_refused(ranks, name, columns, options):
    shards = rows([6, 5], columns=columns)
    for said in ranks(cases.second_derivative, [name] * 2, shards, [options] * 2):
        assert "no second derivative" in said


def test_fewer_than_two_rows_are_refused_on_every_rank(ranks):
    message = "barlow_twins_loss needs at least 2 rows over all ranks, got 1"
    assert ranks(cases.refusal, rows([1, 0])) == [message] * 2


def test_traffic_is_what_the_docstrings_say(ranks):
    n, world = [6, 2], 2

    def sent(name, d, options):
        shards = rows(n, columns=d)
        return ranks(cases.traffic, [name] * world, shards, [options] * world)

    d, total = 10, sum(n)
    for own in sent("barlow", d, {}):
        assert own == {"sums": world + 7 * d + d * d, "out": 0}
    d = 40
    for rank, own in enumerate(sent("barlow", d, {})):
        assert own["sums"] == world + 7 * d + 2 * total**2  # one strip: no triangle saved
        assert own["out"] == 2 * 2 * (n[rank] * d + total * d // world) // 2
    for own in sent("mmcr", d, {"local_weight": 0.1}):
        assert own == {"sums": world + d * d + 1, "out": 0}
