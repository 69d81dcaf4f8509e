"""A running mean of records over steps and ranks."""

import dataclasses
import math
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from . import _groups
from ._groups import ProcessGroup
from ._numbers import accumulator
from ._terms import Terms, host_numbers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TermAverage:
    """Weighted mean of every term over steps, kept on the device until it is read.

    Immutable: `update` returns a new average. Sums are accumulated in float64 (float32 on devices
    without it), and terms are detached, so no graph stays in memory.

    Examples:
        >>> import torch
        >>> import termwise as tw
        >>> average = tw.TermAverage()
        >>> for rows in (2, 6):
        ...     z = torch.arange(rows * 2.0).reshape(rows, 2)
        ...     terms = tw.joint_embedding.vicreg_loss(z, z + rows)
        ...     average = average.update(terms, weight=rows)
        >>> average.metrics("held out/")["held out/sim"]  # (2 * 2^2 + 6 * 6^2) / 8
        28.0
    """

    sums: dict[str, Tensor] = dataclasses.field(default_factory=dict[str, Tensor])
    """Sum of weight times term, by name, over the steps of this rank."""
    weights: dict[str, Float[Tensor, ""]] = dataclasses.field(default_factory=dict[str, Tensor])
    """Sum of the weights of the steps that had the term, by name."""

    def update(self, terms: Terms, weight: float | Tensor = 1.0) -> Self:
        """Add a step.

        Args:
            terms: what the loss returned. Terms of one name have one shape in all steps.
            weight: weight of the step, for instance its number of samples or `terms.num_tokens`; a
                tensor stays on its device. 1: all steps have equal weight.

        Raises:
            ValueError: a term has another shape than in previous steps.
        """
        sums, weights = dict(self.sums), dict(self.weights)
        for name, value in terms.items():
            if name in sums and sums[name].shape != value.shape:
                raise ValueError(
                    f"TermAverage.update needs {name} of shape {list(sums[name].shape)} as in the "
                    f"steps before, got {list(value.shape)}"
                )
            dtype = accumulator(value)
            share = torch.as_tensor(weight, dtype=dtype, device=value.device).detach()
            whole = value.detach().to(dtype) * share
            sums[name] = sums[name] + whole if name in sums else whole
            weights[name] = weights[name] + share if name in weights else share
        return dataclasses.replace(self, sums=sums, weights=weights)

    def metrics(self, prefix: str = "", *, group: ProcessGroup | None = None) -> dict[str, float]:
        """Return the means as Python floats, named as `Terms.metrics` names them.

        Args:
            prefix: put before each name.
            group: process group whose ranks ran different steps, in any numbers, 0 included. Every
                rank of the group must make the call; each sends its sums to all others once, as
                Python numbers. None: no communication.

        Returns:
            The means of scalars and of vectors' elements, the same on every rank; empty if no rank
            has a step, NaN if the weights sum to 0. Synchronizes with the device once.
        """
        vectors = {name: value for name, value in self.sums.items() if value.ndim <= 1}
        weights = {name: self.weights[name].expand(value.shape) for name, value in vectors.items()}
        together = {(_SUM + name): value for name, value in vectors.items()}
        together |= {(_WEIGHT + name): value for name, value in weights.items()}
        ranks = [host_numbers(together)]
        if group is not None:
            ranks = _groups.each_object(ranks[0], group)
        labels = dict.fromkeys(label for rank in ranks for label in rank if label.startswith(_SUM))
        means: dict[str, float] = {}
        for label in labels:
            name = label.removeprefix(_SUM)
            total, weight = (
                math.fsum(rank.get(kind + name, 0.0) for rank in ranks) for kind in (_SUM, _WEIGHT)
            )
            means[prefix + name] = total / weight if weight else math.nan
        return means


_SUM, _WEIGHT = "sum ", "weight "
