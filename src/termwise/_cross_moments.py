r"""Cross-correlation of two batches: its diagonal, and the energy off it.

For n rows of a and b, centered and divided by the standard deviation r of each column,

    A = (a - mean) / r,    C = A^T B / n,    off = sum_{j != k} C_jk^2

without a dim x dim matrix in memory, by one of two paths. *Covariance*: strips of rows of C, their
diagonal entries set to zero before squaring. *Gram*: since ||A^T B||^2 = <A A^T, B B^T>, strips of
the upper triangles of two n x n matrices, minus the squared diagonal of C; chosen automatically if
2 n <= dim. Each strip serves the energy and both gradients while it is in cache: d off / dA is 2 B
C^T / n, or 2 (B B^T) A / n^2.

Over ranks, the gradient with respect to a needs only one more sum, of dim elements: with g = d off
/ dA, whose columns sum to 0 as those of B do, it is g / r - A h sum_i g_i A_i, where h (a - mean)
is the derivative of r.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from . import _groups
from ._autograd import chain, link_to
from ._groups import GradReduction, ProcessGroup
from ._moments import column_sums, is_small, strip_rows
from ._numbers import accumulator, blocks, inner, lifted, looped, product, without_autocast
from ._operators import Operator, differentiable

EpsAddedTo = Literal["variance", "deviation"]


class CrossMoments(NamedTuple):
    """Summary of the cross-correlation C of two batches, over the rows of all ranks."""

    diagonal: Tensor
    """C_jj, " dim"."""
    off: Tensor
    """Sum of C_jk^2 over j != k, accumulated in the wider dtype if it has many terms."""
    deviation: Tensor
    """Standard deviation of each column, "2 dim", without eps; detached."""


def cross_moments(
    a: Tensor,
    b: Tensor,
    counts: Tensor | None,
    *,
    correction: int,
    eps: float,
    eps_added_to: EpsAddedTo,
    group: ProcessGroup | None,
    grad_reduction: GradReduction,
    caller: str,
) -> CrossMoments:
    """Compute the diagonal of the cross-correlation and the energy off it.

    Args:
        a: this rank's rows of one batch, "batch dim". Half precision is converted to float32.
        b: this rank's rows of the other batch.
        counts: `_groups.row_counts(a, group)`.
        correction: the variance is the sum of squares / (n - correction).
        eps: keeps the deviation of a constant column above 0.
        eps_added_to: "variance" (inside the root) or "deviation" (outside it).
        group: process group whose ranks hold different rows, in any numbers, 0 included. None: no
            communication. Reading the counts synchronizes with the device once, with a group only.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.
        caller: the loss that an error names.

    Returns:
        Diagonal and energy are differentiable: twice without a group, once with one.
    """
    standard = _Standard(correction, eps, eps_added_to == "variance")
    if counts is None and a.shape[0] > 1 and is_small(a):
        return CrossMoments(*_as_written(a, b, standard))
    scale = _groups.gradient_scale(group, grad_reduction)
    name = "" if group is None else group.group_name
    inputs = _Inputs(a, b, counts, standard, torch.is_grad_enabled(), name, caller, scale)
    found = differentiable(_cross_moments, _backward, inputs, (0, 1, 2, 3, 4, 5))
    return CrossMoments(found[5], found[6], found[7].detach())


class _Standard(NamedTuple):
    correction: int
    eps: float
    under_the_root: bool


def _as_written(a: Tensor, b: Tensor, standard: _Standard) -> tuple[Tensor, Tensor, Tensor]:
    """Compute diagonal, energy and deviations by operations with derivatives of any order."""
    n, (correction, eps, under_the_root) = a.shape[0], standard
    unit, rows = 1 / n, (lifted(a), lifted(b))
    if under_the_root and eps > 0:  # in one kernel; its variance is biased
        biased = (n - correction) / n
        own, unit = eps * biased, unit * biased
        each = [torch.native_batch_norm(x, None, None, None, None, True, 0.0, own) for x in rows]
        scaled = [x for x, _, _ in each]
        inverses = torch.stack([inverse for _, _, inverse in each]).detach()
        # Rounding can make it negative if a column is constant.
        deviations = ((inverses.pow(-2) - own).clamp(min=0) / biased).sqrt()
    else:  # as in torch.std, the gradient is 0 if a column is constant
        roots = [torch.std(x, 0, correction=correction) for x in rows]
        scaled = [(x - x.mean(0)) / (root + eps) for x, root in zip(rows, roots, strict=True)]
        deviations = torch.stack(roots).detach()
    correlation = product(scaled[0].T, scaled[1]) * unit
    diagonal = correlation.diagonal()
    off = (correlation - diagonal.diag_embed()).square().sum()
    return diagonal, off, deviations


class _Inputs(NamedTuple):
    a: Tensor
    b: Tensor
    counts: Tensor | None
    standard: _Standard
    gradient: bool
    group_name: str
    caller: str
    scale: float
    """Of the gradient, over ranks."""


def _backward(
    inputs: _Inputs,
    saved: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    needs: Mapping[str, bool],
) -> dict[str, Tensor]:
    for_diagonal, for_off = gradients[5:7]
    again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if again and inputs.counts is None:
        return _differentiable_gradients(inputs, for_diagonal, for_off)
    (mean_a, mean_b), (root_a, root_b), (slope_a, slope_b), off_by_a, off_by_b, diagonal = saved
    a, b = inputs.a, inputs.b
    n = a.shape[0] if inputs.counts is None else inputs.counts.sum().to(mean_a.dtype)
    sides = {
        "a": (a, mean_a, root_a, slope_a, b, mean_b, off_by_a),
        "b": (b, mean_b, root_b, slope_b, a, mean_a, off_by_b),
    }
    push = None if for_off is None else for_off.to(mean_a.dtype) * inputs.scale
    across = None if for_diagonal is None else for_diagonal * inputs.scale / (root_a * root_b * n)
    found: dict[str, Tensor] = {}
    for name, (own, mean, root, slope, other, other_mean, off_by_own) in sides.items():
        if not needs[name] or (push is None and across is None):
            continue
        back = None if for_diagonal is None else for_diagonal * diagonal * slope / root
        back = None if back is None else back * -inputs.scale
        given = (own, other, mean, other_mean, off_by_own, push, across, back)
        if again or torch.compiler.is_compiling():
            gradient = _gradient(*given)
        else:
            gradient = _gradient_by_blocks(*given)
        if again:  # so that a second derivative raises an error instead of being omitted
            (gradient,) = chain(mean.new_ones(()), link_to(own), gradient)
        found[name] = gradient
    return found


def _gradient(
    own: Tensor,
    other: Tensor,
    mean: Tensor,
    other_mean: Tensor,
    off_by_own: Tensor,
    push: Tensor | None,
    across: Tensor | None,
    back: Tensor | None,
) -> Tensor:
    """Return push off_by_own + across (other - its mean) + back (own - its mean), if given.

    The last two are the gradient of the diagonal.
    """
    parts: list[Tensor] = []
    if push is not None:
        parts.append(off_by_own * push)
    if across is not None and back is not None:
        parts.append((lifted(other) - other_mean) * across)
        parts.append((lifted(own) - mean) * back)
    return sum(parts[1:], parts[0]).to(own.dtype)


@torch.library.custom_op("termwise::cross_moments_gradient", mutates_args=())
def _gradient_by_blocks(
    own: Tensor,
    other: Tensor,
    mean: Tensor,
    other_mean: Tensor,
    off_by_own: Tensor,
    push: Tensor | None,
    across: Tensor | None,
    back: Tensor | None,
) -> Tensor:
    """Compute `_gradient` without another tensor of its size."""
    gradient = torch.empty_like(own, memory_format=torch.contiguous_format)
    for block in blocks(own):
        gradient[block] = _gradient(
            own[block], other[block], mean, other_mean, off_by_own[block], push, across, back
        )
    return gradient


@_gradient_by_blocks.register_fake
def _(own: Tensor, *_: Tensor | None) -> Tensor:
    return torch.empty_like(own, memory_format=torch.contiguous_format)


_gradient_by_blocks.register_vmap(looped(_gradient_by_blocks))


_Pulled = tuple[tuple[Tensor, Tensor], Callable[[tuple[Tensor, ...]], tuple[Tensor, Tensor]]]


def _differentiable_gradients(
    inputs: _Inputs, for_diagonal: Tensor | None, for_off: Tensor | None
) -> dict[str, Tensor]:
    """Compute the gradients by the formula as written, so that they are differentiable."""

    def formula(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return _as_written(a, b, inputs.standard)[:2]

    (diagonal, off), pull = cast("_Pulled", torch.func.vjp(formula, inputs.a, inputs.b))
    pushes = (
        torch.zeros_like(diagonal) if for_diagonal is None else for_diagonal,
        torch.zeros_like(off) if for_off is None else for_off,
    )
    by_a, by_b = pull(pushes)
    return {"a": by_a, "b": by_b}


def takes_gram(n: int, dim: int) -> bool:
    """Whether two matrices of n x n are smaller than one of dim x dim."""
    return 2 * n <= dim


def _kernel(
    inputs: _Inputs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute means, roots and slopes "2 dim", d off / da and / db (or empty tensors), and results.

    A slope h is what h (x - mean) needs to be the derivative of the root with respect to x.
    """
    correction, eps, under_the_root = inputs.standard
    counts = inputs.counts
    rows = [lifted(x.detach()) for x in (inputs.a, inputs.b)]
    each = [rows[0].shape[0]] if counts is None else cast("list[int]", counts.tolist())
    n, dim, dtype = sum(each), rows[0].shape[1], rows[0].dtype
    if n < 2:
        raise ValueError(f"{inputs.caller} needs at least 2 rows over all ranks, got {n}")

    def over_ranks(x: Tensor) -> Tensor:
        return x if counts is None else _groups.all_reduce(x, inputs.group_name)

    with without_autocast(rows[0]):
        means = over_ranks(torch.stack([column_sums(x, torch.positive) for x in rows])) / n
        means = means.to(dtype)
        scaled = [x - mean for x, mean in zip(rows, means, strict=True)]
        sums = over_ranks(torch.stack([column_sums(x, torch.square) for x in scaled]))
        variances = sums / (n - correction)
        deviations = variances.sqrt()
        roots = (variances + eps).sqrt() if under_the_root else deviations + eps
        slopes = 1 / ((roots if under_the_root else deviations) * (n - correction))
        if not under_the_root:  # as in torch.std, 0 if a column is constant
            slopes = slopes.masked_fill(deviations == 0, 0)
        deviations, roots, slopes = (x.to(dtype) for x in (deviations, roots, slopes))
        for x, root in zip(scaled, roots, strict=True):
            x.div_(root)
        a, b = scaled
        diagonal = over_ranks(_column_products(a, b)) / n
        # Collective calls must not depend on the grad mode, which may differ over ranks.
        ascending = inputs.gradient or counts is not None
        if takes_gram(n, dim):
            if counts is not None:  # all rows, for this rank's share of the columns
                a, b = (_groups.rows_to_columns(x, each, inputs.group_name) for x in scaled)
            energy, *found = _from_gram(a, b, over_ranks, ascending)
            off = energy - diagonal.square().sum()
            if counts is not None:
                found = [_groups.columns_to_rows(x, each, dim, inputs.group_name) for x in found]
            for by, other in zip(found, reversed(scaled), strict=True) if ascending else ():
                by.addcmul_(other, diagonal.to(dtype), value=-1)
        else:
            off, *found = _from_covariance(a, b, n, over_ranks, ascending)
        if ascending:
            shares = [_column_products(x, by) for x, by in zip(scaled, found, strict=True)]
            pulls = (over_ranks(torch.stack(shares)) * (2 / n)).to(dtype) * slopes
            for x, by, root, pull in zip(scaled, found, roots, pulls, strict=True):
                by.mul_(2 / (n * root)).addcmul_(x, pull, value=-1)
        if not inputs.gradient:
            found = [x.new_empty(0) for x in rows]
        return means, roots, slopes, found[0], found[1], diagonal.to(dtype), off, deviations


