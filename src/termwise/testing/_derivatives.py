"""Second derivatives and forward mode: right or refused, and never wrong without a word."""

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
    close,
    derivatives,
    hold,
    is_of,
    outputs,
    refuse_unknown_arguments,
    replaced,
    scalar,
    told_apart,
)

_DOUBLE: Final = (torch.float64,)
# What torch says of a derivative that it has not: "does not support double backward", "marked with
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
    """Assert that second derivatives are right, or refused with an error.

    Every part of the result that is in the graph is differentiated twice, along directions that are
    drawn, and compared with finite differences of its gradient, in float64. A second derivative
    that is 0, or that lacks a part, because a backward pass detaches something is found. An error
    of `torch.autograd`, or a `NotImplementedError`, refuses it. Unlike
    `assert_gradients(second=True)` it takes as long for many elements as for few.

    Args:
        fn: the function.
        arguments: tensors (or fields, "f.values") to differentiate with respect to; all floating
            ones, if None. Leave out what the function detaches, such as a teacher: its finite
            differences are not 0.
        refused: whether the second derivative of the loss (of every part, where none is called so)
            is to be refused: False refuses every error, True a second derivative that is there.
            None takes either.
        max_examples: calls to draw.
        **inputs: as [`calls`][termwise.testing.calls] takes them. Elements are normal variates
            unless `elements` says otherwise.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
        ValueError: `arguments` names none of the function's, or nothing has a gradient with
            respect to them.

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
        AssertionError: assert_double_backward: loss: result's second derivative with respect to...
    """
    law = "assert_double_backward"
    refuse_unknown_arguments(law, fn, arguments or ())
    compared = False

    def check(several: list[Call]) -> None:
        nonlocal compared
        (call,) = several
        at = _differentiable(call, arguments)
        with torch.enable_grad():
            live = {path: t.clone().requires_grad_() for path, t in at.items()}
            values = outputs(replaced(call, live)())
            parts = [name for name, value in values.items() if value.requires_grad]
        whole = ("loss",) if "loss" in parts else parts
        withheld: list[str] = []
        compared = compared or bool(parts)
        weights, direction = _directions(at, seed=0), _directions(at, seed=1)
        # Of all gradients together; where that is refused each alone, for one may be there.
        each: list[Numbers] = [weights, *({path: weight} for path, weight in weights.items())]
        for name, some in itertools.product(parts, each):
            if some is not weights and name not in withheld:
                continue
            try:
                by = _twice(values[name], name, live, some)
            except (NotImplementedError, RuntimeError) as error:
                _take_refusal(error, f"{name}'s second derivative", refused, call)
                withheld.append(name)
                continue
            if refused and some is weights and name in whole:
                raise BrokenLawError(f"{name} has a second derivative", call)
            for path in at:
                along = {path: direction[path]}
                problem = _apart(call, at, name, some, along, _inner(by, along))
                if problem:
                    raise BrokenLawError(
                        f"{name}'s second derivative with respect to {path} is {problem}", call
                    )

    inputs["dtypes"] = _DOUBLE
    hold(law, drawn_calls(fn, inputs, generic=True), check, max_examples)
    if not compared:
        _refuse_nothing(law, fn, arguments)


def _twice(value: Tensor, name: str, live: Numbers, weights: Numbers) -> Numbers:
    """Differentiate a weighted sum of a part's gradients."""
    leaves = list(live.values())
    first = derivatives(scalar({name: value}), leaves, create_graph=True)
    total = _inner(dict(zip(live, first, strict=True)), weights)
    if not total.requires_grad:
        return {path: torch.zeros_like(leaf) for path, leaf in live.items()}
    return dict(zip(live, derivatives(total, leaves, keep=True), strict=True))


def _apart(
    call: Call, at: Numbers, name: str, weights: Numbers, along: Numbers, ours: Tensor
) -> str:
    """Compare a directional second derivative with finite differences; say how they differ."""
    step = 1e-5
    by_differences, unit = _difference(call, at, name, weights, along, step)
    tolerance = 1e-6 * max(unit, 1e-3)
    if abs(ours - by_differences) <= tolerance:
        return ""
    # Where a kink lies within a step, two steps do not agree.
    again, unit = _difference(call, at, name, weights, along, step / 4)
    apart = abs(ours - again)
    if apart <= tolerance or not abs(again - by_differences) <= max(tolerance, 0.1 * unit):
        return ""
    return f"{float(ours):.6g}, by finite differences {float(again):.6g}"


