"""Count the graphs that `torch.compile` makes of a function as sizes change."""

from collections.abc import Callable, Collection
from typing import Any, Final, Unpack

import torch
from torch import Tensor

from ._calls import Call, Inputs, Signature, drawn_calls
from ._laws import (
    BrokenLawError,
    Function,
    MisuseError,
    check_law,
    failing,
    leaf,
    refuse_fixed_axis,
    same_compiled,
)

# Without 0 and 1, which Dynamo treats as constants.
_SIZES: Final = (7, 8, 9, 12, 13, 16, 20, 33, 64, 65)


def assert_recompiles(
    fn: Function,
    axis: str | Collection[str] | None = None,
    *,
    at_most: int = 2,
    dynamic: bool = False,
    traced_at: int | None = None,
    backend: str | Callable[..., Any] = "eager",
    max_examples: int = 1,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that `torch.compile` makes only a few graphs of a function when sizes change.

    The compiled function is called with ten sizes and the same options. `torch.compile` makes a
    graph for the first size and another for all sizes, so two graphs are normal. More graphs mean
    that a size is a constant in each, for instance because it is compared with a number or is the
    length of a loop. The first and the last call must have the results and gradients of eager mode.

    Args:
        fn: the function, which is compiled with `fullgraph=True`.
        axis: name of the axis whose size changes, or several names, whose sizes change together.
            None: all axes that `sizes` does not name.
        at_most: largest number of graphs.
        dynamic: whether to mark the sizes as dynamic before the first call
            (`torch._dynamo.mark_dynamic`), so that one graph is enough.
        traced_at: another size, such as 2**18, at which the function is traced but its graph does
            not run. This graph may not compute more tensors than the first one.
        backend: backend of `torch.compile`; "aot_eager" traces the backward pass too.
        max_examples: number of sets of ten calls to draw; each set is compiled again.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls], in float64 by default.

    Raises:
        AssertionError: if the law fails; the message contains the failing guard, or the numbers of
            tensors, and the call as code.
        ValueError: if the function has no such axis, if a given tensor sets its size, or if
            `at_most` is below 1.

    Examples:
        >>> import torch
        >>> from jaxtyping import Float
        >>> from termwise import testing
        >>> def weighted(x: Float[torch.Tensor, "batch dim"]) -> Float[torch.Tensor, ""]:
        ...     weights = torch.tensor([1 / (1 + row) for row in range(len(x))])
        ...     return (weights[:, None] * x).sum()
        >>> testing.assert_recompiles(weighted)
        Traceback (most recent call last):
        AssertionError: assert_recompiles: weighted: a 3rd graph is compiled at batch 9, dim 12: ...
    """
    if at_most < 1:
        raise MisuseError(f"assert_recompiles needs at_most >= 1, got {at_most}")
    signature = Signature(fn)
    requested = (axis,) if isinstance(axis, str) else axis

    def choose_sizes(free: list[str]) -> list[dict[str, int]]:
        axes = list(requested or (name for name in free if name not in (inputs.get("sizes") or {})))
        for name in axes:
            refuse_fixed_axis("assert_recompiles", signature, name, free, inputs)
        if not axes:
            raise MisuseError(f"assert_recompiles: {signature.name} has no axis that can vary")
        sizes = [
            {name: _SIZES[(turn + offset) % len(_SIZES)] for offset, name in enumerate(axes)}
            for turn in range(len(_SIZES))
        ]
        return sizes + ([] if traced_at is None else [dict.fromkeys(axes, traced_at)])

    def check(calls: list[Call]) -> None:
        calls, large = calls[: len(_SIZES)], calls[len(_SIZES) :]
        # Imported only when needed, because it takes seconds.
        from torch._dynamo import config
        from torch._dynamo.exc import RecompileError

        torch.compiler.reset()
        graphs = Graphs(backend)
        compiled: Function = torch.compile(fn, fullgraph=True, backend=graphs)

        def first(**arguments: Any) -> Any:
            _mark_dynamic(Call(fn, arguments, {}), calls[1])
            return compiled(**arguments)

        try:
            for call in calls:
                with config.patch(error_on_recompile=graphs.count >= at_most):
                    run = first if dynamic and call is calls[0] else compiled
                    try:
                        if call is calls[0] or call is calls[-1]:
                            same_compiled(call, run)
                        else:
                            with failing("when compiled", call):
                                run(**call.mapped(leaf))
                    except BrokenLawError as broken:
                        error = broken.__context__
                        if isinstance(error, RecompileError):
                            problem = _describe(graphs.count, call, error)
                            raise BrokenLawError(problem, call) from None
                        raise
            for call in large:
                tensors = graphs.trace(compiled, call.mapped(leaf))
                if tensors > graphs.tensors:
                    raise BrokenLawError(
                        f"the graph computes {graphs.tensors} tensors at {_sizes(calls[0])}, but "
                        f"{tensors} at {_sizes(call)}: it grows with the data",
                        calls[0],
                    )
        finally:
            torch.compiler.reset()

    inputs.setdefault("dtypes", (torch.float64,))
    strategy = drawn_calls(fn, inputs, choose_sizes=choose_sizes)
    check_law("assert_recompiles", strategy, check, max_examples, shrink=False, simplest=False)


def _describe(count: int, call: Call, error: Exception) -> str:
    """Describe which graph is compiled, at which sizes, and the guard that failed."""
    lines = [line.strip() for line in str(error).splitlines()]
    guard = next((line.partition(":")[2] for line in lines if line.startswith("- ")), "")
    guard = " #".join(guard.split(" #")[:2])  # the guard and its line of source
    ordinal = {1: "2nd", 2: "3rd"}.get(count, f"{count + 1}th")
    return f"a {ordinal} graph is compiled at {_sizes(call)}: {' '.join(guard.split())}"


def _sizes(call: Call) -> str:
    return ", ".join(f"{name} {size}" for name, size in call.sizes.items())


def _mark_dynamic(call: Call, other: Call) -> None:
    """Mark the sizes that differ from those of another call."""
    from torch._dynamo import mark_dynamic

    others = other.tensors()
    for path, tensor in call.tensors().items():
        for index, size in enumerate(tensor.shape):
            if size != others[path].shape[index]:
                mark_dynamic(tensor, index)


class _NotRunError(Exception):
    """Raised by a graph that is only traced."""


class Graphs:
    """A backend that counts graphs, but not those that another backend compiles inside one."""

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        from torch._dynamo.backends.registry import lookup_backend

        self.backend: Any = lookup_backend(backend) if isinstance(backend, str) else backend
        self.count = 0
        self.tensors = 0
        """Number of tensors that the first graph computes."""
        self.traced_tensors = 0
        """Number of tensors that the last graph computes that was only traced."""
        self.runs = True
        self.within = False

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        if self.within:
            return self.backend(graph, inputs)
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        tensors = sum(isinstance(value, Tensor) for value in values)
        self.count, self.within = self.count + 1, True
        self.tensors = self.tensors or tensors
        try:
            compiled = self.backend(graph, inputs) if self.runs else None
        finally:
            self.within = False

        def run(*arguments: Any) -> Any:
            if compiled is None or not self.runs:
                self.traced_tensors = tensors
                raise _NotRunError
            return compiled(*arguments)

        return run

    def trace(self, compiled: Function, call: Call) -> int:
        """Return the number of tensors that the graph of a call computes, without running it."""
        self.runs = False
        try:
            compiled(**call)
        except _NotRunError:
            return self.traced_tensors
        finally:
            self.runs = True
        return 0