def _fake(
    inputs: _Inputs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, dtype = inputs.a, lifted(inputs.a.new_empty(())).dtype
    means, roots, slopes, deviations = (a.new_empty(2, a.shape[1], dtype=dtype) for _ in range(4))
    by_a, by_b = (
        x.new_empty(x.shape if inputs.gradient else 0, dtype=dtype) for x in (a, inputs.b)
    )
    off = a.new_empty((), dtype=accumulator(a))
    return means, roots, slopes, by_a, by_b, torch.empty_like(means[0]), off, deviations


_cross_moments = Operator("cross_moments", _Inputs, _kernel, _fake)

Reduce = Callable[[Tensor], Tensor]


def _from_gram(
    a: Tensor, b: Tensor, over_ranks: Reduce, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ||A^T B||^2 / n^2, B B^T A / n and A A^T B / n from triangles of A A^T and B B^T."""
    energy = a.new_zeros((), dtype=accumulator(a))
    by_a, by_b = (torch.zeros_like(x if gradient else x[:0]) for x in (a, b))
    n, step = len(a), strip_rows(a)
    for start in range(0, n, step):
        stop = min(start + step, n)
        of_a, of_b = (over_ranks(x[start:stop] @ x[start:].T).mul_(1 / n) for x in (a, b))
        width = stop - start
        # A block to the right of the diagonal block counts twice, for itself and its mirror image.
        energy += inner(of_a[:, :width], of_b[:, :width])
        energy += 2 * inner(of_a[:, width:], of_b[:, width:])
        for x, by, strip in ((a, by_a, of_b), (b, by_b, of_a)) if gradient else ():
            by[start:stop].addmm_(strip, x[start:])
            by[stop:].addmm_(strip[:, width:].T, x[start:stop])
    return energy, by_a, by_b


def _from_covariance(
    a: Tensor, b: Tensor, n: int, over_ranks: Reduce, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ||C||^2, B C^T and A C from strips of C = A^T B / n without its diagonal."""
    energy = a.new_zeros((), dtype=accumulator(a))
    by_a, by_b = (torch.zeros_like(x if gradient else x[:0]) for x in (a, b))
    dim, step = a.shape[1], strip_rows(a.T)
    for start in range(0, dim, step):
        columns = slice(start, min(start + step, dim))
        strip = over_ranks(a[:, columns].T @ b).mul_(1 / n)
        strip.diagonal(start).zero_()
        energy += inner(strip, strip)
        if gradient:
            torch.mm(b, strip.T, out=by_a[:, columns])
            by_b.addmm_(a[:, columns], strip)
    return energy, by_a, by_b


def _column_products(x: Tensor, y: Tensor) -> Tensor:
    """Sum x * y over rows: each block in its own dtype, the blocks in the wider one."""
    sums = x.new_zeros(x.shape[1], dtype=accumulator(x))
    for block in blocks(x):
        sums += (x[block] * y[block]).sum(0)
    return sums
