"""The decoupled contrastive loss: its weights, and one logarithm over both views' negatives."""

import math

import pytest
import torch
from losses._contrast import noisy_views

from termwise.joint_embedding import decoupled_contrastive_loss


@pytest.mark.usefixtures("path")
def test_weights_by_hand():
    # A pair at 0 degrees and one at 90: cosines 1 and 0, sigma 1; all other cosines are 0 or 1.
    z1, z2 = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    terms = decoupled_contrastive_loss(z1, z2, temperature=1.0, sigma=1.0)
    share = math.e / (math.e + 1)
    close, far = 2 - 2 * share, 2 - 2 * (1 - share)
    # z1: (1, 0) sees 0 and 1; (0, 1) sees 0 and 0. z2: both (1, 0): see 1 and 0, and 1 and 1.
    sums = [math.log(1 + math.e), math.log(2), math.log(1 + math.e), math.log(2 * math.e)]
    assert terms.loss.item() == pytest.approx((sum(sums) - 2 * close * 1 - 2 * far * 0) / 4)


@pytest.mark.usefixtures("path")
def test_weights_are_of_the_batch_and_have_no_gradient():
    z1, z2 = noisy_views(6, 4)
    cosines = (z1 * z2).sum(1).detach()
    weight = 2 - 6 * (cosines / 0.3).softmax(0)
    terms = decoupled_contrastive_loss(z1, z2, sigma=0.3)
    plain = decoupled_contrastive_loss(z1, z2)
    similar = torch.nn.functional.cosine_similarity(z1, z2)
    expected = plain.loss + ((1 - weight) * similar).mean() / 0.1
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(terms.loss, (z1, z2), retain_graph=True),
        torch.autograd.grad(expected, (z1, z2)),
    )
    # So narrow that exp(1 / sigma) is beyond float32.
    assert decoupled_contrastive_loss(z1.float(), z2.float(), sigma=1e-3).loss.isfinite()