def _difference(
    call: Call, at: Numbers, name: str, weights: Numbers, along: Numbers, step: float
) -> tuple[Tensor, float]:
    """Return how the weighted gradients change along a direction, and the size of the change."""
    ends: list[Numbers] = []
    for signed in (step, -step):
        moved = {path: t + signed * along[path] if path in along else t for path, t in at.items()}
        live = {path: t.detach().clone().requires_grad_() for path, t in moved.items()}
        with torch.enable_grad():
            value = outputs(replaced(call, live)())[name]
        found = derivatives(scalar({name: value}), list(live.values()), keep=True)
        ends.append(dict(zip(live, found, strict=True)))
    slopes = {path: (ends[0][path] - ends[1][path]) / (2 * step) for path in at}
    sizes = [slopes[path].abs().max() * weight.abs().sum() for path, weight in weights.items()]
    unit = sum(float(size.detach()) for size in sizes)
    return _inner(slopes, weights), unit


def assert_forward_mode(
    fn: Function,
    *,
    arguments: Collection[str] | None = None,
    refused: bool | None = None,
    max_examples: int = 3,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that the derivative of forward mode is right, or refused with an error.

    `torch.func.jvp` gives the values of a plain call, and along a direction that is drawn the
    derivative that backpropagation gives; 0 for a part of the result that is outside the graph.
    `torch.no_grad` stops no tangent where `Tensor.detach` does: a target made under it is found.
    `assert_gradients` says whether backpropagation itself is right.

    Args:
        fn: the function.
        arguments: tensors (or fields, "f.values") to differentiate with respect to; all floating
            ones, if None.
        refused: whether forward mode is to be refused: False refuses every error, True a
            derivative that is there. None takes either.
        max_examples: calls to draw.
        **inputs: as [`calls`][termwise.testing.calls] takes them; float64 unless `dtypes` says
            otherwise. Elements are normal variates unless `elements` says otherwise.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
        ValueError: `arguments` names none of the function's, or there is nothing to differentiate.

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

    def check(several: list[Call]) -> None:
        nonlocal compared
        (call,) = several
        at = _differentiable(call, arguments)
        direction = _directions(at, seed=1)

        def of_tensors(*tensors: Tensor) -> Numbers:
            found = outputs(replaced(call, dict(zip(at, tensors, strict=True)))(), numbers=False)
            return {name: value for name, value in found.items() if is_inexact(value.dtype)}

        live = {path: t.clone().requires_grad_() for path, t in at.items()}
        wanted = of_tensors(*live.values())
        if not at or not wanted:
            return
        compared = True
        try:
            jvp: Function = torch.func.jvp
            values, moved = jvp(of_tensors, tuple(at.values()), tuple(direction.values()))
        except (NotImplementedError, RuntimeError) as error:
            _take_refusal(error, "forward mode", refused, call)
            return
        if refused:
            raise BrokenLawError("forward mode is not refused", call)
        for name, value in wanted.items():
            if not close(values[name], value):
                one, two = told_apart(value, values[name])
                raise BrokenLawError(f"{name} is {one}, in forward mode {two}", call)
            slopes = derivatives(scalar({name: value}), list(live.values()), keep=True)
            forward = scalar({name: moved[name]})
            backward = _inner(dict(zip(live, slopes, strict=True)), direction).to(forward.dtype)
            if not close(forward, backward):
                one, two = told_apart(forward, backward)
                raise BrokenLawError(
                    f"{name}'s derivative along a direction is {one} in forward mode, and {two} by "
                    "its gradient",
                    call,
                )

    inputs.setdefault("dtypes", _DOUBLE)
    hold(law, drawn_calls(fn, inputs, generic=True), check, max_examples)
    if not compared:
        _refuse_nothing(law, fn, arguments)


def _differentiable(call: Call, arguments: Collection[str] | None) -> Numbers:
    """List the tensors that a law differentiates with respect to."""
    return {
        path: t.detach().clone()
        for path, t in call.tensors().items()
        if is_inexact(t.dtype) and t.numel() and is_of(path, arguments)
    }


def _directions(at: Numbers, seed: int) -> Numbers:
    generator = torch.Generator().manual_seed(seed)
    return {
        path: torch.randn(t.shape, generator=generator, dtype=t.dtype) for path, t in at.items()
    }


def _inner(one: Numbers, other: Numbers) -> Tensor:
    """Return the sum of products; a complex number counts as its two parts."""
    total = torch.zeros(())
    for path, two in other.items():
        product = (one[path].conj() * two).sum()
        total = total + (product.real if product.is_complex() else product)
    return total


def _take_refusal(error: Exception, what: str, refused: bool | None, call: Call) -> None:
    """Pass an error that says that a derivative is not there, if one may."""
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    if not isinstance(error, NotImplementedError) and not _REFUSALS.search(str(error)):
        raise BrokenLawError(f"{what} fails, {type(error).__name__}: {said}", call) from error
    if refused is False:
        raise BrokenLawError(f"{what} is refused, {type(error).__name__}: {said}", call) from error


def _refuse_nothing(law: str, fn: Function, arguments: Collection[str] | None) -> None:
    raise MisuseError(
        f"{law}: no part of what {Signature(fn).name} returns has a gradient with respect to "
        f"{', '.join(arguments) if arguments else 'a tensor it takes'}"
    )
