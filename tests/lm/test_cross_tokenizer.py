"""Teachers beside cross-entropy: weights, scales, scores, averages and choices."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import termwise as tw
from termwise.lm import (
    Alignment,
    CrossTokenizerLoss,
    Teacher,
    VocabProjection,
    count_valid_chunks,
    cross_tokenizer_loss,
    distillation_loss,
    next_token_loss,
    partitioned_loss,
    projected_kl_loss,
    universal_logit_loss,
    vocab_partition,
)

generator = torch.Generator().manual_seed(0)
STUDENT = 2 * torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
TOKENS = torch.tensor([[0, 4, 2, -1, 1, 3], [1, 1, 0, 2, -100, -100]])
SAME = 2 * torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
OTHER = 2 * torch.randn(2, 4, 9, generator=generator, dtype=torch.float64)
OTHER_TOKENS = torch.tensor([[3, 8, 0, 1], [5, 5, -1, -1]])
VALID = torch.tensor([[True, True, False], [True, False, False]])
ALIGNMENT = Alignment(
    torch.tensor([[-1, 0, 0, 1, 1, 2], [0, 0, 0, 1, -1, -1]]),
    torch.tensor([[-1, 0, 1, 1], [-1, 0, 1, -1]]),
    VALID,
    torch.tensor([[True, False, False], [True, False, False]]),
)
PROJECTION = VocabProjection.from_pairs(
    {(0, 0): 1.0, (1, 1): 0.6, (1, 2): 0.4, (2, 5): 1.0, (3, 7): 1.0, (4, 8): 0.5},
    student_vocab=5,
    teacher_vocab=9,
)
PARTITION = vocab_partition(PROJECTION, rule="relaxed")
KINDS = {
    "same": Teacher(SAME),
    "projection": Teacher(OTHER, ALIGNMENT, PROJECTION, tokens=OTHER_TOKENS),
    "partition": Teacher(OTHER, ALIGNMENT, partition=PARTITION, tokens=OTHER_TOKENS),
    "universal": Teacher(OTHER, ALIGNMENT, tokens=OTHER_TOKENS),
}


def student():
    return STUDENT.clone().requires_grad_()


def alone(kind, x, sample_mask=None, counts=TOKENS >= 0, **options):
    """The divergence of one teacher, by its own loss."""
    reverse = options.get("divergence", "forward")
    common = {"temperature": options.get("temperature", 1.0)}
    if kind == "same":
        if sample_mask is not None:
            counts = counts & sample_mask[:, None]
        few = options.get("teacher_top_k")
        return distillation_loss(
            x, SAME, mask=counts, divergence=reverse, teacher_top_k=few, **common
        ).loss
    common |= {"alignment": ALIGNMENT, "exact_only": options.get("exact_only", False)}
    common |= {"sample_mask": sample_mask, "mask": counts}
    if kind == "universal":
        return universal_logit_loss(x, OTHER, **common).loss
    if kind == "partition":
        tail = options.get("tail_top_k", 8192)
        return partitioned_loss(
            x, OTHER, partition=PARTITION, tail_top_k=tail, divergence=reverse, **common
        ).loss
    common |= {"teacher_mean": options.get("teacher_mean", "log_normalized")}
    few = options.get("columns_top_k")
    return projected_kl_loss(
        x, OTHER, projection=PROJECTION, divergence=reverse, columns_top_k=few, **common
    ).loss


def assert_same(ours, theirs, x):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    gradients = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0, "divergence": "reverse", "teacher_mean": "prob"},
        {"divergence": "reverse", "teacher_top_k": 3, "columns_top_k": 2},
        {"exact_only": True, "tail_top_k": 1, "sample_mask": torch.tensor([True, False])},
    ],
    ids=["defaults", "reverse", "few", "exact"],
)
def test_a_teacher_is_compared_by_what_it_holds(kind, options):
    x = student()
    terms = cross_tokenizer_loss(x, TOKENS, KINDS[kind], kd_weight=0.7, ce_weight=0.2, **options)
    kd = alone(kind, x, **options)
    tokens = TOKENS.clone()
    if "sample_mask" in options:
        tokens[1] = -1
    ce = next_token_loss(x, tokens)
    assert_same(terms.kd, kd, x)
    assert_same(terms.cross_entropy, ce.loss, x)
    assert_same(terms.loss, 0.7 * kd + 0.2 * ce.loss, x)
    torch.testing.assert_close(terms.teacher_kd, kd[None])
    assert terms.teacher_weight.tolist() == [1]
    assert terms.num_tokens == ce.num_tokens
    assert terms.accuracy == ce.accuracy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["mask", "labels"])
def test_a_prompt_trains_nothing_whatever_the_teacher_has(kind, by):
    x, completion = student(), torch.zeros(2, 6, dtype=torch.bool)
    completion[0, 1:4] = True  # all of chunk 0, and one of the two tokens of chunk 1
    if by == "mask":
        terms = cross_tokenizer_loss(x, TOKENS, KINDS[kind], mask=completion)
    else:
        terms = cross_tokenizer_loss(x, TOKENS.where(completion, -100), KINDS[kind])
    assert_same(terms.kd, alone(kind, x, counts=completion & (TOKENS >= 0)), x)
    (gradient,) = torch.autograd.grad(terms.loss, x)
    trained = gradient.abs().sum(2) > 0
    assert trained.tolist() == [[True, True, False, False, False, False], [False] * 6]


@given(
    weights=st.lists(st.floats(-2, 2), min_size=4, max_size=4),
    kd_weight=st.floats(0, 3),
    ce_weight=st.floats(0, 3),
    match=st.booleans(),
    log_vocab=st.booleans(),
)
def test_teachers_and_the_text_are_summed(weights, kd_weight, ce_weight, match, log_vocab):
    x = student()
    teachers = [
        Teacher(t.logits, t.alignment, t.projection, t.partition, weight=weight)
        for t, weight in zip(KINDS.values(), weights, strict=True)
    ]
    options = {"scale": "match" if match else "fixed", "log_vocab": log_vocab}
    terms = cross_tokenizer_loss(
        x, TOKENS, teachers, kd_weight=kd_weight, ce_weight=ce_weight, **options
    )
    factor = math.log(9) / math.log(5) if log_vocab else 1
    kd = sum(
        weight * (1 if kind == "same" else factor) * alone(kind, x)
        for kind, weight in zip(KINDS, weights, strict=True)
    )
    ce = next_token_loss(x, TOKENS).loss
    size = 1.0
    if match and kd.detach() != 0:
        size = abs(float(ce.detach())) / abs(float(kd.detach()))
    torch.testing.assert_close(terms.kd, kd, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(
        terms.loss, kd_weight * size * kd + ce_weight * ce, rtol=1e-9, atol=0
    )
    torch.testing.assert_close(
        terms.loss, kd_weight * terms.kd_scale * terms.kd + ce_weight * terms.cross_entropy
    )
    torch.testing.assert_close(terms.kd, (terms.teacher_weight * terms.teacher_kd).sum())
    ours, theirs = (
        torch.autograd.grad(value, x, retain_graph=True)[0]
        for value in (terms.loss, kd_weight * size * kd + ce_weight * ce)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_matched_terms_are_of_one_size_and_the_scale_has_no_gradient():
    x = student()
    terms = cross_tokenizer_loss(x, TOKENS, KINDS["projection"], scale="match")
    torch.testing.assert_close(terms.loss, 2 * terms.cross_entropy)
    assert not terms.kd_scale.requires_grad
    assert_same(terms.loss, terms.kd_scale * terms.kd + terms.cross_entropy, x)


def test_a_divergence_of_nothing_is_not_scaled():
    x = student()
    terms = cross_tokenizer_loss(x, TOKENS, Teacher(x), scale="match")
    assert terms.kd_scale == 1
    torch.testing.assert_close(terms.loss, terms.cross_entropy)


def score_of(logits, tokens, score):
    """Average over the positions that predict a token that counts, one by one."""
    values = []
    for b in range(tokens.shape[0]):
        for t in range(tokens.shape[1] - 1):
            token = int(tokens[b, t + 1])
            if token < 0:
                continue
            p = (logits[b, t].exp() / logits[b, t].exp().sum()).tolist()
            values.append(
                {
                    "cross_entropy": math.log(p[token]),
                    "entropy": sum(v * math.log(v) for v in p if v),
                    "max_prob": max(p),
                }[score]
            )
    return sum(values) / len(values)


@pytest.mark.parametrize("score", ["cross_entropy", "entropy", "max_prob"])
@pytest.mark.parametrize("log_vocab", [False, True])
def test_scores_are_softmaxed_into_weights(score, log_vocab):
    x = student()
    teachers = [KINDS["projection"], KINDS["same"], KINDS["universal"]]
    terms = cross_tokenizer_loss(
        x, TOKENS, teachers, score=score, score_scale=1.7, log_vocab=log_vocab
    )
    ratio = math.log(9) / math.log(5) if log_vocab else 1
    other = ratio * score_of(OTHER, OTHER_TOKENS, score)
    scores = torch.tensor([other, score_of(SAME, TOKENS, score), other], dtype=torch.float64)
    weights = (1.7 * scores).softmax(0) * torch.tensor([ratio, 1, ratio], dtype=torch.float64)
    torch.testing.assert_close(terms.teacher_weight, weights, rtol=1e-11, atol=1e-12)
    kd = sum(
        weight * alone(kind, x)
        for kind, weight in zip(["projection", "same", "universal"], weights, strict=True)
    )
    assert_same(terms.kd, kd, x)


def test_a_teacher_of_whom_no_token_counts_is_not_trusted():
    silent = Teacher(OTHER, ALIGNMENT, PROJECTION, tokens=torch.full_like(OTHER_TOKENS, -1))
    for options in ({"score": "max_prob"}, {"score": "cross_entropy"}, {"combine": "select"}):
        terms = cross_tokenizer_loss(STUDENT, TOKENS, [silent, KINDS["same"]], **options)
        assert terms.teacher_weight.tolist() == [0, 1]
        terms = cross_tokenizer_loss(STUDENT, torch.full_like(TOKENS, -1), [silent] * 2, **options)
        assert terms.kd.isfinite()


def test_averaged_logits_are_one_teacher():
    x = student()
    second = SAME.flip(1)
    teachers = [Teacher(SAME, weight=3), Teacher(second), Teacher(SAME * torch.nan, weight=0)]
    terms = cross_tokenizer_loss(x, TOKENS, teachers, combine="average_logits", temperature=2.0)
    average = 0.75 * SAME + 0.25 * second
    theirs = distillation_loss(x, average, mask=TOKENS >= 0, temperature=2.0)
    assert_same(terms.kd, theirs.loss, x)
    assert terms.teacher_weight.tolist() == [0.75, 0.25, 0]
    assert terms.teacher_kd.shape == (1,)


def test_averages_of_half_precision_are_rounded_once():
    halves = [SAME.bfloat16(), SAME.flip(1).bfloat16()]
    terms = cross_tokenizer_loss(
        STUDENT.float(), TOKENS, [Teacher(x) for x in halves], combine="average_logits"
    )
    # Of rows less their highest logit, so that a common offset costs no digits.
    centred = [(x - x.amax(-1, keepdim=True)).float() for x in map(torch.Tensor.float, halves)]
    average = ((centred[0] + centred[1]) / 2).bfloat16()
    theirs = distillation_loss(STUDENT.float(), average, mask=TOKENS >= 0)
    torch.testing.assert_close(terms.kd, theirs.loss)


def test_the_teacher_of_the_lowest_cross_entropy_is_selected():
    x = student()
    good = SAME.clone()
    good[:, :-1].scatter_(2, TOKENS[:, 1:, None].clamp_min(0), 9.0)
    kinds = [KINDS["partition"], Teacher(good), KINDS["same"]]
    terms = cross_tokenizer_loss(x, TOKENS, kinds, combine="select")
    assert terms.teacher_weight.tolist() == [0, 1, 0]
    assert_same(terms.kd, distillation_loss(x, good, mask=TOKENS >= 0).loss, x)
    worse = [
        score_of(OTHER, OTHER_TOKENS, "cross_entropy"),
        score_of(SAME, TOKENS, "cross_entropy"),
    ]
    terms = cross_tokenizer_loss(x, TOKENS, [kinds[0], kinds[2]], combine="select")
    assert terms.teacher_weight.argmax() == worse.index(max(worse))


def test_an_infinite_divergence_that_is_not_chosen_does_not_show():
    x = student()
    impossible = SAME.clone()
    impossible[..., 1] = -math.inf
    good = SAME.clone()
    good[:, :-1].scatter_(2, TOKENS[:, 1:, None].clamp_min(0), 9.0)
    terms = cross_tokenizer_loss(
        x, TOKENS, [Teacher(impossible), Teacher(good)], combine="select", divergence="reverse"
    )
    assert terms.teacher_kd.isinf().tolist() == [True, False]
    assert_same(
        terms.kd, distillation_loss(x, good, mask=TOKENS >= 0, divergence="reverse").loss, x
    )


def test_what_has_weight_0_is_left_out_of_value_and_gradient():
    x = student()
    impossible = SAME.clone()
    impossible[..., 1] = -math.inf
    options = {"divergence": "reverse", "temperature": 2.0}
    ce, kd = next_token_loss(x, TOKENS).loss, alone("same", x, **options)

    def terms(*teachers, **numbers):
        return cross_tokenizer_loss(x, TOKENS, teachers, **options, **numbers)

    none = terms(Teacher(impossible), kd_weight=0)
    assert none.kd.isinf()
    assert_same(none.loss, ce, x)
    assert_same(terms(Teacher(impossible, weight=0), Teacher(SAME)).loss, ce + kd, x)
    assert_same(terms(Teacher(impossible, weight=0)).loss, ce, x)
    nothing = terms(Teacher(impossible), kd_weight=0, ce_weight=0)
    assert_same(nothing.loss, 0 * ce, x)
    # Of whom no token counts, so that a score leaves it no weight.
    silent = Teacher(OTHER, ALIGNMENT, PROJECTION, tokens=torch.full_like(OTHER_TOKENS, -1))
    silent = Teacher(OTHER * torch.inf, *(silent.alignment, silent.projection), None, silent.tokens)
    assert_same(terms(silent, Teacher(SAME), score="max_prob").loss, ce + kd, x)
    sure = STUDENT.clone()
    sure[:, :, 0] = -math.inf
    sure[:, :-1] = sure[:, :-1].masked_fill(TOKENS[:, 1:, None] == 0, 1.0)
    unlearnt = cross_tokenizer_loss(sure.requires_grad_(), TOKENS, Teacher(SAME), ce_weight=0)
    torch.testing.assert_close(unlearnt.loss, unlearnt.kd)


def test_what_does_not_count_may_hold_anything():
    x, same, other = STUDENT.clone(), SAME.clone(), OTHER.clone()
    for y in (x, same, other):
        y[:, -1] = torch.nan
        y[1] = torch.inf
    x.requires_grad_()
    clean = student()
    options = {"sample_mask": torch.tensor([True, False]), "score": "entropy", "scale": "match"}
    ours, theirs = (
        cross_tokenizer_loss(
            a,
            TOKENS,
            [Teacher(b), Teacher(c, ALIGNMENT, PROJECTION, tokens=OTHER_TOKENS)],
            **options,
        )
        for a, b, c in ((x, same, other), (clean, SAME, OTHER))
    )
    torch.testing.assert_close(ours.loss, theirs.loss)
    gradients = [torch.autograd.grad(ours.loss, x)[0], torch.autograd.grad(theirs.loss, clean)[0]]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "options", [{}, {"scale": "match"}, {"score": "max_prob"}, {"combine": "select"}], ids=str
)
def test_nothing_that_counts_is_no_loss_and_in_the_graph(options):
    x = student()
    terms = cross_tokenizer_loss(
        x, TOKENS, list(KINDS.values()), sample_mask=torch.zeros(2, dtype=torch.bool), **options
    )
    assert terms.loss == 0
    (gradient,) = torch.autograd.grad(terms.loss, x)
    assert torch.equal(gradient, torch.zeros_like(x))


def test_micro_batches_of_given_normalizers_add_up():
    x = student()
    chunks = count_valid_chunks(ALIGNMENT, mask=TOKENS >= 0)
    count = next_token_loss(x, TOKENS).num_tokens
    whole = cross_tokenizer_loss(x, TOKENS, list(KINDS.values()))
    teachers = [
        Teacher(t.logits, t.alignment, t.projection, t.partition, normalizer=chunks)
        for t in KINDS.values()
    ]
    parts = [
        cross_tokenizer_loss(x, TOKENS, teachers, sample_mask=mask, normalizer=count).loss
        for mask in torch.eye(2, dtype=torch.bool)
    ]
    torch.testing.assert_close(sum(parts), whole.loss)


def test_compiled_an_infinite_divergence_that_is_not_chosen_does_not_show():
    x = student()
    impossible = SAME.clone()
    impossible[..., 1] = -math.inf
    good = SAME.clone()
    good[:, :-1].scatter_(2, TOKENS[:, 1:, None].clamp_min(0), 9.0)

    def function(x):
        teachers = [Teacher(impossible), Teacher(good)]
        options = {"combine": "select", "scale": "match", "divergence": "reverse"}
        return cross_tokenizer_loss(x, TOKENS, teachers, **options)

    ours = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    assert ours.teacher_kd.isinf().tolist() == [True, False]
    assert ours.loss.isfinite()
    assert_same(ours.loss, function(x).loss, x)


def test_it_maps_over_students():
    several = torch.stack([STUDENT, STUDENT.flip(1)])
    teachers = list(KINDS.values())
    gradient = torch.func.grad(lambda x: cross_tokenizer_loss(x, TOKENS, teachers).loss)
    torch.testing.assert_close(
        torch.vmap(gradient)(several), torch.stack([gradient(x) for x in several])
    )


@pytest.mark.parametrize(
    "options",
    [
        {"score": "entropy", "scale": "match"},
        {"combine": "select"},
        {"teacher_top_k": 3, "columns_top_k": 2},
    ],
    ids=str,
)
def test_nothing_waits_for_the_device(options):
    # A fake tensor has no data: .item(), a boolean index or nonzero would raise.
    with FakeTensorMode() as mode:
        fake = functools.partial(tree_map_only, torch.Tensor, mode.from_tensor)
        x = fake(STUDENT).requires_grad_()
        terms = cross_tokenizer_loss(x, fake(TOKENS), fake(list(KINDS.values())), **options)
        (gradient,) = torch.autograd.grad(terms.loss, x)
        assert gradient.shape == x.shape


def test_teachers_move_and_are_trees():
    teacher = KINDS["projection"]
    moved = teacher.to("cpu")
    assert moved.partition is None
    assert torch.equal(moved.logits, teacher.logits)
    leaves = tree_leaves(teacher)
    assert any(leaf is teacher.logits for leaf in leaves)


def test_teachers_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="^Teacher needs a projection or a partition, got both$"):
        Teacher(OTHER, ALIGNMENT, PROJECTION, PARTITION)
    with pytest.raises(ValueError, match="^Teacher needs an alignment beside its partition$"):
        Teacher(OTHER, partition=PARTITION)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "reached"), [("teacher_top_k", "same"), ("columns_top_k", "projection")]
)
def test_each_number_of_tokens_reaches_its_own_comparison_alone(kind, name, reached):
    whole, few = (
        cross_tokenizer_loss(STUDENT, TOKENS, KINDS[kind], **{name: number}).kd.item()
        for number in (None, 2)
    )
    assert (few != whole) == (kind == reached)


def test_refusals():
    same, other = KINDS["same"], KINDS["projection"]
    untold = Teacher(OTHER, ALIGNMENT)
    said = "^cross_tokenizer_loss needs "
    for teachers, options, match in [
        ([], {}, "a teacher, got none$"),
        (Teacher(SAME, weight=math.nan), {}, r"finite weights, got \[nan\]"),
        ([same], {"combine": "select", "log_vocab": True}, "combine='sum' with score or log_vocab"),
        ([same], {"combine": "average_logits", "score": "entropy"}, "combine='sum' with score"),
        ([Teacher(SAME, weight=2)], {"score": "entropy"}, r"weights of 1 .* got \[2\]$"),
        ([same, untold], {"score": "entropy"}, "the tokens of .*, got none of teacher 1$"),
        ([same, untold], {"combine": "select"}, "the tokens of .*, got none of teacher 1$"),
        (
            [same, other],
            {"combine": "average_logits"},
            "teachers of the student's tokenizer .* got an alignment of teacher 1$",
        ),
        (
            [same, Teacher(SAME[:, 1:])],
            {"combine": "average_logits"},
            r"logits of one shape .* got \[2, 6, 5\] and \[2, 5, 5\]$",
        ),
        (
            [Teacher(SAME, weight=-1), same],
            {"combine": "average_logits"},
            r"weights that are not negative, nor all 0, to average logits, got \[-1, 1.0\]$",
        ),
        ([Teacher(SAME, weight=0)], {"combine": "average_logits"}, "weights that are not negative"),
        (same, {"teacher_top_k": 0}, "teacher_top_k >= 1, got 0$"),
        (same, {"columns_top_k": -1}, "columns_top_k >= 1, got -1$"),
    ]:
        with pytest.raises(ValueError, match=said + match):
            cross_tokenizer_loss(STUDENT, TOKENS, teachers, **options)
    with pytest.raises(tw.ContractError, match="tokens needs .* axis time is 5, but it is 6 in"):
        cross_tokenizer_loss(STUDENT, TOKENS[:, 1:], same)
    with pytest.raises(tw.ContractError, match="teachers needs"):
        cross_tokenizer_loss(STUDENT, TOKENS, SAME)
    with pytest.raises(tw.ContractError, match="teacher_logits needs .* axis vocab is 9"):
        cross_tokenizer_loss(STUDENT, TOKENS, Teacher(OTHER[:, :1].expand(2, 6, 9)))


def test_the_module_is_the_function():
    numbers = {"kd_weight": 0.3, "scale": "match", "temperature": 2.0, "score": "entropy"}
    teachers = [KINDS["same"], KINDS["projection"]]
    ours = CrossTokenizerLoss(**numbers)(STUDENT, TOKENS, teachers, mask=TOKENS != 1)
    theirs = cross_tokenizer_loss(STUDENT, TOKENS, teachers, mask=TOKENS != 1, **numbers)
    assert ours.metrics() == theirs.metrics()
