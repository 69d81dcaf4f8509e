"""Sums over rows of logits: how a loss evaluates its formula, and in which blocks.

A loss writes its formula once as a plain expression over all rows, and once by hand: a function
that returns the value of each row and, if needed, writes the gradient. Compiled, or under a
transform of `torch.func`, the expression runs: a compiler fuses it, and the graph does not grow
with the data. It also runs for few logits, where the number of calls determines the time. Otherwise
the rows are read in blocks, each of which yields value and gradient in one pass: on the CPU blocks
that stay in cache, elsewhere at most eight blocks of at least 2^26 elements.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .. import _groups
from .._autograd import Function, on_host, scaled_by, transformed
from .._groups import NO_SECOND_DERIVATIVE, GradReduction, ProcessGroup
from .._numbers import (
    accumulator,
    block_rows,
    few,
    lifted,
    lifted_dtype,
    may_look_at,
    without_autocast,
)
from ._checks import divisor
from ._chunks import logit_chunks

# So few logits that they stay in cache for a fused kernel, which reads them more often.
FUSED = 2**18
# Over ranks with different columns, a block has the same number of rows on each, for any width.
SHARDED_ROWS = 512
# A float16 gradient is scaled by this until the incoming one is known, so that it does not
# underflow.
HALF_SCALE = 256


# Numbers of each row, which may be anything where it does not count, and marks, False there.
PerRow = tuple[Tensor, ...]
# Their sums over the rows that count, and the number of these.
Sums = tuple[Tensor, ...]


# A formula that writes its own gradient: by_hand(out, unused, *rows). It returns numbers of each
# row, where the `unused` ones do not count (None: all count), and writes the gradient of the sum of
# the first numbers with respect to the first of rows to out, which has its shape and dtype (None:
# no gradient is needed).
ByHand = Callable[..., PerRow]


def over_rows(
    formula: Callable[..., PerRow],
    by_hand: ByHand | None,
    vocab_group: ProcessGroup | None,
    unused: Tensor,
    *rows: Tensor,
    wide_sums: bool,
) -> Sums:
    """Sum what formula(unused, *rows) returns over the rows that count, and count these.

    The first sum has a gradient with respect to the first of rows. Over a vocab_group the formula
    by hand always runs, and every rank uses the same blocks, compiled or not, with or without a
    gradient. If there is none, a block's gradient is that of the expression. If `wide_sums`, the
    sums keep the dtype in which they are accumulated, as sums over ranks need.
    """
    x, compiling = rows[0], torch.compiler.is_compiling()
    dtype = accumulator(x) if wide_sums else lifted_dtype(x)
    if vocab_group is None and compiling:  # which fuses the sums, and leaves out those not in use
        parts = _that_count(formula(unused, *rows), unused)
        return tuple(part.sum(dtype=accumulator(x)).to(dtype) for part in parts)
    if vocab_group is None and transformed():
        return sums_of(formula(unused, *rows), unused, dtype).unbind()
    if vocab_group is None and few(x):
        seen = _or_none(unused)
        return sums_of(formula(seen, *rows), seen, dtype).unbind()
    run = by_hand or differentiated(formula)
    step = SHARDED_ROWS if vocab_group is not None and not compiling else block_rows(x)
    if not (torch.is_grad_enabled() and x.requires_grad):
        with torch.no_grad():
            return sums_of(in_blocks(run, step, None, unused, rows), unused, dtype).unbind()
    again = formula if vocab_group is None else None
    return cast("Sums", _Blocks.apply(run, again, step, dtype, unused, *rows))


def sums_of(per_row: PerRow, unused: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sum over the rows that count, in the wider dtype, and count them, as one vector."""
    parts = _that_count(per_row, unused)
    return torch.stack(parts).sum(1, dtype=accumulator(per_row[0])).to(dtype)


def _that_count(per_row: PerRow, unused: Tensor | None) -> list[Tensor]:
    """Return the numbers with 0 in rows that do not count, and a 1 for each that does."""
    used = torch.ones_like(per_row[0]) if unused is None else unused.logical_not()
    return [*(clear(x, unused) if x.is_floating_point() else x for x in per_row), used]


