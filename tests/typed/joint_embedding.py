"""What a type checker knows of the joint-embedding losses. Never run: pyright and mypy read it."""

from typing import assert_type

from torch import Tensor
from torch.distributed import ProcessGroup

from termwise.joint_embedding import (
    DINOLoss,
    DINOTerms,
    IBOTLoss,
    IBOTTerms,
    SwappedPredictionLoss,
    SwappedPredictionTerms,
    VICRegLoss,
    VICRegTerms,
    centered_softmax,
    dino_loss,
    ibot_loss,
    sinkhorn,
    swapped_prediction_loss,
    updated_center,
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


def prototypes(logits: Tensor, index: Tensor, center: Tensor, group: ProcessGroup) -> None:
    probs = sinkhorn(logits, temperature=0.05, batch_group=group)
    assert_type(probs, Tensor)
    assert_type(centered_softmax(logits, center, temperature=0.04), Tensor)
    assert_type(updated_center(center, logits, batch_group=group), Tensor)
    terms = dino_loss(logits, probs, same_view="keep", over_pairs="sum", batch_group=group)
    assert_type(terms, DINOTerms)
    assert_type(terms.marginal_entropy, Tensor)
    assert_type(DINOLoss(temperature=0.2)(logits, probs, batch_group=group), DINOTerms)
    assert_type(ibot_loss(logits, probs, index, images=4, over="patches"), IBOTTerms)
    assert_type(IBOTLoss()(logits, probs, index, images=4, batch_group=group), IBOTTerms)
    assert_type(swapped_prediction_loss(logits, queue=logits), SwappedPredictionTerms)
    assert_type(SwappedPredictionLoss(num_global=2)(logits), SwappedPredictionTerms)
