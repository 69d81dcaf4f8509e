"""Whether a function is deterministic."""

import contextlib
from collections.abc import Generator
from typing import Unpack

import torch
from torch import Tensor

from ._calls import Call, Inputs, calls
from ._laws import (
    BrokenLawError,
    Function,
    Numbers,
    check_law,
    close,
    equal,
    format_difference,
    values_and_gradients,
)


def assert_deterministic(
    fn: Function,
    *,
    device: str | torch.device = "cpu",
    max_examples: int = 5,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that the same call gives the same results and gradients, bit by bit.

    The call also runs under `torch.use_deterministic_algorithms(True)`, where operators without a
    deterministic implementation raise an error, and uninitialized memory is filled with NaN: a
    function that reads such memory then returns other values.

    Args:
        fn: the function.
        device: device to which the tensors and generators of the call are moved. Most
            nondeterministic operators are nondeterministic on CUDA only, where cuBLAS needs the
            environment variable `CUBLAS_WORKSPACE_CONFIG=:4096:8`.
        max_examples: number of calls to draw.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls].

    Raises:
        AssertionError: if the law fails; the message ends with the smallest failing call, as code.
        ValueError: if the result contains no tensor and no number.

    Examples:
        >>> import torch
        >>> from jaxtyping import Float
        >>> from torch import Tensor
        >>> from termwise import testing
        >>> def loss(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        ...     first = torch.zeros(len(x), dtype=torch.int64)
        ...     return torch.zeros_like(x).put_(first, x).sum()  # duplicate indices: undefined
        >>> testing.assert_deterministic(loss)
        Traceback (most recent call last):
        AssertionError: assert_deterministic: loss: with deterministic algorithms: put_ does not...
    """

    def check(call: Call) -> None:
        call = _on(call, device)
        first, again = _numbers(call), _numbers(call)
        for name, value in first.items():
            if not equal(value, again[name]):
                one, two = format_difference(value, again[name])
                raise BrokenLawError(f"{name} is {one}, then {two} for the same call", call)
        with _deterministic():
            try:
                first, again = _numbers(call), _numbers(call)
            except RuntimeError as error:
                message = str(error).partition(". ")[0]
                raise BrokenLawError(f"with deterministic algorithms: {message}", call) from error
        for name, value in first.items():
            if not equal(value, again[name]):
                one, two = format_difference(value, again[name])
                problem = (
                    f"{name} is {one}, then {two} for the same call, with deterministic algorithms"
                )
                raise BrokenLawError(problem, call)
        for name, value in _numbers(call).items():
            if not close(first[name], value):
                one, two = format_difference(value, first[name])
                problem = f"{name} is {one}, but {two} with deterministic algorithms"
                raise BrokenLawError(problem, call)

    check_law("assert_deterministic", calls(fn, **inputs), check, max_examples)


def _numbers(call: Call) -> Numbers:
    values, gradients = values_and_gradients(call)
    return {**values, **gradients}


def _on(call: Call, device: str | torch.device) -> Call:
    """Move a call's tensors and generators to a device."""

    def moved(path: str, tensor: Tensor) -> Tensor:
        return tensor.to(device)

    generators = {
        name: torch.Generator(device).manual_seed(value.initial_seed())
        for name, value in call.items()
        if isinstance(value, torch.Generator)
    }
    return call.mapped(moved).changed(**generators)


@contextlib.contextmanager
def _deterministic() -> Generator[None]:
    """Enable deterministic algorithms, and restore the setting at the end."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
