"""Flow matching."""

import torch
from torch import Tensor

from losses._bench import model, over_batches, plain_flow
from losses._energies import PATH, each, field_terms, of_energy, slope, timed_bowl, variant
from termwise.energy import FlowMatchingLoss, flow_matching_loss


def formula(energy, x0, x1, time, *, sigma_min, weights, **_):
    t = each(time, x0)
    velocity = -slope(energy, (1 - (1 - sigma_min) * t) * x0 + t * x1)
    loss, square, cross, target = field_terms(velocity, x1 - (1 - sigma_min) * x0, weights)
    return {"loss": loss, "velocity_square": square, "cross": cross, "target_square": target}


# What the benches measure.


def our_flow(x: Tensor, other: Tensor, *_: Tensor) -> Tensor:
    time = torch.rand(len(x), device=x.device)
    return flow_matching_loss(model(x), x, other, time).loss


FLOW_MATCHING = of_energy(
    function=flow_matching_loss,
    formula=formula,
    bench={"": over_batches(plain_flow, our_flow)},
    variants={
        "": variant(
            FlowMatchingLoss(timed_bowl, sigma_min=0.1), options={"sigma_min": 0.1}, shapes=PATH
        )
    },
    weights={"velocity_square": 1.0, "cross": 1.0, "target_square": 1.0},
    overrides={"sigma_min": 0.25},
)
