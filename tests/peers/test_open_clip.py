"""open_clip's ClipLoss beside ours, and over ranks with its two ways to gather."""

import pytest
import torch
from open_clip.loss import ClipLoss
from torch.nn.functional import normalize
from torch.testing import assert_close

from termwise.joint_embedding import info_nce_loss


def features(n=9, dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        normalize(torch.randn(n, dim, generator=generator, dtype=dtype), dim=1).requires_grad_()
        for _ in range(2)
    ]


@pytest.mark.parametrize("bias", [None, -10.0])
@pytest.mark.parametrize("n", [9, 700])  # as written, and in strips
def test_clip(n, bias):
    images, texts = features(n)
    scale = torch.tensor(14.3, dtype=torch.float64, requires_grad=True)
    theirs = ClipLoss()(images, texts, scale, bias)
    ours = info_nce_loss(images, texts, scale=scale, bias=bias or 0.0, symmetric=True)
    assert_close(ours.loss, theirs)
    leaves = (images, texts, scale)
    mine = torch.autograd.grad(ours.loss, leaves)
    # Their features are divided by their norms before: of a tangent only, as ours is.
    for x, wanted, found in zip(leaves, torch.autograd.grad(theirs, leaves), mine, strict=True):
        tangent = wanted - (wanted * x).sum(-1, keepdim=True) * x if x.ndim else wanted
        assert_close(found, tangent)
    plain = info_nce_loss(images, texts, scale=scale, symmetric=True, normalize=False)
    again = ClipLoss()(images, texts, scale)
    assert_close(torch.autograd.grad(plain.loss, leaves), torch.autograd.grad(again, leaves))


def test_near_convergence_theirs_is_a_thousandth_off_in_float32():
    generator = torch.Generator().manual_seed(0)
    images = normalize(torch.randn(512, 128, generator=generator), dim=1)
    noise = 0.7 * torch.randn(512, 128, generator=generator) / 128**0.5
    texts = normalize(images + noise, dim=1)
    exact = ClipLoss()(images.double(), texts.double(), torch.tensor(24.0).double())
    theirs = ClipLoss()(images, texts, torch.tensor(24.0))
    ours = info_nce_loss(images, texts, scale=24.0, symmetric=True, normalize=False).loss
    assert abs(ours.double() / exact - 1) < 1e-6
    assert abs(theirs.double() / exact - 1) > 1e-5
