"""stable-pretraining's losses of two views beside ours, on one process."""

import pytest
import torch
from stable_pretraining.losses.joint_embedding import (
    BarlowTwinsLoss,
    BYOLLoss,
    NTXEntLoss,
    VICRegLoss,
)
from stable_pretraining.losses.utils import VCRegLoss
from torch.testing import assert_close

from termwise.joint_embedding import (
    barlow_twins_loss,
    nt_xent_loss,
    predictive_cosine_loss,
    variance_covariance_loss,
    vicreg_loss,
)


def views(n=12, dim=5):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, n, dim, dtype=torch.float64, generator=generator) / 2
    return [z.requires_grad_() for z in drawn]


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
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name):
    theirs, ours = CASES[name]
    z = views()
    expected, found = theirs(*z), ours(*z).loss
    assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, z, allow_unused=True),
        torch.autograd.grad(expected, z, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other)


def test_their_barlow_twins_of_equal_views_is_never_0():
    z, _ = views()
    ours = barlow_twins_loss(z, z, correction=1, eps_added_to="deviation")
    assert BarlowTwinsLoss()(z, z) > 5 / 12**2 * 0.99  # columns of (1 - (n - 1) / n)^2
    assert_close(ours.alignment, torch.tensor(11 / 12, dtype=torch.float64), rtol=1e-4, atol=0)
