"""Dtypes and blocks for the arithmetic of every loss, and vmap over custom operators."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ._autograd import Function, on_host, transformed

# Elements of a block: 1 MiB in float32 on the CPU; elsewhere enough to hide the kernel launches,
# by counting them: no GPU has run these blocks yet.
IN_CACHE, ON_DEVICE = 2**18, 2**26
# Columns of a tile on the CPU.
TILE = 1024
# Maximum number of blocks elsewhere, so that the number of kernels does not grow with the data.
MOST_BLOCKS = 8
# For so few elements, the overhead of a call exceeds its computation.
FEW = 2**15


def lifted(x: Tensor) -> Tensor:
    """Convert half precision to float32; return float32 and float64 unchanged."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def lifted_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of `lifted`."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert all tensors to float64 if one of them is, so that a loss computes in one dtype."""
    types = [lifted_dtype(x) for x in tensors]
    if len(set(types)) == 1:
        return tensors
    return tuple(x.double() for x in tensors)


def may_look_at(x: Tensor) -> bool:
    """Whether values can be read without synchronizing, a graph break, or a transform's error."""
    if torch.compiler.is_compiling():  # which must not see what follows
        return False
    plain = type(x) in (Tensor, torch.nn.Parameter)  # not a fake tensor
    return plain and x.is_cpu and not transformed()


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast if it is enabled: disabling it takes as long as reducing a small tensor."""
    if autocast_is_off(x):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def autocast_is_off(x: Tensor) -> bool:
    """Whether autocast does not change operations on x; meta tensors have no autocast."""
    device = x.device.type
    if device == "meta":
        return True
    # A graph that was compiled while autocast was off may run while it is on.
    return not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device))


def product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices, or batches of them, without autocast, in the backward pass too."""
    return cast("Tensor", _Product.apply(left, right))


def plain_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply matrices without autocast; the overhead of `product` exceeds a small product."""
    return left @ right if autocast_is_off(left) else product(left, right)


class _Product(Function):
    """Matrix product without autocast, even if the backward pass runs under autocast."""

    generate_vmap_rule = True

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        return _product(left, right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        # A compiled graph has no second derivative, and Dynamo would trace this recursion without
        # end.
        once = not torch.is_grad_enabled() or torch.compiler.is_compiling()
        product = _product if once else cast("Callable[..., Tensor]", _Product.apply)
        for_left, for_right = ctx.needs_input_grad
        of_left = None
        if for_left and left.stride(-1) != 1:  # in the layout of left, a transpose
            of_left = product(right, gradients[0].mT).mT
        elif for_left:
            of_left = product(gradients[0], right.mT)
        return of_left, product(left.mT, gradients[0]) if for_right else None


def _product(left: Tensor, right: Tensor) -> Tensor:
    if autocast_is_off(left):
        return left @ right
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def accumulator(x: Tensor) -> torch.dtype:
    """Return the wider dtype, for sums of many terms."""
    return torch.float32 if x.device.type == "mps" else torch.float64  # Metal has no float64


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Sum products: rows in their dtype, over rows in the wider one. 10x as fast as norm."""
    rows = cast("Tensor", torch.linalg.vecdot(x, y))
    return rows.sum(dtype=accumulator(x))


def softplus(x: Tensor) -> Tensor:
    """Compute log(1 + e^x). PyTorch's default returns x above 20, which is inexact in float64."""
    return F.softplus(x, threshold=40.0)


def few(x: Tensor) -> bool:
    """Whether fewer calls save more time than fewer passes over x."""
    return not torch.compiler.is_compiling() and x.numel() <= FEW


def block_rows(x: Tensor, width: int | None = None) -> int:
    """Return how many rows of x form a block: few enough for the cache on the CPU, many elsewhere.

    width is the number of elements computed for each row; None means those of x. Compiled, one
    block has all rows.
    """
    if torch.compiler.is_compiling():
        return max(x.shape[0], 1)
    width = max(x.shape[1] if width is None else width, 1)
    elements = IN_CACHE if on_host(x) else max(ON_DEVICE, x.shape[0] * width // MOST_BLOCKS)
    return max(1, -(-elements // width))


def blocks(x: Tensor, width: int | None = None) -> Iterator[slice]:
    """Cut the rows into blocks of `block_rows`."""
    if torch.compiler.is_compiling():  # a range would specialize on the number of rows
        return iter((slice(None),))
    step = block_rows(x, width)
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def tiles(x: Tensor, columns: int) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix with the rows of x and this many columns into blocks of rows and of columns.

    On an accelerator a block has all columns. Not for compiled code.
    """
    width = max(min(columns, TILE) if on_host(x) else columns, 1)
    for start in range(0, columns, width):
        for rows in blocks(x, width):
            yield rows, slice(start, min(start + width, columns))


def looped(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Return an operator's vmap rule: one call for each element, which is large enough."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        results = [
            operator(
                *(
                    arg.select(dim, index) if isinstance(dim, int) else arg  # None, or a list
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for index in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule
