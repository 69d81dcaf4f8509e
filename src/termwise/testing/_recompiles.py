"""How often a function is compiled, as its sizes change."""

from collections.abc import Callable, Collection
from typing import Any, Final, Unpack

import torch
from torch import Tensor

from ._calls import Call, Inputs, Signature, drawn_calls
from ._laws import (
    BrokenLawError,
    Function,
    MisuseError,
    failing,
    hold,
    leaf,
    refuse_fixed_axis,
    same_compiled,
)

# None of them 0 or 1, which Dynamo takes for constants.
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
    """Assert that a function is compiled a few times at most, whatever the sizes are.

    The compiled function is called at ten sizes, with the same options. `torch.compile` makes a
    graph for the first size and one more for all sizes, so two are usual; more of them mean that a
    size is a constant of each, as where it is compared with a number or is the length of a loop.
    The first and the last call have the results and the gradients of eager mode.

    Args:
        fn: the function, compiled with `fullgraph=True`.
        axis: name of the axis whose size changes, or of several, which have ten sizes each. None:
            all axes that `sizes` does not name.
        at_most: how many graphs.
        dynamic: whether the sizes are marked as dynamic before the first call, as by
            `torch._dynamo.mark_dynamic`, so that one graph is enough.
        traced_at: one more size, such as 2**18, at which the function is traced and its graph not
            run: it may not compute more tensors than the first graph.
        backend: of `torch.compile`; "aot_eager" traces the backward pass too.
        max_examples: sets of ten calls to draw, each compiled again.
        **inputs: as [`calls`][termwise.testing.calls] takes them; float64 unless `dtypes` says
            otherwise.

    Raises:
        AssertionError: with the guard that failed or the numbers of tensors, and the call, as code.
        ValueError: there is no such axis, or a given tensor has its size.

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
    asked = (axis,) if isinstance(axis, str) else axis

    def at(free: list[str]) -> list[dict[str, int]]:
        axes = list(asked or (name for name in free if name not in (inputs.get("sizes") or {})))
        for name in axes:
            refuse_fixed_axis("assert_recompiles", signature, name, free, inputs)
        if not axes:
            raise MisuseError(f"assert_recompiles: {signature.name} has no axis that may change")
        usual = [
            {name: _SIZES[(turn + place) % len(_SIZES)] for place, name in enumerate(axes)}
            for turn in range(len(_SIZES))
        ]
        return usual + ([] if traced_at is None else [dict.fromkeys(axes, traced_at)])

    def check(several: list[Call]) -> None:
        several, large = several[: len(_SIZES)], several[len(_SIZES) :]
        # Imported where something is compiled, and not before, for it takes seconds.
        from torch._dynamo import config
        from torch._dynamo.exc import RecompileError

        torch.compiler.reset()
        graphs = Graphs(backend)
        compiled: Function = torch.compile(fn, fullgraph=True, backend=graphs)

        def first(**arguments: Any) -> Any:
            _mark_dynamic(Call(fn, arguments, {}), several[1])
            return compiled(**arguments)

        try:
            for call in several:
                with config.patch(error_on_recompile=graphs.count >= at_most):
                    run = first if dynamic and call is several[0] else compiled
                    try:
                        if call is several[0] or call is several[-1]:
                            same_compiled(call, run)
                        else:
                            with failing("compiled", call):
                                run(**call.mapped(leaf))
                    except BrokenLawError as broken:
                        error = broken.__context__
                        if isinstance(error, RecompileError):
                            said = _said(graphs.count, call, error)
                            raise BrokenLawError(said, call) from None
                        raise
            for call in large:
                tensors = graphs.traced(compiled, call.mapped(leaf))
                if tensors > graphs.tensors:
                    raise BrokenLawError(
                        f"the graph computes {graphs.tensors} tensors at {_sizes(several[0])}, and "
                        f"{tensors} at {_sizes(call)}: it grows with the data",
                        several[0],
                    )
        finally:
            torch.compiler.reset()

    inputs.setdefault("dtypes", (torch.float64,))
    strategy = drawn_calls(fn, inputs, at=at)
    hold("assert_recompiles", strategy, check, max_examples, shrink=False, simplest=False)


def _said(count: int, call: Call, error: Exception) -> str:
    """Write which graph is compiled, at which sizes, and the guard of the last one that failed."""
    lines = [line.strip() for line in str(error).splitlines()]
    guard = next((line.partition(":")[2] for line in lines if line.startswith("- ")), "")
    guard = " #".join(guard.split(" #")[:2])  # with the line of source that it comes from
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


class _TracedError(Exception):
    """Raised instead of running a graph."""


class Graphs:
    """A backend that counts graphs, and not what it compiles within one of them."""

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        from torch._dynamo.backends.registry import lookup_backend

        self.backend: Any = lookup_backend(backend) if isinstance(backend, str) else backend
        self.count = 0
        self.tensors = 0
        """How many tensors the first graph computes."""
        self.last = 0
        """How many the graph of the last call computes that was only traced."""
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
                self.last = tensors
                raise _TracedError
            return compiled(*arguments)

        return run

    def traced(self, compiled: Function, call: Call) -> int:
        """Return how many tensors the graph of a call computes, without running it."""
        self.runs = False
        try:
            compiled(**call)
        except _TracedError:
            return self.last
        finally:
            self.runs = True
        return 0
