"""What a type checker knows of the joint-embedding losses. Never run: pyright and mypy read it."""

from typing import assert_type

from torch import Tensor
from torch.distributed import ProcessGroup

from termwise.joint_embedding import (
    BarlowTwinsLoss,
    BarlowTwinsTerms,
    MMCRLoss,
    MMCRTerms,
    MultiViewVICRegLoss,
    MultiViewVICRegTerms,
    PredictiveCosineLoss,
    PredictiveCosineTerms,
    VarianceCovarianceLoss,
    VarianceCovarianceTerms,
    VICRegLoss,
    VICRegTerms,
    barlow_twins_loss,
    mmcr_loss,
    multi_view_vicreg_loss,
    predictive_cosine_loss,
    variance_covariance_loss,
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
    for field in (terms.loss, terms.sim, terms.var, terms.cov, terms.std, terms.rank):
        assert_type(field, Tensor)


def modules(z1: Tensor, z2: Tensor, group: ProcessGroup) -> None:
    loss_fn = VICRegLoss(sim_weight=25, covariance_path="gram")
    assert_type(loss_fn(z1, z2), VICRegTerms)
    assert_type(loss_fn(z1, z2, batch_group=group), VICRegTerms)
    assert_type(loss_fn.gamma, float)


def second_moments(z: Tensor, z1: Tensor, z2: Tensor, group: ProcessGroup) -> None:
    many = multi_view_vicreg_loss(z, num_global=2, batch_group=group)
    assert_type(many, MultiViewVICRegTerms)
    assert_type(many.invariance, Tensor)
    assert_type(MultiViewVICRegLoss(num_global=None)(z, batch_group=group), MultiViewVICRegTerms)
    assert_type(variance_covariance_loss(z1, cov_weight=0.1).rank, Tensor)
    assert_type(VarianceCovarianceLoss(gamma=2)(z1), VarianceCovarianceTerms)
    barlow = barlow_twins_loss(z1, z2, correction=1, eps_added_to="deviation", batch_group=group)
    assert_type(barlow, BarlowTwinsTerms)
    assert_type(barlow.on_diagonal, Tensor)
    assert_type(BarlowTwinsLoss(loss_scale=0.025)(z1, z2), BarlowTwinsTerms)
    assert_type(mmcr_loss(z, local_weight=0.1), MMCRTerms)
    assert_type(MMCRLoss(local_weight=0)(z, batch_group=group).centroid_nuclear, Tensor)
    assert_type(predictive_cosine_loss(z1, z2, form="simsiam"), PredictiveCosineTerms)
    assert_type(PredictiveCosineLoss(stop_gradient=False)(z1, z2).cosine, Tensor)
