"""Laws of second derivatives and forward mode: correct, or refused with an error."""

import itertools
import re
from collections.abc import Collection
from typing import Final, Unpack

import torch
from torch import Tensor

from ._calls import Call, Inputs, Signature, drawn_calls, is_inexact
from ._laws import (
    BrokenLawError,
    Function,
    MisuseError,
    Numbers,
    check_law,
    close,
    derivatives,
    format_difference,
    is_among,
    outputs,
    refuse_unknown_arguments,
    replaced,
    scalar,
)

_DOUBLE: Final = (torch.float64,)
# Messages of PyTorch about a missing derivative: "does not support double backward", "marked with
# @once_differentiable", "Trying to use forward AD with ...", "jvp ...".
_REFUSALS: Final = re.compile(
    r"derivative|differentia|double backward|not implemented|autograd formula|forward (AD|mode)"
    r"|forward-mode|\bjvp\b|setup_context",
    re.IGNORECASE,
)


def assert_double_backward(
    fn: Function,
    *,
    arguments: Collection[str] | None = None,
    refused: bool | None = None,
    max_examples: int = 2,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that second derivatives are correct, or refused with an error.

    For every part of the result that requires a gradient, the second derivative along random
    directions is compared with finite differences of the gradient, in float64. This finds a second
    derivative that is 0 or incomplete because a backward pass detaches a tensor. A second
    derivative is refused by an error of `torch.autograd` about a missing derivative, or by a
    `NotImplementedError`. The number of backward passes does not grow with the number of elements,
    unlike that of `assert_gradients(second=True)`.

    Args:
        fn: the function.
        arguments: tensors (or fields, "f.values") to differentiate with respect to; all floating
            ones, if None. Leave out tensors that the function detaches, such as a teacher: their
            finite differences are not 0.
        refused: whether the second derivative of the loss (or of every part, if none is named
            "loss") must be refused (True) or must not be refused (False). None: either is accepted.
        max_examples: number of calls to draw.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls]; `dtypes` has no effect.
            Elements are normal variates unless `elements` is given.

    Raises:
        AssertionError: if the law fails; the message ends with the smallest failing call, as code.
        ValueError: if the function has no such argument, or the result no gradient.

    Examples:
        >>> import torch
        >>> from jaxtyping import Float
        >>> from torch import Tensor
        >>> from termwise import testing
        >>> class Square(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return x**2
        ...
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         (x,) = ctx.saved_tensors
        ...         return 2 * x.detach() * grad  # a constant for the second backward pass
        >>> def loss(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        ...     return Square.apply(x).sum()
        >>> testing.assert_double_backward(loss)
        Traceback (most recent call last):
        AssertionError: assert_double_backward: loss: the second derivative of result with...
    """
    law = "assert_double_backward"
    refuse_unknown_arguments(law, fn, arguments or ())
    compared = False

    def check(calls: list[Call]) -> None:
        nonlocal compared
        (call,) = calls
        point = _differentiable(call, arguments)
        with torch.enable_grad():
            live = {path: t.clone().requires_grad_() for path, t in point.items()}
            values = outputs(replaced(call, live)())
            parts = [name for name, value in values.items() if value.requires_grad]
        must_be_refused = ("loss",) if "loss" in parts else parts
        refused_parts: list[str] = []
        compared = compared or bool(parts)
        weights, direction = _directions(point, seed=0), _directions(point, seed=1)
        # All gradients together; if that is refused, each alone: some may be differentiable.
        choices: list[Numbers] = [weights, *({path: weight} for path, weight in weights.items())]
        for name, chosen in itertools.product(parts, choices):
            if chosen is not weights and name not in refused_parts:
                continue
            try:
                found = _differentiate_twice(values[name], name, live, chosen)
            except (NotImplementedError, RuntimeError) as error:
                _check_refusal(error, f"the second derivative of {name}", refused, call)
                refused_parts.append(name)
                continue
            if refused and chosen is weights and name in must_be_refused:
                raise BrokenLawError(f"the second derivative of {name} is not refused", call)
            for path in point:
                along = {path: direction[path]}
                problem = _compare(call, point, name, chosen, along, _inner(found, along))
                if problem:
                    raise BrokenLawError(
                        f"the second derivative of {name} with respect to {path} is {problem}", call
                    )

    inputs["dtypes"] = _DOUBLE
    check_law(law, drawn_calls(fn, inputs, normal=True), check, max_examples)
    if not compared:
        _refuse_nothing(law, fn, arguments)


def _differentiate_twice(value: Tensor, name: str, live: Numbers, weights: Numbers) -> Numbers:
    """Return the gradients of a weighted sum of the gradients of one part of the result."""
    leaves = list(live.values())
    first = derivatives(scalar({name: value}), leaves, create_graph=True)
    total = _inner(dict(zip(live, first, strict=True)), weights)
    if not total.requires_grad:
        return {path: torch.zeros_like(leaf) for path, leaf in live.items()}
    return dict(zip(live, derivatives(total, leaves, retain_graph=True), strict=True))


def _compare(
    call: Call, point: Numbers, name: str, weights: Numbers, along: Numbers, ours: Tensor
) -> str:
    """Describe how a second derivative differs from finite differences; "" if they agree."""
    step = 1e-5
    expected, scale = _finite_difference(call, point, name, weights, along, step)
    tolerance = 1e-6 * max(scale, 1e-3)
    if abs(ours - expected) <= tolerance:
        return ""
    # A smaller step gives another value if the gradient is not differentiable within the step.
    refined, scale = _finite_difference(call, point, name, weights, along, step / 4)
    error = abs(ours - refined)
    converged = abs(refined - expected) <= max(tolerance, 0.1 * abs(float(refined)))
    if error <= tolerance or not converged:
        return ""
    return f"{float(ours):.6g}, but finite differences give {float(refined):.6g}"


def _finite_difference(
    call: Call, point: Numbers, name: str, weights: Numbers, along: Numbers, step: float
) -> tuple[Tensor, float]:
    """Return the derivative of the weighted gradients along a direction, and a bound on it."""
    ends: list[Numbers] = []
    for signed in (step, -step):
        moved = {p: t + signed * along[p] if p in along else t for p, t in point.items()}
        live = {path: t.detach().clone().requires_grad_() for path, t in moved.items()}
        with torch.enable_grad():
            value = outputs(replaced(call, live)())[name]
        found = derivatives(scalar({name: value}), list(live.values()), retain_graph=True)
        ends.append(dict(zip(live, found, strict=True)))
    slopes = {path: (ends[0][path] - ends[1][path]) / (2 * step) for path in point}
    bounds = [slopes[path].abs().max() * weight.abs().sum() for path, weight in weights.items()]
    scale = sum(float(bound.detach()) for bound in bounds)
    return _inner(slopes, weights), scale


def assert_forward_mode(
    fn: Function,
    *,
    arguments: Collection[str] | None = None,
    refused: bool | None = None,
    max_examples: int = 3,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that forward-mode derivatives are correct, or refused with an error.

    `torch.func.jvp` must give the values of an ordinary call, and along a random direction the
    derivative that the backward pass gives: 0 for a detached part of the result. This finds a
    target that is computed under `torch.no_grad`, which does not stop forward-mode derivatives;
    `Tensor.detach` does. Use `assert_gradients` to test the backward pass itself.

    Args:
        fn: the function.
        arguments: tensors (or fields, "f.values") to differentiate with respect to; all floating
            ones, if None.
        refused: whether forward mode must be refused (True) or must not be refused (False). None:
            either is accepted.
        max_examples: number of calls to draw.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls], in float64 by default.
            Elements are normal variates unless `elements` is given.

    Raises:
        AssertionError: if the law fails; the message ends with the smallest failing call, as code.
        ValueError: if the function has no such argument, or there is nothing to differentiate.

    Examples:
        >>> import torch
        >>> from jaxtyping import Float
        >>> from torch import Tensor
        >>> from termwise import testing
        >>> def loss(x: Float[Tensor, " n"], detached: bool) -> Float[Tensor, ""]:
        ...     scale = x.abs().amax()
        ...     return (x / (scale.detach() if detached else scale)).square().sum()
        >>> testing.assert_forward_mode(loss, refused=False)
    """
    law = "assert_forward_mode"
    refuse_unknown_arguments(law, fn, arguments or ())
    compared = False

    def check(calls: list[Call]) -> None:
        nonlocal compared
        (call,) = calls
        point = _differentiable(call, arguments)
        direction = _directions(point, seed=1)

        def of_tensors(*tensors: Tensor) -> Numbers:
            given = dict(zip(point, tensors, strict=True))
            found = outputs(replaced(call, given)(), numbers=False)
            return {name: value for name, value in found.items() if is_inexact(value.dtype)}

        live = {path: t.clone().requires_grad_() for path, t in point.items()}
        expected = of_tensors(*live.values())
        if not point or not expected:
            return
        compared = True
        try:
            jvp: Function = torch.func.jvp
            values, tangents = jvp(of_tensors, tuple(point.values()), tuple(direction.values()))
        except (NotImplementedError, RuntimeError) as error:
            _check_refusal(error, "forward mode", refused, call)
            return
        if refused:
            raise BrokenLawError("forward mode is not refused", call)
        for name, value in expected.items():
            if not close(values[name], value):
                one, two = format_difference(value, values[name])
                raise BrokenLawError(f"{name} is {one}, but {two} in forward mode", call)
            gradients = derivatives(scalar({name: value}), list(live.values()), retain_graph=True)
            forward = scalar({name: tangents[name]})
            backward = _inner(dict(zip(live, gradients, strict=True)), direction).to(forward.dtype)
            if not close(forward, backward):
                one, two = format_difference(forward, backward)
                raise BrokenLawError(
                    f"the directional derivative of {name} is {one} in forward mode, but {two} in "
                    "the backward pass",
                    call,
                )

    inputs.setdefault("dtypes", _DOUBLE)
    check_law(law, drawn_calls(fn, inputs, normal=True), check, max_examples)
    if not compared:
        _refuse_nothing(law, fn, arguments)


def _differentiable(call: Call, arguments: Collection[str] | None) -> Numbers:
    """Return copies of the tensors to differentiate with respect to."""
    return {
        path: t.detach().clone()
        for path, t in call.tensors().items()
        if is_inexact(t.dtype) and t.numel() and is_among(path, arguments)
    }


def _directions(point: Numbers, seed: int) -> Numbers:
    generator = torch.Generator().manual_seed(seed)
    return {
        path: torch.randn(t.shape, generator=generator, dtype=t.dtype) for path, t in point.items()
    }


def _inner(one: Numbers, other: Numbers) -> Tensor:
    """Return the inner product; a complex number counts as two real numbers."""
    total = torch.zeros(())
    for path, two in other.items():
        product = (one[path].conj() * two).sum()
        total = total + (product.real if product.is_complex() else product)
    return total


def _check_refusal(error: Exception, what: str, refused: bool | None, call: Call) -> None:
    """Assert that an error says that a derivative is missing, and that it may be missing."""
    message = next((line for line in str(error).splitlines() if line.strip()), "")
    problem = f"with {type(error).__name__}: {message}"
    if not isinstance(error, NotImplementedError) and not _REFUSALS.search(str(error)):
        raise BrokenLawError(f"{what} fails {problem}", call) from error
    if refused is False:
        raise BrokenLawError(f"{what} is refused {problem}", call) from error


def _refuse_nothing(law: str, fn: Function, arguments: Collection[str] | None) -> None:
    raise MisuseError(
        f"{law}: no part of the result of {Signature(fn).name} has a gradient with respect to "
        f"{', '.join(arguments) if arguments else 'an argument'}"
    )
