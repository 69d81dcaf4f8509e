"""Checks of the temperature, normalizer and groups of every loss of language models."""

import itertools
import math

import torch
from torch import Tensor

from .._groups import ProcessGroup
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


def check_groups(
    name: str,
    batch_group: ProcessGroup | None,
    vocab_group: ProcessGroup | None,
    sequence_group: ProcessGroup | None,
) -> None:
    """Raise an error if one group of several ranks is passed for two axes."""
    groups = {
        "batch_group": batch_group,
        "vocab_group": vocab_group,
        "sequence_group": sequence_group,
    }
    given = [(argument, group) for argument, group in groups.items() if group is not None]
    for (first, one), (second, other) in itertools.combinations(given, 2):
        if one.group_name == other.group_name and one.size() > 1:
            raise ValueError(
                f"{name} needs other groups for {first} and {second}, got one for both: its ranks "
                f"can hold parts of one axis only. Leave one of them out, and pass tensors that "
                f"are whole along its axis; for a DTensor that is "
                f"x.redistribute(placements=[Replicate()]).to_local()"
            )


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
