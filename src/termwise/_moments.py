r"""Column means, variances and the covariance energy of a batch, for second-moment losses.

For rows z of a batch of N with column means m, and Z = z - m:

    variance_j = sum_i Z_ij^2 / (N - 1)
    energy     = sum_{j != k} C_jk^2,    C = Z^T Z / (N - 1)

The energy is computed without a dim x dim matrix in memory, in one of two ways. *Covariance*: the
upper triangle of C in strips, with the diagonal set to zero before squaring. *Gram*: since
||Z^T Z|| = ||Z Z^T||, the smaller N x N matrix in strips, minus the squared diagonal of C. The
difference cancels at most (off + diagonal) / off, and off / diagonal >= dim / (N - 1) - 1 where the
variances are equal, so this path is chosen automatically only if 2 N <= dim.

Each strip S of the triangle is used three times while it is in cache: for its share of the energy,
and for its and its transpose's share of the gradient 4 (Z C - Z diag C) / (N - 1). In total these
are three products of N dim^2 (or N^2 dim); energy and gradient separately would take four.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from . import _groups
from ._autograd import on_host
from ._groups import GradReduction, ProcessGroup
from ._numbers import (
    FEW,
    accumulator,
    blocks,
    inner,
    lifted,
    looped,
    plain_product,
    without_autocast,
)
from ._operators import Operator, differentiable

CovariancePath = Literal["auto", "gram", "covariance"]

# Rows of a strip on the CPU: enough for the full speed of the matrix product, few enough to keep
# memory small. On other devices: elements of a strip, and the maximum number of strips.
_STRIP, _ON_DEVICE, _MOST_STRIPS = 256, 2**24, 4


def second_moments(
    views: Sequence[Tensor] | Tensor,
    counts: Tensor | None,
    *,
    path: CovariancePath,
    group: ProcessGroup | None,
    grad_reduction: GradReduction,
    caller: str,
) -> tuple[Tensor, Tensor]:
    """Return the unbiased variance of each column, and the energy of the off-diagonal covariance.

    Args:
        views: this rank's rows of each view, "batch dim"; or a tensor of them all, or of one.
            Half precision is converted to float32.
        counts: `_groups.row_counts` of a view.
        path: which product to form; "auto" takes the smaller one.
        group: process group whose ranks hold different rows, in any numbers, 0 included. None: no
            communication. Reading the counts synchronizes with the device once, with a group only.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.
        caller: the loss that an error names.

    Returns:
        Variance "*views dim", and energy "*views" in the wider dtype, where it cannot overflow;
        both differentiable: twice without a group, once with one.
    """
    each, together = views, None
    if isinstance(views, Tensor):
        each, together = (views,) if views.ndim == 2 else views.unbind(), views
    first = each[0]
    wide = path == "auto" and 2 * first.shape[0] <= first.shape[1]  # then its Gram matrix is small
    few = first.numel() <= 2 * FEW if wide else path != "gram" and is_small(first)
    if counts is None and first.shape[0] > 1 and few:
        return _as_written(torch.stack(tuple(each)) if together is None else together, path)
    moments = [
        differentiable(
            _second_moments,
            _backward,
            _Inputs(
                z,
                counts,
                path,
                torch.is_grad_enabled(),
                "" if group is None else group.group_name,
                caller,
                _groups.gradient_scale(group, grad_reduction),
            ),
            (0, 3),
        )
        for z in each
    ]
    return (
        torch.stack([variance for _, variance, _, _ in moments]),
        torch.stack([energy for _, _, energy, _ in moments]),
    )


def effective_rank(variance: Tensor, energy: Tensor) -> Tensor:
    """Return (sum of variances)^2 / ||C||^2 of each view, the participation ratio; detached.

    That is (sum lambda)^2 / sum lambda^2 of the eigenvalues of the covariance C: 1 if all rows lie
    on a line, dim if all directions have the same variance, and 0 if all rows are equal.

    Args:
        variance: "*views dim", as `second_moments` returns it.
        energy: "*views".
    """
    diagonal = variance.detach().to(energy.dtype)
    squares = energy.detach() + diagonal.square().sum(-1)
    # Where nothing varies 0, not NaN.
    ratio = diagonal.sum(-1).square() / squares.clamp_min(torch.finfo(squares.dtype).tiny)
    return ratio.to(variance.dtype)


def is_small(z: Tensor) -> bool:
    """Whether forming the whole covariance, in few calls, is faster than saving products."""
    return z.numel() <= FEW and z.shape[-1] <= _STRIP


def _as_written(z: Tensor, path: CovariancePath) -> tuple[Tensor, Tensor]:
    """Compute variance and energy in operations that autograd follows to any order."""
    (count, dim), rows = z.shape[-2:], lifted(z)
    unit, centred = 1 / (count - 1), rows - rows.mean(-2, keepdim=True)
    if path == "auto" and 2 * count <= dim:
        variance = (centred * centred).sum(-2) * unit
        gram = plain_product(centred, centred.mT).to(accumulator(z))
        total = (gram * gram).sum((-2, -1)) * unit**2
        return variance, total - variance.to(total.dtype).square().sum(-1)
    products = plain_product(centred.mT, centred)
    # Of one matrix in the wider dtype the diagonal cancels without a loss of digits.
    widened = products.to(accumulator(z))
    squares = widened * widened
    energy = (squares.sum((-2, -1)) - squares.diagonal(0, -2, -1).sum(-1)) * unit**2
    return products.diagonal(0, -2, -1) * unit, energy


class _Inputs(NamedTuple):
    z: Tensor
    counts: Tensor | None
    path: str
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
    z, counts = inputs.z, inputs.counts
    mean, energy_gradient = saved
    for_mean, for_variance, for_energy, for_gradient = gradients
    if torch.compiler.is_compiling():
        # A compiled graph has no second derivative, but Dynamo traces it anyway; with zeros for
        # these two outputs, the Hessian below would run in every backward pass.
        for_mean = for_gradient = None
    if counts is not None and (for_mean is not None or for_gradient is not None):
        raise NotImplementedError(_groups.NO_SECOND_DERIVATIVE)
    rows = z.shape[0] if counts is None else counts.sum().to(mean.dtype)
    parts: list[Tensor] = []
    if for_variance is not None and for_energy is not None:
        factor = for_variance * (2.0 * inputs.scale / (rows - 1))
        push = for_energy.to(factor.dtype) * inputs.scale
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            return {"z": _combined(z, mean, factor, energy_gradient, push)}
        parts.append(torch.addcmul(energy_gradient * push, z - mean, factor))
    elif for_variance is not None:
        parts.append((z - mean) * (for_variance * (2.0 * inputs.scale / (rows - 1))))
    elif for_energy is not None:
        parts.append(energy_gradient * (for_energy.to(mean.dtype) * inputs.scale))
    if for_mean is not None:
        parts.append((for_mean / rows).expand(z.shape))
    if for_gradient is not None:
        parts.append(_energy_hessian_product(z - mean, for_gradient))
    return {"z": sum(parts[1:], parts[0]).to(z.dtype)} if parts else {}


def _energy_hessian_product(centred: Tensor, v: Tensor) -> Tensor:
    """Multiply the Hessian of the energy by v. multi_dot chooses the cheaper order of products."""
    chain = cast("Callable[[tuple[Tensor, ...]], Tensor]", torch.linalg.multi_dot)
    with without_autocast(v):
        v = v * (4.0 / (centred.shape[0] - 1) ** 2)  # first, so that no sum over rows overflows
        whole = (
            chain((v, centred.T, centred))
            + chain((centred, v.T, centred))
            + chain((centred, centred.T, v))
        )
        change = whole - v * centred.square().sum(0) - 2 * centred * (v * centred).sum(0)
        return change - change.mean(0)


def _kernel(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute mean, variance, energy, and d energy / d z (or an empty tensor).

    The derivative of the last one is the Hessian.
    """
    z, counts = inputs.z.detach(), inputs.counts
    rows = lifted(z)
    each = [z.shape[0]] if counts is None else cast("list[int]", counts.tolist())
    n, dim = sum(each), z.shape[1]
    if n < 2:
        raise ValueError(f"{inputs.caller} needs at least 2 rows over all ranks, got {n}")

    def over_ranks(x: Tensor) -> Tensor:
        return x if counts is None else _groups.all_reduce(x, inputs.group_name)

    with without_autocast(z):
        mean = (over_ranks(column_sums(rows, torch.positive)) / n).to(rows.dtype)
        centred = rows - mean
        # Each product is scaled by a power of two near 1 / (n - 1) before it is squared. This is
        # exact, and a square then overflows only if a covariance does.
        power = 0.5 ** (n - 1).bit_length()
        rest = 1 / (power * (n - 1))
        squares = (over_ranks(column_sums(centred, torch.square)) * power).to(rows.dtype)
        if inputs.path == "gram" or (inputs.path == "auto" and 2 * n <= dim):
            if counts is not None:  # all rows, for this rank's share of the columns
                centred = _groups.rows_to_columns(centred, each, inputs.group_name)
            # Collective calls must not depend on the grad mode, which may differ over ranks.
            ascending = inputs.gradient or counts is not None
            energy, ascent = _triangle(centred, power, over_ranks, ascending, zero_diagonal=False)
            energy = energy - squares.to(energy.dtype).square().sum()
            if ascending:
                own = squares if counts is None else column_sums(centred, torch.square) * power
                ascent.addcmul_(centred, own.to(rows.dtype), value=-1)
            if counts is not None:
                ascent = _groups.columns_to_rows(ascent, each, dim, inputs.group_name)
        else:
            energy, ascent = _triangle(
                centred.T, power, over_ranks, inputs.gradient, zero_diagonal=True
            )
            ascent = ascent.T if inputs.gradient else ascent
        ascent = ascent.mul_(4 * rest / (n - 1)) if inputs.gradient else rows.new_empty(0)
        return mean, squares * rest, energy * rest**2, ascent


