"""Densities on the plane whose normalizer is known, and integrals over the plane by quadrature."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

_HALF_WIDTH = 8.0  # of the square that integrals run over; data end near 3
_INNER = 7.0  # of a smaller one, which shows how much the square cuts off
SPACING = 0.1  # a third of the narrowest deviation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Round Gaussians of one size and equal weights: smooth, and normalized in closed form."""

    centres: Tensor
    """Place and axis, "centres 2"."""
    deviation: float

    def log_density(self, x: Tensor) -> Tensor:
        """Return log p of each row."""
        squares = (x[:, None] - self.centres.to(x)).square().sum(2)
        exponents = -squares / (2 * self.deviation**2)
        count = len(self.centres)
        return exponents.logsumexp(1) - math.log(count * 2 * math.pi * self.deviation**2)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw exact samples."""
        which = torch.randint(len(self.centres), (count,), generator=generator)
        noise = torch.randn(count, 2, generator=generator)
        return self.centres[which] + self.deviation * noise


def eight_gaussians() -> Mixture:
    """Return eight Gaussians on a ring, so near to each other that samples show their weights."""
    angles = torch.arange(8) * (math.pi / 4)
    return Mixture(centres=2 * torch.stack([angles.cos(), angles.sin()], dim=1), deviation=0.4)


def moons() -> Mixture:
    """Return two interleaved half circles, each of 16 overlapping Gaussians."""
    angles = (torch.arange(16) + 0.5) * (math.pi / 16)
    upper = torch.stack([angles.cos(), angles.sin()], dim=1)
    lower = torch.stack([1 - angles.cos(), 0.5 - angles.sin()], dim=1)
    middle = torch.tensor([0.5, 0.25])
    return Mixture(centres=1.6 * (torch.cat([upper, lower]) - middle), deviation=0.32)


class Plane:
    """A square grid, over which sums are integrals; in float64."""

    def __init__(self, device: torch.device) -> None:
        self.axis = torch.linspace(
            -_HALF_WIDTH, _HALF_WIDTH, round(2 * _HALF_WIDTH / SPACING) + 1, device=device
        )
        self.points = torch.cartesian_prod(self.axis, self.axis)

    def on_grid(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Evaluate a function of rows; by x along the first axis, y along the second."""
        return function(self.points).double().reshape(len(self.axis), -1)

    def integral(self, values: Tensor) -> float:
        """Integrate over the square, where what is integrated has ended before the border."""
        return float(values.sum()) * SPACING**2

    def log_integral(self, exponents: Tensor) -> tuple[float, float]:
        """Return the logarithm of the integral of exp, and a bound on its error.

        The error is what changes with twice the spacing or with a smaller square, at most. As
        smooth functions that end inside the square converge faster than any power of the spacing,
        the integral itself is much nearer.
        """
        value = _log_sum(exponents, SPACING)
        coarse = _log_sum(exponents[::2, ::2], 2 * SPACING)
        within = self.axis.abs() <= _INNER + SPACING / 2
        smaller = _log_sum(exponents[within][:, within], SPACING)
        return value, max(abs(value - coarse), abs(value - smaller))

    def shown(self, values: Tensor, half_width: float) -> Tensor:
        """Cut out the middle."""
        within = self.axis.abs() <= half_width + SPACING / 2
        return values[within][:, within]


def _log_sum(exponents: Tensor, spacing: float) -> float:
    return float(exponents.flatten().logsumexp(0)) + 2 * math.log(spacing)
