"""Gaussian problems whose expectations are finite sums, so that a proof needs no Monte Carlo."""

import dataclasses

import pytest
import torch
from torch import Tensor

from termwise.energy import _sliced_score_matching


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """A Gaussian model with free mean and precision, and sigma points of Gaussian data."""

    x: Tensor
    """2d rows whose mean and covariance are exactly those of the data."""
    data_mean: Tensor
    covariance: Tensor
    mean: Tensor
    """m, a leaf."""
    precision: Tensor
    """P, a leaf; the energy takes its symmetric part."""

    @property
    def moment(self) -> Tensor:
        """M = covariance + (data_mean - mean)(data_mean - mean)^T."""
        difference = self.data_mean - self.mean
        return self.covariance + torch.outer(difference, difference)

    def energy(self, x: Tensor) -> Tensor:
        centred = x - self.mean
        precision = (self.precision + self.precision.T) / 2
        return 0.5 * (centred @ precision * centred).sum(-1)

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.mean, self.precision


def sigma_points(mean: Tensor, covariance: Tensor) -> Tensor:
    d = len(mean)
    steps = d**0.5 * torch.linalg.cholesky(covariance).T
    return torch.cat([mean + steps, mean - steps])


def gaussian(d: int, seed: int, *, at_the_truth: bool = False) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def spread() -> Tensor:
        root = normal(d, d)
        return root @ root.T / d + 0.5 * torch.eye(d, dtype=torch.float64)

    data_mean, covariance = normal(d), spread()
    mean = data_mean.clone() if at_the_truth else normal(d)
    precision = torch.linalg.inv(covariance) if at_the_truth else spread()
    return Gaussian(
        sigma_points(data_mean, covariance),
        data_mean,
        covariance,
        mean.requires_grad_(),
        precision.requires_grad_(),
    )


@pytest.fixture(scope="session")
def make_gaussian():
    return gaussian


@pytest.fixture(autouse=True)
def few_samples_stand_for_many(monkeypatch):
    """Let sliced score matching carry derivatives forward, as it does for more samples."""
    monkeypatch.setattr(_sliced_score_matching, "FEWEST_PROJECTIONS", 0)
    monkeypatch.setattr(_sliced_score_matching, "FEWEST_CARRIED", 0)
