"""Laws: properties that a loss must have for every valid call, each tested by one function."""

import contextlib
import dataclasses
import functools
import os
import pickle
import random
import re
import sys
import typing
import warnings
import zlib
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any, Final, TypeAlias, Unpack, cast

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, HypothesisException, HypothesisWarning
from jaxtyping import jaxtyped
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from .._annotations import field_hints, has_fields
from .._contract import show, spell
from .._terms import Terms
from ._calls import (
    NOTHING_TO_BREAK,
    BrokenCall,
    Call,
    Inputs,
    Signature,
    axis_names,
    drawn_calls,
    fits,
    is_inexact,
    look_up,
    named_axes,
    violations,
)
from ._state import State

Function: TypeAlias = Callable[..., Any]
Numbers: TypeAlias = dict[str, Tensor]
Weight: TypeAlias = str | float | Callable[[Call], float | Tensor]

_DOUBLE: Final = (torch.float64,)
# A loss is slow, a call contains many numbers, and a law may run inside a test under @given.
_PATIENT: Final = (
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.large_base_example,
    HealthCheck.filter_too_much,
    HealthCheck.nested_given,
)
_NUMBER_DTYPES: Final[dict[type, torch.dtype]] = {float: torch.float64, complex: torch.complex128}
# Losses of half-precision arguments are computed and returned in float32.
_PROMOTED: Final = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


class BrokenLawError(Exception):
    """A call for which a law does not hold."""

    def __init__(self, problem: str, call: Call) -> None:
        super().__init__(problem)
        self.problem = problem
        self.call = call


class MisuseError(ValueError):
    """A law that cannot test a function, or not with these arguments."""


def assert_contract(
    fn: Function, *, compiled: bool = False, max_examples: int = 10, **inputs: Unpack[Inputs]
) -> None:
    """Assert that a function accepts valid arguments and rejects invalid ones, by its annotations.

    - The result of a valid call has the annotated type, shapes and dtypes. Its floating parts have
      the dtype of the floating arguments, or float32 if these are in half precision.
    - A call in which one argument violates its annotation raises a `TypeError` that names the
      argument. Every kind of violation is tried for every argument.
    - A call with size 0 for an axis that `sizes` does not name returns such a result, or raises a
      `TypeError`, a `ValueError` or a `NotImplementedError`.

    Args:
        fn: a function decorated with [`contract`][termwise.contract] or with jaxtyping.
        compiled: whether to test the function under `torch.compile(fullgraph=True)` too: a valid
            call compiles, and one violation of each argument (an axis, a dtype or the number of
            axes, in turn) raises an error that names it. `contract` is needed for this; jaxtyping
            alone does not check compiled calls. Takes a second or two.
        max_examples: number of calls to draw.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls].

    Raises:
        AssertionError: if the law fails; the message ends with the smallest failing call, as code.
        ValueError: if no argument can violate its annotation.
    """
    signature = Signature(fn)
    found_violations = False

    def check(call: Call) -> None:
        nonlocal found_violations
        result = _result_or_refusal(call, call.mapped(same_tensor))
        if result is _REFUSED:
            return
        _check_result(signature, call, result)
        for broken in violations(call) if empty_axis(call) is None else ():
            found_violations = True
            _check_error(broken, broken)

    def check_compiled(call: Call) -> None:
        run = torch.compile(fn, fullgraph=True, backend="eager")
        try:
            # Without gradients, which Dynamo traces differently: assert_compiles tests them.
            with failing("when compiled", call):
                run(**call.mapped(same_tensor))
            for broken in _one_violation_per_argument(call):
                _check_error(broken, functools.partial(run, **broken), "when compiled, ")
        finally:
            torch.compiler.reset()

    check_law("assert_contract", drawn(fn, inputs), check, max_examples)
    check_extremes("assert_contract", fn, inputs, check)
    if not found_violations:
        raise MisuseError(f"assert_contract: {signature.name} {NOTHING_TO_BREAK}")
    if compiled:
        check_law(
            "assert_contract",
            drawn(fn, inputs),
            check_compiled,
            1,
            shrink=False,  # shrinking would compile hundreds of times
            simplest=False,
        )


def empty_axis(call: Call) -> str | None:
    """Return the name of an axis of size 0, or None."""
    return next((axis for axis, size in call.sizes.items() if size == 0), None)


_REFUSED: Final = object()


def _result_or_refusal(call: Call, copy: Call) -> Any:
    """Return the result, or `_REFUSED` if the function raises a suitable error for size 0."""
    axis = empty_axis(call)
    try:
        return copy()
    except Exception as error:
        if axis is None:
            raise
        if isinstance(error, TypeError | ValueError | NotImplementedError):
            return _REFUSED
        raise BrokenLawError(
            f"a call with size 0 for axis {axis} raises {type(error).__name__}: "
            f"{_first_line(str(error))}; return a result, or raise a ValueError that says what is "
            f"needed (or set the size of {axis} in `sizes`)",
            call,
        ) from error


def _one_violation_per_argument(call: Call) -> list[BrokenCall]:
    """Return one violation of each argument: tracing one takes a tenth of a second."""
    by_argument: dict[str, list[BrokenCall]] = {}
    for broken in violations(call):
        if broken.kind in ("dtype", "rank", "axis"):
            by_argument.setdefault(broken.argument, []).append(broken)
    return [
        next((one for one in found if one.kind == ("axis", "dtype", "rank")[turn % 3]), found[0])
        for turn, found in enumerate(by_argument.values())
    ]


@contextlib.contextmanager
def failing(when: str, call: Call) -> Generator[None]:
    """Turn an error into a broken law, described by the first line of its message."""
    try:
        yield
    except (BrokenLawError, MisuseError, HypothesisException):
        raise
    except Exception as error:
        problem = f"raises {type(error).__name__} {when}: {_first_line(str(error))}"
        raise BrokenLawError(problem, call) from None


def _check_result(signature: Signature, call: Call, result: Any) -> None:
    hint = signature.returns
    with jaxtyped("context"):
        for name, value in {**signature.bound, **call}.items():
            if name in signature.hints:
                fits(value, signature.hint(name, call))
        if not fits(result, hint):
            raise BrokenLawError(f"the result needs {spell(hint)}, got {show(result)}", call)
        for record in _records(result):
            hints = typing.get_type_hints(type(record), include_extras=True)
            for field in dataclasses.fields(record):
                part: object = getattr(record, field.name)
                if not fits(part, hints[field.name]):
                    needs = spell(hints[field.name])
                    raise BrokenLawError(
                        f"the result's {field.name} needs {needs}, got {show(part)}", call
                    )
    # The precision of a complex dtype is that of its real part.
    floating = [t.dtype.to_real() for t in call.tensors().values() if is_inexact(t.dtype)]
    if not floating:
        return
    widest = max((_PROMOTED.get(d, d) for d in floating), key=lambda d: d.itemsize)
    for name, value in outputs(result, numbers=False).items():
        if is_inexact(value.dtype) and value.dtype.to_real() not in (widest, *floating):
            needed = str(widest).removeprefix("torch.")
            raise BrokenLawError(
                f"{name} is {show(value)}, but must be {needed}, as the arguments are", call
            )


