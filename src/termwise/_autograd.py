"""`torch.autograd.Function` as type checkers and Dynamo take it; gradients made with the value."""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:

    class Function(torch.autograd.Function):
        """Type `apply`, as torch does not; nothing of it exists at run time."""

        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Any:
            """Compute the outputs."""

else:

    class Function(torch.autograd.Function):
        @classmethod
        def apply(cls, *args):
            # torch inspects the signature of forward at each call, for its defaults; ours has none,
            # and a small loss takes less time than that. Dynamo passes this by.
            if transformed():
                return super().apply(*args)
            args = torch._functorch.utils.unwrap_dead_wrappers(args)
            return super(torch.autograd.Function, cls).apply(*args)


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


def on_host(x: Tensor) -> bool:
    """Whether to look into a tensor waits for nothing."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor)


def in_place(factor: Tensor) -> bool:
    """Whether a gradient may be overwritten by its product with the one that comes in.

    It may where the graph is freed after this pass, for then nobody reads the gradient again.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or transformed()
        or torch._C._functorch.is_legacy_batchedtensor(factor)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        or torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    )


def times_factor(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply a gradient that was made with the value by the one that comes in.

    Where that is 0 the loss is left out, even if its own gradient is not finite.
    """
    if not in_place(factor):
        return (gradient * factor).where(factor != 0, 0).to(gradient.dtype)
    if on_host(factor):
        return gradient.mul_(factor) if bool(factor != 0) else gradient.zero_()
    return gradient.mul_(factor).masked_fill_(factor == 0, 0)


def wants_gradient(x: Tensor) -> bool:
    """Whether the pass over x is to write its gradient too."""
    # Under vmap within torch.func.grad a tensor does not know that it is differentiated.
    inside = not torch.compiler.is_compiling() and transformed()
    return torch.is_grad_enabled() and (x.requires_grad or inside)


def link_to(x: Tensor) -> Tensor:
    """Return a 0 that hangs on x: a sum over nothing. For `chain`, and where all weights are 0."""
    return x[:0].sum()


def chain(gradient: Tensor, factor: Tensor | None, link: Tensor) -> Tensor | None:
    """Multiply a gradient that was made with the value by the one that comes in.

    In place where `times_factor` says so, for a second tensor of its size would be most of the
    loss's memory. The result hangs on the link, so that a second derivative is refused rather than
    left out.
    """
    if factor is None:
        return None
    if in_place(factor):
        return times_factor(gradient, factor)
    why = "a loss whose gradient is made with its value has no second derivative"
    return refusing(times_factor(gradient, factor), why, link)


def refusing(x: Tensor, why: str, link: Tensor | None = None) -> Tensor:
    """Return x, and refuse its derivative, and with it that of what hangs on the link."""
    return cast("Tensor", _Refusing.apply(x, why, link))


class _Refusing(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, why: str, link: Tensor | None) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.why = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError(ctx.why)
