"""`torch.autograd.Function` for type checkers and Dynamo, and gradients computed with the value."""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:

    class Function(torch.autograd.Function):
        """Declare the type of `apply`, which PyTorch does not; it has no effect at run time."""

        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Any:
            """Compute the outputs."""

else:

    class Function(torch.autograd.Function):
        @classmethod
        def apply(cls, *args):
            # PyTorch inspects the signature of forward at each call, to fill in defaults. Ours has
            # none, and the inspection takes longer than a small loss. Dynamo ignores this override.
            if transformed():
                return super().apply(*args)
            args = torch._functorch.utils.unwrap_dead_wrappers(args)
            return super(torch.autograd.Function, cls).apply(*args)


def transformed() -> bool:
    """Whether a transform of `torch.func` is at work."""
    return torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]


def apply(function: type[Function], *inputs: Any) -> Any:
    """Apply a function whose forward takes `*others`.

    If no input requires a gradient, Dynamo traces forward directly, and mistakes one with `*others`
    for one that takes a context first. In that case this calls forward itself. Nor does Dynamo take
    one tensor for two inputs, as of a projection that is its own transpose: the second is a view.
    """
    if torch.compiler.is_compiling():
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
            return function.forward(*inputs)
        if len(dict.fromkeys(tensors)) < len(tensors):
            inputs = tuple(
                x.view_as(x) if isinstance(x, Tensor) and any(x is y for y in inputs[:place]) else x
                for place, x in enumerate(inputs)
            )
    return function.apply(*inputs)


def apply_own(what: str, function: type[Function], *inputs: Any) -> Any:
    """Apply a function whose backward pass is not the derivative of its forward pass.

    Where a transform of `torch.func` is compiled, Dynamo traces forward alone, and the gradient
    would be the derivative of that (https://github.com/pytorch/pytorch/issues/193279). Whether a
    tensor is differentiated cannot be seen there.
    """
    if torch.compiler.is_dynamo_compiling() and transformed() and torch.is_grad_enabled():
        raise NotImplementedError(
            f"{what} has a gradient of its own, which torch.compile leaves out within "
            "torch.func.grad and torch.vmap: leave out torch.compile or the transform, or, for "
            "values alone, call it under torch.no_grad()"
        )
    return apply(function, *inputs)


def on_host(x: Tensor) -> bool:
    """Whether reading a tensor's values does not synchronize with a device."""
    return x.is_cpu and not isinstance(x, FakeTensor)


def in_place(factor: Tensor) -> bool:
    """Whether a saved gradient may be overwritten by its product with the incoming one.

    It may if the graph is freed after this pass, since the gradient is then not read again.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or transformed()
        or torch._C._functorch.is_legacy_batchedtensor(factor)  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        or torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    )


def scaled_by(factor: Tensor, *gradients: Tensor) -> list[Tensor]:
    """Multiply gradients that were computed with the value by the incoming one.

    If the incoming one is 0 the products are 0, even if the saved gradients are not finite.
    """
    if not in_place(factor):
        return [(x * factor).where(factor != 0, 0).to(x.dtype) for x in gradients]
    left_out = factor == 0
    if on_host(factor):
        seen = bool(left_out)
        return [x.zero_() if seen else x.mul_(factor) for x in gradients]
    return [x.mul_(factor).masked_fill_(left_out, 0) for x in gradients]


def wants_gradient(x: Tensor) -> bool:
    """Whether the forward pass should compute the gradient with respect to x too."""
    # Under vmap inside torch.func.grad, `requires_grad` is False for a tensor that is
    # differentiated.
    inside = not torch.compiler.is_compiling() and transformed()
    return torch.is_grad_enabled() and (x.requires_grad or inside)


def link_to(x: Tensor) -> Tensor:
    """Return a 0 that depends on x in the graph: a sum over no elements."""
    return x[:0].sum()


def chain(factor: Tensor, link: Tensor, *gradients: Tensor) -> list[Tensor]:
    """Multiply gradients that were computed with the value by the incoming one.

    In place if `in_place` allows it, since a second tensor of this size would be most of the memory
    of the loss. The results depend on `link` in the graph, so that a second derivative raises an
    error instead of being omitted.
    """
    if in_place(factor):
        return scaled_by(factor, *gradients)
    why = "a loss whose gradient is made with its value has no second derivative"
    return [refusing(x, why, link) for x in scaled_by(factor, *gradients)]


def refusing(x: Tensor, why: str, link: Tensor | None = None) -> Tensor:
    """Return x; a derivative through it, or through link, raises NotImplementedError(why)."""
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