def _records(result: Any) -> list[Terms]:
    """Return the records in a result: itself, or those inside it."""
    if isinstance(result, Terms):
        return [result]
    return [record for part in _parts(result).values() for record in _records(part)]


def _check_error(broken: Any, run: Callable[[], Any], when: str = "") -> None:
    """Assert that a broken call raises an error that names the argument."""
    argument = broken.argument
    problem = f"{when}{argument} violates its annotation ({broken.violation})"
    try:
        run()
    except Exception as error:
        message = str(error).partition("from user code")[0]  # the rest is source quoted by Dynamo
        if not re.search(rf"\b{argument}\b", message):
            raise BrokenLawError(
                f"{problem}, but the {type(error).__name__} does not name it: "
                f"{_first_line(message)}",
                broken,
            ) from None
        if not when and not isinstance(error, TypeError):
            raise BrokenLawError(
                f"{problem}, but the error is a {type(error).__name__}, not a TypeError: "
                f"{_first_line(message)}",
                broken,
            ) from None
    else:
        raise BrokenLawError(
            f"{problem}, but the call succeeds (is the function decorated with termwise.contract?)",
            broken,
        )


def assert_pure(
    fn: Function,
    *,
    aliases: Collection[str] = (),
    max_examples: int = 10,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that a function depends only on its arguments, and has no side effects.

    - The same call returns the same result, bit by bit, also after another call.
    - Arguments keep their values, their versions and their `.grad`.
    - The function does not change the global random generators of torch, Python and NumPy, the
      default dtype, the grad mode, the precision of matrix products, the number of threads, the use
      of deterministic algorithms, or the parameters and buffers of a module.
    - No part of the result shares memory with an argument.
    - A cache does not change results: a call returns the same after another call as it does when it
      runs first. Caches are looked for in the global names, attributes, closures and
      `functools.cache`s of the function and of the functions of its package that it calls.

    Args:
        fn: the function.
        aliases: parts of the result, by name, that may share memory with an argument, such as an
            argument that is returned unchanged. The name of a single result is "result".
        max_examples: number of calls to draw.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls].

    Raises:
        AssertionError: if the law fails; the message ends with the smallest failing call, as code.
        ValueError: if the result contains no tensor and no number.
    """
    state = State(fn)

    def check(pair: list[Call]) -> None:
        call, other = pair
        used = call.mapped(leaf)
        before = {path: (t._version, t.detach().clone()) for path, t in used.tensors().items()}
        with _other_seeds():
            global_state = _global_state(fn)
            try:
                result = run_call(used)
                first = _copied(result)
            except RuntimeError as error:
                if "in-place" in str(error) or "inplace" in str(error):
                    problem = f"an argument is modified in place: {error}"
                    raise BrokenLawError(problem, call) from None
                raise
            changed = _first_difference(global_state, _global_state(fn))
        for path, tensor in used.tensors().items():
            if path not in before:
                raise BrokenLawError(f"{path} is added to an argument", call)
            version, value = before[path]
            if tensor._version != version or not equal(tensor.detach(), value):
                raise BrokenLawError(f"{path} is modified in place", call)
            if tensor.is_leaf and tensor.grad is not None:
                raise BrokenLawError(f"{path}.grad is set", call)
        if changed:
            raise BrokenLawError(f"{changed} is changed", call)
        unaliased = {name: value for name, value in result.items() if name not in aliases}
        _check_memory(call, unaliased, used.tensors())
        later = _copied(run_call(other.mapped(same_tensor)))
        again = run_call(call.mapped(leaf))
        for name, value in first.items():
            if not equal(value, again[name].detach()):
                one, two = format_difference(value, again[name])
                raise BrokenLawError(f"{name} is {one}, then {two} for the same call", call)
        with state.initial() as changed_state:
            alone = _copied(run_call(other.mapped(same_tensor))) if changed_state else later
        for name, value in alone.items():
            if not equal(later[name], value):
                one, two = format_difference(value, later[name])
                raise BrokenLawError(
                    f"{name} is {one} if this call runs first, but {two} after a call with the "
                    "same shapes (a value computed from that call is cached)",
                    other,
                )

    check_law("assert_pure", drawn_calls(fn, inputs, count=2, large=True), check, max_examples)


def _check_memory(call: Call, result: Numbers, arguments: Numbers) -> None:
    """Refuse a result that shares memory with an argument."""
    for name, value in result.items():
        for path, tensor in arguments.items():
            strided = value.layout == tensor.layout == torch.strided and value.numel()
            if (
                strided
                and value.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            ):
                is_what = "is" if value.data_ptr() == tensor.data_ptr() else "is a view of"
                raise BrokenLawError(
                    f"{name} {is_what} the argument {path}: return a copy, or pass "
                    f'aliases=["{name}"]',
                    call,
                )


def _global_state(fn: Function) -> dict[str, Any]:
    """Return what a function must not change, by what an error calls it."""
    buffers = fn.state_dict() if isinstance(fn, nn.Module) else {}
    return {
        **{f"the module's {name}": value.tolist() for name, value in buffers.items()},
        "the global generator's state": torch.get_rng_state().tolist(),
        "the state of random": random.getstate(),
        "the state of numpy.random": pickle.dumps(_numpy_state()),
        "the precision of matrix products": torch.get_float32_matmul_precision(),
        "the use of deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "the grad mode": torch.is_grad_enabled(),
        "the number of threads": torch.get_num_threads(),
    }


def _numpy_state() -> object:
    """Return the state of NumPy's global generator, or None if NumPy is not imported."""
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state(legacy=False)["state"]


@contextlib.contextmanager
def _other_seeds() -> Generator[None]:
    """Seed the global generators with a fixed number, so that a function that seeds them is found.

    Their states are restored at the end.
    """
    seed = 271_828
    numpy = sys.modules.get("numpy")
    states = torch.get_rng_state(), random.getstate(), numpy and numpy.random.get_state()
    torch.manual_seed(seed)
    random.seed(seed)
    if numpy is not None:
        numpy.random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy is not None:
            numpy.random.set_state(states[2])


def _first_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    return next((name for name in before if before[name] != after[name]), "")


