"""Same-tokenizer distillation: equal models, offsets, and what does not count."""

import math

import pytest
import torch

import termwise as tw
from termwise import _autograd, _numbers
from termwise.lm import DistillationLoss, _rows, distillation_loss

DIVERGENCES = ["forward", "reverse", "jensen_shannon"]


def logits(batch, time, vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, time, vocab)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    ]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("teacher_top_k", [None, 3])
def test_it_is_nothing_for_equal_models_and_something_for_others(divergence, teacher_top_k):
    student, teacher = logits(2, 4, 6)
    options = {"divergence": divergence, "teacher_top_k": teacher_top_k}
    same = distillation_loss(student, student.detach() + 3, **options)
    torch.testing.assert_close(same.loss, torch.zeros_like(same.loss))
    (gradient,) = torch.autograd.grad(same.loss, student)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    assert distillation_loss(student, teacher, **options).loss > 0.01


def test_forward_is_reverse_with_the_models_in_each_others_place():
    student, teacher = logits(2, 4, 6)
    forward = distillation_loss(student, teacher, divergence="forward")
    reverse = distillation_loss(teacher, student, divergence="reverse")
    torch.testing.assert_close(forward.loss, reverse.loss)
    one = distillation_loss(student, teacher, divergence="jensen_shannon", beta=0.3)
    other = distillation_loss(teacher, student, divergence="jensen_shannon", beta=0.7)
    torch.testing.assert_close(one.loss, other.loss)


@pytest.mark.parametrize(("beta", "limit"), [(1e-7, "forward"), (1 - 1e-7, "reverse")])
def test_jensen_shannon_tends_to_both_divergences(beta, limit):
    student, teacher = logits(2, 4, 6)
    mixed = distillation_loss(student, teacher, divergence="jensen_shannon", beta=beta)
    expected = distillation_loss(student, teacher, divergence=limit)
    ours = mixed.loss / min(beta, 1 - beta)
    torch.testing.assert_close(ours, expected.loss, rtol=1e-5, atol=1e-7)


def test_the_teacher_gets_no_gradient():
    student, teacher = logits(2, 4, 6)
    loss = distillation_loss(student, teacher).loss
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


def test_positions_whose_token_does_not_count_may_hold_anything():
    student, teacher = logits(2, 4, 5)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 2] = False
    broken = [x.detach().clone() for x in (student, teacher)]
    for x, value in zip(broken, (torch.nan, torch.inf), strict=True):
        x[:, -1] = value
        x[0, 1] = value
    broken[0].requires_grad_()
    for options in ({}, {"teacher_top_k": 2}):
        ours = distillation_loss(*broken, mask=mask, **options)
        theirs = distillation_loss(student, teacher, mask=mask, **options)
        torch.testing.assert_close(ours.loss, theirs.loss)
        (gradient,) = torch.autograd.grad(ours.loss, broken[0])
        torch.testing.assert_close(gradient, torch.autograd.grad(theirs.loss, student)[0])


def test_tokens_that_cannot_come():
    student, teacher = logits(1, 2, 4)
    impossible = teacher.detach().clone()
    impossible[..., 1] = -math.inf
    for divergence, finite in [("forward", True), ("reverse", False), ("jensen_shannon", True)]:
        loss = distillation_loss(student, impossible, divergence=divergence).loss
        assert bool(loss.isfinite()) == finite
    both = student.detach().clone()
    both[..., 1] = -math.inf
    both.requires_grad_()
    for divergence in DIVERGENCES:
        loss = distillation_loss(both, impossible, divergence=divergence).loss
        assert loss.isfinite()
        (gradient,) = torch.autograd.grad(loss, both)
        assert gradient.isfinite().all()
        assert (gradient[..., 1] == 0).all()
    assert distillation_loss(both, teacher).loss.isinf()


def test_no_position_is_no_loss_and_in_the_graph():
    student, teacher = logits(2, 4, 5)
    terms = distillation_loss(student, teacher, mask=torch.zeros(2, 4, dtype=torch.bool))
    assert terms.metrics() == {"loss": 0.0, "divergence": 0.0, "num_tokens": 0.0}
    (gradient,) = torch.autograd.grad(terms.loss, student)
    assert torch.equal(gradient, torch.zeros_like(student))


