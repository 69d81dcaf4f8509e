"""Decoupled contrastive loss."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from losses import GROUPS, Declaration, Variant
from losses._bench import between_views, of_pairs, two_embeddings
from losses._contrast import ELEMENTS, PATHS, log_sum, nearest, two_views
from termwise.joint_embedding import DecoupledContrastiveLoss, decoupled_contrastive_loss


def formula(z1, z2, *, temperature, sigma, **_):
    cosines, itself, pair = two_views(z1, z2)
    L = cosines / temperature
    weight = torch.ones(len(L), dtype=L.dtype)
    if sigma is not None:
        powers = (cosines[pair].detach() / sigma).exp()
        weight = 2 - len(powers) * powers / powers.sum()
    losses = log_sum(L, ~(itself | pair)) - weight * L[pair]
    return {"loss": losses.mean(), "accuracy": nearest(L, pair, itself).double().mean()}


WEIGHTED = {"temperature": 0.2, "sigma": 0.5}


# What the benches measure.


def plain_decoupled(z1: Tensor, z2: Tensor) -> Tensor:
    logits, itself, other = between_views(z1, z2, 0.5)
    negatives = logits.masked_fill(itself.roll(len(z1), 1), -torch.inf)
    return (negatives.logsumexp(1) - logits.gather(1, other[:, None])[:, 0]).mean()


DECOUPLED_CONTRASTIVE = Declaration(
    function=decoupled_contrastive_loss,
    formula=formula,
    bench={
        "": of_pairs(
            two_embeddings,
            plain_decoupled,
            lambda *z: decoupled_contrastive_loss(*z, temperature=0.5).loss,
        )
    },
    formula_at=({"sigma": None}, {"sigma": 0.5}),
    paths=PATHS,
    second=("right", "refused"),
    variants={
        "": Variant(
            module=DecoupledContrastiveLoss(**WEIGHTED),
            options=WEIGHTED,
            shapes=("rows columns", "rows columns"),
        )
    },
    sizes={"batch": st.integers(2, 4)},
    elements={"z1": ELEMENTS, "z2": ELEMENTS},
    overrides={"sigma": None},  # the weights have no gradient, which differences do not know
    weights={},
    permuted=("batch", "dim"),
    symmetric=(("z1", "z2"),),
    scaled={("z1",): {"loss": 0}, ("z2",): {"loss": 0}},
    shards=GROUPS,
)
