"""Finite-difference score matching."""

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


FINITE_DIFFERENCE = of_energy(
    function=finite_difference_score_matching_loss,
    formula=formula,
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
