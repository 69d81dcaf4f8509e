"""What declarations of losses along slices share."""

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
    """The integral for each slice of a sample, from -t_max to t_max."""
    t = torch.linspace(-t_max, t_max, 2 * knots - 1, dtype=z.dtype)
    target = torch.exp(-(t**2) / 2)
    waves = torch.exp(1j * t[:, None, None] * (z @ slices.detach()))  # knots, batch, slices
    apart = waves.mean(1) - target[:, None]
    return torch.trapezoid((apart.real**2 + apart.imag**2) * target[:, None], t, dim=0)


def apart(z, num_global):
    """The mean squared difference of each view and the mean of the global ones."""
    centre = sum(z[:num_global]) / len(z[:num_global])
    return sum(((view - centre) ** 2).sum() for view in z) / z.numel()


def quantile_distance(z, slices, eps):
    n, mean = len(z), z.sum(0) / len(z)
    std = (((z - mean) ** 2).sum(0) / n).sqrt().detach()
    ordered, _ = (((z - mean) / (std + eps)) @ slices.detach()).sort(dim=0)
    places = torch.arange(1, n + 1, dtype=z.dtype) / (n + 1)
    quantiles = torch.distributions.Normal(z.new_tensor(0.0), z.new_tensor(1.0)).icdf(places)
    return ((ordered - quantiles[:, None]) ** 2).mean()