def assert_finite(
    fn: Function,
    *,
    ignores: Collection[str] = (),
    scale: float | Mapping[str, float] = 1e3,
    max_examples: int = 10,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that finite arguments give finite results, and that a NaN reaches the result.

    Values and gradients are finite for elements as drawn, for zeros, for rows that are all equal
    (one row, expanded), and for elements multiplied by `scale`. A NaN in the first element of a
    floating argument makes the result non-finite. If the result does not depend on that element, as
    for a node of a graph without an edge, NaN in all elements must do so.

    Args:
        fn: the function.
        ignores: arguments (or fields, "f.values") that may contain a NaN without making the result
            non-finite.
        scale: factor for large elements, or a factor for each argument by name (1000 for the
            others), such as `{"log_variance": 10}` for an argument that is exponentiated.
        max_examples: number of calls to draw.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls]. Arguments in `elements`,
            `overrides` or `given` are tested as drawn, not as zeros, equal rows or large elements.

    Raises:
        AssertionError: if the law fails; the message ends with the smallest failing call, as code.
        ValueError: if the function has no argument that `ignores` or `scale` names, or returns no
            tensor and no number.
    """
    scales: Mapping[str, float] = scale if isinstance(scale, Mapping) else {}
    default_scale = 1e3 if isinstance(scale, Mapping) else scale
    refuse_unknown_arguments("assert_finite", fn, [*ignores, *scales])
    elements = inputs.get("elements")
    restricted: dict[str, Any] = dict(elements) if isinstance(elements, Mapping) else {}
    for names in inputs.get("overrides") or {}:
        restricted.update(dict.fromkeys((names,) if isinstance(names, str) else names, True))
    all_restricted = isinstance(elements, st.SearchStrategy)

    def is_free(call: Call, path: str, tensor: Tensor) -> bool:
        chosen = all_restricted or path.partition(".")[0] in call.given
        return is_inexact(tensor.dtype) and not chosen and look_up(path, restricted) is None

    def scale_of(path: str) -> float:
        return default_scale if (own := look_up(path, scales)) is None else own

    def changed(call: Call, change: Callable[[Tensor, float], Tensor]) -> Call:
        return call.mapped(
            lambda path, t: change(t, scale_of(path)) if is_free(call, path, t) else t.clone()
        )

    def check(call: Call) -> None:
        for kind, change in _EXTREMES.items():
            extreme = changed(call, change)
            with failing(f"for {kind}", extreme):
                values, gradients = values_and_gradients(extreme)
            for name, value in {**values, **gradients}.items():
                if not torch.isfinite(value).all():
                    not_finite = value[~torch.isfinite(value)][0]
                    raise BrokenLawError(f"{name} is {brief(not_finite)} for {kind}", extreme)
        for path, tensor in call.tensors().items():
            if is_inexact(tensor.dtype) and tensor.numel() and path not in ignores:
                with_nan = _call_with_hidden_nan(call, path)
                if with_nan is not None:
                    raise BrokenLawError(
                        f"a NaN in {path} does not reach the result (if it need not, pass "
                        f'ignores=["{path}"])',
                        with_nan,
                    )

    check_law("assert_finite", drawn(fn, inputs), check, max_examples)


def _equal_rows(tensor: Tensor, scale: float) -> Tensor:
    one = tensor[:1] if tensor.ndim and tensor.numel() else tensor
    return one.expand_as(tensor)


_EXTREMES: Final[dict[str, Callable[[Tensor, float], Tensor]]] = {
    "arguments as drawn": lambda t, scale: t.clone(),
    "zeros": lambda t, scale: torch.zeros_like(t),
    "equal rows": _equal_rows,
    "large elements (pass a smaller scale= if they are too large)": lambda t, scale: t * scale,
}


def _call_with_hidden_nan(call: Call, path: str) -> Call | None:
    """Return the call with a NaN in one tensor that the result hides; None if it hides none.

    The NaN is in the first element or, if the result does not depend on it, in all elements.
    """
    first = torch.zeros(call.tensors()[path].numel(), dtype=torch.bool)
    first[0] = True
    for mask in (first, torch.ones_like(first)):
        with_nan = _change_elements(call, path, mask, lambda t: torch.full_like(t, torch.nan))
        found = run_call(with_nan)
        parts = [found["loss"]] if "loss" in found else list(found.values())
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            return None
        values = run_call(call.mapped(same_tensor))
        others = [
            run_call(_change_elements(call, path, mask, change)) for change in (_larger, torch.neg)
        ]
        used = any(not equal(other[name], values[name]) for other in others for name in values)
        if used or mask.all():
            # With an empty tensor, the result may depend on no element.
            empty = not used and any(not t.numel() for t in call.tensors().values())
            return None if empty else with_nan
    return None


def _change_elements(
    call: Call, path: str, mask: Tensor, change: Callable[[Tensor], Tensor]
) -> Call:
    """Return a copy of the call with the masked elements of one tensor changed."""

    def changed(other: str, t: Tensor) -> Tensor:
        return torch.where(mask.reshape(t.shape), change(t), t) if other == path else t.clone()

    return call.mapped(changed)


def _larger(tensor: Tensor) -> Tensor:
    return 3 * tensor + 1


def assert_terms_sum(
    fn: Function,
    weights: Mapping[str, Weight],
    *,
    also_in_graph: Collection[str] = (),
    detached: bool = False,
    max_examples: int = 10,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that `loss` is the weighted sum of its terms, in value and in gradient.

    All other terms are diagnostics, and must be detached.

    Args:
        fn: a function that returns a [`Terms`][termwise.Terms].
        weights: weight of each term in `loss`: a number, the name of the argument that contains it,
            or a function of the call that returns it. If empty, only the diagnostics are checked.
        also_in_graph: terms that are in the graph, but not in the sum.
        detached: whether the terms of the sum must be detached too. If False, the gradient of their
            sum is compared with the gradient of `loss`.
        max_examples: number of calls to draw.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls], in float64 by default.

    Raises:
        AssertionError: if the law fails; the message ends with the smallest failing call, as code.
        ValueError: if the result has no such term, or the function no such argument.
    """
    function = Signature(fn).name
    for weight in weights.values():
        if isinstance(weight, str):
            refuse_unknown_arguments("assert_terms_sum", fn, [weight])

    def check(call: Call) -> None:
        live = call.mapped(leaf)
        result = live()
        terms = outputs(result)
        for name in ("loss", *weights, *also_in_graph):
            if not hasattr(result, name):
                raise MisuseError(f"assert_terms_sum: the result of {function} has no {name}")
        weighted = [terms[t] * _number(w, live) for t, w in weights.items() if t in terms]
        total = sum(weighted, start=torch.tensor(0))
        if weights and not close(terms["loss"], total):
            one, two = format_difference(terms["loss"], total)
            raise BrokenLawError(f"loss is {one}, but the weighted sum of its terms is {two}", call)
        leaves = {path: t for path, t in live.tensors().items() if t.requires_grad}
        both = [] if detached or not weights else [terms["loss"], total]
        gradients = [derivatives(one, list(leaves.values()), retain_graph=True) for one in both]
        for path, ours, expected in zip(leaves, *gradients, strict=True) if gradients else ():
            if not close(ours, expected):
                one, two = format_difference(ours, expected)
                raise BrokenLawError(
                    f"the gradient of loss with respect to {path} is {one}, but that of the "
                    f"weighted sum of its terms is {two}",
                    call,
                )
        in_graph = ("loss", *also_in_graph, *(() if detached else weights))
        for name, value in terms.items():
            if name not in in_graph and value.requires_grad:
                raise BrokenLawError(
                    f"{name} is not detached, but is not in the sum: detach it, or pass "
                    f'also_in_graph=["{name}"]',
                    call,
                )

    inputs.setdefault("dtypes", _DOUBLE)
    check_law("assert_terms_sum", drawn(fn, inputs), check, max_examples)


