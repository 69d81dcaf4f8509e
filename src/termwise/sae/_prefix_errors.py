"""The error of the reconstruction from each prefix, for Matryoshka sparse autoencoders.

The reconstruction from a prefix is that from the previous prefix plus the output of the block of
latents between them. So each row is decoded once, block after block. The backward pass decodes all
but the last block again, a few rows at a time, from a single saved residual, instead of saving a
residual of the whole batch for each prefix.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .._autograd import on_host
from .._groups import ProcessGroup
from .._numbers import accumulator, blocks, few, lifted, lifted_dtype, without_autocast
from .._operators import Operator, differentiable
from ._latents import SparseLatents, decode, row_norms
from ._penalties import magnitudes, upward_sign
from ._squared_errors import FeatureReduction, squared_errors, squared_norm


def errors_and_l1(
    target: Tensor,
    f: Tensor | SparseLatents,
    W_dec: Tensor,
    b_dec: Tensor | None,
    mask: Tensor | None,
    prefixes: tuple[int, ...],
    feature_reduction: FeatureReduction,
    batch_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Return each row's squared error for each prefix, "batch prefixes", and sum |f|, " batch".

    Both in one function, so that the backward pass allocates the gradient of f, which is as large
    as f, once. Few latents take fewer calls by the plain formula, and a compiler fuses it; the
    errors are then already a mean, one row, if `squared_errors` returns one.
    """
    values, indices = (f.values, f.indices) if isinstance(f, SparseLatents) else (f, None)
    if indices is None and (few(values) or torch.compiler.is_compiling()):
        call = (target, values, W_dec, b_dec, mask, prefixes, feature_reduction, batch_group)
        errors, l1 = _as_written(*call)
        return errors if errors.ndim == 2 else errors[None], l1
    # Sparse latents are decoded again in the backward pass, all blocks at once, at little cost.
    keep = indices is None and torch.is_grad_enabled()
    given = Given(
        target, values, indices, W_dec, b_dec, mask, list(prefixes), feature_reduction, keep
    )
    measured, _ = differentiable(_errors, _backward, given, (1,))
    return measured[:, :-1], measured[:, -1]


class Given(NamedTuple):
    """Inputs of errors and gradients."""

    target: Tensor
    values: Tensor
    indices: Tensor | None
    W_dec: Tensor
    b_dec: Tensor | None
    mask: Tensor | None
    prefixes: Sequence[int]
    feature_reduction: str
    keep: bool
    """Whether the forward pass returns the last prefix's residual, for the backward pass."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: float32, or float64 if an input has it."""
        tensors = (self.target, self.values, self.W_dec, self.b_dec)
        kinds = [lifted_dtype(tensor) for tensor in tensors if tensor is not None]
        return torch.float64 if torch.float64 in kinds else torch.float32


class Pulled(NamedTuple):
    """Inputs of the gradients."""

    push: Tensor
    last: Tensor
    given: Given
    needed: Sequence[bool]
    """Whether target, values, W_dec and b_dec need a gradient."""


_NAMES = ("target", "values", "W_dec", "b_dec")


def _backward(
    given: Given,
    saved: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    needs: Mapping[str, bool],
) -> dict[str, Tensor]:
    if gradients[0] is None:
        return {}
    needed = [needs[name] for name in _NAMES]
    again = Pulled(gradients[0], saved[0].detach(), given, needed)
    # A compiled graph has no second derivative, so Dynamo need not trace it.
    if torch.compiler.is_compiling():
        return dict(zip(_NAMES, _gradients(again), strict=True))
    return dict(zip(_NAMES, differentiable(_gradients, _second, again), strict=True))


