"""Sums over a process group that the caller passes; the only file that imports torch.distributed.

A group of None means this rank alone: nothing is sent, and no global state is read. Every rank of
the group must call the same functions, in the same order.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.distributed import ProcessGroup as ProcessGroup

from ._autograd import Function, apply_own, refusing

GradReduction = Literal["mean", "sum"]
"""How a trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum"."""

T = TypeVar("T")

_SUM = "a sum over ranks"
NO_SECOND_DERIVATIVE = (
    "a loss over a process group has no second derivative: "
    "it would need the gradients of the other ranks"
)


def gradient_scale(group: ProcessGroup | None, grad_reduction: GradReduction) -> float:
    """Return the factor for a rank's gradient that makes the trainer's reduction exact.

    A trainer that averages gradients divides their sum by the number of ranks. The gradient of the
    whole is the sum of the ranks' shares, so each share is multiplied by that number first.
    """
    return float(group.size()) if group is not None and grad_reduction == "mean" else 1.0


def terminal_sum(x: Tensor, group: ProcessGroup | None, scale: float) -> Tensor:
    """Sum x over ranks, if the following computation is the same on every rank.

    Forward: the sum, on every rank. Backward: scale * gradient, without communication. A second
    derivative would need the other ranks' gradients and raises an error.
    """
    return terminal_sums([x], group, scale)[0]


def terminal_sums(
    parts: Sequence[Tensor], group: ProcessGroup | None, scale: float
) -> list[Tensor]:
    """Sum tensors of one dtype over ranks, in one collective, as `terminal_sum` does.

    A part that a loss does not use gets no gradient. Splitting one summed tensor would send it
    zeros, and zero times an infinite derivative is NaN.
    """
    if group is None:
        return list(parts)
    return list(apply_own(_SUM, _TerminalSums, group.group_name, scale, *parts))


