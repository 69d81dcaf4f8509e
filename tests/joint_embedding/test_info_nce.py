"""InfoNCE: scale and bias, keys and queues."""

import math

import pytest
import torch
from losses._contrast import noisy_views as views
from losses.info_nce import INFO_NCE

from termwise.joint_embedding import InfoNCELoss, info_nce_loss


@pytest.mark.usefixtures("path")
def test_scale_multiplies():
    """One peer divides by logit_scale: 4.099 where it is 0.0056."""
    a, b = (x.detach() for x in views(8, 16, noise=0.2))
    loss = info_nce_loss(a, b, scale=10.0, symmetric=True).loss.item()
    assert loss == pytest.approx(INFO_NCE.expected(a, b, scale=10.0, symmetric=True)["loss"].item())
    assert loss < 0.1 < info_nce_loss(a, b, scale=1 / 10.0, symmetric=True).loss.item()


@pytest.mark.usefixtures("path")
def test_a_learnt_scale_and_bias():
    a, b = views(7, 4)
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (2.0, -10.0))
    for options in ({"symmetric": True}, {"negatives": torch.randn(5, 4, dtype=torch.float64)}):
        terms = info_nce_loss(a, b, scale=scale, bias=bias, **options)
        plain = info_nce_loss(a, b, scale=2.0, **options)
        assert terms.loss == plain.loss
        assert terms.loss.dtype == torch.float64
        of_scale, of_bias = torch.autograd.grad(terms.loss, (scale, bias))
        expected = INFO_NCE.expected(a, b, scale=scale.double(), **options)["loss"]
        torch.testing.assert_close(of_scale, *torch.autograd.grad(expected, scale))
        assert of_scale.dtype == torch.float32
        assert of_bias == 0
    assert info_nce_loss(a, b, scale=2.0, bias=torch.tensor(math.nan)).loss.isnan()


@pytest.mark.usefixtures("path")
def test_hard_negatives_follow_the_keys():
    """Queries, their keys, and a hard negative each: so many keys more than queries."""
    a, b = views(5, 4)
    hard = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.cat((b, hard))
    terms = info_nce_loss(a, keys, scale=3.0)
    logits = 3 * torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(keys).T
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(5))
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(terms.loss, (a, b, hard)), torch.autograd.grad(expected, (a, b, hard))
    )
    shuffled = torch.tensor([7, 2, 9, 0, 1, 4, 3, 8, 6, 5])
    places = shuffled.argsort()[:5]
    again = info_nce_loss(a, keys[shuffled], scale=3.0, positives=places)
    torch.testing.assert_close(again.loss, terms.loss)
    shared = info_nce_loss(a, b[:1], scale=3.0, positives=torch.zeros(5, dtype=torch.int64))
    assert shared.loss == 0  # one key, which is everyone's


@pytest.mark.usefixtures("path")
def test_a_queue_stands_in_place_of_other_queries_keys():
    a, b = views(5, 4)
    queue = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    terms = info_nce_loss(a, b, scale=5.0, negatives=queue)
    one_by_one = [
        info_nce_loss(a[i : i + 1], torch.cat((b[i : i + 1], queue)), scale=5.0).loss
        for i in range(5)
    ]
    torch.testing.assert_close(terms.loss, sum(one_by_one) / 5)
    gradients = torch.autograd.grad(terms.loss, (a, b, queue), materialize_grads=True)
    assert gradients[2].count_nonzero() == 0
    picked = info_nce_loss(
        a, b.flip(0), scale=5.0, negatives=queue, positives=torch.arange(5).flip(0)
    )
    torch.testing.assert_close(picked.loss, terms.loss)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("stray", [-1, 5])
def test_a_positive_that_is_no_key_makes_the_loss_nan(stray):
    a, b = views(5, 4)
    assert info_nce_loss(a, b, scale=1.0, positives=torch.tensor([0, 1, stray, 3, 4])).loss.isnan()


def test_alignment_is_a_cosine_whatever_the_norms():
    a, b = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[5.0, 0.0], [0.0, 7.0]])
    for normalize in (True, False):
        terms = InfoNCELoss(normalize=normalize)(a, b, scale=1.0)
        assert terms.alignment.item() == pytest.approx((0.6 + 1) / 2)
