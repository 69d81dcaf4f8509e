"""The KL term of contrastive divergence."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from losses._energies import bowl, minus, of_energy, variant
from termwise.energy import ContrastiveDivergenceKLTerm, contrastive_divergence_kl_term


def formula(energy, samples, *, neighbours, entropy_weight, **_):
    """Kozachenko and Leonenko's entropy, with a harmonic number for the digammas."""
    rows, d = samples.reshape(len(samples), -1), samples[0].numel()
    others = rows if neighbours is None else neighbours.detach().reshape(len(neighbours), -1)
    nearest = []
    for i, row in enumerate(rows):
        at = [other for j, other in enumerate(others) if neighbours is not None or j != i]
        nearest.append(min((row - other).square().sum() for other in at).sqrt().log())
    ball = math.pi ** (d / 2) / math.gamma(d / 2 + 1)
    harmonic = sum(1 / k for k in range(1, len(others) + (neighbours is not None)))
    entropy = d * torch.stack(nearest).mean() + math.log(ball) + harmonic
    mean_energy = energy(samples).mean()
    loss = mean_energy - entropy_weight * entropy
    return {"loss": loss, "energy": mean_energy, "entropy": entropy}


KL_TERM = of_energy(
    function=contrastive_divergence_kl_term,
    formula=formula,
    formula_at=({}, {"neighbours": None}),
    variants={
        "": variant(
            ContrastiveDivergenceKLTerm(bowl, entropy_weight=0.5),
            options={"entropy_weight": 0.5},
            named={"neighbours": "noises columns"},  # without them they are each rank's own
        )
    },
    weights={"energy": 1.0, "entropy": minus("entropy_weight")},
    overrides={"neighbours": Float[Tensor, "neighbours *event"]},
    by={"assert_gradients": ("samples",)},  # the others are where they are
    # Equal samples have an entropy of minus infinity.
    not_held={"assert_finite": "is (inf|nan|-inf)"},
    permuted=("batch", "neighbours"),
)
