"""Losses over logits whose samples, columns or positions are on different ranks."""

import lm_cases
import pytest
import torch
from distill_cases import SAMPLES, TIMES, TOKENS, Place, part

from termwise.lm import VocabProjection, vocab_partition

EXACT = {"rtol": 1e-12, "atol": 1e-12}
AXES = {"batch_group": 0, "sequence_group": 1, "vocab_group": 2}
SIZES = ([3, 2], [1, 3, 2], [5, 0])


def whole(axis, total):
    """Logits of two models, tokens and a mask, with `total` along the axis that is sharded."""
    generator = torch.Generator().manual_seed(axis)
    shape = [3, 6, 7]
    shape[axis] = total
    logits = [torch.randn(shape, generator=generator, dtype=torch.float64) * 2 for _ in range(2)]
    tokens = torch.randint(-1, shape[2], shape[:2], generator=generator)
    mask = torch.rand(shape[:2], generator=generator) < 0.8
    return *logits, tokens, mask


def shared(x, sizes, axis):
    """Cut x along an axis, or give all of it to each rank where it has no such axis."""
    if axis >= x.ndim:
        return [x.clone() for _ in sizes]
    return [part.clone() for part in x.split(sizes, axis)]


def assert_is_one_process(results, expected, gradient, sizes, axis):
    parts = gradient.split(sizes, axis)
    factor = len(sizes) if axis == 0 else 1  # what averaging over batch_group divides out
    for (terms, own), expected_part in zip(results, parts, strict=True):
        torch.testing.assert_close(terms, expected, **EXACT)
        torch.testing.assert_close(own, factor * expected_part, **EXACT)


