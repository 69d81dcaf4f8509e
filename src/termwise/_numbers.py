"""What the arithmetic of every loss shares: its dtypes, and vmap over our own operators."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ._autograd import transformed


def lifted(x: Tensor) -> Tensor:
    """Lift halves to float32; float32 and float64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Lift to float64 what stands beside a float64, so that a loss is of one type inside."""
    types = [lifted(x[:0]).dtype for x in tensors]
    if len(set(types)) == 1:
        return tensors
    return tuple(x.double() for x in tensors)


def may_look_at(x: Tensor) -> bool:
    """Whether values can be read without waiting, and without ending a graph or a transform."""
    if torch.compiler.is_compiling():  # which must not see what follows
        return False
    plain = type(x) in (Tensor, torch.nn.Parameter)  # not a fake tensor
    return plain and x.device.type == "cpu" and not transformed()


def accumulator(x: Tensor) -> torch.dtype:
    """Return the wider type, for sums of many terms."""
    return torch.float32 if x.device.type == "mps" else torch.float64  # Metal has no float64


def blocks(x: Tensor) -> Iterator[slice]:
    """Cut the rows into blocks of about 1 MiB in float32, which stay in cache between steps."""
    step = max(1, 2**18 // max(x.shape[1], 1))
    for start in range(0, x.shape[0], step):
        yield slice(start, start + step)


def looped(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Return an operator's vmap rule: one call for each element, for each fills the machine."""

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
