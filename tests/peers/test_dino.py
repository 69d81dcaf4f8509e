"""The losses of DINOv2 and DINOv3 beside ours, on one process and over ranks."""

import checkouts
import pytest
import torch
import torch.nn.functional as F
from over_ranks import koleo_over_ranks, teachers_over_ranks
from torch.testing import assert_close

from termwise.joint_embedding import (
    centered_softmax,
    dino_loss,
    gram_anchor_loss,
    ibot_loss,
    koleo_loss,
    sinkhorn,
    updated_center,
)

dinov2, dinov3 = checkouts.load("dinov2.loss"), checkouts.load("dinov3.loss")
BOTH = pytest.mark.parametrize("peer", [dinov2, dinov3], ids=["dinov2", "dinov3"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# Views of the student and the teacher, batch and prototypes: as written, and in blocks.
SIZES = pytest.mark.parametrize("size", [(2, 2, 3, 4), (8, 2, 6, 16), (10, 2, 4, 9000)])


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def views(size, dtype=torch.float32):
    students, teachers, batch, prototypes = size
    student = normal(students, batch, prototypes, dtype=dtype).requires_grad_()
    return student, normal(teachers, batch, prototypes, seed=1, dtype=dtype).softmax(-1)


def assert_same(ours, theirs, leaf, **tolerance):
    assert_close(ours, theirs, **tolerance)
    found, wanted = (torch.autograd.grad(loss, leaf)[0] for loss in (ours, theirs))
    assert wanted.count_nonzero() > 0
    assert_close(found, wanted, **tolerance)


# --- DINOLoss -------------------------------------------------------------------------------


@SIZES
@DTYPES
def test_dinov2_sums_over_all_pairs_of_its_lists(size, dtype):
    student, teacher = views(size, dtype)
    theirs = dinov2.DINOLoss(size[-1])([*student], [*teacher])
    ours = dino_loss(student, teacher, same_view="keep", over_pairs="sum").loss
    assert_same(ours, theirs, student)


@SIZES
@DTYPES
def test_dinov2s_global_and_local_crops_together_are_our_mean(size, dtype):
    """As ssl_meta_arch.py calls it: the teacher's two crops in reverse order, as one batch."""
    student, teacher = views(size, dtype)
    loss_fn, of_local = dinov2.DINOLoss(size[-1]), 2 * (size[0] - 2)
    swapped = [teacher.flip(0).flatten(0, 1)]
    theirs = loss_fn([student[:2].flatten(0, 1)], swapped) * 2 / (2 + of_local)
    theirs = theirs + loss_fn([*student[2:]], [*teacher]) / (2 + of_local)
    assert_same(dino_loss(student, teacher).loss, theirs, student)


@pytest.mark.parametrize("ignore", [True, False])
@pytest.mark.parametrize("size", [(2, 2, 3, 4), (8, 2, 6, 16), (2, 3, 5, 7), (10, 2, 4, 9000)])
def test_dinov3_is_a_mean_with_and_without_equal_crops(size, ignore):
    student, teacher = views(size)
    theirs = dinov3.DINOLoss(size[-1])(student, teacher, ignore_diagonal=ignore)
    ours = dino_loss(student, teacher, same_view="skip" if ignore else "keep").loss
    assert_same(ours, theirs, student)


def test_dinov3s_global_and_local_crops_together_are_our_mean():
    student, teacher = views((8, 2, 6, 16))
    loss_fn = dinov3.DINOLoss(16)
    theirs = loss_fn(student[:2], teacher, ignore_diagonal=True) * 2 / 14
    theirs = theirs + loss_fn(student[2:], teacher) * 12 / 14
    assert_same(dino_loss(student, teacher).loss, theirs, student)


def test_dinov3_computes_in_float32_and_takes_no_other_teacher():
    student, teacher = views((2, 2, 3, 4), torch.float64)
    with pytest.raises(RuntimeError):
        dinov3.DINOLoss(4)(student, teacher)
    assert dino_loss(student, teacher).loss.dtype == torch.float64


# --- teachers -------------------------------------------------------------------------------


@BOTH
def test_centers_of_two_steps(peer):
    cls, patches, center = peer.DINOLoss(16), peer.iBOTPatchLoss(16), torch.zeros(16)
    cls.center.zero_(), patches.center.zero_()  # NaN in DINOv3 until init_weights
    for step in range(3):
        logits = normal(4, 6, 16, seed=step)
        rows = logits.flatten(0, 1)
        ours = centered_softmax(rows, center, temperature=0.07)
        center = updated_center(center, rows, momentum=0.9)
        assert_close(cls.softmax_center_teacher(rows, 0.07), ours)
        assert_close(patches.softmax_center_teacher(logits, 0.07), ours.view_as(logits))
        cls.update_center(rows), patches.update_center(logits)
    cls.apply_center_update(), patches.apply_center_update()
    assert_close(cls.center[0], center)
    assert_close(patches.center[0, 0], center)


@BOTH
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("shape", [(2, 3), (12, 16), (64, 9000)])
def test_sinkhorn_where_theirs_is_finite(peer, shape, iterations):
    logits = normal(*shape) / 2
    theirs = peer.DINOLoss(shape[1]).sinkhorn_knopp_teacher(logits, 0.05, iterations)
    ours = sinkhorn(logits, temperature=0.05, iterations=iterations)
    exact = sinkhorn(logits.double(), temperature=0.05, iterations=iterations)
    for found in (ours, theirs):  # theirs is float32 whatever the logits are
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() < 3e-7


@BOTH
def test_theirs_is_nan_from_a_logit_of_4_and_with_a_sample_5_lower(peer):
    high, low = normal(12, 16) / 2, normal(12, 16) / 2
    high[0, 0] = 4.0
    low[0] -= 5
    for logits in (high, low):
        assert peer.DINOLoss(16).sinkhorn_knopp_teacher(logits, 0.04).isnan().all()
        exact = sinkhorn(logits.double(), temperature=0.04)
        assert (sinkhorn(logits, temperature=0.04) - exact).abs().max() < 1e-6


def test_their_sinkhorn_of_patches_needs_a_process_group():
    with pytest.raises(ValueError, match="process group has not been initialized"):
        dinov2.iBOTPatchLoss(16).sinkhorn_knopp_teacher(normal(12, 16), 0.05, torch.tensor(12))


# --- iBOTPatchLoss --------------------------------------------------------------------------


def patches(shape, dtype, unmasked):
    """Return logits, probabilities and a mask, "images patches prototypes"."""
    mask = torch.rand(shape[:2], generator=torch.Generator().manual_seed(0)) < 0.4
    mask[1] &= not unmasked
    student = normal(*shape, dtype=dtype).requires_grad_()
    return student, normal(*shape, seed=1, dtype=dtype).softmax(-1), mask


@BOTH
@DTYPES
@pytest.mark.parametrize("unmasked", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 4), (4, 49, 16), (4, 60, 4000)])
def test_patches(peer, shape, unmasked, dtype):
    student, teacher, mask = patches(shape, dtype, unmasked)
    loss_fn, index = peer.iBOTPatchLoss(shape[2]), mask.nonzero()[:, 0]
    # DINOv3 computes in float32.
    close = {"rtol": 1e-5, "atol": 1e-6} if peer is dinov3 else {}
    for theirs in (
        loss_fn(student, teacher, mask),
        loss_fn.forward_masked(student[mask], teacher[mask], student_masks_flat=mask),
    ):
        ours = ibot_loss(student[mask], teacher[mask], index, images=shape[0]).loss
        assert_same(ours, theirs.to(dtype), student, **close)