def _fake(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, dtype = inputs.z, lifted(inputs.z.new_empty(())).dtype
    columns = z.new_empty(z.shape[1], dtype=dtype)
    ascent = z.new_empty(z.shape if inputs.gradient else 0, dtype=dtype)
    energy = z.new_empty((), dtype=accumulator(z))
    return columns, torch.empty_like(columns), energy, ascent


_second_moments = Operator("second_moments", _Inputs, _kernel, _fake)


@torch.library.custom_op("termwise::second_moments_gradient", mutates_args=())
def _combined(z: Tensor, mean: Tensor, factor: Tensor, gradient: Tensor, push: Tensor) -> Tensor:
    """Return (z - mean) * factor + gradient * push, without another tensor of this size."""
    result = torch.empty_like(z, memory_format=torch.contiguous_format)
    for block in blocks(z):
        rows = lifted(z[block])
        own = result[block] if rows.dtype == z.dtype else torch.empty_like(rows)
        torch.sub(rows, mean, out=own).mul_(factor).addcmul_(gradient[block], push)
        if rows.dtype != z.dtype:
            result[block] = own
    return result


@_combined.register_fake
def _(z: Tensor, mean: Tensor, factor: Tensor, gradient: Tensor, push: Tensor) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


_combined.register_vmap(looped(_combined))


def _triangle(
    rows: Tensor,
    power: float,
    over_ranks: Callable[[Tensor], Tensor],
    gradient: bool,
    *,
    zero_diagonal: bool,
) -> tuple[Tensor, Tensor]:
    """Compute ||S||^2 and S rows from the upper triangle of S = power rows rows^T over ranks."""
    energy = rows.new_zeros((), dtype=accumulator(rows))
    # The product has the layout of rows, so that its transpose is contiguous if that of rows is.
    product = torch.zeros_like(rows if gradient else rows[:0])
    step = strip_rows(rows)
    for start in range(0, len(rows), step):
        stop = min(start + step, len(rows))
        left, right = rows[start:stop], rows[start:].T
        strip = rows.new_empty(left.shape[0], right.shape[1])
        strip = over_ranks(torch.addmm(strip, left, right, beta=0, alpha=power, out=strip))
        if zero_diagonal:
            strip.diagonal().zero_()
        # A block to the right of the diagonal block counts twice, for itself and its mirror image.
        own, right_of_it = strip[:, : stop - start], strip[:, stop - start :]
        energy += inner(own, own) + 2 * inner(right_of_it, right_of_it)
        if gradient:
            product[start:stop].addmm_(strip, rows[start:])
            product[stop:].addmm_(strip[:, stop - start :].T, rows[start:stop])
    return energy, product


def strip_rows(rows: Tensor) -> int:
    """Return how many rows of the product of rows with its transpose are computed at a time."""
    if on_host(rows):
        return _STRIP
    return max(_ON_DEVICE // max(len(rows), 1), -(-len(rows) // _MOST_STRIPS), _STRIP)


def column_sums(x: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum each column: each block in its own dtype, the blocks in the wider one.

    `x.sum(0, dtype=...)` would copy all of x to the wider dtype first.
    """
    total = x.new_zeros(x.shape[1], dtype=accumulator(x))
    for block in blocks(x):
        total += of(x[block]).sum(0)
    return total
