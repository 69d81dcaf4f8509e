"""What the arithmetic of every loss shares: its dtypes, and vmap over our own operators."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def lifted(x: Tensor) -> Tensor:
    """Lift halves to float32; float32 and float64 stay."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def accumulator(x: Tensor) -> torch.dtype:
    """Give the wider type, for sums of many terms."""
    return torch.float32 if x.device.type == "mps" else torch.float64  # Metal has no float64


def looped(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Give an operator's vmap rule: one call for each element, for each fills the machine."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        results = [
            operator(
                *(
                    arg if dim is None else arg.select(dim, index)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for index in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(
            results[0]
        )

    return rule
