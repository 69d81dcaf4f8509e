r"""Projections of rows on unit directions ("slices"), compared with a normal distribution.

By characteristic functions: for a column x of projections and t_k = k step, the sums over rows of
cos(t_k x) and sin(t_k x). cos + i sin of t_k x is the k-th power of that of step x, so one cosine
and one sine of each projection suffice, then one complex product for each knot. The gradient

    sum_k a_k cos(t_k x) + b_k sin(t_k x)

is a polynomial in the same number (Horner's method). Cosine and sine are each other's derivatives,
so derivatives of any order use the same sums. On an accelerator, where a launch costs more than a
cosine, and for few elements the formula is computed as written, in blocks.

By quantiles: sorted columns are compared with quantiles of the normal distribution, in blocks of
slices.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import _groups
from .._autograd import Function, on_host, wants_gradient
from .._groups import GradReduction, ProcessGroup
from .._numbers import (
    FEW,
    accumulator,
    block_rows,
    blocks,
    few,
    inner,
    lifted,
    lifted_dtype,
    looped,
    may_look_at,
    product,
    without_autocast,
)
from .._operators import Operator, with_gradients

# Real numbers stored for each projection: a power, the next one, and those that the first is
# computed from.
_HELD = 8
# Least number of slices of a block, so that its products have enough columns.
_FEWEST_SLICES = 64


def slices_of(
    caller: str,
    z: Tensor,
    slices: Tensor | None,
    num_slices: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the given directions "dim slices", or draw them from the unit sphere; no gradient.

    The draws do not depend on the dtype of z.
    """
    count = num_slices if slices is None else slices.shape[1]
    if count < 1:
        raise ValueError(f"{caller} needs at least one slice, got {count}")
    dim = z.shape[-1]
    if dim == 0:
        raise ValueError(f"{caller} needs dim >= 1, got 0")
    if slices is not None:
        return slices.detach().to(lifted_dtype(z))
    device = z.device if generator is None else generator.device
    drawn = torch.randn(dim, count, generator=generator, device=device)
    return (drawn / drawn.square().sum(0).sqrt()).to(z.device, lifted_dtype(z))


def counted_rows(
    caller: str, z: Tensor, slices: Tensor, group: ProcessGroup | None
) -> tuple[Tensor | None, Tensor | int]:
    """Return the ranks' numbers of rows and their sum, if all ranks have the same slices.

    With a group each rank sends its number of rows and a fingerprint of its slices, as 2 int64
    elements of a vector of 2 x ranks. If slices differ, the sum is NaN, and every term is divided
    by it; on the CPU in eager mode, where reading values does not synchronize, an error is raised.
    """
    if group is None:
        if z.shape[-2] == 0:
            raise ValueError(f"{caller} needs at least one row, got 0")
        return None, z.shape[-2]
    rows = z.new_full((), z.shape[-2], dtype=torch.int64)
    counts, prints = _groups.each_rank(torch.stack((rows, _fingerprint(slices)))[:, None], group)
    same = (prints == prints[0]).all()
    if may_look_at(same) and not same:
        raise ValueError(
            f"{caller} needs the same slices on every rank, got different ones: pass slices, or a "
            f"generator with the same seed (and as many draws) on every rank"
        )
    return counts, counts.sum().to(accumulator(z)).where(same, torch.nan)


def _fingerprint(slices: Tensor) -> Tensor:
    """Return a hash of all bits, which also depends on the order of rows and columns."""
    bits = slices.contiguous().view(torch.int32)
    total = bits.new_zeros((), dtype=torch.int64)
    for axis in (0, 1):
        sums = bits.sum(axis)
        total = total * 31 + (sums * torch.arange(1, len(sums) + 1, device=bits.device)).sum()
    return total


# --- characteristic functions ---------------------------------------------------------------


def characteristic_sums(views: Tensor, slices: Tensor, t_max: float, knots: int) -> Tensor:
    """Sum cos(t <z, a>) and sin(t <z, a>) over this rank's rows, at the knots but t = 0.

    Args:
        views: "views batch dim".
        slices: directions a, "dim slices".
        t_max: the largest knot.
        knots: number of knots, including 0.

    Returns:
        "knots-1 views*slices 2", in the wider dtype.
    """
    rows = lifted(views).movedim(0, 1)
    x = product(rows.reshape(-1, rows.shape[2]), slices)
    columns = rows.shape[1] * slices.shape[1]
    return _cosine_sums(x.view(rows.shape[0], columns), t_max / (knots - 1), knots)


