"""Equilibrium matching."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from losses._bench import model, over_batches, slopes
from losses._energies import (
    PATH,
    bowl,
    each,
    field_terms,
    of_energy,
    slope,
    truncated_decay,
    variant,
)
from termwise.energy import EquilibriumMatchingLoss, equilibrium_matching_loss


def formula(energy, x0, x1, time, *, cutoff, multiplier, weights, **_):
    t, length = each(time, x0), each(multiplier * truncated_decay(time, cutoff), x0)
    gradient = slope(energy, (1 - t) * x0 + t * x1)
    loss, square, cross, target = field_terms(gradient, length * (x0 - x1), weights)
    return {"loss": loss, "gradient_square": square, "cross": cross, "target_square": target}


# What the benches measure.


def plain_equilibrium(x: Tensor, other: Tensor, *_: Tensor) -> Tensor:
    time = torch.rand(len(x), 1, device=x.device)
    _, score = slopes(x * (1 - time) + other * time)
    weight = 4 * ((1 - time) / 0.2).clamp(max=1)
    return (score - weight * (x - other)).square().sum(1).mean()


def our_equilibrium(x: Tensor, other: Tensor, *_: Tensor) -> Tensor:
    time = torch.rand(len(x), device=x.device)
    return equilibrium_matching_loss(model(x), x, other, time).loss


EQUILIBRIUM_MATCHING = of_energy(
    function=equilibrium_matching_loss,
    formula=formula,
    bench={"": over_batches(plain_equilibrium, our_equilibrium)},
    variants={
        "": variant(
            EquilibriumMatchingLoss(bowl, multiplier=2.0), options={"multiplier": 2.0}, shapes=PATH
        )
    },
    weights={"gradient_square": 1.0, "cross": 1.0, "target_square": 1.0},
    overrides={"cutoff": st.sampled_from((0.25, 0.5))},
    # Not at a time where it bends.
    more={
        law: {"cutoff": st.sampled_from((0.0, 0.3, 0.8))}
        for law in ("assert_formula", "assert_gradients")
    },
)
