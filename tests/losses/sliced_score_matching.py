"""Sliced score matching."""

import torch
from torch import Tensor

from losses._bench import BATCHES, model, over_batches, slopes
from losses._energies import (
    PROJECTIONS,
    bowl,
    curvature,
    mean,
    of_energy,
    per_row,
    slope,
    variant,
)
from termwise.energy import SlicedScoreMatchingLoss, sliced_score_matching_loss


def formula(energy, x, *, projections, variance_reduced, weights, **_):
    score = slope(energy, x)
    along = sum(per_row(v * score) ** 2 for v in projections) / len(projections)
    square = mean(per_row(score**2) if variance_reduced else along, weights)
    curved = sum(curvature(energy, x, v) for v in projections) / len(projections)
    terms = {"score_square": square, "curvature": mean(curved, weights)}
    return {"loss": 0.5 * square - terms["curvature"], **terms}


# What the benches measure.


def plain_sliced(x: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    point, score = slopes(x)
    (product,) = torch.autograd.grad((score * v).sum(), point, create_graph=True)
    return (0.5 * score.square().sum(1) - (product * v).sum(1)).mean()


def our_sliced(x: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return sliced_score_matching_loss(model(x), x, projections=v[None]).loss


SLICED = of_energy(
    function=sliced_score_matching_loss,
    formula=formula,
    bench={"": over_batches(plain_sliced, our_sliced, *BATCHES)},
    variants={
        "": variant(
            SlicedScoreMatchingLoss(bowl, variance_reduced=False),
            options={"variance_reduced": False},
            named={"projections": "noises rows columns"},
        )
    },
    weights={"score_square": 0.5, "curvature": -1.0},
    overrides=PROJECTIONS,
    permuted=("batch", "projections"),
)
