"""The supervised contrastive loss: its two formulas, its factor, and who has no positive."""

import math
import warnings

import pytest
import torch
from losses._contrast import noisy_views

from termwise.joint_embedding import supervised_contrastive_loss


@pytest.mark.usefixtures("path")
def test_two_formulas_by_hand():
    # Cosines of the first sample: 1 and 0 within its class, 0 with the other one, at T = 1.
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    labels = torch.tensor([5, 5, 5, -2])
    outside, inside = (
        supervised_contrastive_loss(z, labels, temperature=1.0, positives=where)
        for where in ("outside", "inside")
    )
    total = math.log(math.e + 2)
    third = math.log(2 + math.exp(-1))
    assert outside.loss.item() == pytest.approx((2 * (total - 0.5) + third) / 3)
    within = math.log(math.e + 1)
    assert inside.loss.item() == pytest.approx((2 * (total - within) + third - math.log(2)) / 3)
    assert outside.n_without_positive == inside.n_without_positive == 1


@pytest.mark.usefixtures("path")
def test_the_factor_of_the_authors_code_is_asked_for():
    z, labels = noisy_views(6, 3)[0], torch.tensor([0, 0, 1, 1, 2, 2])
    plain = supervised_contrastive_loss(z, labels, temperature=0.1)
    scaled = supervised_contrastive_loss(z, labels, temperature=0.1, base_temperature=0.07)
    torch.testing.assert_close(scaled.loss, plain.loss * 0.1 / 0.07)
    torch.testing.assert_close(scaled.accuracy, plain.accuracy)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("positives", ["outside", "inside"])
def test_without_any_positive_the_loss_is_0(positives):
    z = torch.randn(5, 3, requires_grad=True)
    terms = supervised_contrastive_loss(z, torch.arange(5), positives=positives)
    assert terms.loss == terms.accuracy == 0
    assert terms.n_without_positive == 5
    assert torch.autograd.grad(terms.loss, z)[0].count_nonzero() == 0


@pytest.mark.usefixtures("path")
def test_one_class_alone():
    """No negatives at all: inside there is nothing to lose, outside the others are."""
    z = torch.randn(4, 3, dtype=torch.float64)
    labels = torch.zeros(4, dtype=torch.int64)
    assert supervised_contrastive_loss(z, labels, positives="inside").loss == 0
    assert supervised_contrastive_loss(z, labels).loss > math.log(3)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32])
def test_labels_of_any_integers(dtype):
    z, labels = noisy_views(6, 3)[0], torch.tensor([0, 100, 0, 7, 100, 7])
    expected = supervised_contrastive_loss(z, labels).loss
    assert supervised_contrastive_loss(z, labels.to(dtype)).loss == expected


def test_labels_may_be_every_second_of_others(path):
    z, labels = torch.eye(4).repeat(2, 1), torch.arange(16) % 8 // 2
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch.searchsorted says once that they are not contiguous
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            terms = supervised_contrastive_loss(z, labels[::2])
    finally:
        torch.set_warn_always(before)
    assert terms.metrics() == supervised_contrastive_loss(z, labels[::2].clone()).metrics()
