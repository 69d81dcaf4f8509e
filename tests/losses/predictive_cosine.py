"""BYOL's and SimSiam's cosine."""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses import GROUPS, Declaration, Variant
from losses._bench import Case, Loss, lightly, normal
from termwise.joint_embedding import PredictiveCosineLoss, predictive_cosine_loss


def formula(prediction, target, *, form, stop_gradient, **_):
    target = target.detach() if stop_gradient else target
    squares = [(x**2).sum(1) for x in (prediction, target)]
    p, t = (torch.where(square > 0, square, 1e-24).sqrt() for square in squares)
    cosine = ((prediction * target).sum(1) / (p * t)).mean()
    return {"loss": {"byol": 2 - 2 * cosine, "simsiam": -cosine}[form], "cosine": cosine}


SOME = {"form": "simsiam", "stop_gradient": False}


# What the benches measure.


def lightly_cosine() -> Loss:
    lightly()
    from lightly.loss import NegativeCosineSimilarity

    return NegativeCosineSimilarity()


def prediction_and_target(batch: int, dim: int) -> list[Tensor]:
    return [normal(batch, dim).requires_grad_(), normal(batch, dim)]


PREDICTIVE_COSINE = Declaration(
    function=predictive_cosine_loss,
    formula=formula,
    bench={
        "": Case(
            ((64, 128), (256, 128), (4096, 256)),
            prediction_and_target,
            lambda p, t: -F.cosine_similarity(p, t).mean(),
            lambda p, t: predictive_cosine_loss(p, t, form="simsiam").loss,
            rows=2**15,
            size_of=lambda rows: (rows, 1024),
            peer=("lightly", lightly_cosine),
        )
    },
    formula_at=({"form": "simsiam"},),
    variants={
        "": Variant(
            module=PredictiveCosineLoss(**SOME),
            options=SOME,
            shapes=("rows columns", "rows columns"),
        )
    },
    overrides={"stop_gradient": False},
    weights={},
    also_in_graph=("cosine",),
    permuted=("batch", "dim"),
    symmetric=(("prediction", "target"),),
    scaled={("prediction",): {"cosine": 0}, ("target",): {"cosine": 0}},
    shards=GROUPS,
    second=("right",),
)