@BOTH
def test_patches_with_padding_to_an_upper_bound(peer):
    student, teacher, mask = patches((4, 49, 16), torch.float32, True)
    count, index = int(mask.sum()), mask.nonzero()[:, 0]
    padded = [F.pad(x[mask], (0, 0, 0, 7)) for x in (student, teacher)]
    weight = (1 / mask.sum(-1).clamp(min=1.0))[:, None].expand_as(mask)[mask]
    theirs = peer.iBOTPatchLoss(16).forward_masked(
        *padded, student_masks_flat=mask, n_masked_patches=count, masks_weight=weight
    )
    ours = ibot_loss(student[mask], teacher[mask], index, images=4).loss
    assert_same(ours, theirs, student)


def test_in_bfloat16_dinov2_multiplies_in_bfloat16():
    student, teacher, mask = patches((4, 60, 4000), torch.bfloat16, False)
    index = mask.nonzero()[:, 0]
    exact = ibot_loss(student[mask].double(), teacher[mask].double(), index, images=4).loss
    ours = ibot_loss(student[mask], teacher[mask], index, images=4).loss
    two, three = (
        peer.iBOTPatchLoss(4000).forward_masked(student[mask], teacher[mask], mask)
        for peer in (dinov2, dinov3)
    )
    assert abs(ours / exact - 1) < 1e-6
    assert abs(three / exact - 1) < 1e-6
    assert abs(two / exact - 1) > 1e-5