def _number(weight: Weight, call: Call) -> float | Tensor:
    if isinstance(weight, str):
        return cast("float", call[weight])
    return weight(call) if callable(weight) else weight


def assert_permutation_invariant(
    fn: Function, axis: str, *, max_examples: int = 10, **inputs: Unpack[Inputs]
) -> None:
    """Assert that the order of elements along an axis does not matter.

    All arguments that have the axis are permuted in the same way. Results and gradients that have
    the axis are then permuted in this way too, and all others do not change.

    Args:
        fn: the function.
        axis: name of the axis.
        max_examples: number of calls to draw.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls], in float64 by default.

    Raises:
        AssertionError: if the law fails; the message ends with the smallest failing call, as code.
        ValueError: if the function has no such axis, or its size is below 2 in every call.
    """
    signature = Signature(fn)
    compared = False

    def check(call: Call) -> None:
        nonlocal compared
        orders = _orders(_size("assert_permutation_invariant", call, axis) or 0)
        if not orders:
            return
        compared = True
        values, gradients = values_and_gradients(call)
        for order in orders:
            check_order(call, values, gradients, torch.tensor(order))

    def check_order(call: Call, values: Numbers, gradients: Numbers, order: Tensor) -> None:
        axes = call.axes()

        def permuted(tensor: Tensor, names: Sequence[str | None]) -> Tensor:
            for index, name in enumerate(names):
                if name == axis:
                    tensor = tensor.index_select(index, order)
            return tensor

        reordered = call.mapped(lambda path, t: permuted(t, axes.get(path, ())).clone())
        ours, our_gradients = values_and_gradients(reordered)
        expected = {
            name: permuted(value, result_axes(signature, name, value))
            for name, value in values.items()
        }
        # The gradient of a result with several elements depends on their order: see `scalar`.
        if "loss" in values or all(value.numel() == 1 for value in values.values()):
            for name, value in gradients.items():
                expected[name] = permuted(value, axes.get(name.removeprefix(GRADIENT), ()))
        for name, value in expected.items():
            found = {**ours, **our_gradients}[name]
            if not close(found, value):
                one, two = format_difference(value, found)
                raise BrokenLawError(
                    f"{name} is {one}, but {two} when {axis} is in the order {order.tolist()}",
                    call,
                )

    inputs.setdefault("dtypes", _DOUBLE)
    strategy = drawn(fn, inputs, at_least_two=axis)
    check_law("assert_permutation_invariant", strategy, check, max_examples)
    if not compared:
        raise MisuseError(
            f"assert_permutation_invariant: the size of {axis} was below 2 in every call of "
            f"{signature.name}: allow larger sizes in `sizes`"
        )


def _orders(size: int) -> list[list[int]]:
    """Return permutations: a reversal, a rotation, and one that separates neighbours."""
    indices = list(range(size))
    orders = [indices[::-1], indices[1:] + indices[:1], indices[1::2] + indices[::2]]
    return [order for index, order in enumerate(orders) if order not in [indices, *orders[:index]]]


def assert_symmetric(
    fn: Function, first: str, second: str, *, max_examples: int = 10, **inputs: Unpack[Inputs]
) -> None:
    """Assert that a function is symmetric in two arguments, in value and in gradient.

    Args:
        fn: the function.
        first: name of an argument.
        second: name of another argument, which has the same shape.
        max_examples: number of calls to draw.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls], in float64 by default.

    Raises:
        AssertionError: if the law fails; the message ends with the smallest failing call, as code.
        ValueError: if the function has no such argument.
    """
    refuse_unknown_arguments("assert_symmetric", fn, [first, second], whole=True)

    def check(call: Call) -> None:
        swapped = call.changed(**{first: call[second], second: call[first]})
        values, gradients = values_and_gradients(call)
        ours, our_gradients = values_and_gradients(swapped)
        for name, value in values.items():
            if not close(ours[name], value):
                one, two = format_difference(value, ours[name])
                raise BrokenLawError(
                    f"{name} is {one}, but {two} when {first} and {second} are swapped", call
                )
        other = {first: second, second: first}
        for name, value in gradients.items():
            path = name.removeprefix(GRADIENT)
            head, dot, field = path.partition(".")
            found = our_gradients[GRADIENT + other.get(head, head) + dot + field]
            if not close(found, value):
                one, two = format_difference(value, found)
                raise BrokenLawError(
                    f"{name} is {one}, but {two} when {first} and {second} are swapped", call
                )

    inputs.setdefault("dtypes", _DOUBLE)
    check_law("assert_symmetric", drawn(fn, inputs), check, max_examples)


