"""Run an energy so that its second and third derivatives exist and are correct.

A loss with second derivatives with respect to x needs third derivatives for its gradient. In
PyTorch 2.13 those of layer_norm and instance_norm, and of prod and cumprod with zeros, are silently
wrong, and fused attention, cdist, pdist and hardsigmoid have no second derivative. Here they are
replaced by compositions of functions that have all derivatives.
"""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .._numbers import lifted


class CoupledRowsError(ValueError):
    """The energy normalizes over its batch."""


class MissingDerivativeError(NotImplementedError):
    """The energy calls a function without a derivative of the order that the loss needs."""


@contextmanager
def in_our_words(caller: str) -> Generator[None, None, None]:
    """Raise PyTorch's errors about derivatives, and those about coupled rows, for a loss."""
    try:
        yield
    except CoupledRowsError as coupled:
        raise ValueError(f"{caller} {coupled}") from None
    except RuntimeError as error:
        text = str(error).partition("\n")[0]
        for words, problem in _PROBLEMS.items():
            if words in text:
                raise NotImplementedError(f"{caller} {problem.format(text)}") from error
        raise


_PROBLEMS = {
    "use_reentrant=True": "needs torch.utils.checkpoint with use_reentrant=False in the energy: "
    "the reentrant one cannot be differentiated with respect to an input",
    "is not implemented": "needs a derivative of the energy that torch has not ({}): write the "
    "energy with functions that have two derivatives",
    "must override the setup_context": 'with differentiation="func" needs energies without '
    "autograd.Functions of the old style and without reentrant checkpoints: write "
    'forward(*inputs) and setup_context, or pass differentiation="autograd"',
    "saved tensor hooks": 'with differentiation="func" cannot go through saved-tensor hooks, which '
    'torch.utils.checkpoint uses too: take them out, or pass differentiation="autograd"',
}
"""Messages for errors of PyTorch, by words in them; {} is the error itself."""


def higher_order_safe(
    enabled: bool = True, order: Literal[1, 2, 3] = 3
) -> AbstractContextManager[object]:
    """Return a context in which PyTorch functions have correct derivatives of any order.

    Inside it, batch normalization with the statistics of the batch raises an error.

    Args:
        enabled: whether to replace functions.
        order: order of the derivatives that the caller's gradient needs. A checkpointed part of an
            energy is recomputed outside this context, so functions are not replaced there: those
            without a correct derivative of this order in PyTorch raise an error.
    """
    return _HigherOrderSafe(order) if enabled else nullcontext()


class _HigherOrderSafe(TorchFunctionMode):
    def __init__(self, order: int) -> None:
        super().__init__()
        self.order = order

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in REFUSED and self.order > 1 and _has_gradient((args, kwargs)):
            raise MissingDerivativeError(
                f"needs a second derivative, which torch's {func.__name__} has not: "
                f"{REFUSED[func]}, or pass higher_order_safe=False where it is no function of x"
            )
        if func not in COMPOSITIONS:
            return func(*args, **kwargs)
        if _is_checkpointed():
            if self.order > 2 or (self.order == 2 and func in WITHOUT_SECOND_DERIVATIVE):
                raise MissingDerivativeError(
                    f"needs {func.__name__} outside torch.utils.checkpoint, whose recomputation "
                    "would not swap it for one with the derivatives needed: take it out of the "
                    "checkpointed function, or write it there with functions that have them "
                    "(attention: under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)) and pass "
                    "higher_order_safe=False"
                )
            if func not in BATCH_STATISTICS:
                return func(*args, **kwargs)
            with torch.no_grad():  # which raises the error, if any
                COMPOSITIONS[func](*args, **kwargs)
            return func(*args, **kwargs)
        return COMPOSITIONS[func](*args, **kwargs)


def _has_gradient(value: Any) -> bool:
    """Whether a tensor among arguments requires a gradient."""
    if isinstance(value, (tuple, list)):
        return any(_has_gradient(part) for part in cast("Sequence[Any]", value))
    if isinstance(value, dict):
        return any(_has_gradient(part) for part in cast("dict[str, Any]", value).values())
    return isinstance(value, Tensor) and value.requires_grad


