"""The error that each prefix of the latents leaves, for Matryoshka sparse autoencoders.

The reconstruction from a prefix is that from the one before and the output of the block of latents
between them. So each row is decoded once, block after block. The backward pass has the residuals of
the prefixes before the last decoded once more, some rows at a time, and needs no more than one
residual kept for that: none is held for each prefix of the whole batch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .._autograd import Function
from .._numbers import accumulator, blocks, lifted, looped, on_host, without_autocast
from ._latents import SparseLatents, row_norms
from ._penalties import magnitudes, upward_sign
from ._squared_errors import FeatureReduction, squared_norm


def errors_and_l1(
    target: Tensor,
    f: Tensor | SparseLatents,
    W_dec: Tensor,
    b_dec: Tensor | None,
    mask: Tensor | None,
    prefixes: tuple[int, ...],
    feature_reduction: FeatureReduction,
) -> tuple[Tensor, Tensor]:
    """Return each row's squared error for each prefix, "batch prefixes", and sum |f|, " batch".

    Both in one, since the gradient of f is as large as f: the backward pass makes it once.
    """
    values, indices = (f.values, f.indices) if isinstance(f, SparseLatents) else (f, None)
    # Sparse latents are decoded anew in the backward pass, all blocks at once, for little.
    keep = indices is None and torch.is_grad_enabled()
    measured, _ = cast(
        "tuple[Tensor, Tensor]",
        _PrefixErrors.apply(
            target, values, indices, W_dec, b_dec, mask, prefixes, feature_reduction, keep
        ),
    )
    return measured[:, :-1], measured[:, -1]


class _PrefixErrors(Function):
    """Outputs errors and L1 side by side, and the last prefix's residual, for backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        target: Tensor,
        values: Tensor,
        indices: Tensor | None,
        W_dec: Tensor,
        b_dec: Tensor | None,
        mask: Tensor | None,
        prefixes: tuple[int, ...],
        feature_reduction: str,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        outputs = _errors(
            target, values, indices, W_dec, b_dec, mask, list(prefixes), feature_reduction, keep
        )
        return cast("tuple[Tensor, Tensor]", outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.prefixes, ctx.feature_reduction, _ = inputs
        ctx.save_for_backward(output[1], *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        last, *tensors = ctx.saved_tensors
        if gradients[0] is None:
            return (None,) * 9
        needs = ctx.needs_input_grad
        needed = [bool(needs[place]) for place in (0, 1, 3, 4)]
        # A compiled graph has no second derivative, and Dynamo need not trace one.
        step = _gradients if torch.compiler.is_compiling() else cast("Any", _PrefixGradients.apply)
        found = step(
            gradients[0], last.detach(), *tensors, list(ctx.prefixes), ctx.feature_reduction, needed
        )
        given = [part if need else None for part, need in zip(found, needed, strict=True)]
        return given[0], given[1], None, given[2], given[3], *[None] * 4


class _PrefixGradients(Function):
    """The backward pass of `_PrefixErrors`; its own is the formula's, derived twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        push: Tensor,
        last: Tensor,
        target: Tensor,
        values: Tensor,
        indices: Tensor | None,
        W_dec: Tensor,
        b_dec: Tensor | None,
        mask: Tensor | None,
        prefixes: Sequence[int],
        feature_reduction: str,
        needed: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outputs = _gradients(
            push,
            last,
            target,
            values,
            indices,
            W_dec,
            b_dec,
            mask,
            list(prefixes),
            feature_reduction,
            list(needed),
        )
        return cast("tuple[Tensor, Tensor, Tensor, Tensor]", outputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        push, _, *tensors, ctx.prefixes, ctx.feature_reduction, ctx.needed = inputs
        ctx.save_for_backward(push, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        push, target, values, indices, W_dec, b_dec, mask = ctx.saved_tensors
        inputs: list[Tensor] = [target, values, W_dec] + ([] if b_dec is None else [b_dec])

        def measured(target: Tensor, values: Tensor, W_dec: Tensor, *bias: Tensor) -> Tensor:
            b_dec = bias[0] if bias else None
            return _as_written(
                target, values, indices, W_dec, b_dec, mask, ctx.prefixes, ctx.feature_reduction
            )

        def first(push: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            pull = cast(
                "Callable[[Tensor], tuple[Tensor, ...]]", torch.func.vjp(measured, *inputs)[1]
            )
            return pull(push)

        with without_autocast(push):
            _, pull = cast("Any", torch.func.vjp)(first, push, *inputs)
            again = pull(
                tuple(
                    torch.zeros_like(like) if gradient is None else gradient
                    for gradient, like in zip(gradients, inputs, strict=False)
                )
            )
        for_bias = again[4] if b_dec is not None else None
        return again[0], None, again[1], again[2], None, again[3], for_bias, *[None] * 4


def _as_written(
    target: Tensor,
    values: Tensor,
    indices: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    mask: Tensor | None,
    prefixes: Sequence[int],
    feature_reduction: FeatureReduction,
) -> Tensor:
    """Compute what `compute_errors` does, in operations that autograd follows to any order."""
    dtype = _dtype_of(target, values, W_dec, b_dec)
    if indices is not None:
        dense = values.new_zeros((values.shape[0], W_dec.shape[0]))
        values = dense.scatter_add(1, indices.long(), values)
    l1 = magnitudes(values.to(dtype)).sum(1)
    residual = _start(target, b_dec, mask, dtype)
    widths = [high - low for low, high in _blocks(prefixes)] + [W_dec.shape[0] - prefixes[-1]]
    columns = cast("tuple[Tensor, ...]", values.split(widths, 1))
    rows = cast("tuple[Tensor, ...]", W_dec.split(widths))
    errors: list[Tensor] = []
    for place in range(len(prefixes)):
        residual = residual - columns[place].to(dtype) @ rows[place].to(dtype)
        errors.append(squared_norm(residual, feature_reduction))
    return torch.stack([*errors, l1], 1)


def compute_errors(
    target: Tensor,
    values: Tensor,
    indices: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    mask: Tensor | None,
    prefixes: Sequence[int],
    feature_reduction: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the errors and L1 of each row, and the last prefix's residual (or nothing)."""
    dtype = _dtype_of(target, values, W_dec, b_dec)
    measured = target.new_empty((target.shape[0], len(prefixes) + 1), dtype=dtype)
    last = target.new_empty(target.shape if keep else 0, dtype=dtype)
    with without_autocast(target):
        for part in _some_rows(values, indices, prefixes, target.shape[1]):
            residuals = _residuals(part, target, values, indices, W_dec, b_dec, mask, prefixes)
            measured[part, :-1] = squared_norm(residuals, cast("Any", feature_reduction)).T
            if keep:
                last[part] = residuals[-1]
        measured[:, -1] = row_norms(values, 1)
    return measured, last


def compute_gradients(
    push: Tensor,
    last: Tensor,
    target: Tensor,
    values: Tensor,
    indices: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    mask: Tensor | None,
    prefixes: Sequence[int],
    feature_reduction: str,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of target, values, W_dec and b_dec, those that are needed.

    The output of a block enters the residuals of its own and of all later prefixes. So it is the
    sum of these, each with its factor, that the block's latents and decoder rows are pulled by.
    """
    dtype = _dtype_of(target, values, W_dec, b_dec)
    for_target, for_values, for_decoder, for_bias = _room(target, values, W_dec, b_dec, needed)
    factor = push[:, :-1] * (2 if feature_reduction == "sum" else 2 / max(target.shape[1], 1))
    slope = push[:, -1:]
    with without_autocast(target):
        for part in _some_rows(values, indices, prefixes, target.shape[1]):
            pulls = _residuals(part, target, values, indices, W_dec, b_dec, mask, prefixes, last)
            pulls *= factor[part].T[:, :, None]
            for later in range(len(prefixes) - 1, 0, -1):
                pulls[later - 1].add_(pulls[later])
            if needed[0]:
                for_target[part] = pulls[0]
            if needed[3]:
                for_bias -= pulls[0].sum(0)
            if indices is not None:
                where, block = indices[part].long(), _block_of(indices[part], prefixes)
                # Latents beyond the last prefix are pulled by nothing.
                pulled = F.pad(pulls, (0, 0, 0, 0, 0, 1)).flatten(0, 1)
                pulled = pulled.index_select(0, block.flatten())
                if needed[1]:
                    rows = W_dec.index_select(0, where.flatten()).to(dtype)
                    found = cast("Tensor", torch.linalg.vecdot(pulled, rows)).view(where.shape)
                    for_values[part] = upward_sign(values[part].to(dtype)) * slope[part] - found
                if needed[2]:
                    pulled *= values[part].reshape(-1, 1).to(dtype)
                    for_decoder.index_add_(0, where.flatten(), pulled, alpha=-1)
                continue
            for pull, (low, high) in zip(pulls, _blocks(prefixes), strict=True):
                block, rows = values[part, low:high].to(dtype), W_dec[low:high].to(dtype)
                if needed[1]:
                    found = _slopes(block, slope[part], for_values[part, low:high])
                    found.addmm_(pull, rows.T, alpha=-1)
                    if values.dtype != dtype:
                        for_values[part, low:high] = found
                if needed[2]:
                    for_decoder[low:high].addmm_(block.T, pull, alpha=-1)
            if needed[1] and prefixes[-1] < values.shape[1]:
                beyond = for_values[part, prefixes[-1] :]
                beyond.copy_(_slopes(values[part, prefixes[-1] :].to(dtype), slope[part], beyond))
    bias_type = target.dtype if b_dec is None else b_dec.dtype
    return for_target, for_values, for_decoder.to(W_dec.dtype), for_bias.to(bias_type)


def _residuals(
    part: slice,
    target: Tensor,
    values: Tensor,
    indices: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    mask: Tensor | None,
    prefixes: Sequence[int],
    last: Tensor | None = None,
) -> Tensor:
    """Decode some rows once, and return the residual of each prefix: "prefixes rows d_model".

    The last prefix's residual is not computed where it is known.
    """
    dtype = _dtype_of(target, values, W_dec, b_dec)
    start = _start(target[part], b_dec, None if mask is None else mask[part], dtype)
    if indices is not None:
        where, block = indices[part].long(), _block_of(indices[part], prefixes)
        outputs = W_dec.index_select(0, where.flatten()).to(dtype)
        outputs = outputs * values[part].reshape(-1, 1).to(dtype)
        residuals = start.new_zeros((len(prefixes) + 1, *start.shape))
        residuals.flatten(0, 1).index_add_(0, block.flatten(), outputs, alpha=-1)
        residuals[0].add_(start)
        for later in range(1, len(prefixes)):
            residuals[later].add_(residuals[later - 1])
        return residuals[:-1]
    residuals = start.new_empty((len(prefixes), *start.shape))
    for residual, (low, high) in zip(residuals, _blocks(prefixes), strict=True):
        if high == prefixes[-1] and last is not None and last.numel():
            residual.copy_(last[part])
        else:
            block, rows = values[part, low:high].to(dtype), W_dec[low:high].to(dtype)
            start = torch.addmm(start, block, rows, alpha=-1, out=residual)
    return residuals


def _slopes(values: Tensor, slope: Tensor, room: Tensor) -> Tensor:
    """Return slope * upward_sign(values), in the room if its type fits."""
    slopes = room if room.dtype == values.dtype else torch.empty_like(values)
    for part in blocks(values):
        signs = torch.sign(values[part], out=slopes[part])
        signs.add_(0.5).sign_().mul_(slope[part])  # as upward_sign
    return slopes


def _start(target: Tensor, b_dec: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return what no latent has reconstructed yet, with 0 in rows that do not count."""
    start = target.to(dtype) if b_dec is None else target.to(dtype) - b_dec.to(dtype)
    return start if mask is None else start.where(mask[:, None], 0)


def _blocks(prefixes: Sequence[int]) -> list[tuple[int, int]]:
    """Return the bounds of the latents that each prefix has more than the one before."""
    return list(zip([0, *prefixes[:-1]], prefixes, strict=True))


def _block_of(indices: Tensor, prefixes: Sequence[int]) -> Tensor:
    """Return each sparse latent's place among "prefixes + 1, rows", counted through."""
    rows = torch.arange(len(indices), device=indices.device)[:, None]
    # bucketize needs the prefixes on the device: a copy that synchronizes with it.
    block = rows.new_zeros(indices.shape)
    for prefix in prefixes:
        block += indices >= prefix
    return block * len(indices) + rows


def _some_rows(
    values: Tensor, indices: Tensor | None, prefixes: Sequence[int], d_model: int
) -> Iterator[slice]:
    """Cut the rows so that what is held for each prefix is as large as one residual in all."""
    parts = len(prefixes) if indices is None else len(prefixes) + values.shape[1]
    if not on_host(values):
        return blocks(values, parts * d_model)
    if values.dtype not in (torch.float32, torch.float64):
        parts = max(8, parts)  # a lifted copy of so many latents stays small beside them
    step = max(128, -(-values.shape[0] // parts))  # fewer rows would waste the matrix product
    return (slice(start, start + step) for start in range(0, values.shape[0], step))


def _room(
    target: Tensor, values: Tensor, W_dec: Tensor, b_dec: Tensor | None, needed: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tensors for the gradients; those that sums go into are zeros, in float32 at least."""
    dtype = _dtype_of(target, values, W_dec, b_dec)
    return (
        target.new_empty(target.shape if needed[0] else 0),
        values.new_empty(values.shape if needed[1] else 0),
        W_dec.new_zeros(W_dec.shape if needed[2] else 0, dtype=dtype),
        target.new_zeros(target.shape[1] if needed[3] else 0, dtype=accumulator(target)),
    )


def _dtype_of(*tensors: Tensor | None) -> torch.dtype:
    """Return the type of the arithmetic: float32, or float64 where an input is."""
    kinds = [lifted(tensor[:0]).dtype for tensor in tensors if tensor is not None]
    return torch.float64 if torch.float64 in kinds else torch.float32


def _vmapped(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Return the vmap rule of an operator some of whose arguments are lists of numbers."""
    rule: Callable[..., tuple[Any, Any]] = looped(operator)

    def of(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return rule(info, tuple(dim if isinstance(dim, int) else None for dim in in_dims), *args)

    return of


_errors = torch.library.custom_op("termwise::prefix_errors", mutates_args=())(compute_errors)
_gradients = torch.library.custom_op("termwise::prefix_gradients", mutates_args=())(
    compute_gradients
)
_errors.register_vmap(_vmapped(_errors))
_gradients.register_vmap(_vmapped(_gradients))


@_errors.register_fake
def _(
    target: Tensor,
    values: Tensor,
    indices: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    mask: Tensor | None,
    prefixes: Sequence[int],
    feature_reduction: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    dtype = _dtype_of(target, values, W_dec, b_dec)
    measured = target.new_empty((target.shape[0], len(prefixes) + 1), dtype=dtype)
    return measured, target.new_empty(target.shape if keep else 0, dtype=dtype)


@_gradients.register_fake
def _(
    push: Tensor,
    last: Tensor,
    target: Tensor,
    values: Tensor,
    indices: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    mask: Tensor | None,
    prefixes: Sequence[int],
    feature_reduction: str,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    room = _room(target, values, W_dec, b_dec, needed)
    return (
        room[0],
        room[1],
        room[2].to(W_dec.dtype),
        room[3].to(target.dtype if b_dec is None else b_dec.dtype),
    )
