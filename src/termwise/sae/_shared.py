"""What the objectives of sparse autoencoders share: latents, and means over the rows that count.

A row is a token. Every term is a mean over the rows that count: those that `mask` keeps (padding
and BOS tokens are left out), on all ranks of `batch_group`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .. import _groups
from .._autograd import Function
from .._groups import GradReduction, ProcessGroup
from .._numbers import accumulator, blocks, lifted

FeatureReduction = Literal["mean", "sum"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SparseLatents:
    """The k latents of each row that may be active; all others are zero.

    Every loss that takes latents takes these in place of the dense matrix, and then touches k
    columns of it instead of all. Within a row, an index stands once; a latent that did not fire
    holds the value 0 at any index not in use.
    """

    values: Float[Tensor, "batch k"]
    """Float[Tensor, "batch k"]: activations, in the graph."""
    indices: Int[Tensor, "batch k"]
    """Int[Tensor, "batch k"]: the column of each activation, int64."""

    def __post_init__(self) -> None:
        if self.values.shape != self.indices.shape:
            raise ValueError(
                "SparseLatents needs values and indices of one shape, got "
                f"{list(self.values.shape)} and {list(self.indices.shape)}"
            )


torch.export.register_dataclass(SparseLatents, serialized_type_name="termwise.sae.SparseLatents")

Latents: TypeAlias = Float[Tensor, "batch d_sae"] | SparseLatents


def means_over_rows(
    per_row: Sequence[Tensor],
    mask: Tensor | None,
    batch_group: ProcessGroup | None,
    grad_reduction: GradReduction,
) -> list[Tensor]:
    """Average each quantity over the rows that count, on all ranks, with one sum over ranks.

    Each element of per_row is " batch" or "batch n" (which gives " n"). No row counts: NaN.
    """
    wide = accumulator(per_row[0])
    kept = [rows if mask is None else _keep(rows, mask) for rows in per_row]
    sums = [rows.sum(0, dtype=wide).reshape(-1) for rows in kept]
    # Filled on the device: a tensor made from a Python number is a copy that waits for it.
    count = sums[0].new_full((1,), per_row[0].shape[0]) if mask is None else mask.sum()[None]
    scale = _groups.gradient_scale(batch_group, grad_reduction)
    totals = _groups.terminal_sum(torch.cat([*sums, count.to(wide)]), batch_group, scale)
    means = cast(
        "tuple[Tensor, ...]", (totals[:-1] / totals[-1]).split([len(part) for part in sums])
    )
    return [
        mean.reshape(rows.shape[1:]).to(lifted(rows[:0]).dtype)
        for mean, rows in zip(means, per_row, strict=True)
    ]


def residual(x: Tensor, x_hat: Tensor, mask: Tensor | None) -> Tensor:
    """Give x - x_hat, taken after lifting, with 0 in rows that do not count."""
    difference = lifted(x) - lifted(x_hat)
    return difference if mask is None else _keep(difference, mask)


def centred_rows(rows: Tensor, mask: Tensor | None, batch_group: ProcessGroup | None) -> Tensor:
    """Subtract the mean of the rows that count, on all ranks; the others stay 0."""
    total = rows.sum(0, dtype=accumulator(rows))
    count = (
        total.new_full((1,), rows.shape[0]) if mask is None else mask.sum()[None].to(total.dtype)
    )
    sums = torch.cat([total, count])
    if batch_group is not None:
        sums = _groups.all_reduce(sums, batch_group.group_name)
    centred = rows - (sums[:-1] / sums[-1]).to(rows.dtype)
    return centred if mask is None else centred.where(mask[:, None], 0)


def squared_norm(rows: Tensor, feature_reduction: FeatureReduction) -> Tensor:
    """Square and sum (or average) each row; finite wherever the result is representable."""
    if feature_reduction == "sum":
        return _dot(rows)
    # Scaled by a power of two, which rounds nothing, so that the sum cannot pass the mean's range.
    width = max(rows.shape[-1], 1)
    scale = 2.0 ** -math.ceil(math.log2(width) / 2)
    scaled = rows * scale
    return _dot(scaled) * (1 / (width * scale**2))


def check_latents(caller: str, f: Latents, batch: int) -> None:
    """Check what a contract does not see: the rows of sparse latents."""
    if isinstance(f, SparseLatents) and f.values.shape[0] != batch:
        raise ValueError(f"{caller} needs f of {batch} rows, got {f.values.shape[0]}")


def counted(f: Latents, mask: Tensor | None) -> Latents:
    """Give the latents with 0 in rows that do not count, whatever stood there."""
    if mask is None:
        return f
    if isinstance(f, SparseLatents):
        return SparseLatents(_keep(f.values, mask), f.indices)
    return _keep(f, mask)


def active(f: Latents) -> Tensor:
    """Count the latents of each row that are not zero: " batch", float, without a gradient."""
    values = (f.values if isinstance(f, SparseLatents) else f).detach()
    if torch.compiler.is_compiling():  # a compiler fuses it
        return (values != 0).sum(1).to(lifted(values[:0]).dtype)
    return _by_blocks(values, lambda rows: (rows != 0).sum(1))


def penalty(f: Latents, decoder_norm: Tensor | None, p: float) -> Tensor:
    """Give sum_j norm_j |f_j|^p of each row, without a copy of f in the forward pass."""
    values = f.values if isinstance(f, SparseLatents) else f
    if decoder_norm is None and p == 1.0 and not torch.compiler.is_compiling():
        return cast("Tensor", _RowsL1.apply(values))
    powered = _powers(magnitudes(lifted(values)), p)
    if decoder_norm is None:
        return powered.sum(1)
    norm = lifted(decoder_norm)
    if isinstance(f, SparseLatents):
        return (powered * norm[f.indices]).sum(1)
    return decode(powered, norm[:, None])[:, 0]


def magnitudes(f: Tensor) -> Tensor:
    """Give |f| with the derivative 1 at f = 0, where a latent below its threshold stands.

    Whatever set the latent to zero decides whether that gradient goes on: a ReLU and a choice of
    the k largest stop it, JumpReLU's estimate takes it for the half of its kernel below the
    threshold. With the derivative 0 that half would be lost.
    """
    return cast("Tensor", _Magnitudes.apply(f))


def upward_sign(f: Tensor) -> Tensor:
    """Give the derivative of |f|: its sign, and 1 where f is 0 or -0."""
    return f.sign() + (f == 0)


def decode(f: Latents, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Give f W_dec + b_dec in float32 at least, whatever autocast says.

    Where f is sparse, only the active rows of W_dec are read.
    """
    values = f.values if isinstance(f, SparseLatents) else f
    wide = torch.promote_types(lifted(values[:0]).dtype, lifted(W_dec[:0]).dtype)
    if isinstance(f, SparseLatents):
        rows = W_dec.to(wide)
        product = F.embedding_bag(f.indices, rows, per_sample_weights=f.values.to(wide), mode="sum")
    else:
        product = cast("Tensor", _Product.apply(f.to(wide), W_dec.to(wide)))
    return product if b_dec is None else product + b_dec


