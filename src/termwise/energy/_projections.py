"""Random directions v with E[v v^T] = I, for losses that use them."""

import math
from typing import Literal

import torch
from torch import Tensor

from .._numbers import lifted

Distribution = Literal["rademacher", "sphere", "gaussian"]


def projections_of(
    caller: str,
    x: Tensor,
    projections: int | Tensor,
    distribution: Distribution,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the given directions, or draw them: "projections batch *event", at least float32."""
    count = projections if isinstance(projections, int) else projections.shape[0]
    if count < 1:
        raise ValueError(f"{caller} needs at least one projection, got {count}")
    if isinstance(projections, Tensor):
        return lifted(projections)
    device = x.device if generator is None else generator.device
    v = torch.empty(count, *x.shape, dtype=lifted(x[:0]).dtype, device=device)
    if distribution == "rademacher":
        v = v.bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    else:
        v = v.normal_(generator=generator)
    if distribution == "sphere":
        # Of radius sqrt(d): unit vectors have E[v v^T] = I / d.
        d = math.prod(x.shape[1:])
        rows = v.reshape(count, x.shape[0], d)
        lengths = rows.square().sum(2, keepdim=True).sqrt()
        v = (rows / lengths * math.sqrt(d)).view_as(v)
    return v.to(x.device)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum a * b over the axes of the event, each row along each direction."""
    product = a * b
    return product.flatten(2).sum(2) if product.ndim > 2 else product
