"""stable-pretraining's losses of views beside ours, on one process."""

import pytest
import torch
from stable_pretraining.losses.dino import DINOv1Loss, DINOv2Loss, iBOTPatchLoss
from stable_pretraining.losses.joint_embedding import (
    BarlowTwinsLoss,
    BYOLLoss,
    InfoNCELoss,
    NTXEntLoss,
    SwAVLoss,
    VICRegLoss,
)
from stable_pretraining.losses.multimodal import CLIPLoss
from stable_pretraining.losses.utils import NegativeCosineSimilarity, VCRegLoss
from torch.testing import assert_close

from termwise.joint_embedding import (
    barlow_twins_loss,
    centered_softmax,
    dino_loss,
    ibot_loss,
    info_nce_loss,
    nt_xent_loss,
    predictive_cosine_loss,
    sinkhorn,
    swapped_prediction_loss,
    updated_center,
    variance_covariance_loss,
    vicreg_loss,
)


def views(size=(12, 5), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, *size, dtype=torch.float64, generator=generator) / 2
    return [z.to(dtype).requires_grad_() for z in drawn]


CASES = {
    "VICReg": (VICRegLoss(), lambda *z: vicreg_loss(*z, variance_views="mean")),
    "VCReg": (
        lambda z1, _: VCRegLoss()(z1),
        lambda z1, _: variance_covariance_loss(z1, var_weight=12.5),
    ),
    "Barlow Twins": (
        BarlowTwinsLoss(),
        lambda *z: barlow_twins_loss(*z, correction=1, eps_added_to="deviation"),
    ),
    "BYOL": (lambda z1, z2: BYOLLoss()(z1, z2.detach()), predictive_cosine_loss),
    "NT-Xent": (NTXEntLoss(0.2), lambda *z: nt_xent_loss(*z, temperature=0.2)),
    "cosine": (
        NegativeCosineSimilarity(),
        lambda *z: predictive_cosine_loss(*z, form="simsiam", stop_gradient=False),
    ),
    "InfoNCE": (
        lambda z1, z2: InfoNCELoss(0.2)(z1[:4], z2, torch.tensor([2, 0, 8, 2])),
        lambda z1, z2: info_nce_loss(
            z1[:4], z2, scale=1 / 0.2, positives=torch.tensor([2, 0, 8, 2])
        ),
    ),
    "CLIP": (CLIPLoss(), lambda *z: info_nce_loss(*z, scale=1 / 0.07, symmetric=True)),
    "CLIP, whose logit_scale divides": (
        lambda *z: CLIPLoss()(*z, logit_scale=0.2),
        lambda *z: info_nce_loss(*z, scale=1 / 0.2, symmetric=True),
    ),
}


def assert_same(found, expected, leaves):
    rtol = 1e-5 if expected.dtype == torch.float32 else 1e-9
    assert_close(found, expected, rtol=rtol, atol=rtol)
    gradients = (torch.autograd.grad(x, leaves, allow_unused=True) for x in (found, expected))
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, rtol=rtol, atol=rtol * other.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(12, 5), (9, 40), (400, 16)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name, size, dtype):
    theirs, ours = CASES[name]
    z = views(size, dtype)
    assert_same(ours(*z).loss, theirs(*z), z)


def test_their_barlow_twins_of_equal_views_is_never_0():
    z, _ = views()
    ours = barlow_twins_loss(z, z, correction=1, eps_added_to="deviation")
    assert BarlowTwinsLoss()(z, z) > 5 / 12**2 * 0.99  # columns of (1 - (n - 1) / n)^2
    assert_close(ours.alignment, torch.tensor(11 / 12, dtype=torch.float64), rtol=1e-4, atol=0)


# --- over prototypes, in float32 whatever they are given -------------------------------------


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 3


@pytest.mark.parametrize("size", [(2, 3), (12, 16), (32, 9000)], ids=str)
@pytest.mark.parametrize(("students", "teachers"), [(2, 2), (5, 2), (2, 3)])
def test_dino(size, students, teachers):
    student = drawn(students, *size).requires_grad_()
    teacher = drawn(teachers, *size, seed=1).softmax(-1)
    assert_same(dino_loss(student, teacher).loss, DINOv1Loss()(student, teacher), [student])


def test_dino_takes_no_float64_teacher():
    with pytest.raises(RuntimeError):
        DINOv1Loss()(drawn(2, 3, 4), drawn(2, 3, 4).softmax(-1).double())


def test_dinos_teachers_and_its_center_that_starts_as_the_first_mean():
    loss_fn, center = DINOv1Loss(), None
    for step in range(3):
        logits = drawn(2, 12, 16, seed=step)
        rows = logits.flatten(0, 1)
        ours = centered_softmax(
            rows, torch.zeros(16) if center is None else center, temperature=0.1
        )
        assert_close(loss_fn.softmax_center_teacher(logits, 0.1), ours.view_as(logits))
        center = rows.mean(0) if center is None else updated_center(center, rows)
        loss_fn.update_center(logits)
    theirs = loss_fn.sinkhorn_knopp_teacher(logits, 0.1, num_samples=24)
    assert_close(sinkhorn(rows, temperature=0.1).view_as(logits), theirs)


def test_ibot_is_a_mean_over_patches_and_ours_over_images():
    student, teacher = drawn(12, 16).requires_grad_(), drawn(12, 16, seed=1).softmax(-1)
    equal, other = torch.arange(12) // 4, torch.tensor([0] * 7 + [1] * 4 + [2])
    of_images = ibot_loss(student, teacher, equal, images=3).loss
    assert_same(of_images, iBOTPatchLoss()(student, teacher), [student])
    of_rows = dino_loss(student[None], teacher[None], same_view="keep").loss
    assert_same(of_rows, iBOTPatchLoss()(student, teacher), [student])
    of_images = ibot_loss(student, teacher, other, images=3).loss
    assert abs(of_images / iBOTPatchLoss()(student, teacher) - 1) > 0.01


def test_dinov2_is_a_weighted_sum():
    student, teacher = drawn(12, 16).requires_grad_(), drawn(12, 16, seed=1).softmax(-1)
    crops, probs = drawn(2, 6, 16).requires_grad_(), drawn(2, 6, 16, seed=2).softmax(-1)
    theirs = DINOv2Loss(ibot_loss_weight=0.5)(crops, probs, student, teacher)
    of_rows = dino_loss(student[None], teacher[None], same_view="keep").loss
    assert_same(dino_loss(crops, probs).loss + 0.5 * of_rows, theirs, [crops, student])


@pytest.mark.parametrize("queued", [False, True])
def test_swav_assigns_both_views_at_once(queued):
    z = [one.detach() for one in views((12, 5), torch.float32)]
    queue = drawn(9, 5) if queued else None
    prototypes = torch.nn.Linear(5, 16, bias=False)
    theirs = SwAVLoss()(*z, prototypes, queue)
    assert_close(prototypes.weight.norm(dim=1), torch.ones(16))  # scaled in place
    unit = [torch.nn.functional.normalize(one, dim=1) for one in (*z, *([queue] if queued else []))]
    scores = prototypes(torch.cat(unit))
    logits = scores[:24].view(2, 12, 16)
    probs = sinkhorn(scores, temperature=0.05)[:24].view_as(logits)
    assert_same(dino_loss(logits, probs).loss, theirs, [prototypes.weight])
    assert abs(swapped_prediction_loss(logits).loss / theirs - 1) > 0.01  # each view by itself
