"""Sums over rows of logits: where a loss runs its formula, and in which pieces.

A loss writes its formula once as a plain expression over all rows, and once by hand: the value of
some rows, and the gradient where it is asked for. Compiled, or under a transform of `torch.func`,
the expression is what runs: a compiler fuses it, and the graph does not grow with the data. Eagerly
the rows are read in blocks, each of which gives value and gradient in one pass: blocks that stay
in cache on the CPU, and of about 2^26 elements elsewhere.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import _groups
from .._autograd import Function
from .._groups import NO_SECOND_DERIVATIVE, GradReduction, ProcessGroup
from .._numbers import accumulator, lifted
from ._checks import divisor
from ._chunks import logit_chunks

# Elements of a block: 1 MiB in float32 on the CPU; elsewhere so many that a launch costs nothing.
IN_CACHE, ON_DEVICE = 2**18, 2**26
# Over ranks that hold other columns a block is as many rows on each of them, whatever its width.
SHARDED_ROWS = 512
# A gradient in float16 is kept times this, until the incoming one is known, lest it underflow.
HALF_SCALE = 256.0


class ByHand(Protocol):
    """A formula that writes its own gradient."""

    def __call__(self, out: Tensor | None, used: Tensor | None, *rows: Tensor) -> Tensor:
        """Return the sums over some rows, and write the first one's gradient into out.

        Args:
            out: of the shape and dtype of the first of rows. None: no gradient is wanted.
            used: which rows count. None: all of them.
            rows: the logits that have a gradient, and what else there is for each row.
        """
        ...


def over_rows(
    formula: Callable[..., Tensor],
    by_hand: ByHand | None,
    vocab_group: ProcessGroup | None,
    used: Tensor,
    *rows: Tensor,
) -> Tensor:
    """Return formula(used, *rows), a vector of sums over rows.

    The first of them has a gradient with respect to the first of rows. Over a vocab_group by_hand
    is the formula, and every rank takes the same blocks, compiled or not, with a gradient or
    without. Without by_hand a block's gradient is that of the expression.
    """
    x, compiling = rows[0], torch.compiler.is_compiling()
    if vocab_group is None and (compiling or transformed()):
        return formula(used, *rows)
    run = by_hand or differentiated(formula)
    step = _rows_of_a_block(x, vocab_group is not None, compiling)
    if not (torch.is_grad_enabled() and x.requires_grad):
        with torch.no_grad():
            return _in_blocks(run, step, None, used, rows)
    again = formula if vocab_group is None else None
    return cast("Tensor", _Blocks.apply(run, again, step, used, *rows))


def transformed() -> bool:
    """Whether a transform of `torch.func` is at work."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]


def row_blocks(x: Tensor) -> Iterator[slice]:
    """Cut rows into blocks for a pass that sends nothing."""
    if torch.compiler.is_compiling():
        return iter((slice(None),))
    return _blocks(x.shape[0], _rows_of_a_block(x, False, False))


def _rows_of_a_block(x: Tensor, sharded: bool, compiling: bool) -> int:
    if compiling:
        return max(x.shape[0], 1)
    if sharded:
        return SHARDED_ROWS
    elements = IN_CACHE if _on_host(x) else ON_DEVICE
    return max(1, elements // max(x.shape[1], 1))


def _blocks(rows: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, max(rows, 1), step))


def _in_blocks(
    run: ByHand, step: int, gradient: Tensor | None, used: Tensor, rows: tuple[Tensor, ...]
) -> Tensor:
    if rows[0].shape[0] <= step:
        return run(gradient, _or_all(used), *rows)
    sums = [
        run(
            None if gradient is None else gradient[part],
            _or_all(used[part]),
            *[x[part] for x in rows],
        )
        for part in _blocks(rows[0].shape[0], step)
    ]
    return torch.stack(sums).sum(0)


def _or_all(used: Tensor) -> Tensor | None:
    """Return None where all rows are seen to be used: on the CPU to look does not wait."""
    if torch.compiler.is_compiling() or not _on_host(used):
        return used
    return None if bool(used.all()) else used