def assert_shift_invariant(
    fn: Function,
    axis: str,
    *,
    arguments: Collection[str] | None = None,
    max_examples: int = 10,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that a shift that is constant along an axis does not change the result.

    The shift varies over the other axes, and is the same for all tensors of one shape. A function
    of deviations from the mean along the axis is invariant, and so is one of differences between
    two shifted arguments.

    Args:
        fn: the function.
        axis: name of the axis.
        arguments: tensors (or fields, "f.values") to shift; all floating ones that have the axis,
            if None.
        max_examples: number of calls to draw.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls], in float64 by default.

    Raises:
        AssertionError: if the law fails; the message ends with the smallest failing call, as code.
        ValueError: if the function has no such axis or argument, or no floating tensor to shift.
    """
    refuse_unknown_arguments("assert_shift_invariant", fn, arguments or ())
    shifted = False

    def check(call: Call) -> None:
        if _size("assert_shift_invariant", call, axis) is None:
            return
        axes = call.axes()

        def shift(path: str, tensor: Tensor) -> Tensor:
            nonlocal shifted
            chosen = is_among(path, arguments)
            names = axes.get(path, ())
            inexact = is_inexact(tensor.dtype)
            if not chosen or axis not in names or not inexact or not tensor.numel():
                return tensor.clone()
            shifted = True
            index = names.index(axis)
            one = tensor.select(index, 0)
            ramp = torch.arange(one.numel(), dtype=torch.float64).reshape(one.shape)
            return tensor + (1.5 + ramp.sin()).unsqueeze(index).to(tensor.dtype)

        values = run_call(call.mapped(same_tensor))
        for name, ours in run_call(call.mapped(shift)).items():
            if not close(ours, values[name]):
                one, two = format_difference(values[name], ours)
                raise BrokenLawError(
                    f"{name} is {one}, but {two} when the arguments are shifted", call
                )

    inputs.setdefault("dtypes", _DOUBLE)
    check_law("assert_shift_invariant", drawn(fn, inputs), check, max_examples)
    if not shifted:
        among = f" among {', '.join(arguments)}" if arguments else ""
        raise MisuseError(
            f"assert_shift_invariant: {Signature(fn).name} takes no floating tensor that has the "
            f"axis {axis}{among}"
        )


def assert_scale(
    fn: Function,
    arguments: Collection[str],
    degree: float | Mapping[str, float],
    *,
    factor: float = 2.0,
    max_examples: int = 10,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that a loss is homogeneous: arguments times c give the loss times c^degree.

    Args:
        fn: the function.
        arguments: tensors (or numbers) to multiply, all by the same factor.
        degree: degree of `loss` (or of a single result), or of each term by name.
        factor: the factor c.
        max_examples: number of calls to draw.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls], in float64 by default.

    Raises:
        AssertionError: if the law fails; the message ends with the smallest failing call, as code.
        ValueError: if the function has no such argument or the result no such term, if `arguments`
            or `degree` is empty, or if `factor` is 1.
    """
    refuse_unknown_arguments("assert_scale", fn, arguments)
    if not arguments or factor == 1 or degree == {}:
        raise MisuseError("assert_scale needs arguments, a degree, and a factor other than 1")

    def check(call: Call) -> None:
        given = {name: call.get(name) for name in arguments}
        numbers = {name: x * factor for name, x in given.items() if isinstance(x, float | int)}
        larger = call.changed(**numbers).mapped(
            lambda path, t: t * factor if is_among(path, arguments) else t.clone()
        )
        values, ours = (run_call(one) for one in (call.mapped(same_tensor), larger))
        loss = "loss" if "loss" in values else "result"
        degrees = degree if isinstance(degree, Mapping) else {loss: degree}
        for name, power in degrees.items():
            expected = term("assert_scale", fn, values, name) * factor**power
            if not close(ours[name], expected):
                one, two = format_difference(ours[name], expected)
                raise BrokenLawError(
                    f"{name} is {one} for {factor:g} times {', '.join(arguments)}, but a term of "
                    f"degree {power:g} is {two}",
                    call,
                )

    inputs.setdefault("dtypes", _DOUBLE)
    check_law("assert_scale", drawn(fn, inputs), check, max_examples)


def assert_formula(
    fn: Function,
    reference: Callable[..., Any],
    *,
    max_examples: int = 25,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that a function equals a reference formula, in value and in gradient.

    Axes that `sizes` does not name are also tested with sizes above 64, because code may work in
    blocks, and with size 0. For size 0 the function may raise a `TypeError`, a `ValueError` or a
    `NotImplementedError`; where the reference raises an error, it must not return a finite loss.

    Args:
        fn: the function.
        reference: the formula in plain PyTorch. It is called with the same keyword arguments, and
            returns the loss, or a record or a dict of terms by name. Each of them is compared with
            the term of the same name; so is its gradient, where both have one.
        max_examples: number of calls to draw.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls], in float64 by default.

    Raises:
        AssertionError: if the law fails; the message ends with the smallest failing call, as code.
        ValueError: if the reference returns no tensor, or a term that the result does not have.
    """

    def check(call: Call) -> None:
        live, plain = call.mapped(leaf), call.mapped(leaf)
        result = _result_or_refusal(call, live)
        if result is _REFUSED:
            return
        values, axis = outputs(result), empty_axis(call)
        try:
            formula = outputs(reference(**plain), numbers=False)
        except Exception as error:
            if axis is None:
                raise
            name = "loss" if "loss" in values else next(iter(values))
            if values[name].numel() and torch.isfinite(values[name]).all():
                raise BrokenLawError(
                    f"{name} is {brief(values[name])} with size 0 for axis {axis}, but the formula "
                    f"raises {type(error).__name__}: {_first_line(str(error))}",
                    call,
                ) from None
            return
        if "result" in formula and "loss" in values:
            formula = {"loss": formula["result"]}
        if not formula:
            raise MisuseError("assert_formula: the reference returns no tensor")
        for name, expected in formula.items():
            ours = term("assert_formula", fn, values, name)
            if not close(ours, expected):
                one, two = format_difference(ours, expected)
                raise BrokenLawError(f"{name} is {one}, but the formula gives {two}", call)
            if name in ("loss", "result") and expected.requires_grad and not ours.requires_grad:
                raise BrokenLawError(f"{name} has no gradient, but the formula has one", call)
            if not (ours.requires_grad and expected.requires_grad):
                continue
            leaves = {path: t for path, t in live.tensors().items() if t.requires_grad}
            reference_leaves = [plain.tensors()[path] for path in leaves]
            for path, gradient, by_formula in zip(
                leaves,
                derivatives(ours.sum(), list(leaves.values()), retain_graph=True),
                derivatives(expected.sum(), reference_leaves, retain_graph=True),
                strict=True,
            ):
                if not close(gradient, by_formula):
                    one, two = format_difference(gradient, by_formula)
                    raise BrokenLawError(
                        f"the gradient of {name} with respect to {path} is {one}, but the formula "
                        f"gives {two}",
                        call,
                    )

    inputs.setdefault("dtypes", _DOUBLE)
    check_law("assert_formula", drawn(fn, inputs), check, max_examples)
    check_extremes("assert_formula", fn, inputs, check, large=True)


def assert_gradients(
    fn: Function,
    *,
    arguments: Collection[str] | None = None,
    second: bool = False,
    max_examples: int = 5,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that gradients equal finite differences, in float64 (`torch.autograd.gradcheck`).

    Every part of the result that requires a gradient is compared. Elements are normal variates
    unless `elements` is given, so that no call is at a point without a derivative.

    Args:
        fn: the function.
        arguments: tensors (or fields, "f.values") to differentiate with respect to; all floating
            ones, if None.
        second: whether to compare second derivatives too (`torch.autograd.gradgradcheck`).
        max_examples: number of calls to draw.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls]; `dtypes` has no effect.

    Raises:
        AssertionError: if the law fails; the message ends with the smallest failing call, as code.
        ValueError: if the function has no such argument, or the result no gradient.
    """
    refuse_unknown_arguments("assert_gradients", fn, arguments or ())
    compared = False

    def check(calls: list[Call]) -> None:
        nonlocal compared
        (call,) = calls
        paths = [
            path
            for path, t in call.tensors().items()
            if is_inexact(t.dtype) and t.numel() and is_among(path, arguments)
        ]

        def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(paths, tensors, strict=True))
            result = outputs(call.mapped(lambda path, t: given.get(path, t))())
            return tuple(value for value in result.values() if value.requires_grad)

        leaves = [call.tensors()[path].clone().requires_grad_() for path in paths]
        if not leaves or not of_tensors(*leaves):
            return
        compared = True
        live = call.mapped(lambda path, t: leaves[paths.index(path)] if path in paths else t)
        names = [name for name, value in outputs(live()).items() if value.requires_grad]
        try:
            torch.autograd.gradcheck(of_tensors, leaves)
        except GradcheckError as error:
            raise BrokenLawError(_in_names(str(error), names, paths), call) from None
        try:
            if second:
                torch.autograd.gradgradcheck(of_tensors, leaves)
        except GradcheckError as error:
            gradients = [f"({GRADIENT}{path})" for path in paths]
            inputs_of_backward = [*paths, *(f"the gradient that reaches {name}" for name in names)]
            problem = _in_names(str(error), gradients, inputs_of_backward)
            raise BrokenLawError(problem, call) from None

    inputs["dtypes"] = _DOUBLE
    check_law("assert_gradients", drawn_calls(fn, inputs, normal=True), check, max_examples)
    if not compared:
        raise MisuseError(
            f"assert_gradients: no part of the result of {Signature(fn).name} has a gradient with "
            f"respect to {', '.join(arguments) if arguments else 'an argument'}"
        )


