"""Finite-difference score matching."""

from torch import Tensor

from losses._bench import SIGMA, model, over_batches
from losses._energies import PROJECTIONS, bowl, mean, of_all, of_energy, variant
from termwise.energy import (
    FiniteDifferenceScoreMatchingLoss,
    finite_difference_score_matching_loss,
)


def formula(energy, x, *, step, projections, weights, **_):
    ahead, behind = (of_all(energy, x + sign * step * projections) for sign in (1, -1))
    square = mean((((ahead - behind) / (2 * step)) ** 2).mean(0), weights)
    curvature = mean(((ahead + behind - 2 * energy(x)) / step**2).mean(0), weights)
    return {"loss": 0.5 * square - curvature, "score_square": square, "curvature": curvature}


# What the benches measure.


def plain_differences(x: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    up, here, down = (model(x)(y) for y in (x + SIGMA * v, x, x - SIGMA * v))
    slope, bend = (up - down) / (2 * SIGMA), (up + down - 2 * here) / SIGMA**2
    return (0.5 * slope.square() - bend).mean()


def our_differences(x: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return finite_difference_score_matching_loss(model(x), x, step=SIGMA, projections=v[None]).loss


FINITE_DIFFERENCE = of_energy(
    function=finite_difference_score_matching_loss,
    formula=formula,
    bench={"": over_batches(plain_differences, our_differences)},
    variants={
        "": variant(
            FiniteDifferenceScoreMatchingLoss(bowl, step=0.2),
            options={"step": 0.2},
            named={"projections": "noises rows columns"},
        )
    },
    weights={"score_square": 0.5, "curvature": -1.0},
    overrides=PROJECTIONS,
    # Energies that differ little: in float64 the formula itself is good to nine digits.
    more={"assert_formula": {"step": 0.5}},
    permuted=("batch", "projections"),
)
