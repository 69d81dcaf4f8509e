"""Assignments and losses on prototypes over ranks: uneven and empty ones equal one process."""

import prototype_cases as cases
import pytest
import torch

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SIZES = [[5, 0, 11], [3, 1]]


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"over": "patches"}, {"grad_reduction": "sum"}], ids=str)
def test_ibot_with_other_images_on_each_rank(ranks, options):
    masked, images = [5, 0, 11], [3, 2, 4]  # some without a mask; the second rank has none
    rows = sum(masked)
    student, teacher = drawn(rows, 6), drawn(rows, 6, seed=1).softmax(1)
    indices = [torch.tensor([0, 0, 2, 0, 2]), torch.zeros(0).long(), torch.arange(11) % 3]
    before = torch.tensor([0, *images[:-1]]).cumsum(0)
    whole = torch.cat([index + start for index, start in zip(indices, before, strict=True)])
    expected, gradient = cases.ibot(None, student, teacher, whole, sum(images), options)
    shards = [list(x.split(masked)) for x in (student, teacher)]
    results = ranks(cases.ibot, *shards, indices, images, [options] * 3)
    for terms, _ in results:
        torch.testing.assert_close(terms, expected, **EXACT)
    found = torch.cat([own for _, own in results])
    share = 1 if options.get("grad_reduction") == "sum" else 3
    torch.testing.assert_close(found / share, gradient, **EXACT)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_ranks_may_take_different_paths_and_differ_in_grad_mode(ranks, sizes):
    student, teacher = drawn(3, sum(sizes), 6), drawn(2, sum(sizes), 6, seed=1).softmax(2)
    expected, gradient, _ = cases.dino(None, student.clone(), teacher, 2**18, True)
    shards = [list(x.split(sizes, 1)) for x in (student, teacher)]
    small = [0, 2**18, 0][: len(sizes)]
    with_gradients = [True, False, True][: len(sizes)]
    results = ranks(cases.dino, *shards, small, with_gradients)
    for (terms, own, _), whole in zip(results, gradient.split(sizes, 1), strict=True):
        torch.testing.assert_close(terms, expected, **EXACT)
        if own is not None:
            torch.testing.assert_close(own / len(sizes), whole, **EXACT)
    halves = [[x.float() for x in part] for part in shards]
    for _, _, dtype in ranks(cases.dino, *halves, small, with_gradients):
        assert dtype == torch.float32


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_teachers_are_one_processs(ranks, sizes):
    logits, center = drawn(sum(sizes), 6), drawn(6, seed=1)
    probs, moved = cases.teachers(None, center, logits)
    results = ranks(cases.teachers, [center] * len(sizes), list(logits.split(sizes)))
    torch.testing.assert_close(torch.cat([own for own, _ in results]), probs, **EXACT)
    for _, own in results:
        torch.testing.assert_close(own, moved, **EXACT)


def test_what_is_sent_is_what_docstrings_say(ranks):
    logits, teacher, k = drawn(3, 5, 6).float(), drawn(2, 5, 6).softmax(2).float(), 6
    highest, count = ("torch.float32", k, "min"), ("torch.int64", 1, "sum")
    total, of_loss = ("torch.float64", k, "sum"), ("torch.float64", k + 2, "sum")
    two = [(dtype, 2 * elements, how) for dtype, elements, how in (highest, total, total, total)]
    of_sinkhorn, of_dino = [highest, total, total], [count, of_loss]
    of_center = [total, count]
    expected = [*of_sinkhorn, *of_dino, *two, *of_dino, *of_center]
    for found in ranks(cases.sent, [logits] * 2, [teacher] * 2):
        assert found == expected