def _in_names(report: str, outs: Sequence[str], ins: Sequence[str]) -> str:
    """Rewrite gradcheck's report in one sentence, with names instead of indices."""
    text = " ".join(re.sub(", dtype=torch.(float64|complex128)", "", report).split())
    indices = re.search(r"output (\d+) with respect to input (\d+)", text)
    numbers = re.search(r"numerical:\s*(.*?)\s*analytical:\s*(.*)", text)
    if not indices or not numbers:
        return text
    name, by = outs[int(indices[1])], ins[int(indices[2])]
    numerical, analytical = (part.removeprefix("tensor(").rstrip(")") for part in numbers.groups())
    return (
        f"the gradient of {name} with respect to {by} is {analytical}, but finite differences give "
        f"{numerical}"
    )


def assert_compiles(
    fn: Function,
    *,
    backend: str = "aot_eager",
    max_examples: int = 1,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that a function compiles with `fullgraph=True`, and gives the results of eager mode.

    The compiled function is called twice, with different sizes and options. Its values and
    gradients are compared with those of eager mode.

    Args:
        fn: the function.
        backend: backend of `torch.compile`.
        max_examples: number of pairs of calls to draw; each pair is compiled again.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls], in float64 by default.

    Raises:
        AssertionError: if the law fails; the message ends with the failing call, as code.
        ValueError: if the result contains no tensor and no number.
    """

    def check(pair: tuple[Call, ...]) -> None:
        torch.compiler.reset()
        run = torch.compile(fn, fullgraph=True, backend=backend)
        try:
            for call in pair:
                same_compiled(call, run)
        finally:
            torch.compiler.reset()

    inputs.setdefault("dtypes", _DOUBLE)
    one = drawn_calls(fn, inputs).map(lambda drawn: drawn[0])
    check_law(
        "assert_compiles", st.tuples(one, one), check, max_examples, shrink=False, simplest=False
    )


def same_compiled(call: Call, run: Function) -> None:
    """Assert that a compiled function gives the values and gradients of eager mode."""
    values, gradients = values_and_gradients(call)
    with failing("when compiled", call):
        ours, our_gradients = values_and_gradients(call, run)
    for name, value in {**values, **gradients}.items():
        compiled = {**ours, **our_gradients}.get(name)
        if compiled is None:
            raise BrokenLawError(f"{name} is missing when compiled", call)
        if not close(compiled, value):
            one, two = format_difference(value, compiled)
            raise BrokenLawError(f"{name} is {one}, but {two} when compiled", call)


def assert_vmaps(
    fn: Function,
    *,
    arguments: Collection[str] | None = None,
    max_examples: int = 3,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that `torch.vmap` gives the results of a loop, also for `torch.func.grad`.

    Args:
        fn: the function.
        arguments: tensors (or fields, "f.values") to map over; all floating ones, if None.
        max_examples: number of batches of three calls to draw.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls], in float64 by default.

    Raises:
        AssertionError: if the law fails; the message ends with the smallest failing call, as code.
        ValueError: if the function has no such argument, or no floating tensor to map over.
    """
    refuse_unknown_arguments("assert_vmaps", fn, arguments or ())
    compared = False

    def check(three: list[Call]) -> None:
        nonlocal compared
        call = three[0]
        paths = [
            path
            for path, t in call.tensors().items()
            if is_inexact(t.dtype) and is_among(path, arguments)
        ]
        if not paths:
            return
        compared = True

        def of_tensors(*tensors: Tensor) -> Numbers:
            given = dict(zip(paths, tensors, strict=True))
            return run_call(call.mapped(lambda path, t: given.get(path, t)))

        rows = [[one.tensors()[path] for path in paths] for one in three]
        stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
        looped = [of_tensors(*row) for row in rows]
        with failing("under vmap", call):
            mapped = torch.vmap(of_tensors)(*stacked)
        for index, values in enumerate(looped):
            for name, value in values.items():
                if not close(mapped[name][index], value):
                    one, two = format_difference(value, mapped[name][index])
                    raise BrokenLawError(f"{name} is {one}, but {two} under vmap", three[index])
        leaves = [[tensor.clone().requires_grad_() for tensor in row] for row in rows]
        losses = [scalar(of_tensors(*row)) for row in leaves]
        if not losses[0].requires_grad:
            return
        argnums = tuple(range(len(paths)))
        gradient: Function = torch.func.grad(lambda *xs: scalar(of_tensors(*xs)), argnums)
        with failing("under vmap of torch.func.grad", call):
            gradients = torch.vmap(gradient)(*stacked)
        for index, (loss, row) in enumerate(zip(losses, leaves, strict=True)):
            for path, ours, expected in zip(paths, gradients, derivatives(loss, row), strict=True):
                if not close(ours[index], expected):
                    one, two = format_difference(expected, ours[index])
                    raise BrokenLawError(
                        f"{GRADIENT}{path} is {one}, but {two} under vmap", three[index]
                    )

    inputs.setdefault("dtypes", _DOUBLE)
    check_law("assert_vmaps", drawn_calls(fn, inputs, count=3, large=True), check, max_examples)
    if not compared:
        among = f" among {', '.join(arguments)}" if arguments else ""
        raise MisuseError(
            f"assert_vmaps: {Signature(fn).name} takes no floating tensor to map over{among}"
        )


