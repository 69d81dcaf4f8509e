"""BYOL's and SimSiam's cosine."""

import torch

from losses import GROUPS, Declaration, Variant
from termwise.joint_embedding import PredictiveCosineLoss, predictive_cosine_loss


def formula(prediction, target, *, form, stop_gradient, **_):
    target = target.detach() if stop_gradient else target
    squares = [(x**2).sum(1) for x in (prediction, target)]
    p, t = (torch.where(square > 0, square, 1e-24).sqrt() for square in squares)
    cosine = ((prediction * target).sum(1) / (p * t)).mean()
    return {"loss": {"byol": 2 - 2 * cosine, "simsiam": -cosine}[form], "cosine": cosine}


SOME = {"form": "simsiam", "stop_gradient": False}
PREDICTIVE_COSINE = Declaration(
    function=predictive_cosine_loss,
    formula=formula,
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
    second=True,
)
