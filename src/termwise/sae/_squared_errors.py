"""Squared errors of the rows of a reconstruction, scaled so that their ratios do not overflow."""

import math
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _groups
from .._autograd import transformed
from .._groups import ProcessGroup
from .._means import kept_rows
from .._numbers import accumulator, alike, lifted, may_look_at, without_autocast

FeatureReduction = Literal["mean", "sum"]


def squared_errors(
    x: Tensor,
    x_hat: Tensor,
    mask: Tensor | None,
    feature_reduction: FeatureReduction,
    batch_group: ProcessGroup | None,
) -> Tensor:
    """Return the squared error of each row, "rows *layers", for a mean over rows.

    Where all rows count and none is on another rank it is their mean already: a number, or one row.
    """
    if mask is None and batch_group is None and not torch.compiler.is_compiling():
        mean = None if transformed() else _mean_square(x, x_hat)
        if mean is not None:
            mean = mean if feature_reduction == "mean" else mean * x.shape[-1]
            return mean[None] if mean.ndim else mean
    error = residual(x.flatten(1), x_hat.flatten(1), mask).view(x.shape)
    return squared_norm(error, feature_reduction)


def _mean_square(x: Tensor, x_hat: Tensor) -> Tensor | None:
    """Return the mean square of x_hat - x over rows and features, None where sums overflow.

    To look for that on an accelerator would wait: a power of two keeps them within range there.
    """
    x, x_hat = map(lifted, alike(x, x_hat))
    count = x.shape[0] * x.shape[-1]
    if not count:
        return None
    if not may_look_at(x_hat):
        scale = 2.0 ** -math.ceil(math.log2(count) / 2)
        return _squares(x * scale, x_hat * scale, "sum") * (1 / (count * scale**2))
    mean = _squares(x, x_hat, "mean")
    seen = mean.detach()
    return mean if math.isfinite(float(seen.sum() if seen.ndim else seen)) else None


def _squares(x: Tensor, x_hat: Tensor, how: Literal["mean", "sum"]) -> Tensor:
    if x.ndim == 2:
        return F.mse_loss(x_hat, x, reduction=how)
    squares = F.mse_loss(x_hat, x, reduction="none")
    return squares.mean((0, 2)) if how == "mean" else squares.sum((0, 2))


def residual(x: Tensor, x_hat: Tensor, mask: Tensor | None) -> Tensor:
    """Return x - x_hat, in float32 or float64, with 0 in rows that do not count."""
    return kept_rows(lifted(x) - lifted(x_hat), mask)


def rows_that_count(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return rows in float32 or float64, with 0 in those that do not count."""
    return kept_rows(lifted(rows), mask)


def centred_rows(rows: Tensor, mask: Tensor | None, batch_group: ProcessGroup | None) -> Tensor:
    """Subtract the mean of the rows that count, on all ranks; the others remain 0."""
    total = rows.sum(0, dtype=accumulator(rows))
    count = (
        total.new_full((1,), rows.shape[0]) if mask is None else mask.sum()[None].to(total.dtype)
    )
    sums = torch.cat([total, count])
    if batch_group is not None:
        # Without a gradient, which is exact: the mean's part in the gradient of sum |x - mean|^2 is
        # zero.
        sums = _groups.all_reduce(sums.detach(), batch_group.group_name)
    return kept_rows(rows - (sums[:-1] / sums[-1]).to(rows.dtype), mask)


def squared_norm(rows: Tensor, feature_reduction: FeatureReduction) -> Tensor:
    """Square and sum (or average) each row; finite wherever the result is representable."""
    if feature_reduction == "sum":
        return _dot(rows)
    # Scaled by a power of two, which is exact, so that the sum overflows only if the mean does.
    width = max(rows.shape[-1], 1)
    scale = 2.0 ** -math.ceil(math.log2(width) / 2)
    scaled = rows * scale
    return _dot(scaled) * (1 / (width * scale**2))


def wide_squared_norm(rows: Tensor) -> Tensor:
    """Return each row's squared norm in the wider dtype, where it is finite if the row is."""
    dtype, exponent = accumulator(rows), exponents(rows)
    squares = squared_norm(scaled(rows, -exponent), "sum").to(dtype)
    return squares * _power_of_two(2 * exponent[:, 0], dtype)


def exponents(rows: Tensor) -> Tensor:
    """Return the exponent of two next above each row's largest element, as integers, "*batch 1"."""
    sizes = rows.detach().abs()
    # Padded by 0, so that a row without elements has a largest one.
    row_max = F.pad(sizes, (0, 1)).amax(-1, keepdim=True)
    exponent = torch.frexp(row_max).exponent
    return exponent.masked_fill(~row_max.isfinite(), 0)


def scaled(rows: Tensor, exponent: Tensor) -> Tensor:
    """Multiply rows by 2^exponent, which is exact, in two steps that cannot overflow."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    return rows * _power_of_two(half, rows.dtype) * _power_of_two(exponent - half, rows.dtype)


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.exp2(exponent.to(dtype))


def _dot(rows: Tensor) -> Tensor:
    with without_autocast(rows):
        return cast("Tensor", torch.linalg.vecdot(rows, rows))
