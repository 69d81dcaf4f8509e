"""Count the kernels that a function launches on an accelerator, with meta tensors."""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Unpack, cast

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._library import custom_ops
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ._calls import Call, Inputs, Signature, drawn_calls, is_inexact
from ._laws import (
    BrokenLawError,
    Function,
    MisuseError,
    check_law,
    outputs,
    refuse_fixed_axis,
)

# Operators that launch no kernel, besides views.
_NO_KERNEL: Final = frozenset(
    {
        "alias", "detach", "empty", "empty_like", "empty_strided", "is_same_size", "lift_fresh",
        "new_empty", "new_empty_strided", "promote_types", "_unsafe_view",
    }
)  # fmt: skip


def assert_launches(
    fn: Function,
    axis: str,
    *,
    at: Sequence[int] = (16, 256, 4096),
    at_most: int | None = None,
    plain: Function | None = None,
    times: float = 4.0,
    max_examples: int = 1,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that the number of kernels does not grow with the data.

    In a loop over rows or small blocks, launching a kernel takes longer than running it. The
    kernels of a forward and a backward pass are counted with tensors on the meta device, which have
    sizes but no data, so no accelerator is needed. Every operator that is not a view counts as one
    kernel, and a custom operator counts as the operators that it calls. An operation that
    synchronizes with the device (`.item()`, a boolean index) raises an error there.

    Args:
        fn: the function.
        axis: name of the axis whose size grows.
        at: sizes of the axis. At none of them are more kernels launched than at the first.
        at_most: largest number of kernels at any size.
        plain: the formula in plain PyTorch, called with the same keyword arguments. `fn` may launch
            at most `times` as many kernels.
        times: largest ratio of the number of kernels to that of `plain`.
        max_examples: number of calls to draw; each is made at all sizes.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls], in float32 by default. Set
            the other axes in `sizes` to their sizes in training. `elements` has no effect, and
            given tensors are moved to the meta device. The gradient is taken with respect to the
            tensors that require one or, if there are none, all floating tensors.

    Raises:
        AssertionError: if the law fails; the message contains the numbers of kernels, the most
            frequent additional ones, and the call as code.
        ValueError: if the function has no such axis, if a given tensor sets its size, or if `at`
            is empty.

    Examples:
        >>> import torch
        >>> from jaxtyping import Float
        >>> from termwise import testing
        >>> def total(x: Float[torch.Tensor, "batch dim"]) -> Float[torch.Tensor, ""]:
        ...     return x.square().sum(1).mean()
        >>> testing.assert_launches(total, "batch", sizes={"dim": 512}, at_most=8)
        >>> def one_by_one(x: Float[torch.Tensor, "batch dim"]) -> Float[torch.Tensor, ""]:
        ...     return torch.stack([row.square().sum() for row in x]).mean()
        >>> testing.assert_launches(one_by_one, "batch")
        Traceback (most recent call last):
        AssertionError: assert_launches: one_by_one: ... kernels at batch 256, but ...
    """
    signature = Signature(fn)
    if not at:
        raise MisuseError("assert_launches needs sizes in at, got none")

    def choose_sizes(free: list[str]) -> list[dict[str, int]]:
        refuse_fixed_axis("assert_launches", signature, axis, free, inputs)
        return [{axis: size} for size in at]

    def check(calls: list[Call]) -> None:
        first: collections.Counter[str] | None = None
        for call in calls:
            kernels = launches(fn, call).kernels
            number, size = kernels.total(), f"{axis} {call.sizes[axis]}"
            first = kernels if first is None else first
            if number > first.total():
                raise BrokenLawError(
                    f"{number} kernels at {size}, but {first.total()} at {axis} {at[0]}; "
                    f"additional kernels: {_most_frequent(kernels - first)}",
                    call,
                )
            if at_most is not None and number > at_most:
                raise BrokenLawError(
                    f"{number} kernels at {size}, more than {at_most}: {_most_frequent(kernels)}",
                    call,
                )
            reference = None if plain is None else launches(plain, call).kernels
            if reference is not None and number > times * reference.total():
                raise BrokenLawError(
                    f"{number} kernels at {size}, more than {times:g} times the "
                    f"{reference.total()} of the plain formula; additional kernels: "
                    f"{_most_frequent(kernels - reference)}",
                    call,
                )

    inputs.setdefault("dtypes", (torch.float32,))
    strategy = drawn_calls(fn, inputs, choose_sizes=choose_sizes, meta=True)
    check_law("assert_launches", strategy, check, max_examples, shrink=False)


def _most_frequent(kernels: collections.Counter[str]) -> str:
    """Format the three operators that are launched most often, with their numbers."""
    return ", ".join(f"{number} {name}" for name, number in kernels.most_common(3))


def launches(fn: Function, call: Mapping[str, Any]) -> "Launches":
    """Count the kernels of a call and its backward pass."""
    run = Call(fn, call, {})
    inputs = [x for x in tree_leaves(dict(call)) if isinstance(x, Tensor) and x.requires_grad]
    inputs += [x for x in run.tensors().values() if x.requires_grad]
    if not inputs:
        run = run.mapped(_leaf)
        inputs = [x for x in run.tensors().values() if x.requires_grad]
    leaves = list({id(leaf): leaf for leaf in inputs}.values())
    count = Launches()
    with count:
        parts = outputs(fn(**run))
        chosen = [parts["loss"]] if "loss" in parts else list(parts.values())
        scalars = [part.sum() if part.ndim else part for part in chosen if part.requires_grad]
        if scalars and leaves:
            torch.autograd.grad(scalars, leaves, allow_unused=True)
    return count


def _leaf(path: str, tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.requires_grad_() if is_inexact(tensor.dtype) else tensor


class Launches(TorchDispatchMode):
    """Count kernels, the bytes that they read and write, and the FLOPs of matrix products."""

    def __init__(self) -> None:
        # Not imported above, because it imports triton where that is installed.
        from torch.utils.flop_counter import flop_registry

        cast("Any", super()).__init__()
        self._flops_of = cast("Mapping[Any, Callable[..., int]]", flop_registry)
        self.kernels: collections.Counter[str] = collections.Counter()
        self.bytes = 0
        self.flops: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        custom: Any = cast("Mapping[str, Any]", custom_ops.OPDEFS).get(func._schema.name)
        if custom is not None:
            with self:
                return custom._init_fn(*args, **kwargs)
        # Without autograd, as in the body of a custom operator, `matmul` is not yet decomposed.
        if func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        found = func(*args, **kwargs)
        name: str = func._schema.name.partition("::")[2]
        if func.is_view or name in _NO_KERNEL:
            return found
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        self.kernels[name] += 1
        self.bytes += sum(map(_moved, inputs)) + sum(map(_moved, results))
        product = getattr(torch.ops.aten, name.rstrip("_"), None)  # addmm_ is an addmm
        flops = self._flops_of.get(product)
        if flops is not None:
            kwargs.pop("out", None)
            dtype = str(inputs[0].dtype).removeprefix("torch.")
            self.flops[dtype] += flops(*args, **kwargs, out_val=found)
        return found


def _moved(x: Tensor) -> int:
    """Return the size of a tensor in bytes, without expanded axes."""
    sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return torch.Size(sizes).numel() * x.element_size()
