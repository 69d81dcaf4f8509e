"""Sums, counts, means and maxima over the ranks of a process group, with the correct gradient.

The losses of this library use these functions, and so can your own. A loss that computes its terms
from them has the same value on every rank, and its gradient over ranks is that of one process that
holds all the data. A group of None means this rank alone: no communication, no global state. Every
rank of the group must make the same calls in the same order.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import _groups
from .._contract import contract
from .._groups import GradReduction as GradReduction
from .._groups import ProcessGroup as ProcessGroup
from .._means import means_over_rows


@contract
def sum_over_ranks(
    x: Float[Tensor, "*shape"],
    group: ProcessGroup | None,
    *,
    grad_reduction: GradReduction = "mean",
) -> Float[Tensor, "*shape"]:
    r"""Sum over ranks, if the following computation is the same on every rank.

    This is the last step of most losses: each rank sums over its own samples, the ranks' sums are
    added, and the loss of all samples is computed from them. The backward pass does not
    communicate: each rank's part gets the gradient of the sum. If the trainer averages gradients
    over ranks, it is multiplied by the number of ranks, so that the average is the gradient of the
    whole batch.

    Args:
        x (Float[Tensor, "*shape"]): this rank's part of the sum, of the same shape on every rank.
        group: process group to sum over. None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Also pass "sum" if ranks hold different columns or positions, whose gradients are not
            combined. Without a group it has no effect.

    Returns:
        Float[Tensor, "*shape"]: the sum, the same on every rank. A second derivative with a group
        raises NotImplementedError. Each rank sends x once, in its dtype; convert half precision to
        float32 before the call.

    Examples:
        >>> import torch
        >>> from termwise import groups
        >>> groups.sum_over_ranks(torch.ones(3).sum(), None)
        tensor(3.)
    """
    return _groups.terminal_sum(x, group, _groups.gradient_scale(group, grad_reduction))


@contract
def sum_over_ranks_both_ways(
    x: Float[Tensor, "*shape"], group: ProcessGroup | None
) -> Float[Tensor, "*shape"]:
    """Sum over ranks, if the following computation differs between ranks.

    For a sum that each rank combines with its own samples, such as a mean to compare samples with,
    or a normalizer of rows that other ranks hold. The backward pass sums the gradients over ranks
    too. Sum the resulting loss over ranks with [`sum_over_ranks`][termwise.groups.sum_over_ranks].

    Args:
        x (Float[Tensor, "*shape"]): this rank's part of the sum, of the same shape on every rank.
        group: process group to sum over. None: no communication.

    Returns:
        Float[Tensor, "*shape"]: the sum, the same on every rank, differentiable to any order. Each
        rank sends x once in the forward and once in the backward pass, in its dtype.

    Examples:
        >>> import torch
        >>> from termwise import groups
        >>> groups.sum_over_ranks_both_ways(torch.ones(2), None)
        tensor([1., 1.])
    """
    return _groups.sum_over_ranks(x, group)


@contract
def mean_over_ranks(
    rows: Float[Tensor, "rows *event"],
    group: ProcessGroup | None,
    *,
    mask: Bool[Tensor, " rows"] | None = None,
    grad_reduction: GradReduction = "mean",
) -> Float[Tensor, "*event"]:
    """Average over the rows of all ranks, each with equal weight.

    The mean of the ranks' means differs from it if ranks hold different numbers of rows.

    Args:
        rows (Float[Tensor, "rows *event"]): this rank's rows, in any number, 0 included.
        group: process group whose ranks hold different rows. None: no communication.
        mask (Bool[Tensor, " rows"] | None): rows that count; the others affect neither the value
            nor the gradient, even if they are NaN. None: all.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        Float[Tensor, "*event"]: the mean, the same on every rank, in the dtype of rows (half
        precision in float32). NaN if no row counts. A second derivative with a group raises
        NotImplementedError. Each rank sends an event and one element, in float64.

    Examples:
        >>> import torch
        >>> from termwise import groups
        >>> groups.mean_over_ranks(torch.tensor([1.0, 5.0]), None, mask=torch.tensor([True, False]))
        tensor(1.)
    """
    return means_over_rows([rows], mask, group, grad_reduction)[0]


@contract
def count_over_ranks(
    rows: Float[Tensor, "rows *event"] | Bool[Tensor, "*shape"], group: ProcessGroup | None
) -> Int[Tensor, ""]:
    """Count over ranks: the rows of a tensor, or the true elements of a mask.

    Args:
        rows (Float[Tensor, "rows *event"] | Bool[Tensor, "*shape"]): rows of this rank, in any
            number, 0 included; or a mask of the elements that count.
        group: process group to count over. None: no communication.

    Returns:
        Int[Tensor, ""]: the count as int64 on the device, the same on every rank, without a
        gradient. Does not synchronize with the device. Each rank sends one int64.

    Examples:
        >>> import torch
        >>> from termwise import groups
        >>> groups.count_over_ranks(torch.ones(8, 3), None)
        tensor(8)
        >>> groups.count_over_ranks(torch.tensor([True, False, True]), None)
        tensor(2)
    """
    if rows.dtype == torch.bool:
        count = rows.sum()
    else:
        count = rows.new_full((), rows.shape[0], dtype=torch.int64)
    return count if group is None else _groups.all_reduce(count, group.group_name)


@contract
def max_over_ranks(
    x: Float[Tensor, "*shape"], group: ProcessGroup | None
) -> Float[Tensor, "*shape"]:
    """Return the elementwise maximum over ranks, without a gradient.

    For values that cancel in a formula, such as the maximum that a softmax subtracts.

    Args:
        x (Float[Tensor, "*shape"]): this rank's values, of the same shape on every rank.
        group: process group to take the maximum over. None: no communication.

    Returns:
        Float[Tensor, "*shape"]: the maximum, detached, the same on every rank; NaN where a rank
        holds NaN. Each rank sends x twice (once to mark NaN).

    Examples:
        >>> import torch
        >>> from termwise import groups
        >>> groups.max_over_ranks(torch.tensor([1.0, -torch.inf]), None)
        tensor([1., -inf])
    """
    x = x.detach()
    if group is None:
        return x
    missing = x.isnan()
    pair = torch.stack([x.masked_fill(missing, -torch.inf), missing.to(x.dtype)])
    highest, unknown = _groups.all_reduce(pair, group.group_name, "max").unbind()
    return highest.masked_fill(unknown > 0, torch.nan)
