"""What a type checker knows of the joint-embedding losses. Never run: pyright and mypy read it."""

from typing import assert_type

from torch import Tensor
from torch.distributed import ProcessGroup

from termwise.joint_embedding import (
    GramAnchorLoss,
    GramAnchorTerms,
    KoLeoLoss,
    KoLeoTerms,
    SigmoidContrastiveLoss,
    SigmoidContrastiveTerms,
    VICRegLoss,
    VICRegTerms,
    gram_anchor_loss,
    koleo_loss,
    sigmoid_contrastive_loss,
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


def pairs_and_patches(a: Tensor, b: Tensor, bias: Tensor, group: ProcessGroup) -> None:
    pairs = sigmoid_contrastive_loss(a, b, scale=10.0, bias=bias, batch_group=group)
    assert_type(pairs, SigmoidContrastiveTerms)
    for field in (pairs.loss, pairs.positive, pairs.negative, pairs.accuracy):
        assert_type(field, Tensor)
    spread = koleo_loss(a, top_k=2, group_size=16, batch_group=group)
    assert_type(spread, KoLeoTerms)
    for field in (spread.loss, spread.nearest_distance, spread.min_distance):
        assert_type(field, Tensor)
    patches = gram_anchor_loss(a, b, negatives="keep", level="batch", batch_group=group)
    assert_type(patches, GramAnchorTerms)
    for field in (patches.loss, patches.agreement):
        assert_type(field, Tensor)

    of_pairs = SigmoidContrastiveLoss(normalize=False)
    assert_type(of_pairs(a, b, scale=bias, bias=-10), SigmoidContrastiveTerms)
    assert_type(of_pairs.normalize, bool)
    assert_type(KoLeoLoss(eps=1e-6)(a, batch_group=group), KoLeoTerms)
    assert_type(GramAnchorLoss(negatives="teacher")(a, b), GramAnchorTerms)