def drawn(fn: Function, inputs: Inputs, *, at_least_two: str = "") -> st.SearchStrategy[Call]:
    """Return a strategy for the calls of a law; in some of them an axis is longer than 64."""
    strategy = drawn_calls(fn, inputs, large=True, at_least_two=at_least_two)
    return strategy.map(lambda calls: calls[0])


# Sizes above those of the blocks that losses work in.
_LARGE: Final = (257, 65)


def check_extremes(
    law: str, fn: Function, inputs: Inputs, check: Callable[[Call], None], *, large: bool = False
) -> None:
    """Test a law with size 0 for each axis, in turn, that `sizes` does not name.

    If `large`, test it with a large size for each of the first two of these axes too.
    """
    named = inputs.get("sizes") or {}

    def choose_sizes(free: list[str]) -> list[dict[str, int]]:
        axes = [axis for axis in free if axis not in named]
        longer = [{axis: n} for axis, n in zip(axes, _LARGE, strict=False)]
        return [{axis: 0} for axis in axes] + longer * large

    def check_all(calls: list[Call]) -> None:
        for call in calls:
            check(call)

    strategy = drawn_calls(fn, inputs, choose_sizes=choose_sizes)
    check_law(law, strategy, check_all, 1, shrink=False, simplest=False)


def check_law(
    law: str,
    strategy: st.SearchStrategy[Any],
    check: Callable[[Any], None],
    examples: int,
    *,
    shrink: bool = True,
    simplest: bool = True,
) -> None:
    """Test a law on drawn calls, and raise an AssertionError with the smallest failing call.

    Hypothesis tries the simplest call first: all sizes 1, all elements 0. If not `simplest`, this
    call is used only if there is no other, and is not counted.
    """
    if simplest and shrink:  # the other laws compile, which is slow
        examples = max(examples, _requested_examples())
    skipped: list[Any] = []
    checked = 0
    failures: list[BrokenLawError] = []
    kept = {Phase.reuse: simplest, Phase.generate: True, Phase.shrink: shrink}

    def attempt(drawn: Any) -> None:
        nonlocal checked
        if not simplest and not skipped:
            skipped.append(drawn)
            return
        checked += 1
        try:
            try:
                check(drawn)
            except (BrokenLawError, MisuseError, HypothesisException):
                raise
            except Exception as error:
                call = drawn if isinstance(drawn, Call) else drawn[0]
                message = str(error).strip()
                raise BrokenLawError(f"raises {type(error).__name__}: {message}", call) from error
        except BrokenLawError as broken:
            failures.append(broken)
            raise

    @settings(
        deadline=None,
        max_examples=examples if simplest else examples + 1,
        suppress_health_check=_PATIENT,
        report_multiple_bugs=False,
        print_blob=False,
        phases=[phase for phase in settings().phases if kept.get(phase, False)],
    )
    @given(strategy)
    def run(drawn: Any) -> None:  # short, because hypothesis reads its source at every run
        attempt(drawn)

    if settings().derandomize:  # otherwise the source of `run` would be the seed
        run = seed(zlib.crc32(law.encode()))(run)

    try:
        with warnings.catch_warnings():  # hypothesis warns about examples that print long
            warnings.simplefilter("ignore", HypothesisWarning)
            run()
            if skipped and not checked:
                run()
    except (BrokenLawError, Flaky):
        if not failures:
            raise
        broken = failures[-1]  # a function that keeps state may pass when it is called again
        name = Signature(broken.call.fn).name
        text = f"{law}: {name}: {broken.problem}\n\n{broken.call.code()}"
        raise AssertionError(text) from broken.__cause__


_HYPOTHESIS_DEFAULT: Final = 100


def _requested_examples() -> int:
    """Return the number of calls that TERMWISE_EXAMPLES or hypothesis's profile requests.

    A profile counts only if it requests more than hypothesis does by default.
    """
    profile = settings().max_examples
    requested = int(os.environ.get("TERMWISE_EXAMPLES", "0"))
    return max(requested, profile if profile > _HYPOTHESIS_DEFAULT else 0)


GRADIENT: Final = "the gradient with respect to "


def outputs(result: Any, *, numbers: bool = True) -> Numbers:
    """Return the tensors and numbers of a result by name: field, key, index, or "result".

    The name of a nested part contains both: "result 0.loss". A number is returned as a tensor.
    """
    if isinstance(result, Tensor):
        return {"result": result}
    if isinstance(result, bool | int | float | complex):
        dtype = _NUMBER_DTYPES.get(type(result))
        return {"result": torch.tensor(result, dtype=dtype)} if numbers else {}
    prefix = "result " if type(result) in (tuple, list) else ""
    named: Numbers = {}
    for key, part in _parts(result).items():
        for name, value in outputs(part, numbers=numbers).items():
            inner = "" if name == "result" else f".{name.removeprefix('result ')}"
            named[f"{prefix}{key}{inner}"] = value
    return named


def _parts(result: Any) -> dict[str, Any]:
    if isinstance(result, Terms):
        return dict(result.items())
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        entries = cast("Mapping[object, Any]", result)
        return {str(key): part for key, part in entries.items()}
    if isinstance(result, tuple | list):
        items = cast("Sequence[Any]", result)
        names: Sequence[str] = getattr(items, "_fields", [str(i) for i in range(len(items))])
        return dict(zip(names, items, strict=True))
    return {}


def run_call(call: Call, run: Function | None = None) -> Numbers:
    """Call the function, and return its results by name."""
    values = outputs(call() if run is None else run(**call))
    if not values:
        raise MisuseError(f"{Signature(call.fn).name} returns no tensor and no number to compare")
    return values


def scalar(values: Numbers) -> Tensor:
    """Return the loss, or a sum of all floating elements with a different weight for each."""
    if "loss" in values:
        return values["loss"]
    total = torch.zeros(())
    for value in values.values():
        if value.is_complex():
            value = torch.view_as_real(value)
        if value.is_floating_point():
            ramp = torch.arange(1, value.numel() + 1, dtype=value.dtype).reshape(value.shape)
            total = total + (value * ramp.cos()).sum()
    return total