def _second(
    inputs: Pulled,
    saved: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    needs: Mapping[str, bool],
) -> dict[str, Tensor]:
    """Differentiate the formula twice."""
    given, push = inputs.given, inputs.push
    bias = [] if given.b_dec is None else [given.b_dec]
    leaves = [given.target, given.values, given.W_dec, *bias]

    def measured(target: Tensor, values: Tensor, W_dec: Tensor, *bias: Tensor) -> Tensor:
        if given.indices is not None:
            dense = values.new_zeros((values.shape[0], W_dec.shape[0]))
            values = dense.scatter_add(1, given.indices.long(), values)
        how = given.mask, given.prefixes, cast("Any", given.feature_reduction), None
        errors, l1 = _as_written(target, values, W_dec, bias[0] if bias else None, *how)
        return torch.cat([errors, l1[:, None]], 1)

    def first(push: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        pull = cast("Callable[[Tensor], tuple[Tensor, ...]]", torch.func.vjp(measured, *leaves)[1])
        return pull(push)

    with without_autocast(push):
        _, pull = cast("Any", torch.func.vjp)(first, push, *leaves)
        again = pull(
            tuple(
                torch.zeros_like(like) if gradient is None else gradient
                for gradient, like in zip(gradients, leaves, strict=False)
            )
        )
    names = ("push", *(f"given_{name}" for name in _NAMES))
    return dict(zip(names, again, strict=False))


def _as_written(
    target: Tensor,
    values: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    mask: Tensor | None,
    prefixes: Sequence[int],
    feature_reduction: FeatureReduction,
    batch_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Compute the errors and L1 of dense latents by operations with derivatives of any order."""
    # Lifted once, so that gradients in half precision are rounded once.
    target, values, W_dec = lifted(target), lifted(values), lifted(W_dec)
    x_hat, errors = b_dec, cast("list[Tensor]", [])
    for low, high in _blocks(prefixes):
        x_hat = decode(values[:, low:high], W_dec[low:high], x_hat)
        errors.append(squared_errors(target, x_hat, mask, feature_reduction, batch_group))
    # One that is not finite is not a mean already, as others may be.
    alike = cast("tuple[Tensor, ...]", torch.broadcast_tensors(*errors))
    return torch.stack(alike, -1), magnitudes(values).sum(1)


def compute_errors(given: Given) -> tuple[Tensor, Tensor]:
    """Compute the errors and L1 of each row, and the last prefix's residual (or nothing)."""
    target, values = given.target, given.values
    measured, last = _errors_fake(given)
    with without_autocast(target):
        for part in _some_rows(given):
            residuals = _residuals(given, part)
            measured[part, :-1] = squared_norm(residuals, cast("Any", given.feature_reduction)).T
            if given.keep:
                last[part] = residuals[-1]
        measured[:, -1] = row_norms(values, 1)
    return measured, last


def compute_gradients(inputs: Pulled) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of target, values, W_dec and b_dec, those that are needed.

    The output of a block enters the residuals of its own prefix and all later ones. So the
    gradients of the block's latents and decoder rows come from the weighted sum of these residuals.
    """
    push, last, given, needed = inputs
    dtype, target, values, indices = given.dtype, given.target, given.values, given.indices
    W_dec, prefixes = given.W_dec, given.prefixes
    for_target, for_values, for_decoder, for_bias = _room(given, needed)
    per_element = 2 if given.feature_reduction == "sum" else 2 / max(target.shape[1], 1)
    factor, slope = push[:, :-1] * per_element, push[:, -1:]
    with without_autocast(target):
        for part in _some_rows(given):
            pulls = _residuals(given, part, last)
            pulls *= factor[part].T[:, :, None]
            for later in range(len(prefixes) - 1, 0, -1):
                pulls[later - 1].add_(pulls[later])
            if needed[0]:
                for_target[part] = pulls[0]
            if needed[3]:
                for_bias -= pulls[0].sum(0)
            if indices is not None:
                where, block = indices[part].long(), _block_of(indices[part], prefixes)
                # Latents beyond the last prefix have no gradient from the errors.
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
    return for_target, for_values, for_decoder.to(W_dec.dtype), for_bias.to(_bias_dtype(given))


def _residuals(given: Given, part: slice, last: Tensor | None = None) -> Tensor:
    """Decode some rows once, and return the residual of each prefix: "prefixes rows d_model".

    The last prefix's residual is not computed if it is known.
    """
    dtype, values, indices = given.dtype, given.values, given.indices
    W_dec, prefixes = given.W_dec, given.prefixes
    start = _start(given, part)
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
    """Return slope * upward_sign(values), in the given memory if its dtype fits."""
    slopes = room if room.dtype == values.dtype else torch.empty_like(values)
    for part in blocks(values) if on_host(values) else (slice(None),):
        signs = torch.sign(values[part], out=slopes[part])
        signs.add_(0.5).sign_().mul_(slope[part])  # as upward_sign
    return slopes


def _start(given: Given, part: slice) -> Tensor:
    """Return the residual before any latent, with 0 in rows that do not count."""
    start = given.target[part].to(given.dtype)
    if given.b_dec is not None:
        start = start - given.b_dec.to(given.dtype)
    return start if given.mask is None else start.where(given.mask[part, None], 0)


def _blocks(prefixes: Sequence[int]) -> list[tuple[int, int]]:
    """Return the bounds of the block of latents that each prefix adds to the previous one."""
    return list(zip([0, *prefixes[:-1]], prefixes, strict=True))


def _block_of(indices: Tensor, prefixes: Sequence[int]) -> Tensor:
    """Return each sparse latent's flat index into "prefixes + 1, rows"."""
    rows = torch.arange(len(indices), device=indices.device)[:, None]
    # bucketize would need a copy of the prefixes to the device, which synchronizes with it.
    block = rows.new_zeros(indices.shape)
    for prefix in prefixes:
        block += indices >= prefix
    return block * len(indices) + rows


def _some_rows(given: Given) -> Iterator[slice]:
    """Cut the rows so that the residuals of all prefixes together are as large as one residual."""
    values, prefixes = given.values, given.prefixes
    parts = len(prefixes) if given.indices is None else len(prefixes) + values.shape[1]
    if not on_host(values):
        return blocks(values, parts * given.target.shape[1])
    if values.dtype not in (torch.float32, torch.float64):
        parts = max(8, parts)  # a float32 copy of so many latents is small compared with them
    step = max(128, -(-values.shape[0] // parts))  # fewer rows would waste the matrix product
    return (slice(start, start + step) for start in range(0, values.shape[0], step))


def _room(given: Given, needed: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tensors for the gradients; accumulators are zeros, in float32 or float64."""
    target, values, W_dec = given.target, given.values, given.W_dec
    return (
        target.new_empty(target.shape if needed[0] else 0),
        values.new_empty(values.shape if needed[1] else 0),
        W_dec.new_zeros(W_dec.shape if needed[2] else 0, dtype=given.dtype),
        target.new_zeros(target.shape[1] if needed[3] else 0, dtype=accumulator(target)),
    )


def _bias_dtype(given: Given) -> torch.dtype:
    return given.target.dtype if given.b_dec is None else given.b_dec.dtype


def _errors_fake(given: Given) -> tuple[Tensor, Tensor]:
    target, dtype = given.target, given.dtype
    measured = target.new_empty((target.shape[0], len(given.prefixes) + 1), dtype=dtype)
    return measured, target.new_empty(target.shape if given.keep else 0, dtype=dtype)


def _gradients_fake(inputs: Pulled) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = inputs.given
    for_target, for_values, for_decoder, for_bias = _room(given, inputs.needed)
    return (
        for_target,
        for_values,
        for_decoder.to(given.W_dec.dtype),
        for_bias.to(_bias_dtype(given)),
    )


_errors = Operator("prefix_errors", Given, compute_errors, _errors_fake)
_gradients = Operator("prefix_gradients", Pulled, compute_gradients, _gradients_fake)
