"""Denoising score matching."""

import torch
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor

from losses._bench import BATCHES, SIGMA, model, over_batches, slopes
from losses._energies import bowl, each, mean, of_energy, per_row, slope, variant
from termwise.energy import DenoisingScoreMatchingLoss, denoising_score_matching_loss


def formula(energy, x, *, sigma, weighting, antithetic, noise, weights, **_):
    """Level by level; a level's sigma and factor may be the rows' own."""
    several = isinstance(sigma, list | tuple)
    sigmas, noises = (sigma, noise) if several else ([sigma], [noise])
    rows = []
    for level, (s, n) in enumerate(zip(sigmas, noises, strict=True)):
        wide = each(s, x) if isinstance(s, Tensor) else s
        factor = {"none": 1.0, "sigma2": s**2}[weighting] if isinstance(weighting, str) else (
            weighting if isinstance(s, Tensor) else weighting[level]
        )  # fmt: skip
        signs = (1, -1) if antithetic else (1,)
        scores = [slope(energy, x + sign * wide * n) for sign in signs]
        square = sum(per_row(g**2) for g in scores) / len(signs)
        cross = sum(
            sign * per_row(g * n / wide) for sign, g in zip(signs, scores, strict=True)
        ) / len(signs)
        constant = 0 * cross if antithetic else per_row((n / wide) ** 2)
        parts = (square / 2 - cross + constant / 2, square, cross, constant)
        rows.append(torch.stack([mean(factor * part, weights) for part in parts]))
    per_sigma, *others = torch.stack(rows, 1)
    names = ("score_square", "cross", "noise_square")
    means = {name: part.mean() for name, part in zip(names, others, strict=True)}
    return {"loss": per_sigma.mean(), **means, "per_sigma": per_sigma}


LEVELS = {"sigma": (0.5, 2.0), "weighting": "sigma2"}


# What the benches measure.


def plain_denoising(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    _, score = slopes(x + SIGMA * noise)
    return 0.5 * (score - noise / SIGMA).square().sum(1).mean()


def our_denoising(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    return denoising_score_matching_loss(model(x), x, sigma=SIGMA, noise=noise).loss


DENOISING = of_energy(
    function=denoising_score_matching_loss,
    formula=formula,
    bench={"": over_batches(plain_denoising, our_denoising, *BATCHES)},
    formula_at=(
        {},
        {"sigma": Float[Tensor, " batch"], "weighting": Float[Tensor, " batch"]},
        {
            "sigma": (0.25, 0.5, 1.0),
            "noise": Float[Tensor, "3 batch *event"],
            "weighting": Float[Tensor, " 3"],
        },
    ),
    variants={
        "": variant(
            DenoisingScoreMatchingLoss(bowl, **LEVELS),
            options=LEVELS,
            named={"noise": "noises rows columns"},
        )
    },
    weights={"score_square": 0.5, "cross": -1.0, "noise_square": 0.5},
    overrides={
        "sigma": st.sampled_from((0.5, 2.0)),
        "weighting": st.sampled_from(("none", "sigma2")),
        "noise": Float[Tensor, "batch *event"],
    },
    also_in_graph=("per_sigma",),
)
