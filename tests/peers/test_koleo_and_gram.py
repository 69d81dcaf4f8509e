"""KoLeo beside lightly's and DINOv2's formula, Gram anchoring beside DINOv3's."""

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import KoLeoLoss
from torch.testing import assert_close

from termwise.joint_embedding import gram_anchor_loss, koleo_loss


def rows(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("n", [2, 9, 30])
def test_koleo_is_lightlys_but_for_an_eps_in_each_coordinate(n):
    z = rows(n, 6)
    ours, theirs = koleo_loss(z).loss, KoLeoLoss()(z)
    assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert_close(
        *(torch.autograd.grad(loss, z)[0] for loss in (ours, theirs)), rtol=1e-5, atol=1e-6
    )


def test_their_gradient_of_duplicates_does_not_part_them():
    z = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    (theirs,) = torch.autograd.grad(KoLeoLoss()(z), z)
    (ours,) = torch.autograd.grad(koleo_loss(z).loss, z)
    assert ours.count_nonzero() == 0
    assert_close(theirs[0], theirs[1])
    halves = torch.ones(2, 2, dtype=torch.float16)
    assert koleo_loss(halves).loss.isfinite()
    assert not KoLeoLoss()(halves).isfinite()


def dinov3(student, teacher, negatives, level):
    """`gram_loss.py` of DINOv3 at 6876159, written anew: clipping in this order."""
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    if level == "batch":
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    own, wanted = student @ student.mT, teacher @ teacher.mT
    if negatives != "keep":
        cleared = own < 0
        if negatives == "teacher":
            cleared = cleared & (wanted < 0)
        own, wanted = own.masked_fill(cleared, 0), wanted.masked_fill(wanted < 0, 0)
    return F.mse_loss(own, wanted)


@pytest.mark.parametrize("level", ["image", "batch"])
@pytest.mark.parametrize("negatives", ["both", "teacher", "keep"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 150, 5)])
def test_gram_anchoring_is_dinov3s(shape, negatives, level):
    student, teacher = rows(*shape), rows(*shape, seed=1).detach()
    ours = gram_anchor_loss(student, teacher, negatives=negatives, level=level).loss
    theirs = dinov3(student, teacher, negatives, level)
    assert_close(ours, theirs)
    assert_close(*(torch.autograd.grad(loss, student) for loss in (ours, theirs)))
