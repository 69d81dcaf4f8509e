"""pytorch-metric-learning's SupConLoss and NTXentLoss beside ours."""

import pytest
import torch
from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss, SupConLoss
from torch.testing import assert_close

from termwise.joint_embedding import info_nce_loss, nt_xent_loss, supervised_contrastive_loss


def embeddings(n=11, dim=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64).requires_grad_()


LABELS = torch.tensor([0, 1, 2, 0, 1, 7, 0, 3, 3, 1, 0])  # two are alone in their class


def compare(ours, theirs, *leaves):
    # They divide by the number of positives and a small number.
    assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    pairs = torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)
    assert_close(*pairs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_supervised(temperature):
    z = embeddings()
    theirs = SupConLoss(temperature=temperature)(z, LABELS)
    ours = supervised_contrastive_loss(z, LABELS, temperature=temperature)
    compare(ours.loss, theirs, z)
    assert ours.n_without_positive == 2


def test_nt_xent_of_pairs():
    z1, z2 = embeddings(), embeddings(seed=1)
    theirs = SelfSupervisedLoss(NTXentLoss(temperature=0.5))(z1, z2)
    compare(nt_xent_loss(z1, z2, temperature=0.5).loss, theirs, z1, z2)
    several = SelfSupervisedLoss(SupConLoss(temperature=0.5))(z1, z2)
    compare(nt_xent_loss(z1, z2, temperature=0.5).loss, several, z1, z2)


def test_one_direction_of_pairs():
    """Embeddings against a reference set: the positives of each are there."""
    z1, z2 = embeddings(), embeddings(seed=1)
    labels = torch.arange(11)
    theirs = NTXentLoss(temperature=0.5)(z1, labels, ref_emb=z2, ref_labels=labels.clone())
    compare(info_nce_loss(z1, z2, scale=2.0).loss, theirs, z1, z2)


def test_with_several_positives_their_nt_xent_is_neither_of_ours():
    """Each positive is compared with the negatives alone, not with the other positives."""
    z = embeddings()
    theirs = NTXentLoss(temperature=0.5)(z, LABELS)
    for positives in ("outside", "inside"):
        ours = supervised_contrastive_loss(z, LABELS, temperature=0.5, positives=positives).loss
        assert (ours - theirs).abs() > 0.01


def test_with_one_class_theirs_is_0_and_ours_is_the_loss_among_positives():
    z, one_class = embeddings(), torch.zeros(11, dtype=torch.int64)
    assert SupConLoss()(z, one_class) == 0
    assert supervised_contrastive_loss(z, one_class, temperature=0.1).loss > 0
    alone = torch.arange(11)
    assert SupConLoss()(z, alone) == supervised_contrastive_loss(z, alone).loss == 0