def in_blocks(
    run: ByHand,
    step: int,
    gradient: Tensor | None,
    unused: Tensor | None,
    rows: tuple[Tensor, ...],
) -> PerRow:
    """Run a formula by hand on blocks of rows. gradient may be the first of rows."""
    if rows[0].shape[0] <= step:
        return run(gradient, unused, *rows)
    parts = [
        run(
            None if gradient is None else gradient[part],
            None if unused is None else _or_none(unused[part]),
            *[x[part] for x in rows],
        )
        for part in (slice(start, start + step) for start in range(0, len(rows[0]), step))
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def _or_none(unused: Tensor) -> Tensor | None:
    """Return None if all rows are used and reading this does not synchronize, as on the CPU."""
    return None if on_host(unused) and not bool(unused.any()) else unused


def few_that_count(x: Tensor, most: int, *limits: object, columns: int | None = None) -> bool:
    """Whether logits [batch, time, columns] are few and all but the last positions count.

    They are x, or their columns are given and x has the positions.

    On the CPU, without masks and groups (limits), a loss then copies the logits without the last
    positions, which predict nothing, and needs no masks, which take several calls each. A compiler
    does not copy them, so that any number is few.
    """
    if any(limit is not None for limit in limits) or not (x.shape[0] > 0 and x.shape[1] > 1):
        return False
    if torch.compiler.is_compiling():
        return True
    width = x.shape[2] if columns is None else columns
    few = x.shape[0] * x.shape[1] * width <= most
    return few and on_host(x) and not transformed()


def differentiated(formula: Callable[..., PerRow]) -> ByHand:
    """Return a formula by hand whose gradient is that of the expression."""

    def run(out: Tensor | None, unused: Tensor | None, *rows: Tensor) -> PerRow:
        if out is None:
            return formula(unused, *rows)
        with torch.enable_grad():
            x = rows[0].detach().requires_grad_()
            per_row = formula(unused, x, *rows[1:])
            loss_sum = clear(per_row[0], unused).sum()
            (gradient,) = torch.autograd.grad(loss_sum, x, materialize_grads=True)
        write_gradient(out, gradient)
        return tuple(x.detach() for x in per_row)

    return run


def write_gradient(out: Tensor, gradient: Tensor, unused: Tensor | None = None) -> None:
    """Write a gradient, unless it was computed in place; 0 in unused rows."""
    if unused is not None:
        gradient.masked_fill_(unused[:, None], 0)
    if gradient is not out:
        out.copy_(gradient * HALF_SCALE if out.dtype == torch.float16 else gradient)


class _Blocks(Function):
    """Compute the gradient with the value; save it, and the rows for a second derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        run: ByHand,
        again: Callable[..., PerRow] | None,
        step: int,
        dtype: torch.dtype,
        unused: Tensor,
        *rows: Tensor,
    ) -> Sums:
        gradient = torch.empty_like(rows[0], memory_format=torch.contiguous_format)
        sums = sums_of(in_blocks(run, step, gradient, unused, rows), unused, dtype).unbind()
        ctx.again = again
        ctx.save_for_backward(gradient, unused, *rows)
        ctx.mark_non_differentiable(*sums[1:])
        ctx.set_materialize_grads(False)
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, unused, *rows = ctx.saved_tensors
        factor = gradients[0]
        unasked = (None,) * (len(rows) - 1)
        if factor is None:  # nothing of the loss was asked for
            return None, None, None, None, None, None, *unasked
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if ctx.again is None:
                raise NotImplementedError(NO_SECOND_DERIVATIVE)
            first = clear(ctx.again(unused, *rows)[0], unused).sum()
            own = cast(
                "tuple[Tensor]",
                torch.autograd.grad(
                    first, rows[0], factor, create_graph=True, materialize_grads=True
                ),
            )
            return None, None, None, None, None, own[0], *unasked
        if gradient.dtype == torch.float16:
            factor = factor / HALF_SCALE
        return None, None, None, None, None, *scaled_by(factor, gradient), *unasked


def read(rows: Tensor, unused: Tensor | None) -> Tensor:
    """Return rows in float32 or float64, with 0 in those that are not used."""
    return clear(lifted(rows), unused)


def clear(x: Tensor, unused: Tensor | None) -> Tensor:
    """Return rows (or one number for each) with 0 in those that are not used."""
    if unused is None:
        return x
    return x.masked_fill(unused if x.ndim == 1 else unused[:, None], 0)


def highest(x: Tensor, vocab_group: ProcessGroup | None) -> Tensor:
    """Return the highest logit of each row over the columns of all ranks, without a gradient."""
    top = x.detach().amax(1) if x.shape[1] else x.new_full((x.shape[0],), -torch.inf)
    top = lifted(top)
    name = None if vocab_group is None else vocab_group.group_name
    return _groups.all_reduce(top, name, "max")


def over_columns(x: Tensor, vocab_group: ProcessGroup | None) -> Tensor:
    """Sum over the ranks of vocab_group, without a gradient."""
    return _groups.all_reduce(x, None if vocab_group is None else vocab_group.group_name)


def centred(rows: Tensor, top: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """Subtract from each row its `highest`, in float32 at least, and divide by the temperature.

    A common offset of the logits of a row then does not reduce the precision.
    """
    room = out if out is not None and out.dtype == top.dtype else None
    x = torch.sub(rows, top[:, None], out=room)
    return x if temperature == 1 else torch.div(x, temperature, out=room)


def log_softmax(
    rows: Tensor, unused: Tensor | None, temperature: float, vocab_group: ProcessGroup | None
) -> Tensor:
    """Return log-probabilities of rows over a temperature; over a vocab_group without gradient."""
    x = read(rows, unused)
    if vocab_group is not None or temperature != 1:
        x = centred(x, highest(x, vocab_group), temperature)
    if vocab_group is None:
        return x.log_softmax(1)
    return x - over_columns(x.exp().sum(1), vocab_group).log()[:, None]


def unused_positions(
    positions: Tensor,
    mask: Tensor | None,
    sample_mask: Tensor | None,
    sequence_group: ProcessGroup | None,
) -> Tensor:
    """Return which of the batch * time positions predict no token that counts."""
    if mask is None:
        places = torch.zeros(positions.shape[:2], dtype=torch.int64, device=positions.device)
    else:
        places = mask.long() - 1
    if sample_mask is not None:
        places = places.where(sample_mask[:, None], -1)
    return logit_chunks(places, sequence_group).reshape(-1) < 0


def weighted_logs(mass: Tensor, logs: Tensor) -> Tensor:
    """Multiply mass and logs, with 0 log 0 = 0."""
    found = mass * logs
    if may_look_at(found) and not math.isnan(float(found.detach().sum())):
        return found
    return mass * logs.masked_fill(mass == 0, 0)


def weighted_log_sums(mass: Tensor, logs: Tensor) -> Tensor:
    """Return the sums of mass * logs in each row, with 0 log 0 = 0; logs are overwritten."""
    if on_host(logs):
        found = row_products(mass, logs)
        if not bool(found.isnan().any()):
            return found
    return row_products(mass, logs.masked_fill_(mass == 0, 0))


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """Return the inner product of each row of x with that of y."""
    with without_autocast(x):  # which would round to half precision
        return cast("Tensor", torch.linalg.vecdot(x, y))


def mean_of_few(per_row: Tensor, normalizer: Tensor | float | None) -> tuple[Tensor, Tensor]:
    """Return the sum of `few_that_count`, divided by the normalizer, and their number."""
    count = per_row.new_full((), per_row.shape[0])
    if normalizer is None and torch.compiler.is_compiling():
        return per_row.mean(dtype=accumulator(per_row)), count
    if normalizer is None:
        return per_row.mean(), count
    return (per_row.sum() / divisor(normalizer, count)).to(per_row.dtype), count


def adds_ranks(batch_group: ProcessGroup | None, sequence_group: ProcessGroup | None) -> bool:
    """Whether `over_ranks` adds the sums of several ranks."""
    return batch_group is not None or sequence_group is not None


def over_ranks(
    sums: Sums,
    batch_group: ProcessGroup | None,
    sequence_group: ProcessGroup | None,
    grad_reduction: GradReduction,
) -> Sums:
    """Add the sums of all ranks; the first has a gradient."""
    if adds_ranks(batch_group, sequence_group):
        whole = _groups.terminal_sum(torch.stack(sums), sequence_group, 1.0)
        scale = _groups.gradient_scale(batch_group, grad_reduction)
        sums = _groups.terminal_sum(whole, batch_group, scale).unbind()
    return sums[0], *[x.detach() for x in sums[1:]]
