"""Checks of the temperature and the normalizer of every loss of language models."""

import math

import torch
from torch import Tensor

from .._numbers import accumulator


def check_temperature(name: str, temperature: float) -> None:
    """Raise an error for a temperature that is not positive and finite."""
    if not temperature > 0:
        raise ValueError(f"{name} needs temperature > 0, got {temperature}")
    if temperature == math.inf:
        raise ValueError(f"{name} needs a finite temperature, got {temperature}")


def check_normalizer(name: str, normalizer: Tensor | float | None) -> None:
    """Raise an error for a number that is negative or not finite; tensors are not read."""
    if normalizer is None or isinstance(normalizer, Tensor):
        return
    if not normalizer >= 0:
        raise ValueError(f"{name} needs normalizer >= 0, got {normalizer}")
    if normalizer == math.inf:
        raise ValueError(f"{name} needs a finite normalizer, got {normalizer}")


def divisor(normalizer: Tensor | float | None, count: Tensor) -> Tensor:
    """Return the divisor of a sum.

    It is 1 if nothing counts and the normalizer is 0, and NaN for a negative tensor.
    """
    dtype = accumulator(count)
    if normalizer is None:
        return count.clamp_min(1)
    if isinstance(normalizer, Tensor):
        given = normalizer.detach().to(dtype)
        given = given.where(given >= 0, torch.nan)
    else:
        given = torch.full_like(count, normalizer, dtype=dtype)
    return given.where((given != 0) | (count != 0), 1)
