"""NT-Xent, by hand and beside the loss that it is a case of."""

import math

import pytest
import torch
from losses._contrast import noisy_views

from termwise.joint_embedding import nt_xent_loss, supervised_contrastive_loss


@pytest.mark.usefixtures("path")
def test_two_samples_by_hand():
    # At 0 and 90 degrees, and at 180 and 90: cosines of 0 in a pair, and -1, 0, 0, 1 beside it.
    z1, z2 = torch.tensor([[2.0, 0.0], [-3.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 5.0]])
    terms = nt_xent_loss(z1, z2, temperature=1.0)
    first = math.log(1 + math.exp(-1) + 1)  # of (1, 0): its pair, its opposite, another 0
    second = math.log(1 + 1 + math.e)
    assert terms.loss.item() == pytest.approx((first + second) / 2)
    assert terms.accuracy.item() == 0.5  # ties count, of the first view


@pytest.mark.usefixtures("path")
def test_one_sample_has_nothing_to_lose():
    z = torch.ones(1, 3, requires_grad=True)
    terms = nt_xent_loss(z, torch.ones(1, 3))
    assert terms.loss == 0
    assert torch.autograd.grad(terms.loss, z)[0].count_nonzero() == 0


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("positives", ["outside", "inside"])
def test_it_is_the_supervised_loss_with_a_label_for_each_sample(positives):
    z1, z2 = noisy_views(7, 4)
    labels = torch.arange(7).repeat(2)
    ours = nt_xent_loss(z1, z2, temperature=0.1)
    theirs = supervised_contrastive_loss(
        torch.cat((z1, z2)), labels, temperature=0.1, positives=positives
    )
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(ours.accuracy, theirs.accuracy)
    torch.testing.assert_close(
        torch.autograd.grad(ours.loss, (z1, z2)), torch.autograd.grad(theirs.loss, (z1, z2))
    )
