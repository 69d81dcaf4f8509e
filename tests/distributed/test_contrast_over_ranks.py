"""Contrastive losses over ranks: learnt scales, local positives, queues, and what is sent."""

import contrast_cases as cases
import pytest
import torch
from rows import rows

UNEVEN = ([5, 0, 11], [4, 3])
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def both(sizes):
    return rows(sizes), rows(sizes, seed=1)


@pytest.mark.parametrize("sizes", UNEVEN, ids=str)
@pytest.mark.parametrize("how", ["mean", "sum"])
@pytest.mark.parametrize("extra", ["symmetric", "hard", "queue"])
def test_a_learnt_scale_and_bias(ranks, extra, sizes, how):
    """Their gradients are shares, which a trainer reduces like those of other parameters."""
    world, (a, b) = len(sizes), both(sizes)
    if extra == "hard":  # two keys for each query, and its own is the second
        b = [torch.cat((2 * x.cos(), x)) for x in b]
        local = [{"positives": torch.arange(n) + n} for n in sizes]
        starts = [2 * sum(sizes[:rank]) for rank in range(world)]
        places = [one["positives"] + start for one, start in zip(local, starts, strict=True)]
        whole = {"positives": torch.cat(places)}
    else:
        queue = {"negatives": rows([6], seed=5)[0]}
        whole = queue if extra == "queue" else {"symmetric": True}
        local = [whole] * world
    expected, gradients = cases.with_scale(None, torch.cat(a), torch.cat(b), whole, how)
    results = ranks(cases.with_scale, a, b, local, [how] * world)
    share = world if how == "mean" else 1
    for terms, _ in results:
        torch.testing.assert_close(terms, expected, **EXACT)
    for name, wanted in gradients.items():
        parts = [found[name] for _, found in results]
        total = torch.cat(parts) if wanted.ndim else sum(parts)
        torch.testing.assert_close(total / share, wanted, **EXACT)
    assert gradients["scale"] != 0
    assert gradients["bias"] == 0


@pytest.mark.parametrize("sizes", UNEVEN, ids=str)
def test_clip_under_ddp(ranks, sizes):
    shards = rows(sizes)
    expected = cases.trained(None, torch.cat(shards))
    for found in ranks(cases.trained, shards):
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("name", ["clip", "decoupled", "inside"])
def test_they_compile_whole_with_a_group(ranks, name):
    shards = rows([3, 0, 4])
    whole = torch.cat(shards).requires_grad_()
    terms = cases.RUNS[name](*cases.pair(whole))
    (gradient,) = torch.autograd.grad(terms.loss, whole)
    results = ranks(cases.compiled, shards, [name] * 3)
    for found, _ in results:
        torch.testing.assert_close(found, cases.values(terms), **EXACT)
    torch.testing.assert_close(torch.cat([g for _, g in results]) / 3, gradient, **EXACT)


def test_ranks_may_differ_in_grad_mode(ranks):
    shards = rows([3, 4])
    whole = torch.cat(shards)
    for found in ranks(cases.with_gradients_on_some, shards):
        for name, terms in found.items():
            expected = cases.values(cases.RUNS[name](*cases.pair(whole)))
            torch.testing.assert_close(terms, expected, **EXACT)


def test_a_rank_may_differentiate_alone(ranks):
    shards = rows([3, 4])
    whole = torch.cat(shards).requires_grad_()
    loss = cases.RUNS["clip"](*cases.pair(whole)).loss
    (gradient,) = torch.autograd.grad(loss, whole)
    found = ranks(cases.gradient_on_one, shards)
    torch.testing.assert_close(found[0] / 2, gradient[:3], **EXACT)


def test_second_derivatives_are_refused(ranks):
    for said in ranks(cases.second_derivatives, rows([3, 4])):
        assert all("no second derivative" in text for text in said.values()), said


def test_too_few_over_all_ranks_are_refused_on_each(ranks):
    needed = "needs at least {} embeddings over all ranks, got {}"
    one = ["decoupled_contrastive_loss " + needed.format(4, 2)]
    assert (
        ranks(cases.refusal, rows([1, 0, 0]))
        == [[*one, "supervised_contrastive_loss " + needed.format(2, 1)]] * 3
    )
    none = [
        "decoupled_contrastive_loss " + needed.format(4, 0),
        "nt_xent_loss " + needed.format(2, 0),
        "supervised_contrastive_loss " + needed.format(2, 0),
    ]
    assert ranks(cases.refusal, rows([0, 0])) == [none] * 2


@pytest.mark.parametrize("name", cases.RUNS)
def test_traffic_is_what_the_docstrings_say(ranks, name):
    sizes, d, world = [5, 0, 11], 4, 3
    N = sum(sizes)
    views = 2 if name in ("nt_xent", "decoupled") else 1
    sums = {
        "clip": [world, N, 2 * N, 5, 2],  # counts, maxima, sums and positives; terms; alignment
        "one way": [world, 4, 2],
        "queue": [4, 2],
        "nt_xent": [world, 4],
        "decoupled": [1, 2, world, 4],
        "outside": [world, 4],
        "inside": [world, 4],
    }[name]
    for n, sent in zip(sizes, ranks(cases.traffic, rows(sizes), [name] * world), strict=True):
        assert sent["sums"] == sums
        if name == "queue":
            assert sent["in"] == sent["out"] == []
            continue
        labels = name in ("outside", "inside")
        # Rows to each rank and from each, then labels, then the gradients of all of them.
        assert sent["out"] == [views * world * n * d, *[world * n] * labels, views * N * d]
        assert sent["in"] == [views * N * d, *[N] * labels, views * world * n * d]
