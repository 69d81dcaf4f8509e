"""Means over the rows that count, on all ranks: what losses over rows are made of.

A row is a token, a sample or whatever a loss averages over. `mask` keeps rows; `batch_group` adds
those of other ranks.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from . import _groups
from ._groups import GradReduction, ProcessGroup
from ._numbers import accumulator, lifted


def means_over_rows(
    per_row: Sequence[Tensor],
    mask: Tensor | None,
    batch_group: ProcessGroup | None,
    grad_reduction: GradReduction,
) -> list[Tensor]:
    """Average each quantity over the rows that count, on all ranks, with one sum over ranks.

    Each element of per_row is " batch" or "batch n" (which gives " n"). No row counts: NaN.
    """
    dtype = accumulator(per_row[0])
    sums = [kept_rows(rows, mask).sum(0, dtype=dtype) for rows in per_row]
    count = per_row[0].shape[0] if mask is None else mask.sum()
    if batch_group is not None:
        # Filled on the device: torch.tensor(number) would be a copy that synchronizes with it.
        counted = sums[0].new_full((1,), len(per_row[0])) if mask is None else mask.sum()[None]
        parts = [*(one.reshape(-1) for one in sums), counted.to(dtype)]
        scale = _groups.gradient_scale(batch_group, grad_reduction)
        totals = _groups.terminal_sum(torch.cat(parts), batch_group, scale)
        *whole, count = cast("tuple[Tensor, ...]", totals.split([len(part) for part in parts]))
        sums = [one.reshape(like.shape) for one, like in zip(whole, sums, strict=True)]
        count = count[0]
    return [
        (one / count).to(lifted(rows[:0]).dtype) for one, rows in zip(sums, per_row, strict=True)
    ]


def kept_rows(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return rows, with 0 in those that do not count, whatever they hold."""
    if mask is None:
        return rows
    return rows.where(mask if rows.ndim == 1 else mask[:, None], 0)
