"""Energy matching."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from losses._bench import model, over_batches, plain_flow
from losses._energies import (
    PATH,
    bowl,
    each,
    mean,
    of_energy,
    per_row,
    slope,
    truncated_decay,
    variant,
)
from termwise.energy import EnergyMatchingLoss, energy_matching_loss


def formula(energy, x0, x1, time, negatives, *, contrastive_weight, cutoff, weights, **_):
    t = each(time, x0)
    error = per_row((-slope(energy, (1 - t) * x0 + t * x1) - (x1 - x0)) ** 2)
    flow = mean(truncated_decay(time, cutoff) * error, weights)
    contrast = 0 * flow
    if negatives is not None:
        contrast = mean(energy(x1), weights) - energy(negatives.detach()).mean()
    return {"loss": flow + contrastive_weight * contrast, "flow": flow, "contrast": contrast}


# What the benches measure.


def our_energy_matching(x: Tensor, other: Tensor, *_: Tensor) -> Tensor:
    time = torch.rand(len(x), device=x.device)
    return energy_matching_loss(model(x), x, other, time).loss


ENERGY_MATCHING = of_energy(
    function=energy_matching_loss,
    formula=formula,
    bench={"": over_batches(plain_flow, our_energy_matching)},
    variants={
        "": variant(
            EnergyMatchingLoss(bowl, contrastive_weight=0.3),
            options={"contrastive_weight": 0.3},
            shapes=(*PATH, "rows columns"),
        )
    },
    weights={"flow": 1.0, "contrast": "contrastive_weight"},
    overrides={"cutoff": st.sampled_from((0.25, 1.0))},
    more={"assert_formula": {"cutoff": st.sampled_from((0.0, 0.3, 1.0))}},
    by={"assert_gradients": ("x0", "x1")},
)
