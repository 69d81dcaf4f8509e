"""Shared code of losses that match a field along paths from noise to data."""

from torch import Tensor

from .._numbers import lifted
from ._energies import per_row_sum


def straight_path(
    x0: Tensor, x1: Tensor, time: Tensor, sigma_min: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the point of each row's path at its time, in x1's dtype, and the path's velocity."""
    start, end = lifted(x0), lifted(x1)
    velocity = end - (1 - sigma_min) * start
    return (start + for_rows(time, end) * velocity).to(x1.dtype), velocity


def for_rows(per_row: Tensor, of: Tensor) -> Tensor:
    """Convert and reshape one number for each row to multiply a batch of events."""
    return per_row.to(of.dtype).view(-1, *[1] * (of.ndim - 1))


def truncated_decay(time: Tensor, cutoff: float) -> Tensor:
    """Return 1 until the cutoff, and then decrease linearly to 0 at time 1."""
    time = lifted(time)
    if cutoff == 1:
        return time.new_ones(time.shape)
    return ((1 - time) / (1 - cutoff)).clamp(0, 1)


def squares(field: Tensor, target: Tensor) -> list[Tensor]:
    """Return |field - target|^2 of each row and its parts |field|^2, -2 field . target, |target|^2.

    The whole is not computed as a sum of the parts, which cancel if field and target agree.
    """
    return [
        per_row_sum((field - target).square()),
        per_row_sum(field.square()),
        -2 * per_row_sum(field * target),
        per_row_sum(target.square()),
    ]