@pytest.mark.parametrize("sharded", AXES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_next_token(ranks, sharded, sizes):
    axis = AXES[sharded]
    logits, _, tokens, mask = whole(axis, sum(sizes))
    expected, gradient = lm_cases.next_token(None, sharded, logits.clone(), tokens, mask)
    arguments = [shared(x, sizes, axis) for x in (logits, tokens, mask)]
    results = ranks(lm_cases.next_token, [sharded] * len(sizes), *arguments)
    assert_is_one_process(results, expected, gradient, sizes, axis)


@pytest.mark.parametrize("sharded", AXES)
@pytest.mark.parametrize(
    ("sizes", "divergence"),
    list(zip(SIZES, ["forward", "reverse", "jensen_shannon"], strict=True)),
)
def test_distillation(ranks, divergence, sharded, sizes):
    axis, world = AXES[sharded], len(sizes)
    options = {"divergence": divergence, "beta": 0.3, "temperature": 1.5}
    logits, teacher, _, mask = whole(axis, sum(sizes))
    expected, gradient = lm_cases.distillation(
        None, sharded, logits.clone(), teacher, mask, options
    )
    arguments = [shared(x, sizes, axis) for x in (logits, teacher, mask)]
    results = ranks(lm_cases.distillation, [sharded] * world, *arguments, [options] * world)
    assert_is_one_process(results, expected, gradient, sizes, axis)


def chunked(axis, total):
    """Logits of two vocabularies and an alignment, with `total` along the axis that is sharded."""
    generator = torch.Generator().manual_seed(10 + axis)
    student, teacher = [3, 6, 7], [3, 6, 5]
    student[axis] = total
    if axis < 2:  # each rank has all of the teacher's vocabulary
        teacher[axis] = total
    logits = [
        torch.randn(shape, generator=generator, dtype=torch.float64) * 2
        for shape in (student, teacher)
    ]
    ids = [torch.randint(-1, 3, x.shape[:2], generator=generator).sort(1).values for x in logits]
    valid = torch.rand((student[0], 3), generator=generator) < 0.8
    return *logits, *ids, valid, valid.clone()


def chunked_parts(arguments, sizes, axis):
    """Cut what a rank holds a part of: the chunks themselves are whole where positions are cut."""
    logits, teacher, student_id, teacher_id, valid, exact = arguments
    whole_on_each = [shared(x, sizes, 0 if axis == 0 else 9) for x in (valid, exact)]
    teacher = shared(teacher, sizes, axis if axis < 2 else 9)
    ids = [shared(x, sizes, axis) for x in (student_id, teacher_id)]
    return [shared(logits, sizes, axis), teacher, *ids, *whole_on_each]


@pytest.mark.parametrize("sharded", AXES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_universal_logit(ranks, sharded, sizes):
    axis, world = AXES[sharded], len(sizes)
    arguments = chunked(axis, sum(sizes))
    vocab = sum(sizes) if axis == 2 else None
    first = [x.clone() for x in arguments]
    expected, gradient = lm_cases.universal_logit(None, sharded, *first, vocab)
    assert expected["num_chunks"] > 2
    parts = chunked_parts(arguments, sizes, axis)
    results = ranks(lm_cases.universal_logit, [sharded] * world, *parts, [vocab] * world)
    assert_is_one_process(results, expected, gradient, sizes, axis)


@pytest.mark.parametrize("sharded", AXES)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [([1, 3, 2], {"score": "entropy"}), ([5, 0], {"combine": "select"})],
    ids=str,
)
def test_cross_tokenizer(ranks, sharded, sizes, options):
    axis, world = AXES[sharded], len(sizes)
    options = {**options, "scale": "match", "temperature": 1.5}
    logits, same, tokens, mask = whole(axis, sum(sizes))
    tokens = tokens.where(mask, -1)
    chunks = chunked(axis, sum(sizes))
    teacher, vocab = chunks[1], logits.shape[2]
    generator = torch.Generator().manual_seed(8)
    teacher_tokens = torch.randint(-1, 5, teacher.shape[:2], generator=generator)
    pairs = {(token, token % 5): 1.0 for token in range(vocab)}
    projection = VocabProjection.from_pairs(pairs, student_vocab=vocab, teacher_vocab=5)
    partition = vocab_partition(projection, rule="strict")
    given = projection, partition, vocab if axis == 2 else None
    expected, gradient = lm_cases.cross_tokenizer(
        None,
        sharded,
        logits.clone(),
        tokens,
        same,
        teacher,
        teacher_tokens,
        chunks[2:],
        given,
        options,
    )
    cut = chunked_parts(chunks, sizes, axis)
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    shards = [
        (projection.rows(*ends[rank : rank + 2]) if axis == 2 else projection, *given[1:])
        for rank in range(world)
    ]
    results = ranks(
        lm_cases.cross_tokenizer,
        [sharded] * world,
        *[shared(x, sizes, axis) for x in (logits, tokens, same)],
        cut[1],
        shared(teacher_tokens, sizes, axis),
        list(zip(*cut[2:], strict=True)),
        shards,
        [options] * world,
    )
    assert_is_one_process(results, expected, gradient, sizes, axis)


@pytest.mark.parametrize("score", [None, "cross_entropy", "entropy", "max_prob"])
@pytest.mark.parametrize("how", ["mean", "sum"])
def test_every_teacher_over_all_three_axes_at_once(eight_ranks, score, how):
    options = {"score": score, "grad_reduction": how}
    expected, gradient = lm_cases.every_teacher(Place(), {}, options)
    assert expected["num_tokens"] > 4
    results = eight_ranks(lm_cases.every_teacher_at_once, [options] * 8)
    for rank, (terms, own) in enumerate(results):
        place = Place(*[int(bit) for bit in f"{rank:03b}"])
        whole = gradient[part(SAMPLES, place.batch), part(TIMES["student"], place.sequence)]
        torch.testing.assert_close(terms, expected, **EXACT)
        scale = 2 if how == "mean" else 1
        torch.testing.assert_close(own, scale * whole[..., part(TOKENS, place.vocab)], **EXACT)


def test_no_token_on_any_rank_is_no_loss(ranks):
    logits, _, tokens, mask = whole(0, 5)
    arguments = [shared(x, [3, 2], 0) for x in (logits, tokens, torch.zeros_like(mask))]
    for terms, gradient in ranks(lm_cases.next_token, ["batch_group"] * 2, *arguments):
        assert terms["loss"] == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_second_derivatives_over_shards_are_refused_by_name(ranks):
    logits, teacher, _, _ = whole(2, 5)
    arguments = [shared(x, [3, 2], 2) for x in (logits, teacher)]
    for said in ranks(lm_cases.distillation_second_derivative, *arguments):
        assert "a loss over a process group has no second derivative" in said


@pytest.mark.parametrize("sharded", AXES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_losses_of_a_linear_head(ranks, sharded, sizes):
    axis, world = AXES[sharded], len(sizes)
    logits, _, tokens, mask = whole(axis, sum(sizes))
    generator = torch.Generator().manual_seed(5)
    batch, time, vocab = logits.shape
    hidden, weight, bias, other, other_weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((batch, time, 3), (vocab, 3), (vocab,), (batch, time, 2), (vocab, 2))
    )
    given = hidden, weight, bias, other, other_weight, tokens, mask
    expected, gradients = lm_cases.linear(None, sharded, *given)
    of_vocab = (1, 2, 4)
    cuts = [
        (0 if i in of_vocab else 9) if axis == 2 else (9 if i in of_vocab else axis)
        for i in range(7)
    ]
    parts = [shared(x, sizes, cut) for x, cut in zip(given, cuts, strict=True)]
    results = ranks(lm_cases.linear, [sharded] * world, *parts)
    factor = world if axis == 0 else 1  # what averaging over batch_group divides out
    for place, (gradient, cut) in enumerate(zip(gradients, cuts[:3], strict=True)):
        own = [found[1][place] for found in results]
        if cut == 9 and axis < 2:  # a share of the weight's, to be summed
            torch.testing.assert_close(sum(own), factor * gradient, **EXACT)
            continue
        for one, like in zip(own, shared(gradient, sizes, cut), strict=True):
            torch.testing.assert_close(one, factor * like, **EXACT)
    for terms, _ in results:
        torch.testing.assert_close(terms, expected, **EXACT)
