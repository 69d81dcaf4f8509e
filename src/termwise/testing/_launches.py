"""How many kernels a function launches on an accelerator, counted on meta tensors of any size."""

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
    hold,
    outputs,
    refuse_fixed_axis,
)

# Operators that launch nothing, besides views.
_FREE: Final = frozenset(
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
    """Assert that an accelerator launches no more kernels for more data.

    A loop over rows, or over small blocks of them, is a loop of launches, which take longer than
    what they compute. Kernels are counted forward and backward on meta tensors, which have sizes
    and no data, so that no accelerator is needed: every operator that is not a view is one kernel,
    and a custom operator is what its body calls. What reads a value (`.item()`, a boolean index)
    fails there, as it would wait for the device.

    Args:
        fn: the function.
        axis: name of the axis that grows.
        at: its sizes, one after another; at none of them there are more kernels than at the first.
        at_most: how many kernels there are at most, at each size.
        plain: the formula, written plainly; takes the same keywords. `fn` launches at most `times`
            as many kernels as it.
        times: how many times as many.
        max_examples: calls to draw, each at all sizes.
        **inputs: as [`calls`][termwise.testing.calls] takes them; float32 unless `dtypes` says
            otherwise. Name the other axes in `sizes`, as they are in training. `elements` have no
            effect, and tensors that are given are moved to the meta device. Differentiated by the
            tensors that require a gradient, or by all floating ones, if none does.

    Raises:
        AssertionError: with the numbers, the kernels that are more, and the call, as code.
        ValueError: there is no such axis, or a given tensor has its size.

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
        AssertionError: assert_launches: one_by_one: ... kernels at batch 256, and ...
    """
    signature = Signature(fn)
    if not at:
        raise MisuseError("assert_launches needs sizes in at, got none")

    def sizes(free: list[str]) -> list[dict[str, int]]:
        refuse_fixed_axis("assert_launches", signature, axis, free, inputs)
        return [{axis: size} for size in at]

    def check(several: list[Call]) -> None:
        first: collections.Counter[str] | None = None
        for call in several:
            kernels = launches(fn, call).kernels
            number, here = kernels.total(), f"{axis} {call.sizes[axis]}"
            first = kernels if first is None else first
            if number > first.total():
                raise BrokenLawError(
                    f"{number} kernels at {here}, and {first.total()} at {axis} {at[0]}: "
                    f"{_most(kernels - first)} more",
                    call,
                )
            if at_most is not None and number > at_most:
                raise BrokenLawError(
                    f"{number} kernels at {here}, more than {at_most}: {_most(kernels)}", call
                )
            needed = None if plain is None else launches(plain, call).kernels
            if needed is not None and number > times * needed.total():
                raise BrokenLawError(
                    f"{number} kernels at {here}, more than {times:g} times the formula's "
                    f"{needed.total()}: {_most(kernels - needed)} more",
                    call,
                )

    inputs.setdefault("dtypes", (torch.float32,))
    strategy = drawn_calls(fn, inputs, at=sizes, meta=True)
    hold("assert_launches", strategy, check, max_examples, shrink=False)


def _most(kernels: collections.Counter[str]) -> str:
    """Name the operators that are launched most often."""
    return ", ".join(f"{number} {name}" for name, number in kernels.most_common(3))


def launches(fn: Function, call: Mapping[str, Any]) -> "Launches":
    """Count what a call launches, and its backward pass."""
    whole = Call(fn, call, {})
    given = [x for x in tree_leaves(dict(call)) if isinstance(x, Tensor) and x.requires_grad]
    given += [x for x in whole.tensors().values() if x.requires_grad]
    if not given:
        whole = whole.mapped(_differentiated)
        given = [x for x in whole.tensors().values() if x.requires_grad]
    leaves = list({id(leaf): leaf for leaf in given}.values())
    count = Launches()
    with count:
        parts = outputs(fn(**whole))
        chosen = [parts["loss"]] if "loss" in parts else list(parts.values())
        derived = [part.sum() if part.ndim else part for part in chosen if part.requires_grad]
        if derived and leaves:
            torch.autograd.grad(derived, leaves, allow_unused=True)
    return count


def _differentiated(path: str, tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.requires_grad_() if is_inexact(tensor.dtype) else tensor


class Launches(TorchDispatchMode):
    """Count what runs within it: kernels, the bytes they move, operations of matrix products."""

    def __init__(self) -> None:
        # Imported here: it imports triton, where that is installed.
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
        # Where autograd is off, as in a custom operator's body, `matmul` comes here whole.
        if func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        found = func(*args, **kwargs)
        name: str = func._schema.name.partition("::")[2]
        if func.is_view or name in _FREE:
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
    """Return the bytes of a tensor, without axes that repeat one element."""
    sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return torch.Size(sizes).numel() * x.element_size()