def test_micro_batches_of_one_normalizer_add_up():
    student, teacher = logits(4, 5, 6)
    whole = distillation_loss(student, teacher)
    parts = [
        distillation_loss(student[rows], teacher[rows], normalizer=whole.num_tokens).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole.loss)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bfloat16_gives_the_gradient_of_float64_to_rounding(divergence):
    student, teacher = (x.detach().bfloat16().requires_grad_() for x in logits(2, 9, 200))
    terms = distillation_loss(student, teacher, divergence=divergence)
    exact = student.detach().double().requires_grad_()
    expected = distillation_loss(exact, teacher.double(), divergence=divergence)
    assert terms.loss.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (ours,) = torch.autograd.grad(terms.loss, student)
    (theirs,) = torch.autograd.grad(expected.loss, exact)
    torch.testing.assert_close(ours.double(), theirs, rtol=2**-7, atol=1e-6)


def test_it_compiles_whole_and_maps():
    student, teacher = logits(2, 4, 5)
    mask = torch.arange(8).reshape(2, 4) % 3 != 1
    options = {"divergence": "jensen_shannon", "teacher_top_k": 3, "mask": mask}
    compiled = torch.compile(distillation_loss, fullgraph=True, backend="eager")
    pair = [f(student, teacher, **options).loss for f in (compiled, distillation_loss)]
    torch.testing.assert_close(*pair)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in pair))
    several = torch.stack([student.detach(), student.detach().flip(1)])
    gradient = torch.func.grad(lambda x: distillation_loss(x, teacher, **options).loss)
    expected = torch.stack([gradient(x) for x in several])
    torch.testing.assert_close(torch.vmap(gradient)(several), expected)


def test_refusals():
    student, teacher = logits(2, 3, 4)
    said = "^distillation_loss needs "
    with pytest.raises(ValueError, match=said + "temperature > 0, got 0$"):
        distillation_loss(student, teacher, temperature=0)
    with pytest.raises(ValueError, match=said + r"beta in \(0, 1\), got 1$"):
        distillation_loss(student, teacher, divergence="jensen_shannon", beta=1)
    with pytest.raises(
        ValueError, match=said + r"teacher_top_k in 1..4 and no vocab_group, got teacher_top_k 5$"
    ):
        distillation_loss(student, teacher, teacher_top_k=5)
    with pytest.raises(tw.ContractError, match="teacher_logits needs .* axis vocab is 3, but it"):
        distillation_loss(student, teacher[..., :3])
    with pytest.raises(tw.ContractError, match='divergence needs Literal.*got str "js"'):
        distillation_loss(student, teacher, divergence="js")


def test_the_module_is_the_function():
    student, teacher = logits(2, 3, 4)
    numbers = {"divergence": "reverse", "temperature": 2.0, "teacher_top_k": 3}
    ours = DistillationLoss(**numbers)(student, teacher)
    assert ours.metrics() == distillation_loss(student, teacher, **numbers).metrics()


QUARTERS = torch.zeros(1, 2, 4, dtype=torch.float64)
HALF = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log().expand(1, 2, 4)


@pytest.mark.parametrize(
    ("tail", "divergence", "value"),
    [
        ("bucket", "forward", 0.173287),
        ("zero", "forward", 0.749780),
        ("renormalize", "forward", 0.056633),
        ("bucket", "reverse", 0.173287),
        ("renormalize", "reverse", 0.058892),
        ("zero", "reverse", math.inf),
    ],
)
def test_what_is_beyond_the_top_two_tokens(tail, divergence, value):
    terms = distillation_loss(QUARTERS, HALF, teacher_top_k=2, tail=tail, divergence=divergence)
    assert terms.loss.item() == pytest.approx(value, abs=1e-6)


def test_a_student_whose_mass_is_elsewhere_is_seen_by_the_bucket():
    student = torch.tensor([0.0, 0.0, 20.0, 0.0]).expand(1, 2, 4)
    teacher = torch.tensor([0.0, 0.0, -20.0, -20.0]).expand(1, 2, 4)
    found = {
        tail: distillation_loss(student, teacher, teacher_top_k=2, tail=tail).loss.item()
        for tail in ("renormalize", "bucket", "zero")
    }
    full = distillation_loss(student, teacher).loss.item()
    assert found["renormalize"] == 0
    assert found["bucket"] == pytest.approx(full, abs=1e-4)
    assert found["zero"] == pytest.approx(full, abs=1e-4)
    assert full == pytest.approx(20 - math.log(2), abs=1e-4)


