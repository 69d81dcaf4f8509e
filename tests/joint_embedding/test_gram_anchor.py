"""Gram anchoring: rotations, hand values, what negatives are, tiles, refusals."""

import math

import pytest
import torch
from losses.gram_anchor import GRAM_ANCHOR

import termwise as tw
from termwise.joint_embedding import _gram_anchor as module
from termwise.joint_embedding import gram_anchor_loss

NEGATIVES, LEVELS = ("both", "teacher", "keep"), ("image", "batch")


@pytest.fixture(params=["as written", "in tiles"])
def path(request, monkeypatch):
    if request.param == "in tiles":
        monkeypatch.setattr(module, "_FEW_PAIRS", 0)


def features(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# --- known values ---------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("patches", [2, 9])  # fewer, and more, than features
def test_a_rotation_of_the_teacher_is_no_loss(path, negatives, level, patches):
    teacher = features(3, patches, 4)
    rotation = torch.linalg.qr(features(4, 4, seed=1)).Q
    student = (teacher @ rotation * 3).requires_grad_()
    terms = gram_anchor_loss(student, teacher, negatives=negatives, level=level)
    assert abs(terms.loss.item()) < 1e-15
    assert terms.agreement.item() == pytest.approx(1)
    (gradient,) = torch.autograd.grad(terms.loss, student)
    assert gradient.abs().max() < 1e-14


def test_a_lift_into_more_dimensions_is_no_loss(path):
    teacher = features(2, 3, 4)
    student = torch.cat((teacher, torch.zeros(2, 3, 2)), 2)
    assert gram_anchor_loss(student, teacher).loss == 0


def test_negatives_by_hand(path):
    # The student's cosine is -1. The teacher's is -0.6, and +0.6 in the second image.
    student = torch.tensor([[[1.0, 0.0], [-2.0, 0.0]]] * 2)
    teacher = torch.tensor([[[1.0, 0.0], [-0.6, 0.8]], [[1.0, 0.0], [0.6, 0.8]]])
    losses = {
        negatives: gram_anchor_loss(student, teacher, negatives=negatives).loss.item()
        for negatives in NEGATIVES
    }
    assert losses["both"] == pytest.approx(2 * 0.6**2 / 8)
    assert losses["teacher"] == pytest.approx(2 * 1.6**2 / 8)
    assert losses["keep"] == pytest.approx((2 * 0.4**2 + 2 * 1.6**2) / 8)


def test_what_is_clipped_has_no_gradient(path):
    student = torch.tensor([[[1.0, 0.1], [-2.0, 0.3]]], requires_grad=True)
    terms = gram_anchor_loss(student, torch.tensor([[[1.0, 0.0], [0.6, 0.8]]]))
    (gradient,) = torch.autograd.grad(terms.loss, student)
    assert gradient.abs().max() < 1e-7  # the diagonal is 1 whatever the features are
    other = gram_anchor_loss(student, torch.tensor([[[1.0, 0.0], [0.6, 0.8]]]), negatives="teacher")
    assert torch.autograd.grad(other.loss, student)[0].abs().max() > 0.1


def test_without_normalizing_lengths_count(path):
    student, teacher = torch.tensor([[[2.0]]]), torch.tensor([[[1.0]]])
    assert gram_anchor_loss(student, teacher, normalize=False).loss == 9
    assert gram_anchor_loss(student, teacher).loss == 0


def test_the_teacher_has_no_gradient(path):
    student, teacher = (features(2, 3, 4, seed=seed).requires_grad_() for seed in range(2))
    gram_anchor_loss(student, teacher).loss.backward()
    assert teacher.grad is None
    assert student.grad.count_nonzero() > 0


# --- paths and tiles ------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_paths_and_tiles(monkeypatch, negatives, level, normalize):
    monkeypatch.setattr(module, "_FEW_PAIRS", 0)
    monkeypatch.setattr("termwise._numbers.TILE", 4)
    monkeypatch.setattr("termwise._numbers.IN_CACHE", 20)
    student, teacher = features(3, 6, 4).requires_grad_(), features(3, 6, 5, seed=1)
    options = {"negatives": negatives, "level": level, "normalize": normalize}
    terms = gram_anchor_loss(student, teacher, **options)
    expected = GRAM_ANCHOR.expected(student, teacher, **options)
    torch.testing.assert_close(dict(terms.items()), expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, student) for value in (terms.loss, expected["loss"]))
    )


def test_float32_by_products_of_features():
    student, teacher = features(2, 300, 8), features(2, 300, 8, seed=1)
    near = 0.9 * teacher + 0.1 * student
    expected = GRAM_ANCHOR.expected(near, teacher, negatives="keep")
    terms = gram_anchor_loss(near.float(), teacher.float(), negatives="keep")
    assert terms.loss.item() == pytest.approx(expected["loss"].item(), abs=2e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(path, dtype):
    student = features(2, 3, 4, dtype=dtype).requires_grad_()
    teacher = features(2, 3, 4, dtype=dtype, seed=1)
    terms = gram_anchor_loss(student, teacher)
    torch.testing.assert_close(terms.loss, gram_anchor_loss(student.float(), teacher.float()).loss)
    (gradient,) = torch.autograd.grad(terms.loss, student)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


def test_a_nan_is_not_repaired(path):
    student = features(2, 3, 4)
    student[1, 2, 0] = math.nan
    for negatives in NEGATIVES:
        assert gram_anchor_loss(student, features(2, 3, 4), negatives=negatives).loss.isnan()


def test_in_tiles_it_compiles_whole(monkeypatch):
    monkeypatch.setattr(module, "_FEW_PAIRS", 0)
    student, teacher = features(2, 3, 4).requires_grad_(), features(2, 3, 4, seed=1)
    compiled = torch.compile(gram_anchor_loss, fullgraph=True, backend="aot_eager")
    ours, theirs = (run(student, teacher).loss for run in (compiled, gram_anchor_loss))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(value, student) for value in (ours, theirs)))
    mapped = torch.vmap(lambda x: gram_anchor_loss(x, teacher).loss)
    each = torch.stack((student.detach(), teacher))
    torch.testing.assert_close(
        mapped(each), torch.stack([gram_anchor_loss(x, teacher).loss for x in each])
    )


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3)])
def test_nothing_to_compare_is_refused(shape):
    message = (
        rf"^gram_anchor_loss needs at least 1 image and 1 patch, got {shape[0]} images of "
        rf"{shape[1]} patches$"
    )
    with pytest.raises(ValueError, match=message):
        gram_anchor_loss(torch.zeros(shape), torch.zeros(shape))


def test_other_patches_and_maps_are_refused():
    with pytest.raises(tw.ContractError, match="teacher"):
        gram_anchor_loss(torch.zeros(2, 3, 4), torch.zeros(2, 5, 4))
    with pytest.raises(tw.ContractError, match="student"):
        gram_anchor_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4))
