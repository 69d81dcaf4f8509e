"""Custom operators that take one NamedTuple, whose annotations define the schema.

Kernels, fakes and backward passes read fields by name. A field may be a NamedTuple itself: to
PyTorch an operator has one argument for each tensor, number or string in it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast, get_type_hints

import torch
from torch import Tensor

from ._autograd import Function, apply, chain
from ._numbers import looped

Inputs = TypeVar("Inputs", bound=tuple[Any, ...])
Outputs = TypeVar("Outputs", bound=tuple[Tensor, ...])

_SCHEMA: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    float: "float",
    float | None: "float?",
    str: "str",
    str | None: "str?",
    Sequence[bool]: "bool[]",
    Sequence[int]: "SymInt[]",
}


class Operator(Generic[Inputs, Outputs]):
    """A kernel that is opaque to autograd and compilers, and that vmap calls in a loop."""

    def __init__(
        self,
        name: str,
        inputs: type[Inputs],
        kernel: Callable[[Inputs], Outputs],
        fake: Callable[[Inputs], Outputs],
    ) -> None:
        hints = dict(_fields(inputs))
        self.fields = tuple(hints)
        self.record = cast("Callable[[Iterator[Any]], Inputs]", _reader(inputs))
        given = ", ".join(f"{_SCHEMA[hint]} {field}" for field, hint in hints.items())
        results = ["Tensor"] * len(get_type_hints(kernel)["return"].__args__)

        def run(*values: Any) -> Outputs:
            return kernel(self.record(iter(values)))

        def run_fake(*values: Any) -> Outputs:
            return fake(self.record(iter(values)))

        schema = f"({given}) -> ({', '.join(results)})"
        self.call: Any = torch.library.custom_op(
            f"termwise::{name}", run, mutates_args=(), schema=schema
        )
        self.call.register_fake(run_fake)
        self.call.register_vmap(looped(self.call))

    def __call__(self, inputs: Inputs) -> Outputs:
        """Run the kernel, without a gradient."""
        return cast("Outputs", self.call(*_values(inputs)))


def with_gradients(operator: Operator[Inputs, Outputs], inputs: Inputs, count: int = 1) -> Outputs:
    """Run an operator whose last `count` results are gradients of its first result.

    They are with respect to the first `count` inputs, which are not saved for the backward pass.
    """
    return cast("Outputs", apply(_WithGradients, operator.call, count, *_values(inputs)))


class _WithGradients(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(call: Any, count: int, *inputs: Any) -> tuple[Tensor, ...]:
        return cast("tuple[Tensor, ...]", call(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, count, *given = inputs
        ctx.others = len(given) - count
        # The gradients hang on the result, so that a second derivative is refused.
        ctx.save_for_backward(output[0], *output[-count:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        result, *own = ctx.saved_tensors
        needs = ctx.needs_input_grad[2 : 2 + len(own)]
        if gradients[0] is None:
            return None, None, *[None] * (len(own) + ctx.others)
        wanted = [gradient for gradient, need in zip(own, needs, strict=True) if need]
        found = iter(chain(gradients[0], result, *wanted))
        return None, None, *[next(found) if need else None for need in needs], *[None] * ctx.others


# A backward pass: (inputs, saved outputs, gradients of the outputs, which fields need one) to the
# gradients of the inputs, by the names of their fields; those left out have none.
Backward = Callable[
    [Any, Sequence[Tensor], Sequence[Tensor | None], Mapping[str, bool]], Mapping[str, Tensor]
]


def differentiable(
    operator: Operator[Inputs, Outputs],
    backward: Backward,
    inputs: Inputs,
    saved: tuple[int, ...] = (),
) -> Outputs:
    """Run an operator with a backward pass, which receives the inputs and the saved outputs."""
    return cast("Outputs", apply(_Differentiable, operator, backward, saved, *_values(inputs)))


class _Differentiable(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        operator: Operator[Any, Any], backward: Backward, saved: tuple[int, ...], *values: Any
    ) -> Any:
        return operator.call(*values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operator, ctx.pull, saved, *values = inputs
        ctx.others = [None if isinstance(x, Tensor) else x for x in values]
        tensors = [x if isinstance(x, Tensor) else None for x in values]
        ctx.save_for_backward(*tensors, *[output[place] for place in saved])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, count = ctx.saved_tensors, len(ctx.others)
        values = [
            x if x is not None else other
            for x, other in zip(tensors[:count], ctx.others, strict=True)
        ]
        needs = dict(zip(ctx.operator.fields, ctx.needs_input_grad[3:], strict=True))
        inputs = ctx.operator.record(iter(values))
        found = ctx.pull(inputs, tensors[count:], gradients, needs)
        return None, None, None, *[found.get(field) if needs[field] else None for field in needs]


def _fields(inputs: Any) -> Iterator[tuple[str, Any]]:
    """Return the names and annotations of a record's fields, with nested records flattened."""
    for name, hint in get_type_hints(inputs).items():
        if hasattr(hint, "_fields"):
            yield from ((f"{name}_{inner}", kind) for inner, kind in _fields(hint))
        else:
            yield name, hint


def _values(inputs: tuple[Any, ...]) -> list[Any]:
    """Return the values of these fields; a tuple is a record, and numbers are in a list."""
    values: list[Any] = []
    for value in inputs:
        values += _values(cast("Any", value)) if isinstance(value, tuple) else [value]
    return values


def _reader(inputs: Any) -> Callable[[Iterator[Any]], Any]:
    """Return a function that builds a record from these values."""
    hints = get_type_hints(inputs).values()
    readers = [_reader(hint) if hasattr(hint, "_fields") else next for hint in hints]
    return lambda values: inputs(*[read(values) for read in readers])
