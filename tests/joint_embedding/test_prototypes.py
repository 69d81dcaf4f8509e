"""Assignments to prototypes and the losses on them: known values, pits, precision, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F

import termwise as tw
from termwise.joint_embedding import (
    DINOLoss,
    centered_softmax,
    dino_loss,
    ibot_loss,
    sinkhorn,
    swapped_prediction_loss,
    updated_center,
)

SMALL = "termwise.joint_embedding._prototypes._SMALL"


def drawn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture(params=["as written", "by blocks"])
def path(request, monkeypatch):
    if request.param == "by blocks":
        monkeypatch.setattr(SMALL, 0)


def exponential_first(logits, temperature, iterations=3):
    """Sinkhorn as DINOv2 (b8931f7) and SwAV write it."""
    q = (logits / temperature).exp().T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / len(q)
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


# --- sinkhorn -------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 4e-7), (torch.float64, 4e-16)])
@pytest.mark.parametrize("temperature", [0.04, 0.1])
def test_sinkhorn_is_theirs_where_theirs_is_finite(temperature, dtype, error):
    logits = drawn(64, 300, dtype=dtype).clamp(-3, 3) / 2
    theirs = exponential_first(logits, temperature)
    ours = sinkhorn(logits, temperature=temperature)
    assert (ours - theirs).abs().max() <= error


@pytest.mark.parametrize("change", ["a logit of 4", "a logit of 16", "a sample 5 lower"])
def test_sinkhorn_is_finite_where_theirs_is_not(change):
    logits = drawn(64, 300, dtype=torch.float32).clamp(-3, 3) / 2
    if change == "a sample 5 lower":
        logits[3] -= 5
    else:
        logits[0, 0] = float(change.rpartition(" ")[2])
    ours = sinkhorn(logits, temperature=0.04)
    assert exponential_first(logits, 0.04).isnan().any()
    wide = exponential_first(logits.double(), 0.04)
    torch.testing.assert_close(ours.double(), wide, rtol=0, atol=1e-6)


def test_sinkhorn_is_finite_after_many_iterations_from_any_logits():
    ours = sinkhorn(drawn(20, 30, dtype=torch.float32) * 100, temperature=0.01, iterations=200)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours.sum(1), torch.ones(20))


def test_the_maximum_of_a_row_must_not_be_subtracted():
    logits = drawn(64, 30)
    shifted = logits - logits.amax(1, keepdim=True)
    ours = sinkhorn(logits, temperature=0.1)
    assert (sinkhorn(shifted, temperature=0.1) - ours).abs().max() > 0.1


def test_what_a_sample_weighs_is_forgotten_with_the_iterations():
    logits = drawn(16, 8) / 4
    shifted = logits + drawn(16, 1, seed=1)
    moved = [
        (
            sinkhorn(shifted, temperature=0.2, iterations=n)
            - sinkhorn(logits, temperature=0.2, iterations=n)
        )
        .abs()
        .max()
        .item()
        for n in (1, 3, 300)
    ]
    assert moved[0] > moved[1] > 1e-3
    assert moved[2] < 1e-9


def test_sinkhorn_balances_prototypes():
    probs = sinkhorn(drawn(64, 16), temperature=0.5, iterations=100)
    torch.testing.assert_close(probs.sum(0), torch.full((16,), 4.0, dtype=torch.float64))
    assert sinkhorn(drawn(2, 3).bfloat16(), temperature=0.1).dtype == torch.float32


def test_blocks_of_sinkhorn_are_one(monkeypatch):
    logits = drawn(33, 7)
    whole = sinkhorn(logits, temperature=0.1)
    monkeypatch.setattr("termwise._numbers.IN_CACHE", 20)
    torch.testing.assert_close(sinkhorn(logits, temperature=0.1), whole)


# --- the center -----------------------------------------------------------------------------


def test_a_center_is_a_running_mean():
    center = torch.tensor([1.0, 2.0])
    logits = torch.tensor([[3.0, 0.0], [5.0, 0.0]])
    moved = updated_center(center, logits, momentum=0.75)
    assert moved.tolist() == [0.75 + 1.0, 1.5]
    assert center.tolist() == [1.0, 2.0]
    assert updated_center(center, logits[:0]).tolist() == [1.0, 2.0]
    assert updated_center(center.bfloat16(), logits).dtype == torch.bfloat16


def test_a_centered_teacher_has_no_gradient():
    logits, center = drawn(4, 3).requires_grad_(), drawn(3, seed=1)
    probs = centered_softmax(logits, center, temperature=0.04)
    torch.testing.assert_close(probs, ((logits - center) / 0.04).softmax(1).detach())
    assert not probs.requires_grad
    assert not sinkhorn(logits, temperature=0.1).requires_grad


# --- dino -----------------------------------------------------------------------------------


def loop(student, teacher, temperature, keep):
    """Sum over pairs as DINOv2's loop does."""
    total = 0.0
    for s, logits in enumerate(student):
        for t, probs in enumerate(teacher):
            if keep or s != t:
                total = total - (probs * (logits / temperature).log_softmax(1)).sum(1).mean()
    return total