# --- KoLeo ----------------------------------------------------------------------------------


@BOTH
@DTYPES
@pytest.mark.parametrize("shape", [(2, 3), (9, 6), (300, 32)])
def test_koleo_is_theirs_but_for_an_eps_in_each_coordinate(peer, shape, dtype):
    z = normal(*shape, dtype=dtype).requires_grad_()
    assert_same(koleo_loss(z).loss, peer.KoLeoLoss()(z), z, rtol=1e-5, atol=1e-6)


@BOTH
def test_koleo_of_float16_is_computed_in_float16(peer):
    z = normal(64, 256).half()
    exact = koleo_loss(z.double()).loss
    assert abs(koleo_loss(z).loss / exact - 1) < 1e-6
    assert abs(peer.KoLeoLoss()(z) / exact - 1) > 5e-5
    z[1] = z[0]
    assert peer.KoLeoLoss()(z) == torch.inf  # their eps of 1e-8 is 0 in float16
    assert koleo_loss(z).loss.isfinite()


@DTYPES
@pytest.mark.parametrize("top_k", [1, 3])
def test_koleo_of_several_neighbours(top_k, dtype):
    z = normal(9, 6, dtype=dtype).requires_grad_()
    theirs = dinov3.KoLeoLossDistributed(topk=top_k)(z).to(dtype)
    assert_same(koleo_loss(z, top_k=top_k).loss, theirs, z, rtol=1e-5, atol=1e-6)


# --- GramLoss -------------------------------------------------------------------------------

GRAM_SIZES = pytest.mark.parametrize("shape", [(2, 3, 5), (3, 150, 5), (2, 300, 48)])
LEVELS = pytest.mark.parametrize("level", ["image", "batch"])


def gram(student, teacher, level, **options):
    return dinov3.GramLoss(**options)(student, teacher, img_level=level == "image")


@GRAM_SIZES
@LEVELS
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("negatives", ["both", "keep"])
def test_gram_anchoring(shape, level, normalize, negatives):
    student, teacher = normal(*shape).requires_grad_(), normal(*shape, seed=1)
    theirs = gram(student, teacher, level, apply_norm=normalize, remove_neg=negatives == "both")
    options = {"normalize": normalize, "negatives": negatives, "level": level}
    ours = gram_anchor_loss(student, teacher, **options).loss
    assert_same(ours, theirs, student)


