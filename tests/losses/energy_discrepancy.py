"""Energy discrepancy."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from losses._bench import SIGMA, model, over_batches
from losses._energies import bowl, mean, of_all, of_energy, variant
from termwise.energy import EnergyDiscrepancyLoss, energy_discrepancy_loss


def formula(energy, x, *, t, copies, w_stable, noise, weights, **_):
    of_copies = of_all(energy, x + math.sqrt(t) * (noise[0] + noise[1:]))
    total = w_stable / copies + (energy(x) - of_copies).exp().mean(0)
    v = (-of_copies).exp()
    return {
        "loss": mean(total.log(), weights),
        "gap": mean(energy(x) - of_copies.mean(0), weights),
        "stabilization": mean(w_stable / copies / total, weights),
        "effective_copies": mean(v.sum(0).square() / v.square().sum(0), weights),
    }


# What the benches measure.


def plain_discrepancy(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    moved = x + SIGMA * noise
    copies = torch.stack([moved + SIGMA * noise, moved - SIGMA * noise])
    gaps = model(x)(x) - model(x)(copies.flatten(0, 1)).view(2, -1)
    return (F.pad(gaps, (0, 0, 1, 0)).logsumexp(0) - math.log(2)).mean()


def our_discrepancy(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    draws = torch.stack([noise, noise, -noise])
    return energy_discrepancy_loss(model(x), x, t=SIGMA**2, copies=2, noise=draws).loss


ENERGY_DISCREPANCY = of_energy(
    function=energy_discrepancy_loss,
    formula=formula,
    bench={"": over_batches(plain_discrepancy, our_discrepancy)},
    variants={
        "": variant(
            EnergyDiscrepancyLoss(bowl, t=0.3, copies=1),
            options={"t": 0.3, "copies": 1},
            named={"noise": "noises rows columns"},
        )
    },
    weights={},
    overrides={"noise": Float[Tensor, "{copies}+1 batch *event"]},
)