def _dot(rows: Tensor) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        return cast("Tensor", torch.linalg.vecdot(rows, rows))


def _powers(size: Tensor, p: float) -> Tensor:
    if p == 1.0:
        return size
    if p > 1.0:
        return size.pow(p)
    # The derivative at 0 is infinite, and infinity times a factor of 0 is NaN: 0 instead.
    zero = size == 0
    return size.masked_fill(zero, 1).pow(p).masked_fill(zero, 0)


def _keep(rows: Tensor, mask: Tensor) -> Tensor:
    return rows.where(mask if rows.ndim == 1 else mask[:, None], 0)


def _by_blocks(x: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduce each row, in blocks, so that no temporary is as large as x."""
    parts = [x.new_zeros(0), *(of(x[here]) for here in blocks(x))]
    return torch.cat([part.to(lifted(parts[0]).dtype) for part in parts])


class _RowsL1(Function):
    """Sum |f| over each row. `f.abs()` would keep a tensor as large as f for nothing."""

    generate_vmap_rule = True

    @staticmethod
    def forward(f: Tensor) -> Tensor:
        return _by_blocks(f, lambda rows: lifted(rows).abs().sum(1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        f: Tensor = ctx.saved_tensors[0]
        return upward_sign(f) * gradients[0][:, None].to(f.dtype)


class _Magnitudes(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(f: Tensor) -> Tensor:
        return f.abs()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        f: Tensor = ctx.saved_tensors[0]
        return upward_sign(f) * gradients[0]


class _Product(Function):
    """Matrix product that autocast leaves alone, in a backward pass under autocast too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        return _product(left, right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        # A compiled graph has no second derivative, and Dynamo would trace this one for ever.
        again = cast("Callable[[Tensor, Tensor], Tensor]", _Product.apply)
        product = _product if torch.compiler.is_compiling() else again
        for_left, for_right = ctx.needs_input_grad
        return (
            product(gradients[0], right.T) if for_left else None,
            product(left.T, gradients[0]) if for_right else None,
        )


def _product(left: Tensor, right: Tensor) -> Tensor:
    with torch.autocast(left.device.type, enabled=False):
        return left @ right