def _on_host(x: Tensor) -> bool:
    """Whether to look into a tensor waits for nothing."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor)


def differentiated(formula: Callable[..., Tensor]) -> ByHand:
    """Return a formula by hand that takes its gradient from the expression."""

    def run(out: Tensor | None, used: Tensor | None, *rows: Tensor) -> Tensor:
        x, *others = rows
        if used is None:
            used = torch.ones(len(x), dtype=torch.bool, device=x.device)
        if out is None:
            return formula(used, *rows)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            sums = formula(used, x, *others)
            (gradient,) = torch.autograd.grad(sums[0], x, materialize_grads=True)
        put(out, gradient)
        return sums.detach()

    return run


def put(out: Tensor, gradient: Tensor) -> None:
    """Write a gradient, unless it was made in place."""
    if gradient is not out:
        out.copy_(gradient * HALF_SCALE if out.dtype == torch.float16 else gradient)


def room(out: Tensor | None, x: Tensor) -> Tensor | None:
    """Return out if x can be computed in place there."""
    return out if out is not None and out.dtype == x.dtype else None


class _Blocks(Function):
    """Makes the gradient with the value; keeps it, and the rows for a second derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        run: ByHand,
        again: Callable[..., Tensor] | None,
        step: int,
        used: Tensor,
        *rows: Tensor,
    ) -> Tensor:
        gradient = torch.empty_like(rows[0], memory_format=torch.contiguous_format)
        sums = _in_blocks(run, step, gradient, used, rows)
        ctx.again = again
        ctx.save_for_backward(gradient, used, *rows)
        return sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, used, *rows = ctx.saved_tensors
        unasked = (None,) * (len(rows) - 1)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if ctx.again is None:
                raise NotImplementedError(NO_SECOND_DERIVATIVE)
            sums = ctx.again(used, *rows)
            (own,) = torch.autograd.grad(
                sums[0], rows[0], gradients[0][0], create_graph=True, materialize_grads=True
            )
            return None, None, None, None, own, *unasked
        factor = gradients[0][0]
        if gradient.dtype == torch.float16:
            factor = factor / HALF_SCALE
        return None, None, None, None, times_factor(gradient, factor), *unasked


def in_place(factor: Tensor) -> bool:
    """Whether a gradient may be overwritten by its product with the one that comes in.

    It may where the graph is freed after this pass, for then nobody reads the gradient again.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or transformed()
        or torch._C._functorch.is_legacy_batchedtensor(factor)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        or torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    )


def times_factor(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply a gradient that was made with the value by the one that comes in.

    Where that is 0 the loss is left out, even if its own gradient is not finite.
    """
    if not in_place(factor):
        return (gradient * factor).where(factor != 0, 0).to(gradient.dtype)
    if _on_host(factor):
        return gradient.mul_(factor) if bool(factor != 0) else gradient.zero_()
    return gradient.mul_(factor).masked_fill_(factor == 0, 0)


def read(rows: Tensor, used: Tensor | None) -> Tensor:
    """Lift rows, with 0 in those that are not used."""
    x = lifted(rows)
    return x if used is None else x.where(used[:, None], 0)


def highest(x: Tensor, vocab_group: ProcessGroup | None) -> Tensor:
    """Return the highest logit of each row over the columns of all ranks, without a gradient."""
    top = x.detach().amax(1) if x.shape[1] else x.new_full((x.shape[0],), -torch.inf)
    if vocab_group is None:
        return top
    return -_groups.all_reduce(-top, vocab_group.group_name, "min")


def over_columns(x: Tensor, vocab_group: ProcessGroup | None) -> Tensor:
    """Sum over the ranks that hold other columns, without a gradient."""
    return x if vocab_group is None else _groups.all_reduce(x, vocab_group.group_name)


def log_softmax(
    rows: Tensor, used: Tensor | None, temperature: float, vocab_group: ProcessGroup | None
) -> Tensor:
    """Return log-probabilities of rows over a temperature.

    The highest logit is subtracted before anything else, so that an offset that all logits of a
    row have in common costs no digits. Over a vocab_group there is no gradient.
    """
    x = read(rows, used)
    if temperature != 1 or vocab_group is not None:
        x = x - highest(x, vocab_group)[:, None]
        x = x if temperature == 1 else x / temperature
    if vocab_group is None:
        return x.log_softmax(1)
    return x - over_columns(x.exp().sum(1), vocab_group).log()[:, None]


def used_positions(
    logits: Tensor, mask: Tensor | None, sequence_group: ProcessGroup | None
) -> Tensor:
    """Return which of the batch * time logits predict a token that counts."""
    if mask is None:
        mask = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return logit_chunks(mask.long() - 1, sequence_group).reshape(-1) >= 0


def means_over_ranks(
    sums: Tensor,
    used: Tensor,
    normalizer: Tensor | float | None,
    batch_group: ProcessGroup | None,
    sequence_group: ProcessGroup | None,
    grad_reduction: GradReduction,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over ranks. Return the first sum over the normalizer, the others, and the count."""
    wide = accumulator(sums)
    sums = torch.cat([sums.to(wide), used.sum().to(wide)[None]])
    sums = _groups.terminal_sum(sums, sequence_group, 1.0)
    scale = _groups.gradient_scale(batch_group, grad_reduction)
    sums = _groups.terminal_sum(sums, batch_group, scale)
    count = sums[-1].detach()
    return sums[0] / divisor(normalizer, count), sums[1:-1].detach(), count