def values_and_gradients(call: Call, run: Function | None = None) -> tuple[Numbers, Numbers]:
    """Call on copies that require a gradient, and return the results and the gradients."""
    live = call.mapped(leaf)
    values = run_call(live, run)
    loss = scalar(values)
    leaves = {path: t for path, t in live.tensors().items() if t.requires_grad}
    gradients: Numbers = {}
    if loss.requires_grad:
        found = derivatives(loss, list(leaves.values()))
        gradients = {GRADIENT + path: value for path, value in zip(leaves, found, strict=True)}
    return {name: value.detach() for name, value in values.items()}, gradients


def result_axes(signature: Signature, name: str, value: Tensor) -> tuple[str | None, ...]:
    """Return the axis names of a part of a result, from its annotation."""
    hint: Any = signature.returns
    for part in name.removeprefix("result ").split(".") if name != "result" else ():
        hint = _hint_of(hint, part)
    return named_axes(hint, value, "").get("", ())


def _hint_of(hint: Any, part: str) -> Any:
    if has_fields(hint):
        return field_hints(hint).get(part)
    kinds: tuple[Any, ...] = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return kinds[0 if Ellipsis in kinds else int(part)]
    return kinds[-1] if kinds else None


def derivatives(
    loss: Tensor,
    leaves: Sequence[Tensor],
    *,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> list[Tensor]:
    """Return the gradient with respect to each leaf: 0 where the loss does not depend on it."""
    if not leaves or not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(
        loss,
        leaves,
        create_graph=create_graph,
        retain_graph=retain_graph or create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return list(found)


def replaced(call: Call, others: Numbers) -> Call:
    """Return a copy of the call with the tensors at some paths replaced."""
    return call.mapped(lambda path, t: others.get(path, t))


def _size(law: str, call: Call, axis: str) -> int | None:
    """Return the size of an axis in a call; None if the arguments that have it are None."""
    size: int | None = call.sizes.get(axis)
    if isinstance(size, tuple):
        raise MisuseError(
            f"{law}: {axis} of {Signature(call.fn).name} stands for any number of axes, needs one"
        )
    if size is None:
        refuse_unknown_axis(law, Signature(call.fn), axis)
    return size


def refuse_unknown_axis(law: str, signature: Signature, axis: str) -> None:
    known = dict.fromkeys(name for hint in signature.hints.values() for name in axis_names(hint))
    if axis not in known:
        raise MisuseError(f"{law}: {signature.name} has no axis {axis}, only {', '.join(known)}")


def refuse_fixed_axis(
    law: str, signature: Signature, axis: str, free: Collection[str], inputs: Inputs
) -> None:
    """Raise an error for an axis whose size a law cannot choose."""
    if axis not in free and not callable(inputs.get("given")):
        refuse_unknown_axis(law, signature, axis)
        raise MisuseError(
            f"{law}: the size of {axis} must vary, but a tensor in `overrides` or `given` sets it"
        )


def is_among(path: str, arguments: Collection[str] | None) -> bool:
    """Whether a tensor is one of the arguments or inside one; None stands for all arguments."""
    if arguments is None:
        return True
    return any(path == name or path.startswith(f"{name}.") for name in arguments)


def refuse_unknown_arguments(
    law: str, fn: Function, paths: Collection[str], *, whole: bool = False
) -> None:
    signature = Signature(fn)
    for path in paths:
        if (path if whole else path.partition(".")[0]) not in signature.parameters:
            known = ", ".join(signature.parameters)
            raise MisuseError(f"{law}: {signature.name} takes no {path}, only {known}")


def term(law: str, fn: Function, values: Numbers, name: str) -> Tensor:
    if name not in values:
        known = ", ".join(values)
        raise MisuseError(f"{law}: the result of {Signature(fn).name} has no {name}, only {known}")
    return values[name]


def leaf(path: str, tensor: Tensor) -> Tensor:
    """Return a copy of a tensor that requires a gradient, if its dtype allows it."""
    copied = same_tensor(path, tensor.detach())
    return copied.requires_grad_() if is_inexact(copied.dtype) else copied


def same_tensor(path: str, tensor: Tensor) -> Tensor:
    """Copy a tensor with its strides, which `clone` does not keep for every slice."""
    copied = tensor.clone()
    plain = tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg() or tensor.is_meta
    if plain or copied.stride() == tensor.stride():
        return copied
    storage = tensor.untyped_storage().clone()
    fresh = torch.empty(0, dtype=tensor.dtype)
    return fresh.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _copied(values: Numbers) -> Numbers:
    return {name: value.detach().clone() for name, value in values.items()}


def equal(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return torch.allclose(one, two, rtol=0, atol=0, equal_nan=True)


def close(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors agree to the precision of the dtype, relative to the largest element."""
    if one.shape != two.shape:
        return False
    one, two = one.detach().to(two.dtype), two.detach()
    if not is_inexact(two.dtype):
        return bool(torch.equal(one, two))
    tolerance = 1e-8 if two.dtype in (torch.float64, torch.complex128) else 1e-4
    unit = float(two.abs().nan_to_num(0, 0, 0).max()) if two.numel() else 0.0
    return bool(
        torch.allclose(one, two, rtol=tolerance, atol=tolerance * max(unit, 1e-3), equal_nan=True)
    )


def brief(value: Tensor) -> str:
    """Format the first elements of a tensor."""
    numbers = cast("list[float]", value.detach().reshape(-1)[:4].tolist())
    text = ", ".join(f"{number:.6g}" for number in numbers)
    if value.ndim == 0:
        return text
    return f"[{text}{', ...' if value.numel() > 4 else ''}]"


def format_difference(one: Tensor, two: Tensor) -> tuple[str, str]:
    """Format the elements in which two tensors differ most, with enough digits to differ."""
    one, two = one.detach(), two.detach()
    if one.shape != two.shape:
        return show(one), show(two)
    same = (one == two) | ((one != one) & (two != two))
    distance = (one - two).abs().nan_to_num(torch.inf) if is_inexact(one.dtype) else ~same
    index = int(torch.where(same, 0, distance.double()).argmax())
    numbers = [cast("float", tensor.reshape(-1)[index].item()) for tensor in (one, two)]
    digits = next((n for n in (6, 9, 17) if f"{numbers[0]:.{n}g}" != f"{numbers[1]:.{n}g}"), 17)
    first, second = (f"{number:.{digits}g}" for number in numbers)
    if one.ndim == 0:
        return first, second
    indices = [int(i) for i in torch.unravel_index(torch.tensor(index), one.shape)]
    return f"{first} at {indices}", second


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")
