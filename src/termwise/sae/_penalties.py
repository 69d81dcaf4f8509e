"""Penalties on the latents of each row, for the objectives here and for your own."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .._autograd import Function, transformed
from .._contract import contract
from .._numbers import few, lifted, may_look_at, without_autocast
from ._latents import Latents, SparseLatents, check_indices, decode, row_norms


@contract
def tanh_penalty(
    f: Float[Tensor, "batch d_sae"] | SparseLatents,
    *,
    scale: float = 1.0,
    decoder_norm: Float[Tensor, " d_sae"] | None = None,
) -> Float[Tensor, " batch"]:
    r"""Compute a smooth count of the active latents of each row: each adds at most 1.

    $$\sum_j \tanh(c \, \left|f_j\right| \, \nu_j)$$

    Args:
        f (Float[Tensor, "batch d_sae"] | SparseLatents): latents, dense or
            [`SparseLatents`][termwise.sae.SparseLatents]. Half precision is converted to float32.
        scale: c, in units of 1 / (f nu): a latent well above 1 / c adds almost 1.
        decoder_norm (Float[Tensor, " d_sae"] | None): nu, the norms of the decoder's rows;
            gradients reach them if they require one. None: 1.

    Returns:
        Float[Tensor, " batch"]: the penalty of each row, without a coefficient. The derivative of
        \|f\| at 0 is 1; ReLU and top-k selection block it, and [`jumprelu`][termwise.sae.jumprelu]
        passes it to the threshold of latents just below it.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: scale is not positive.

    References:
        Anthropic, Dictionary Learning Optimization Techniques, update of January 2025,
        https://transformer-circuits.pub/2025/january-update, where c = 4; SAELens and the
        cross-layer transcoders of Ameisen et al. (2025) have the same form.

    Examples:
        >>> import torch
        >>> from termwise.sae import tanh_penalty
        >>> tanh_penalty(torch.tensor([[0.0, 50.0, -50.0], [0.5, 0.0, 0.0]]))
        tensor([2.0000, 0.4621])
    """
    if not scale > 0:
        raise ValueError(f"tanh_penalty needs scale > 0, got {scale}")
    check_indices("tanh_penalty", f, decoder_norm)
    sizes = magnitudes(lifted(f.values if isinstance(f, SparseLatents) else f))
    if decoder_norm is None:
        return torch.tanh(sizes * scale).sum(1)
    slopes = lifted(decoder_norm) * scale
    if isinstance(f, SparseLatents):
        slopes = slopes.index_select(0, f.indices.flatten().long()).view_as(sizes)
    return torch.tanh(sizes * slopes).sum(1)


@contract
def lp_penalty(
    f: Float[Tensor, "batch d_sae"] | SparseLatents,
    *,
    p: float,
    decoder_norm: Float[Tensor, " d_sae"] | None = None,
) -> Float[Tensor, " batch"]:
    r"""Sum a power of the latents of each row: L1 for p = 1, close to their number for small p.

    $$\sum_j \nu_j \left|f_j\right|^p$$

    Args:
        f (Float[Tensor, "batch d_sae"] | SparseLatents): latents, dense or
            [`SparseLatents`][termwise.sae.SparseLatents]. Half precision is converted to float32.
        p: exponent. For p < 1 the derivative at 0 is infinite; the gradient at a latent of 0 is set
            to 0, as in `torch.norm`.
        decoder_norm (Float[Tensor, " d_sae"] | None): nu, the norms of the decoder's rows;
            gradients reach them if they require one. None: 1.

    Returns:
        Float[Tensor, " batch"]: the penalty of each row, without a coefficient and without a root.
        At p = 1 the derivative at 0 is 1, as in [`tanh_penalty`][termwise.sae.tanh_penalty].

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: p is not positive.

    References:
        Karvonen et al., Measuring Progress in Dictionary Learning (2024),
        https://arxiv.org/abs/2408.00113, where p falls from 1 during training.

    Examples:
        >>> import torch
        >>> from termwise.sae import lp_penalty
        >>> lp_penalty(torch.tensor([[4.0, 0.0, -9.0]]), p=0.5)
        tensor([5.])
    """
    if not p > 0:
        raise ValueError(f"lp_penalty needs p > 0, got {p}")
    check_indices("lp_penalty", f, decoder_norm)
    values = f.values if isinstance(f, SparseLatents) else f
    with without_autocast(values):
        return penalty(f, decoder_norm, p)


def penalty(f: Latents, decoder_norm: Tensor | None, p: float) -> Tensor:
    """Return sum_j norm_j |f_j|^p of each row, without a copy of f in the forward pass."""
    values = f.values if isinstance(f, SparseLatents) else f
    plain = decoder_norm is None and p == 1.0
    if plain and not (few(values) or torch.compiler.is_compiling() or none_negative(values)):
        return cast("Tensor", _RowsL1.apply(values))
    powered = _powers(magnitudes(lifted(values)), p)
    if decoder_norm is None:
        return powered.sum(1)
    norm = lifted(decoder_norm)
    if isinstance(f, SparseLatents):
        # Not norm[indices], in which the index -1 is the last latent.
        picked = norm.index_select(0, f.indices.flatten().long()).view_as(powered)
        return (powered * picked).sum(1)
    if torch.compiler.is_compiling():  # which fuses it, but no product of matrices
        return (powered * norm).sum(1)
    return decode(powered, norm[:, None])[:, 0]


def magnitudes(f: Tensor) -> Tensor:
    """Return |f| with the derivative 1 at f = 0, the value of a latent below its threshold.

    The function that set the latent to zero decides whether to use that gradient: ReLU and top-k
    selection block it, JumpReLU's estimate uses it for the half of its kernel below the threshold.
    With the derivative 0 that half would be missing.
    """
    if none_negative(f):
        return f
    if few(f):  # keeps -f, for fewer calls
        return F.leaky_relu(-f, -1.0)
    return cast("Tensor", _Magnitudes.apply(f))


def none_negative(f: Tensor) -> bool:
    """Whether the values can be read and all are 0 or more, as after a ReLU: then |f| is f."""
    return may_look_at(f) and f.numel() > 0 and bool(f.detach().amin() >= 0)


def upward_sign(f: Tensor) -> Tensor:
    """Return the derivative of |f|: its sign, and 1 where f is 0 or -0."""
    sign = f.sign()
    if torch.compiler.is_compiling():  # a polynomial: comparisons take longer than the reading of f
        return 1 + sign - sign * sign
    return sign.add_(0.5).sign_()  # in place, without booleans, which are 4 times slower


def _powers(size: Tensor, p: float) -> Tensor:
    if p == 1.0:
        return size
    if p > 1.0:
        return size.pow(p)
    # The derivative at 0 is infinite, and infinity times a factor of 0 is NaN: 0 instead.
    zero = size == 0
    return size.masked_fill(zero, 1).pow(p).masked_fill(zero, 0)


class _RowsL1(Function):
    """Sum |f| over each row, without saving a tensor as large as f, as `f.abs()` would."""

    generate_vmap_rule = True

    @staticmethod
    def forward(f: Tensor) -> Tensor:
        return row_norms(f, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        f: Tensor = ctx.saved_tensors[0]
        slopes, push = upward_sign(f), gradients[0][:, None].to(f.dtype)
        # In place if allowed: allocating a tensor of the size of f costs as much as the sign.
        return slopes * push if transformed() else slopes.mul_(push)


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