@pytest.mark.parametrize(("views", "of_teacher"), [(2, 2), (8, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("keep", [True, False])
def test_dino_is_the_loop_over_pairs(path, views, of_teacher, keep):
    student = drawn(views, 5, 7).requires_grad_()
    teacher = drawn(of_teacher, 5, 7, seed=1).softmax(2)
    same_view = "keep" if keep else "skip"
    terms = dino_loss(student, teacher, same_view=same_view, over_pairs="sum", temperature=0.3)
    theirs = loop(student, teacher, 0.3, keep)
    torch.testing.assert_close(terms.loss, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(terms.loss, student), torch.autograd.grad(theirs, student)
    )
    pairs = views * of_teacher - (0 if keep else min(views, of_teacher))
    mean = dino_loss(student, teacher, same_view=same_view, temperature=0.3)
    torch.testing.assert_close(mean.loss, theirs / pairs)
    torch.testing.assert_close(mean.cross_entropy, terms.cross_entropy)


def test_uniform_student_and_teacher(path):
    terms = dino_loss(torch.zeros(4, 8, 16), torch.full((2, 8, 16), 1 / 16)).metrics()
    log_k = pytest.approx(math.log(16))
    assert terms == {
        "loss": log_k,
        "cross_entropy": log_k,
        "teacher_entropy": log_k,
        "kl": pytest.approx(0, abs=1e-6),
        "marginal_entropy": log_k,
    }


def test_one_prototype_for_all_shows_in_marginal_entropy(path):
    collapsed = F.one_hot(torch.zeros(2, 8, dtype=torch.long), 16).float()
    spread = F.one_hot(torch.arange(16).view(2, 8), 16).float()
    terms = [dino_loss(torch.zeros(2, 8, 16), p) for p in (collapsed, spread)]
    assert [one.teacher_entropy.item() for one in terms] == [0, 0]
    assert terms[0].marginal_entropy == 0
    assert terms[1].marginal_entropy.item() == pytest.approx(math.log(16))


def test_the_optimum_is_the_teacher(path):
    teacher = drawn(1, 6, 5).softmax(2)
    student = (teacher.log() * 0.1 + 3).requires_grad_()
    terms = dino_loss(student, teacher, same_view="keep")
    torch.testing.assert_close(terms.loss, terms.teacher_entropy)
    assert terms.kl.abs() < 1e-12
    assert torch.autograd.grad(terms.loss, student)[0].abs().max() < 1e-12


def test_the_teacher_has_no_gradient(path):
    student, teacher = drawn(2, 4, 3).requires_grad_(), drawn(2, 4, 3).softmax(2).requires_grad_()
    terms = dino_loss(student, teacher)
    gradients = torch.autograd.grad(terms.loss, (student, teacher), allow_unused=True)
    assert gradients[1] is None
    assert not any(terms[name].requires_grad for name in ("teacher_entropy", "kl"))


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The number of elements of the largest tensor that is made within it."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(found):
            if isinstance(x, torch.Tensor) and function.namespace != "termwise":
                self.elements = max(self.elements, x.numel())
        return found


def test_no_tensor_has_pairs():
    student = torch.zeros(8, 16, 4096, requires_grad=True)
    teacher = torch.full((2, 16, 4096), 1 / 4096)
    with Largest() as largest:
        dino_loss(student, teacher).loss.backward()
    assert largest.elements <= student.numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_lifted_block_by_block(path, dtype):
    student = (drawn(3, 8, 64) * 20).to(dtype).requires_grad_()
    teacher = drawn(2, 8, 64, seed=1).softmax(2).to(dtype)
    wide = student.detach().double().requires_grad_()
    ours, theirs = dino_loss(student, teacher), dino_loss(wide, teacher.double())
    for (name, one), (_, other) in zip(ours.items(), theirs.items(), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=1e-6, msg=name)
    gradient, expected = (
        torch.autograd.grad(terms.loss, x)[0] for terms, x in ((ours, student), (theirs, wide))
    )
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=1e-5)


def test_the_gradient_of_a_half_is_not_lost_before_it_is_scaled(path):
    """Of 65,536 prototypes a softmax is about 1.5e-6, of which float16 has 5 bits."""
    student = torch.zeros(1, 2, 2**16, dtype=torch.float16)
    student[:, :, ::2] = -3
    student.requires_grad_()
    teacher = F.one_hot(torch.tensor([[1, 3]]), 2**16).float()
    loss = dino_loss(student, teacher, same_view="keep", temperature=1.0).loss
    (gradient,) = torch.autograd.grad(2.0**14 * loss, student)
    softmax = math.exp(-3) / (2**15 * (1 + math.exp(-3)))
    assert gradient[0, 0, 4].item() == pytest.approx(2**14 * softmax / 2, rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_nan_is_repaired(path, bad):
    student, teacher = drawn(2, 3, 4), drawn(2, 3, 4).softmax(2)
    broken = [x.clone() for x in (student, teacher)]
    broken[0][1, 2, 0] = broken[1][0, 0, 1] = bad
    assert not dino_loss(broken[0], teacher).loss.isfinite()
    assert not dino_loss(student, broken[1]).loss.isfinite()


def test_a_strided_student_is_welcome(path):
    student = drawn(4, 6, 10).requires_grad_()
    teacher = drawn(2, 6, 5).softmax(2)
    inputs = student[:, :, ::2].transpose(0, 1).contiguous().transpose(0, 1), teacher
    ours, theirs = (dino_loss(x, teacher).loss for x in (student[:, :, ::2], inputs[0]))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (ours, theirs)))


# --- ibot -----------------------------------------------------------------------------------


def dinov2_masked(student, teacher, mask, temperature):
    """The mean of DINOv2 (b8931f7) over images, of their masked patches alone."""
    loss = (teacher * (student / temperature).log_softmax(1)).sum(1)
    weight = (1 / mask.sum(1).clamp(min=1.0))[:, None].expand_as(mask)[mask]
    return -(loss * weight).sum() / len(mask)


MASK = torch.tensor([[True, False, True], [False, False, False], [True, True, True], [0, 1, 0]]) > 0


def test_ibot_is_dinov2s(path):
    student, teacher = drawn(6, 5).requires_grad_(), drawn(6, 5, seed=1).softmax(1)
    index = MASK.nonzero()[:, 0]
    terms = ibot_loss(student, teacher, index, images=4)
    theirs = dinov2_masked(student, teacher, MASK, 0.1)
    torch.testing.assert_close(terms.loss, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(terms.loss, student), torch.autograd.grad(theirs, student)
    )
    assert terms.n_masked == 6
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    shuffled = ibot_loss(student[order], teacher[order], index[order], images=4)
    torch.testing.assert_close(shuffled.loss, theirs)


def test_an_image_without_a_mask_counts_below_alone(path):
    uniform = torch.zeros(2, 16), torch.full((2, 16), 1 / 16)
    index = torch.tensor([0, 0])
    whole, half = (ibot_loss(*uniform, index, images=n).loss.item() for n in (1, 2))
    assert whole == pytest.approx(math.log(16))
    assert half == pytest.approx(math.log(16) / 2)


def test_over_patches_each_counts_alike(path):
    student, teacher = drawn(6, 5), drawn(6, 5, seed=1).softmax(1)
    terms = ibot_loss(student, teacher, MASK.nonzero()[:, 0], images=4, over="patches")
    torch.testing.assert_close(
        terms.loss, F.cross_entropy(student / 0.1, teacher), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("over", ["images", "patches"])
def test_without_a_mask_the_loss_is_0(path, over):
    student = torch.zeros(0, 5, requires_grad=True)
    index = torch.zeros(0, dtype=torch.long)
    terms = ibot_loss(student, torch.zeros(0, 5), index, images=3, over=over)
    assert terms.loss == terms.kl == terms.n_masked == 0
    assert torch.autograd.grad(terms.loss, student)[0].shape == (0, 5)


def test_images_may_be_mapped_over(path):
    student, teacher = drawn(6, 5), drawn(6, 5, seed=1).softmax(1)
    indices = torch.stack([MASK.nonzero()[:, 0], torch.arange(6) % 2])
    mapped = torch.vmap(lambda index: ibot_loss(student, teacher, index, images=4).loss)(indices)
    each = [ibot_loss(student, teacher, index, images=4).loss for index in indices]
    torch.testing.assert_close(mapped, torch.stack(each))


def test_what_the_caller_counts_is_left_alone(path):
    student, teacher = drawn(6, 5).requires_grad_(), drawn(6, 5).softmax(1)
    index = MASK.nonzero()[:, 0]
    before = [x.detach().clone() for x in (student, teacher, index)]
    ibot_loss(student, teacher, index, images=4).loss.backward()
    assert all(map(torch.equal, (student, teacher, index), before))


# --- swapped prediction ---------------------------------------------------------------------


@pytest.mark.parametrize("queued", [False, True])
def test_swapped_prediction_is_swavs(path, queued):
    logits = drawn(4, 6, 5).div(4).requires_grad_()
    queue = drawn(2, 7, 5, seed=1).div(4) if queued else None
    ours = swapped_prediction_loss(logits, num_global=2, queue=queue).loss
    theirs = 0.0
    for g in range(2):
        scores = logits[g].detach()
        if queue is not None:
            scores = torch.cat((queue[g], scores))
        q = exponential_first(scores, 0.05)[-6:]
        others = [logits[v] for v in range(4) if v != g]
        theirs = theirs + sum(F.cross_entropy(x / 0.1, q) for x in others) / 3
    torch.testing.assert_close(ours, theirs / 2)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits), torch.autograd.grad(theirs / 2, logits)
    )