def _is_checkpointed() -> bool:
    """Whether this runs inside torch.utils.checkpoint."""
    if torch.compiler.is_compiling():
        return False
    autograd = cast("Any", torch._C)._autograd  # pyright: ignore[reportPrivateUsage]
    hooks: tuple[Callable[..., object], ...] | None = autograd._top_saved_tensors_default_hooks(
        True
    )
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def _normalized(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    upcast = lifted(x)
    centred = upcast - upcast.mean(axes, keepdim=True)
    return (centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()).to(x.dtype)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    normal = _normalized(input, tuple(range(-len(normalized_shape), 0)), eps)
    scaled = normal if weight is None else normal * weight
    return scaled if bias is None else scaled + bias


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    axes = tuple(range(-len(normalized_shape), 0))
    least = torch.finfo(input.dtype).eps if eps is None else eps
    upcast = lifted(input)
    normal = (upcast * (upcast.square().mean(axes, keepdim=True) + least).rsqrt()).to(input.dtype)
    return normal if weight is None else normal * weight


def _by_channel(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.reshape(-1, *[1] * (x.ndim - 2))


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = x if weight is None else x * _by_channel(weight, x)
    return scaled if bias is None else scaled + _by_channel(bias, x)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    groups = input.reshape(input.shape[0], num_groups, -1)
    return _affine(_normalized(groups, (2,), eps).reshape(input.shape), weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:  # which the function updates
        F.instance_norm(input.detach(), running_mean, running_var, momentum=momentum, eps=eps)
    return _affine(_normalized(input, tuple(range(2, input.ndim)), eps), weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        raise CoupledRowsError(
            "needs energies of each row alone, got batch normalization in training mode, which "
            "couples the rows of a batch: call eval() on it, or use a normalization of each row"
        )
    scale = (running_var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    return _affine(input, scale, shift)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        copies = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(copies, -3), value.repeat_interleave(copies, -3)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        attn_mask = visible.tril()
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        if attn_mask.dtype == torch.bool:
            hidden = ~attn_mask
        else:
            hidden = attn_mask == -math.inf
            scores = scores + attn_mask.masked_fill(hidden, 0)
        # A query whose keys are all masked gets zeros, as in PyTorch, and no NaN in its gradient.
        blind = hidden.all(-1, keepdim=True)
        scores = scores.masked_fill(hidden & ~blind, -math.inf)
        weights = scores.softmax(-1).masked_fill(blind, 0)
    return (F.dropout(weights, dropout_p) if dropout_p else weights) @ value


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None) -> Tensor:
    difference = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    return cast("Tensor", torch.linalg.vector_norm(difference, p, -1))


def _pdist(input: Tensor, p: float = 2.0) -> Tensor:
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return cast("Tensor", torch.linalg.vector_norm(input[first] - input[second], p, -1))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(input + 3) / 6


def _prod(input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Multiply recursively in two halves; PyTorch's third derivatives are wrong with zeros."""
    x: Any = input if dtype is None else input.to(dtype)
    if dim is None:
        x, dim = x.reshape(-1), 0
    if x.ndim == 0:
        return x * 1
    while int(x.shape[dim]) > 1:
        count = int(x.shape[dim])
        half = count // 2
        pairs = x.narrow(dim, 0, half) * x.narrow(dim, half, half)
        x = torch.cat([pairs, x.narrow(dim, 2 * half, 1)], dim) if count % 2 else pairs
    if x.shape[dim] == 0:
        return torch.prod(x, dim, keepdim)
    return x if keepdim else x.squeeze(dim)


def _cumprod(input: Any, dim: int, *, dtype: Any = None) -> Any:
    x: Any = input if dtype is None else input.to(dtype)
    if x.ndim == 0:
        return x * 1
    step, count = 1, x.shape[dim]
    while step < count:  # each element is now the product of the last `step` elements
        head, tail = x.narrow(dim, 0, step), x.narrow(dim, step, count - step)
        x = torch.cat([head, tail * x.narrow(dim, 0, count - step)], dim)
        step *= 2
    return x


def _own_statistics(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def _running_statistics(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    with sdpa_kernel(SDPBackend.MATH):  # the mode does not reach calls inside
        return F.multi_head_attention_forward(*args, **kwargs)


COMPOSITIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    torch.instance_norm: _own_statistics,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _running_statistics,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    torch.cdist: _cdist,
    torch.pdist: _pdist,
    F.pdist: _pdist,
    F.hardsigmoid: _hardsigmoid,
    torch.prod: _prod,
    Tensor.prod: _prod,
    torch.cumprod: _cumprod,
    Tensor.cumprod: _cumprod,
}
"""Replacements of PyTorch functions, with the same arguments."""

WITHOUT_SECOND_DERIVATIVE = {
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
    torch.cdist,
    torch.pdist,
    F.pdist,
    F.hardsigmoid,
}
_LIKE_MARGIN = "write it with relu of the margins"
REFUSED: dict[Callable[..., Any], str] = {
    F.ctc_loss: "write the recursion over time steps with torch.logaddexp",
    torch.ctc_loss: "write the recursion over time steps with torch.logaddexp",
    F.multi_margin_loss: _LIKE_MARGIN,
    F.multilabel_margin_loss: _LIKE_MARGIN,
}
"""Functions without a second derivative and without a replacement, and what to use instead."""

BATCH_STATISTICS = {F.batch_norm, torch.batch_norm}
