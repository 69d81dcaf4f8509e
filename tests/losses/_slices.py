"""What declarations of losses along slices share."""

import math

import torch
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor

DRAWN = {
    "slices": Float[Tensor, "dim slices"],
    "generator": None,
    "t_max": st.sampled_from((3.0, 1.5)),
    "knots": st.sampled_from((17, 2, 4)),
}
# Few elements, and what is made for many.
SMALL_AND_LARGE = ({}, {"termwise.joint_embedding._slices.FEW": 0})
SLICES = {"slices": "columns latents"}


def distances(z, slices, t_max, knots):
    """The integral for each slice of a sample, knot by knot, from -t_max to t_max."""
    step, found = t_max / (knots - 1), []
    for a in slices.detach().T:
        x, total = z @ a, 0.0
        for k in range(1 - knots, knots):
            t = k * step
            wave = torch.exp(1j * t * x).sum() / len(x)
            square = (wave - math.exp(-t * t / 2)).abs() ** 2 * math.exp(-t * t / 2)
            total = total + square * step * (0.5 if abs(k) == knots - 1 else 1.0)
        found.append(total)
    return torch.stack(found)


def apart(z, num_global):
    """The mean squared difference of each view and the mean of the global ones."""
    centre = sum(z[:num_global]) / len(z[:num_global])
    return sum(((view - centre) ** 2).sum() for view in z) / z.numel()


def quantile_distance(z, slices, eps):
    n, found = len(z), []
    mean = z.sum(0) / n
    std = (((z - mean) ** 2).sum(0) / n).sqrt().detach()
    normal = torch.distributions.Normal(z.new_tensor(0.0), z.new_tensor(1.0))
    for a in slices.detach().T:
        x, _ = (((z - mean) / (std + eps)) @ a).sort()
        for i in range(n):
            found.append((x[i] - normal.icdf(z.new_tensor((i + 1) / (n + 1)))) ** 2)
    return sum(found) / len(found)
