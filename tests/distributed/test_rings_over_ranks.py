"""Losses whose rows go around a ring: uneven and empty ranks are one process."""

import pytest
import sigmoid_cases
import torch
from rows import rows

from termwise.joint_embedding import gram_anchor_loss, koleo_loss, sigmoid_contrastive_loss

SIZES = ([5, 0, 11], [4, 7], [0, 0, 3], [2, 1, 1])
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("how", ["mean", "sum"])
def test_a_learnt_scale_and_bias(ranks, sizes, how):
    shards, world = rows(sizes), len(sizes)
    expected, gradients = sigmoid_cases.sigmoid(None, torch.cat(shards), {})
    options = [{"grad_reduction": how} for _ in shards]
    results = ranks(sigmoid_cases.sigmoid, shards, options)
    for terms, _ in results:
        torch.testing.assert_close(terms, expected, **EXACT)
    divisor = world if how == "mean" else 1
    for name, whole in gradients.items():
        total = sum(found[name] for _, found in results) / divisor
        torch.testing.assert_close(total, whole, **EXACT)


def test_it_compiles_whole_with_a_group(ranks):
    shards = rows([5, 3])
    expected, gradients = sigmoid_cases.sigmoid(None, torch.cat(shards), {})
    results = ranks(sigmoid_cases.sigmoid, shards, [{"compiled": True}] * 2)
    for terms, _ in results:
        torch.testing.assert_close(terms, expected, **EXACT)
    for name, whole in gradients.items():
        mean = sum(found[name] for _, found in results) / 2
        torch.testing.assert_close(mean, whole, **EXACT)


@pytest.mark.parametrize("sizes", [[5, 0, 11], [6, 2], [3, 4, 1]], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 2}, {"group_size": 4, "top_k": 3}, {"group_size": 8}], ids=str
)
def test_koleo(ranks, sizes, options):
    shards = rows(sizes)
    expected, gradient = sigmoid_cases.koleo(None, torch.cat(shards), options)
    results = ranks(sigmoid_cases.koleo, shards, [options for _ in shards])
    for (terms, own), whole in zip(results, gradient.split(sizes), strict=True):
        torch.testing.assert_close(terms, expected, **EXACT)
        torch.testing.assert_close(own / len(sizes), whole, **EXACT)


@pytest.mark.parametrize("sizes", [[5, 0, 11], [4, 3]], ids=str)
@pytest.mark.parametrize("level", ["image", "batch"])
@pytest.mark.parametrize("negatives", ["both", "teacher", "keep"])
@pytest.mark.parametrize("dim", [2, 30])  # by products of features, and of patches
def test_gram_anchor(ranks, sizes, level, negatives, dim):
    shards = [x.unflatten(1, (4, dim)) for x in rows(sizes, columns=4 * dim)]
    teachers = [x.unflatten(1, (4, dim + 1)) for x in rows(sizes, columns=4 * dim + 4, seed=1)]
    options = {"level": level, "negatives": negatives}
    whole = torch.cat(shards), torch.cat(teachers)
    expected, gradient = sigmoid_cases.gram_anchor(None, *whole, options)
    results = ranks(sigmoid_cases.gram_anchor, shards, teachers, [options for _ in shards])
    for (terms, own), part in zip(results, gradient.split(sizes), strict=True):
        torch.testing.assert_close(terms, expected, **EXACT)
        torch.testing.assert_close(own / len(sizes), part, **EXACT)


def test_ranks_may_differ_in_grad_mode(ranks):
    shards = rows([4, 3])
    x = torch.cat(shards)
    maps = x.unsqueeze(1).expand(-1, 3, -1)
    expected = (
        sigmoid_contrastive_loss(x, x.flip(1), scale=2.0, bias=0.0),
        koleo_loss(x),
        gram_anchor_loss(maps, maps.flip(2), level="batch"),
    )
    for found in ranks(sigmoid_cases.without_gradients_on_one_rank, shards):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, dict(theirs.items()), **EXACT)


def test_too_little_over_all_ranks_is_refused_on_each(ranks):
    for said in ranks(sigmoid_cases.refusals, [None] * 2):
        assert said == [
            "sigmoid_contrastive_loss needs at least 1 row over all ranks, got 0",
            "koleo_loss needs more samples than top_k=1, got 1",
            "koleo_loss needs a number of samples that group_size divides, got 4 samples and 3",
            "gram_anchor_loss needs at least 1 image over all ranks, got 0",
        ]


def test_second_derivatives_are_refused(ranks):
    for said in ranks(sigmoid_cases.second_derivatives, rows([3, 2])):
        assert len(said) == 3
        assert all("has no second derivative" in one for one in said)


@pytest.mark.parametrize("which", ["sigmoid", "koleo", "batch", "image"])
def test_traffic_is_what_the_docstring_says(ranks, which):
    sizes, d = [5, 2, 4], 6
    total, world = sum(sizes), len(sizes)
    found = ranks(sigmoid_cases.traffic, rows(sizes, columns=d), [which] * world)
    for rank, sent in enumerate(found):
        assert sent["sums"] == world + 3
        own, last = sizes[rank], sizes[(rank + 1) % world]  # last of what visits
        if which == "sigmoid":
            assert sent["in"] == sent["out"] == 2 * total * d
            assert sent["messages"] == world
        elif which == "koleo":
            assert sent["in"] == (2 * total - own) * d
            assert sent["out"] == (2 * total - last) * d
            assert sent["messages"] == 2 * world - 1
        elif which == "batch":
            assert sent["in"] == (total - own) * 2 * d
            assert sent["out"] == (total - last) * 2 * d
            assert sent["messages"] == world - 1
        else:
            assert sent["messages"] == 0
