"""Weights of terms: a weight of exactly 0 removes its term from the loss and from the gradient.

0 times an infinite term, or times its derivative, would be NaN. The term itself stays in the graph,
for users who weight the terms themselves. (A compiled backward pass sends zeros to every output, so
there the gradient of an infinite term is NaN.) A weight that is a tensor is never read, since that
would synchronize with the device: it always multiplies its term.
"""

import torch
from torch import Tensor


def is_zero(weight: float | Tensor) -> bool:
    """Whether a weight is known to be 0."""
    return not isinstance(weight, Tensor) and weight == 0


def weighted(weight: float | Tensor, term: Tensor) -> Tensor:
    """Return weight * term in the dtype of the term, or 0 if the weight is 0."""
    if is_zero(weight):
        return torch.zeros_like(term).detach()
    # A weight in float64 must not change the dtype of the loss.
    return (weight.to(term.dtype) if isinstance(weight, Tensor) else weight) * term


def with_auxiliary(
    loss: Tensor, weight: float | Tensor, aux: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return loss + weight * aux, and aux in the dtype of the loss; None is 0.

    Times a number that is not added; a weight that is a tensor may be NaN.
    """
    given = torch.zeros_like(loss).detach() if aux is None else aux.to(loss.dtype)
    if aux is None and not isinstance(weight, Tensor):
        return loss, given
    return loss + weighted(weight, given), given
