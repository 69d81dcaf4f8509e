"""Two-dimensional densities with known normalizers, and integrals by quadrature."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

_HALF_WIDTH = 8.0  # of the square of integration; the data lie within about 3 of the origin
_INNER = 7.0  # half the width of a smaller square, to bound what the first one cuts off
SPACING = 0.1  # of the grid: a third of the smallest standard deviation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """A mixture of isotropic Gaussians with equal weights and one standard deviation."""

    centres: Tensor
    """Means of the Gaussians, "centres 2"."""
    deviation: float

    def log_density(self, x: Tensor) -> Tensor:
        """Return the log-density of each row."""
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
    """Return eight Gaussians on a circle, which overlap."""
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
    """A square grid to evaluate functions on, and to integrate over, in float64."""

    def __init__(self, device: torch.device) -> None:
        self.axis = torch.linspace(
            -_HALF_WIDTH, _HALF_WIDTH, round(2 * _HALF_WIDTH / SPACING) + 1, device=device
        )
        self.points = torch.cartesian_prod(self.axis, self.axis)

    def on_grid(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Evaluate a function of rows on the grid: x along the first axis, y along the second."""
        return function(self.points).double().reshape(len(self.axis), -1)

    def integral(self, values: Tensor) -> float:
        """Integrate a function that is 0 near the border of the square."""
        return float(values.sum()) * SPACING**2

    def log_integral(self, exponents: Tensor) -> tuple[float, float]:
        """Return the logarithm of the integral of exp(exponents), and a bound on its error.

        The bound is the largest change with twice the spacing or with a smaller square. The error
        is much smaller: for a smooth function that is 0 near the border, the sum over a grid
        converges faster than any power of the spacing.
        """
        value = _log_sum(exponents, SPACING)
        coarse = _log_sum(exponents[::2, ::2], 2 * SPACING)
        within = self.axis.abs() <= _INNER + SPACING / 2
        smaller = _log_sum(exponents[within][:, within], SPACING)
        return value, max(abs(value - coarse), abs(value - smaller))

    def shown(self, values: Tensor, half_width: float) -> Tensor:
        """Return the values in the central square of this half width."""
        within = self.axis.abs() <= half_width + SPACING / 2
        return values[within][:, within]


def _log_sum(exponents: Tensor, spacing: float) -> float:
    return float(exponents.flatten().logsumexp(0)) + 2 * math.log(spacing)