def epps_pulley(sums: Tensor, rows: Tensor | int, t_max: float, knots: int) -> Tensor:
    """Integrate |phi_n(t) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) over [-t_max, t_max], for each slice.

    By the trapezoid rule on [0, t_max], doubled. At t = 0 the integrand is 0.
    """
    t = _frequencies(sums, t_max / (knots - 1), knots)
    target = (-0.5 * t.square()).exp()
    weights = (2 * t_max / (knots - 1)) * target
    weights[-1].div_(2)  # an end of the trapezoid rule
    real, imaginary = (sums / rows).unbind(-1)
    distances = (real - target[:, None]).square() + imaginary.square()
    return (weights[:, None] * distances).sum(0)


def _frequencies(like: Tensor, step: float, knots: int) -> Tensor:
    return torch.arange(1, knots, dtype=like.dtype, device=like.device) * step


def _cosine_sums(x: Tensor, step: float, knots: int) -> Tensor:
    # Compiled for an accelerator, the plain formula is one kernel that stores no angles.
    compiled = torch.compiler.is_compiling() and x.device.type != "cpu"
    few_angles = not torch.compiler.is_compiling() and x.numel() * knots <= 4 * FEW
    if compiled or few_angles:
        return _sums_as_written(x, None, step, knots).to(accumulator(x))
    return cast("Tensor", _Sums.apply(x, None, step, knots))


def _sums_as_written(x: Tensor, weights: Tensor | None, step: float, knots: int) -> Tensor:
    angles = x * _frequencies(x, step, knots)[:, None, None]
    waves = (angles.cos(), angles.sin())
    if weights is not None:
        waves = (waves[0] * weights, waves[1] * weights)
    return torch.stack([wave.sum(1) for wave in waves], -1)


def _first_power(x: Tensor, step: float) -> Tensor:
    angles = x * step
    return torch.complex(angles.cos(), angles.sin())


@torch.library.custom_op("termwise::cosine_sums", mutates_args=())
def _sums(x: Tensor, weights: Tensor | None, step: float, knots: int) -> Tensor:
    """Sum weights * cos(t_k x) and weights * sin(t_k x) over the rows of x, "rows columns"."""
    total = x.new_zeros(knots - 1, x.shape[1], 2, dtype=accumulator(x))
    host = on_host(x)
    for block in blocks(x, (_HELD if host else 2 * knots) * x.shape[1]):
        own = None if weights is None else weights[block]
        if not host:
            total += _sums_as_written(x[block], own, step, knots)
            continue
        first = _first_power(x[block], step)
        power = first.clone() if own is None else first * own
        sums = [power.sum(0)]
        for _ in range(knots - 2):
            sums.append(power.mul_(first).sum(0))
        total += torch.view_as_real(torch.stack(sums))
    return total


@_sums.register_fake
def _(x: Tensor, weights: Tensor | None, step: float, knots: int) -> Tensor:
    return x.new_empty(knots - 1, x.shape[1], 2, dtype=accumulator(x))


@torch.library.custom_op("termwise::cosine_series", mutates_args=())
def _series(x: Tensor, coefficients: Tensor, step: float) -> Tensor:
    """Sum a_k cos(t_k x) + b_k sin(t_k x) over the knots; coefficients are "knots-1 columns 2"."""
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    knots, host = len(coefficients) + 1, on_host(x)
    own = coefficients.to(x.dtype)
    factors = torch.complex(own[..., 0], -own[..., 1])
    for block in blocks(x, (_HELD if host else 2 * knots) * x.shape[1]):
        if not host:
            angles = x[block] * _frequencies(x, step, knots)[:, None, None]
            of_cos, of_sin = own[:, None].unbind(-1)
            result[block] = torch.addcmul(angles.cos() * of_cos, angles.sin(), of_sin).sum(0)
            continue
        first = _first_power(x[block], step)
        value = first * factors[-1]
        for factor in reversed(factors[:-1].unbind()):
            value.add_(factor).mul_(first)
        result[block] = value.real
    return result


