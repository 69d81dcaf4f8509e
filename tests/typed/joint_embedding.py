"""What a type checker knows of the joint-embedding losses. Never run: pyright and mypy read it."""

from typing import assert_type

from torch import Tensor
from torch.distributed import ProcessGroup

from termwise.joint_embedding import (
    DecoupledContrastiveLoss,
    DecoupledContrastiveTerms,
    InfoNCELoss,
    InfoNCETerms,
    NTXentLoss,
    NTXentTerms,
    SupervisedContrastiveLoss,
    SupervisedContrastiveTerms,
    VICRegLoss,
    VICRegTerms,
    decoupled_contrastive_loss,
    info_nce_loss,
    nt_xent_loss,
    supervised_contrastive_loss,
    vicreg_loss,
)


def functions(z1: Tensor, z2: Tensor, group: ProcessGroup) -> None:
    terms = vicreg_loss(z1, z2, variance_views="mean", batch_group=group)
    assert_type(terms, VICRegTerms)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), VICRegTerms)
    for name, value in terms.items():
        assert_type(name, str)
        assert_type(value, Tensor)
    for field in (terms.loss, terms.sim, terms.var, terms.cov, terms.std):
        assert_type(field, Tensor)


def modules(z1: Tensor, z2: Tensor, group: ProcessGroup) -> None:
    loss_fn = VICRegLoss(sim_weight=25, covariance_path="gram")
    assert_type(loss_fn(z1, z2), VICRegTerms)
    assert_type(loss_fn(z1, z2, batch_group=group), VICRegTerms)
    assert_type(loss_fn.gamma, float)


def contrast(z1: Tensor, z2: Tensor, labels: Tensor, group: ProcessGroup) -> None:
    scale, queue = z1.sum(), z2
    clip = info_nce_loss(z1, z2, scale=scale, bias=-10.0, symmetric=True, batch_group=group)
    assert_type(clip, InfoNCETerms)
    assert_type(info_nce_loss(z1, z2, scale=5, negatives=queue, positives=labels), InfoNCETerms)
    assert_type(nt_xent_loss(z1, z2, temperature=0.1, batch_group=group), NTXentTerms)
    assert_type(
        supervised_contrastive_loss(z1, labels, positives="inside", batch_group=group),
        SupervisedContrastiveTerms,
    )
    assert_type(decoupled_contrastive_loss(z1, z2, sigma=0.5), DecoupledContrastiveTerms)
    for field in (clip.loss, clip.forward, clip.backward, clip.accuracy, clip.alignment):
        assert_type(field, Tensor)
    assert_type(InfoNCELoss(symmetric=True)(z1, z2, scale=scale), InfoNCETerms)
    assert_type(NTXentLoss(temperature=0.1)(z1, z2, batch_group=group), NTXentTerms)
    assert_type(
        SupervisedContrastiveLoss(positives="inside")(z1, labels).n_without_positive, Tensor
    )
    assert_type(DecoupledContrastiveLoss(sigma=0.5).sigma, float | None)