def sum_over_ranks(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum x over ranks, if the following computation differs between ranks.

    Forward and backward both sum over ranks; derivatives of any order are correct.
    """
    if group is None:
        return x
    return cast("Tensor", apply_own(_SUM, _SumOverRanks, x, group.group_name))


def replicated(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return x, which is the same on every rank, if each rank computes a part of the loss from it.

    Backward sums the ranks' gradients; derivatives of any order are correct.
    """
    if group is None:
        return x
    return cast("Tensor", apply_own(_SUM, _Replicated, x, group.group_name))


def row_counts(x: Tensor, group: ProcessGroup | None) -> Tensor | None:
    """Return each rank's number of rows as an int64 vector, the same on every rank."""
    if group is None:
        return None
    return each_rank(x.new_full((), x.shape[0], dtype=torch.int64), group)


def each_rank(number: Tensor, group: ProcessGroup) -> Tensor:
    """Return the ranks' scalars as a vector, in the order of ranks, the same on every rank."""
    places = torch.arange(group.size(), device=number.device)
    return all_reduce(torch.where(places == group.rank(), number, 0), group.group_name)


def first_column(x: Tensor, group: ProcessGroup | None) -> Tensor | None:
    """Return the number of columns (the last axis) of all ranks before this one."""
    if group is None:
        return None
    width = x.new_full((), x.shape[-1], dtype=torch.int64)
    widths = each_rank(width, group)
    before = torch.arange(group.size(), device=x.device) < group.rank()
    return widths.where(before, 0).sum()


def each_object(value: T, group: ProcessGroup) -> list[T]:
    """Return every rank's Python object, in the order of ranks; it must be picklable."""
    values = [value] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def name_of(group: ProcessGroup | None) -> str | None:
    """Return a group's name, which operators take instead of the group; None without a group."""
    return None if group is None else group.group_name


def all_reduce(
    x: Tensor, group_name: str | None, how: Literal["sum", "min", "max"] = "sum"
) -> Tensor:
    """Reduce over ranks without a gradient, as an operator that compiles.

    None is this rank alone: nothing is sent.
    """
    if group_name is None:
        return x
    if how == "max":  # by min, the only other reduction in use
        return -all_reduce(-x, group_name, "min")
    reduced = torch.ops._c10d_functional.all_reduce(x.contiguous(), how, group_name)
    return cast("Tensor", torch.ops._c10d_functional.wait_tensor(reduced))


def rows_to_columns(rows: Tensor, counts: list[int], group_name: str) -> Tensor:
    """Exchange a share of the rows, with all columns, for a share of the columns, with all rows."""
    group = resolved(group_name)
    shares = _column_shares(rows.shape[1], len(counts))
    parts = cast("tuple[Tensor, ...]", rows.split(shares, dim=1))
    sent = torch.cat([part.reshape(-1) for part in parts])
    own = shares[group.rank()]
    received = rows.new_empty(sum(counts) * own)
    dist.all_to_all_single(
        received,
        sent,
        [count * own for count in counts],
        [rows.shape[0] * share for share in shares],
        group=group,
    )
    return received.view(sum(counts), own)


def columns_to_rows(columns: Tensor, counts: list[int], width: int, group_name: str) -> Tensor:
    """Invert `rows_to_columns`; width is the number of columns over all ranks."""
    group = resolved(group_name)
    shares = _column_shares(width, len(counts))
    own = counts[group.rank()]
    received = columns.new_empty(own * width)
    dist.all_to_all_single(
        received,
        columns.reshape(-1),
        [own * share for share in shares],
        [count * columns.shape[1] for count in counts],
        group=group,
    )
    parts = cast("tuple[Tensor, ...]", received.split([own * share for share in shares]))
    return torch.cat(
        [part.view(own, share) for part, share in zip(parts, shares, strict=True)], dim=1
    )


def passed_on(block: Tensor, rows: int, group_name: str) -> Tensor:
    """Send rows to the next rank of a ring, and return the `rows` rows of the previous rank."""
    group = resolved(group_name)
    ranks, own = group.size(), group.rank()
    received = block.new_empty(rows, *block.shape[1:])
    sizes = [0] * ranks, [0] * ranks
    sizes[0][(own - 1) % ranks], sizes[1][(own + 1) % ranks] = received.numel(), block.numel()
    dist.all_to_all_single(received.view(-1), block.reshape(-1), *sizes, group=group)
    return received


def gathered_rows(rows: Tensor, counts: list[int], group_name: str) -> Tensor:
    """Return the rows of all ranks, in the order of ranks, without a gradient."""
    group, width = resolved(group_name), rows.shape[1]
    sent = rows.reshape(-1).repeat(len(counts))
    received = rows.new_empty(sum(counts) * width)
    dist.all_to_all_single(
        received, sent, [n * width for n in counts], [rows.numel()] * len(counts), group=group
    )
    return received.view(sum(counts), width)


def scattered_rows(rows: Tensor, counts: list[int], group_name: str) -> Tensor:
    """Sum tensors with the rows of all ranks over ranks, and return this rank's rows."""
    group, width = resolved(group_name), rows.shape[1]
    own = counts[group.rank()]
    received = rows.new_empty(len(counts) * own * width)
    dist.all_to_all_single(
        received,
        rows.reshape(-1),
        [own * width] * len(counts),
        [n * width for n in counts],
        group=group,
    )
    return received.view(len(counts), own, width).sum(0)


def _column_shares(width: int, ranks: int) -> list[int]:
    return [width // ranks + (rank < width % ranks) for rank in range(ranks)]


def resolved(group_name: str) -> ProcessGroup:
    """Return the process group with this name."""
    return c10d._resolve_process_group(cast("Any", group_name))  # type: ignore[attr-defined]


class _TerminalSums(Function):
    @staticmethod
    def forward(group_name: str, scale: float, *parts: Tensor) -> tuple[Tensor, ...]:
        whole = all_reduce(torch.cat([part.reshape(-1) for part in parts]), group_name)
        sums = cast("tuple[Tensor, ...]", whole.split([part.numel() for part in parts]))
        return tuple(part.view(like.shape) for part, like in zip(sums, parts, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.scale = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        scaled = (None if part is None else part * ctx.scale for part in gradients)
        refused = (x if x is None else refusing(x, NO_SECOND_DERIVATIVE) for x in scaled)
        return None, None, *refused

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        # For any shape: the mapped axis is one more axis of each part that has it.
        return _TerminalSums.apply(*args), in_dims[2:]


class _SumOverRanks(Function):
    @staticmethod
    def forward(x: Tensor, group_name: str) -> Tensor:
        return all_reduce(x, group_name)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.group_name = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return cast("Tensor", _SumOverRanks.apply(gradients[0], ctx.group_name)), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return cast("Tensor", _SumOverRanks.apply(*args)), in_dims[0]


class _Replicated(Function):
    @staticmethod
    def forward(x: Tensor, group_name: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.group_name = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return cast("Tensor", _SumOverRanks.apply(gradients[0], ctx.group_name)), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return cast("Tensor", _Replicated.apply(*args)), in_dims[0]
