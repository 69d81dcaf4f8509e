"""A running mean of records: over the steps of an epoch and over ranks."""

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
    """Weighted mean of every term over steps, kept on the device until it is asked for.

    Frozen: `update` returns a new one. Sums are kept in float64 (float32 where a device has none),
    and what was summed is detached, so no graph is kept.

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
    """Of weight times term, by name, over the steps of this rank."""
    weights: dict[str, Float[Tensor, ""]] = dataclasses.field(default_factory=dict[str, Tensor])
    """Of the steps in which a term was there, by name."""

    def update(self, terms: Terms, weight: float | Tensor = 1.0) -> Self:
        """Add a step.

        Args:
            terms: what the loss returned. Terms of one name have one shape in all steps.
            weight: of the step, for instance its number of rows or `terms.num_tokens`; a tensor
                stays on its device. 1: every step counts alike.

        Raises:
            ValueError: a term has another shape than in the steps before.
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
            group: ranks that saw other steps, in any number, 0 included: the mean is over all of
                them. Every rank of the group has to call. Each sends its sums to all others once,
                as Python numbers. None: this rank alone, nothing is sent.

        Returns:
            The means of scalars and of vectors' elements, the same on every rank; empty where no
            rank has a step, NaN where the weights sum to 0. Synchronizes with the device, once.
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