def test_all_views_are_global_unless_it_is_said():
    logits = drawn(3, 6, 5)
    assert (
        swapped_prediction_loss(logits).loss == swapped_prediction_loss(logits, num_global=3).loss
    )


# --- refusals -------------------------------------------------------------------------------

STUDENT, TEACHER = torch.zeros(2, 3, 4), torch.full((2, 3, 4), 0.25)
PATCHES = torch.zeros(3, 4), torch.full((3, 4), 0.25)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: dino_loss(STUDENT[:1], TEACHER[:1]),
            "dino_loss needs a pair of views, got 1 of the student and 1 of the teacher with "
            'same_view="skip"',
        ),
        (
            lambda: dino_loss(STUDENT, TEACHER[:0], same_view="keep"),
            "dino_loss needs a pair of views, got 2 of the student and 0 of the teacher with "
            'same_view="keep"',
        ),
        (
            lambda: dino_loss(STUDENT, TEACHER, temperature=0.0),
            "dino_loss needs a finite temperature > 0, got 0.0",
        ),
        (
            lambda: dino_loss(STUDENT[:, :, :0], TEACHER[:, :, :0]),
            "dino_loss needs at least 1 prototype, got 0",
        ),
        (
            lambda: ibot_loss(*PATCHES, torch.tensor([0, 2, 1]), images=2),
            "ibot_loss needs image_index in 0..1 for images=2, got 0..2",
        ),
        (
            lambda: ibot_loss(*PATCHES, torch.zeros(3, dtype=torch.long), images=0),
            "ibot_loss needs images >= 1, got 0",
        ),
        (
            lambda: swapped_prediction_loss(STUDENT, num_global=3),
            "swapped_prediction_loss needs num_global between 1 and the 2 views of z, got 3",
        ),
        (
            lambda: swapped_prediction_loss(STUDENT, num_global=1, queue=TEACHER),
            "swapped_prediction_loss needs a queue of the 1 global views, got 2",
        ),
        (
            lambda: swapped_prediction_loss(STUDENT, iterations=0),
            "swapped_prediction_loss needs iterations >= 1, got 0",
        ),
        (
            lambda: sinkhorn(STUDENT[0], temperature=0.1, iterations=0),
            "sinkhorn needs iterations >= 1, got 0",
        ),
        (
            lambda: sinkhorn(STUDENT[0], temperature=math.nan),
            "sinkhorn needs a finite temperature > 0, got nan",
        ),
        (
            lambda: updated_center(STUDENT[0, 0], STUDENT[0], momentum=1.5),
            "updated_center needs momentum in 0..1, got 1.5",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(call, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        call()
    assert str(refused.value) == message


def test_lists_of_views_and_wrong_words_are_refused_by_name():
    with pytest.raises(tw.ContractError, match="^dino_loss: student_logits needs"):
        dino_loss([*STUDENT], TEACHER)
    with pytest.raises(tw.ContractError, match="^dino_loss: teacher_probs needs"):
        dino_loss(STUDENT, TEACHER[:, :2])
    with pytest.raises(tw.ContractError, match="^DINOLoss.__init__: over_pairs needs"):
        DINOLoss(over_pairs="total")
