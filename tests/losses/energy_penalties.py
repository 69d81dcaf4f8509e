"""Penalties on an energy and its slope."""

from losses._bench import model, over_batches, slopes
from losses._energies import bowl, mean, of_energy, slope, variant
from termwise.energy import (
    EnergySquarePenalty,
    GradientPenalty,
    energy_square_penalty,
    gradient_penalty,
)


def square(energy, x, *, weights, **_):
    return {"loss": mean(energy(x) ** 2, weights), "energy": mean(energy(x), weights)}


def steepness(energy, x, *, target, weights, **_):
    norm = slope(energy, x).reshape(len(x), -1).norm(dim=1)
    return {"loss": mean((norm - target) ** 2, weights), "gradient_norm": mean(norm, weights)}


SQUARE = of_energy(
    function=energy_square_penalty,
    formula=square,
    bench={
        "": over_batches(
            lambda x, *_: model(x)(x).square().mean(),
            lambda x, *_: energy_square_penalty(model(x), x).loss,
        )
    },
    variants={"": variant(EnergySquarePenalty(bowl), named={"weights": "rows"})},
    weights={},
)
GRADIENT = of_energy(
    function=gradient_penalty,
    formula=steepness,
    bench={
        "": over_batches(
            lambda x, *_: slopes(x)[1].square().sum(1).mean(),
            lambda x, *_: gradient_penalty(model(x), x).loss,
        )
    },
    variants={"": variant(GradientPenalty(bowl, target=1.0), options={"target": 1.0})},
    weights={},
)