@GRAM_SIZES
@LEVELS
def test_their_removal_of_the_teachers_negatives_alone_leaves_the_students(shape, level):
    student, teacher = normal(*shape).requires_grad_(), normal(*shape, seed=1)
    theirs = gram(student, teacher, level, remove_neg=False, remove_only_teacher_neg=True)
    ours = gram_anchor_loss(student, teacher, negatives="teacher", level=level).loss
    own, wanted = (F.normalize(x, dim=-1) for x in (student, teacher))
    if level == "batch":
        own, wanted = own.flatten(0, 1), wanted.flatten(0, 1)
    own, wanted = own @ own.mT, wanted @ wanted.mT
    both_negative = (own < 0) & (wanted < 0)
    assert_same(ours + own[both_negative].square().sum() / own.numel(), theirs, student)
    assert theirs > 1.15 * ours


def test_the_level_that_its_constructor_takes_has_no_effect():
    student, teacher = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    theirs = dinov3.GramLoss(img_level=False)(student, teacher)
    assert_close(theirs, gram_anchor_loss(student, teacher, level="image").loss)
    assert not torch.isclose(theirs, gram_anchor_loss(student, teacher, level="batch").loss)


# --- over ranks -----------------------------------------------------------------------------


def test_teachers_over_ranks_with_equal_numbers_of_samples(ranks):
    logits = normal(12, 16) / 2
    exact = sinkhorn(logits, temperature=0.1).split(4)
    center = updated_center(torch.zeros(16), logits)
    for wanted, (theirs, ours, ours_center, count) in zip(
        exact, ranks(teachers_over_ranks, logits.split(4)), strict=True
    ):
        assert_close(ours, wanted)
        assert_close(ours_center, center)
        for name, found in theirs.items():
            assert_close(found, center if "center" in name else wanted, rtol=1e-5, atol=1e-6)
        assert count == 12  # of all ranks, in the caller's own tensor


def test_teachers_over_ranks_with_other_numbers(ranks):
    logits = normal(12, 16) / 2
    sizes = [2, 3, 7]
    exact = sinkhorn(logits, temperature=0.1).split(sizes)
    center = updated_center(torch.zeros(16), logits)
    apart = {}
    for wanted, (theirs, ours, ours_center, _) in zip(
        exact, ranks(teachers_over_ranks, logits.split(sizes)), strict=True
    ):
        assert_close(ours, wanted)
        assert_close(ours_center, center)
        for name, found in theirs.items():
            difference = (found - (center if "center" in name else wanted)).abs().max().item()
            apart[name] = max(apart.get(name, 0), difference)
    # Each rank's samples weigh 1 over their number in the first two iterations, and in the center.
    for name in ("dinov2", "dinov3"):
        assert apart[f"{name} DINO"] == pytest.approx(0.22, abs=0.01)
        assert apart[f"{name} center"] == pytest.approx(0.031, abs=0.001)
        assert apart[f"{name} iBOT"] < 1e-6  # whose number of samples is that of all ranks


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("size", [None, 5])
def test_koleo_over_ranks(ranks, size, top_k):
    x, weight = normal(15, 6, dtype=torch.float64), normal(6, 5, seed=1, dtype=torch.float64)
    whole = weight.clone().requires_grad_()
    loss = koleo_loss(x @ whole, top_k=top_k, group_size=size).loss
    (gradient,) = torch.autograd.grad(loss, whole)
    numbers = {"loss_group_size": size, "topk": top_k}
    found = ranks(koleo_over_ranks, x.split(5), [weight] * 3, [numbers] * 3)
    for (_, theirs), (value, ours) in found:
        assert_close(value, loss.detach())
        assert_close(ours, gradient)
        assert_close(theirs, gradient, rtol=1e-5, atol=1e-6)
    # Theirs is the value of the rank's own samples; it is computed in float32.
    values = torch.stack([value for (value, _), _ in found]).double()
    assert_close(values.mean(), loss.detach(), rtol=1e-5, atol=1e-6)
    assert values.std() > 0.01
