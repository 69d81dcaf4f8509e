"""Energy discrepancy."""

import math

from jaxtyping import Float
from torch import Tensor

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


ENERGY_DISCREPANCY = of_energy(
    function=energy_discrepancy_loss,
    formula=formula,
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
