"""Means over the rows that count, on all ranks, for losses that average over rows.

A row is a token, a sample or another unit that a loss averages over. Weights, or a mask, say how
much each row counts; `batch_group` includes the rows of other ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _groups
from ._groups import GradReduction, ProcessGroup
from ._numbers import accumulator, few, lifted, lifted_dtype

# For so few rows, a sum in the wider dtype is hardly more precise, and converting them takes time.
FEW_ROWS = 2**10


def means_over_rows(
    per_row: Sequence[Tensor],
    weights: Tensor | None,
    batch_group: ProcessGroup | None,
    grad_reduction: GradReduction,
) -> list[Tensor]:
    """Average each quantity over the rows that count, on all ranks, with one sum over ranks.

    Each element of per_row is " rows" or "rows *event" (whose mean is "*event"), or a mean already,
    "", where there are neither weights nor a group. weights is a mask, a weight for each row, or
    None. If no row counts, the mean is NaN.
    """
    return weighted_means(
        (per_row, weights), batch_group=batch_group, grad_reduction=grad_reduction
    )


def weighted_means(
    *samples: tuple[Sequence[Tensor], Tensor | None],
    batch_group: ProcessGroup | None,
    grad_reduction: GradReduction,
) -> list[Tensor]:
    """Average over rows, on all ranks, with one sum over ranks.

    Args:
        samples: for each set of rows, the quantities to average over them, each " rows" or "rows
            *event", and their weights: a mask, a number for each row, or None for 1. The sets may
            have different numbers of rows.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        sum_i w_i v_i / sum_i w_i of each quantity, in the order given; NaN if the weights sum to 0.
    """
    if batch_group is None and all(weights is None for _, weights in samples):
        return [_plain_mean(rows) for per_row, _ in samples for rows in per_row]
    sums: list[Tensor] = []
    counts: list[Tensor | int] = []
    for per_row, weights in samples:
        dtype = accumulator(per_row[0])
        sums += [_weighted_rows(rows, weights).sum(0, dtype=dtype) for rows in per_row]
        number = per_row[0].shape[0]
        counts.append(number if weights is None else weights.sum(dtype=dtype))
    if batch_group is not None:
        # Filled on the device, since copying torch.tensor(number) to it would synchronize.
        known = [n if isinstance(n, Tensor) else sums[0].new_full((), n) for n in counts]
        scale = _groups.gradient_scale(batch_group, grad_reduction)
        totals = _groups.terminal_sums([*sums, *known], batch_group, scale)
        sums, counts = totals[: len(sums)], [*totals[len(sums) :]]
    rows_of = [(rows, n) for n, (per_row, _) in enumerate(samples) for rows in per_row]
    return [
        (one / counts[n]).to(lifted_dtype(rows))
        for one, (rows, n) in zip(sums, rows_of, strict=True)
    ]


def _plain_mean(rows: Tensor) -> Tensor:
    if rows.ndim == 0:
        return rows
    if few(rows) and rows.shape[0] <= FEW_ROWS:
        return lifted(rows).mean(0)
    return rows.mean(0, dtype=accumulator(rows)).to(lifted_dtype(rows))


def kept_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return rows with 0 in place of those that do not count, even if these are NaN."""
    return rows if mask is None else rows.where(_column(mask, rows), 0)


def _weighted_rows(rows: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None or weights.dtype == torch.bool:
        return kept_rows(rows, weights)
    dtype = accumulator(rows)
    return rows.to(dtype) * _column(weights.to(dtype), rows)


def _column(per_row: Tensor, rows: Tensor) -> Tensor:
    return per_row.view(-1, *[1] * (rows.ndim - 1))
