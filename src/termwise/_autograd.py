"""`torch.autograd.Function`, as a type checker has to see it and as Dynamo takes it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:

    class Function(torch.autograd.Function):
        """Type `apply`, as torch does not; nothing of it exists at run time."""

        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Any:
            """Compute the outputs."""

else:
    Function = torch.autograd.Function


def transformed() -> bool:
    """Whether a transform of `torch.func` is at work."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]


def apply(function: type[Function], *inputs: Any) -> Any:
    """Apply a function whose forward takes `*others`.

    Where no input has a gradient Dynamo traces forward as it stands, and takes one of `*others` for
    one that wants a context first. Without a gradient forward is all there is to do.
    """
    if torch.compiler.is_compiling():
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
            return function.forward(*inputs)
    return function.apply(*inputs)