@_series.register_fake
def _(x: Tensor, coefficients: Tensor, step: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_sums.register_vmap(looped(_sums))
_series.register_vmap(looped(_series))


class _Sums(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weights: Tensor | None, step: float, knots: int) -> Tensor:
        return cast("Tensor", _sums(x, weights, step, knots))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weights, ctx.step, _ = inputs
        ctx.save_for_backward(x, weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, weights = ctx.saved_tensors
        # A compiled graph has no second derivative, and Dynamo would trace this recursion without
        # end.
        series = _series if torch.compiler.is_compiling() else _Series.apply
        for_x = series(x, _derivative(gradients[0], ctx.step), ctx.step)
        if weights is None:
            return for_x, None, None, None
        return for_x * weights, series(x, gradients[0], ctx.step), None, None


class _Series(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, coefficients: Tensor, step: float) -> Tensor:
        return cast("Tensor", _series(x, coefficients, step))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, coefficients, ctx.step = inputs
        ctx.save_for_backward(x, coefficients)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, coefficients = ctx.saved_tensors
        knots = len(coefficients) + 1
        slope = _Series.apply(x, _derivative(coefficients, ctx.step), ctx.step)
        return gradients[0] * slope, _Sums.apply(x, gradients[0], ctx.step, knots), None


def _derivative(coefficients: Tensor, step: float) -> Tensor:
    """Return the coefficients of the derivative of a series."""
    t = _frequencies(coefficients, step, len(coefficients) + 1)[:, None]
    of_cos, of_sin = coefficients.unbind(-1)
    return torch.stack((t * of_sin, -t * of_cos), -1)


# --- quantiles ------------------------------------------------------------------------------


def quantile_distance(
    views: Tensor,
    slices: Tensor,
    counts: Tensor | None,
    *,
    group: ProcessGroup | None,
    grad_reduction: GradReduction,
) -> Tensor:
    r"""Return the mean squared difference of sorted projections and normal quantiles.

    mean over views, slices and i of (x_(i) - Phi^-1(i / (n + 1)))^2, for the i-th smallest of the n
    projections over all ranks.

    Args:
        views: this rank's rows, "views batch dim", in float32 or float64.
        slices: "dim slices", the same on every rank.
        counts: the ranks' numbers of rows; they are read on the host, which synchronizes with the
            device once, with a group only.
        group: process group whose ranks hold different rows. For S slices, V views, n rows here and
            N over W ranks, each rank sends n V S numbers and receives N V S / W, a share of the
            slices with all rows, and the reverse for the gradient. None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.
    """
    if counts is None and few(views) and views.shape[0] * views.shape[1] * slices.shape[1] <= FEW:
        x = product(views.flatten(0, 1), slices).view(*views.shape[:2], -1)
        ordered = x.sort(1).values
        return (ordered - _quantiles(views.shape[1], x)[:, None]).square().mean()
    inputs = _Inputs(
        views,
        slices,
        counts,
        wants_gradient(views),
        "" if group is None else group.group_name,
        _groups.gradient_scale(group, grad_reduction),
    )
    return with_gradients(_quantile_distance, inputs)[0]


def _quantiles(n: int, like: Tensor) -> Tensor:
    places = torch.arange(1, n + 1, dtype=accumulator(like), device=like.device)
    return cast("Tensor", torch.special.ndtri(places / (n + 1))).to(like.dtype)


class _Inputs(NamedTuple):
    views: Tensor
    slices: Tensor
    counts: Tensor | None
    gradient: bool
    group_name: str
    scale: float
    """Of the gradient, over ranks."""


def _kernel(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    """Compute the distance, and its gradient with respect to views (or an empty tensor)."""
    views, slices, counts = inputs.views.detach(), inputs.slices, inputs.counts
    each = [views.shape[1]] if counts is None else cast("list[int]", counts.tolist())
    n = sum(each)
    quantiles = _quantiles(n, views)
    total = views.new_zeros((), dtype=accumulator(views))
    ascent = torch.zeros_like(views if inputs.gradient else views[:0])
    with without_autocast(views):
        for block in _slice_blocks(slices, len(views) * n):
            directions = slices[:, block]
            x = (directions.T @ views.mT).flatten(0, 1)  # rows are columns here: sorted in place
            if counts is not None:  # a share of the slices, with the rows of all ranks
                x = _groups.rows_to_columns(x.T, each, inputs.group_name).T.contiguous()
            ordered, places = x.sort(1)
            apart = ordered.sub_(quantiles)
            total += inner(apart, apart)
            push = x.scatter_(1, places, apart)
            # Collective calls must not depend on the grad mode, which may differ over ranks.
            if counts is not None:
                width = len(views) * directions.shape[1]
                push = _groups.columns_to_rows(push.T, each, width, inputs.group_name).T
            if inputs.gradient:
                ascent += (
                    push.reshape(len(views), directions.shape[1], views.shape[1]).mT @ directions.T
                )
        terms = len(views) * slices.shape[1] * n
        if counts is not None:
            total = _groups.all_reduce(total, inputs.group_name)
        ascent.mul_(2 * inputs.scale / max(terms, 1))
        return (total / terms).to(views.dtype), ascent


def _slice_blocks(slices: Tensor, elements: int) -> Iterator[slice]:
    """Cut the slices into blocks, the same on every rank, given the projections of each slice."""
    step = max(block_rows(slices.T, 5 * elements), _FEWEST_SLICES)
    return (slice(start, start + step) for start in range(0, slices.shape[1], step))


def _fake(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    views = inputs.views
    return views.new_empty(()), torch.empty_like(views if inputs.gradient else views[:0])


_quantile_distance = Operator("quantile_distance", _Inputs, _kernel, _fake)