def test_a_tail_without_top_k_says_nothing():
    student, teacher = logits(2, 3, 4)
    with pytest.raises(
        ValueError, match="distillation_loss needs teacher_top_k with tail 'bucket', got"
    ):
        distillation_loss(student, teacher, tail="bucket")


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_blocks_are_the_formula(monkeypatch, divergence):
    student, teacher = logits(2, 9, 7)
    mask = torch.arange(18).reshape(2, 9) % 4 != 1
    for teacher_top_k in (None, 3):
        options = {
            "divergence": divergence,
            "temperature": 1.5,
            "mask": mask,
            "teacher_top_k": teacher_top_k,
        }
        found = []
        # The CPU's blocks of 3 rows, all at once, and an accelerator's of 5.
        for name, size in (("IN_CACHE", 21), ("IN_CACHE", 2**18), ("ON_DEVICE", 35)):
            monkeypatch.setattr(_numbers, name, size)
            if name == "ON_DEVICE":
                for module in (_autograd, _numbers, _rows):
                    monkeypatch.setattr(module, "on_host", lambda x: False)
            loss = distillation_loss(student, teacher, **options).loss
            found.append((loss, *torch.autograd.grad(loss, student)))
        plain = torch.func.grad_and_value(
            lambda x, o=options: distillation_loss(x, teacher, **o).loss
        )
        gradient, loss = plain(student.detach())
        for pair in found:
            torch.testing.assert_close(pair, (loss, gradient), check_device=False)
        monkeypatch.undo()


@pytest.mark.parametrize("normalizer", [None, 3.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_few_positions_that_all_count_are_the_formula(monkeypatch, divergence, normalizer):
    student, teacher = logits(2, 5, 7)
    with torch.no_grad():
        student[:, :, 6], teacher[:, :, 6] = -torch.inf, -torch.inf
        teacher[0, 0, 1] = -torch.inf if divergence == "forward" else 0.0
    found = []
    for few in (0, 2**15):
        monkeypatch.setattr(_numbers, "FEW", few)
        terms = distillation_loss(
            student, teacher, divergence=divergence, normalizer=normalizer, temperature=2.0
        )
        (gradient,) = torch.autograd.grad(terms.loss, student, create_graph=True)
        weight = torch.arange(gradient.numel()).reshape(gradient.shape).sin()
        (second,) = torch.autograd.grad((gradient * weight)[..., :6].sum(), student)
        found.append((dict(terms.items()), gradient, second))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
def test_two_widths_are_computed_in_the_wider_one(divergence):
    generator = torch.Generator().manual_seed(4)
    wide = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    narrow = torch.randn(2, 4, 5, generator=generator)
    for student, teacher in ((wide, narrow), (narrow, wide)):
        leaf = student.clone().requires_grad_()
        terms = distillation_loss(leaf, teacher, divergence=divergence)
        plain = student.double().requires_grad_()
        expected = distillation_loss(plain, teacher.double(), divergence=divergence)
        torch.testing.assert_close(terms.loss, expected.loss, rtol=1e-14, atol=0)
        (ours,), (theirs,) = (
            torch.autograd.grad(one.loss, x) for one, x in ((terms, leaf), (expected, plain))
        )
        assert ours.dtype == student.dtype
        torch.testing.assert_close(ours, theirs.to(student.dtype))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jensen_shannon"])
@pytest.mark.parametrize("tail", [None, "renormalize", "bucket", "zero"])
@pytest.mark.parametrize("left", [2, 1])
def test_tokens_that_neither_model_has_change_no_gradient(divergence, tail, left):
    # -inf in the logits of both, as padded vocabularies have it.
    drawn = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1, 3, 4, generator=drawn, dtype=torch.float64)
    padded = [logits.masked_fill(torch.arange(4) >= left, -torch.inf) for logits in (x, y)]
    options = {"divergence": divergence}
    if tail is not None:
        options.update(teacher_top_k=2, tail=tail)

    def loss(x, y=padded[1]):
        return distillation_loss(x, y, **options).loss

    # The same without these tokens, or, where 2 are compared, with one of next to no probability.
    width = 2 if tail else left
    fewer = [logits[..., :width].clamp_min(-200) for logits in padded]
    x = fewer[0].clone().requires_grad_()
    options |= {"tail": "renormalize"} if tail else {}
    value = loss(x, fewer[1])
    (expected,) = torch.autograd.grad(value, x)
    expected = torch.nn.functional.pad(expected, (0, 4 - width))
    options |= {"tail": tail} if tail else {}
    x = padded[0].clone().requires_grad_()
    torch.testing.assert_close(loss(x), value)
    torch.testing.assert_close(torch.autograd.grad(loss(x), x)[0], expected)
    torch.testing.assert_close(torch.func.grad(loss)(padded[0]), expected)
