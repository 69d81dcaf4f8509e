"""Laws of losses: each is one call in a test, and its failure is code to be pasted."""

import contextlib
import dataclasses
import functools
import os
import random
import re
import sys
import typing
import warnings
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any, Final, TypeAlias, Unpack, cast

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky, HypothesisException, HypothesisWarning
from jaxtyping import jaxtyped
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from .._contract import show, spell
from .._terms import Terms
from ._calls import (
    BrokenCall,
    Call,
    Inputs,
    Signature,
    axis_names,
    drawn_calls,
    fits,
    given_for,
    is_inexact,
    named_axes,
    violations,
)
from ._state import State

Function: TypeAlias = Callable[..., Any]
Numbers: TypeAlias = dict[str, Tensor]
Weight: TypeAlias = str | float | Callable[[Call], float | Tensor]

_DOUBLE: Final = (torch.float64,)
# A loss is slow, a law may run inside a test under @given, and a call holds many numbers.
_PATIENT: Final = (
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.large_base_example,
    HealthCheck.filter_too_much,
    HealthCheck.nested_given,
)
_WIDE: Final[dict[type, torch.dtype]] = {float: torch.float64, complex: torch.complex128}
_LIFTED: Final = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


class BrokenLawError(Exception):
    """A law does not hold for a call."""

    def __init__(self, problem: str, call: Call) -> None:
        super().__init__(problem)
        self.problem = problem
        self.call = call


class MisuseError(ValueError):
    """A law was asked of a function that it says nothing about."""


def assert_contract(
    fn: Function, *, compiled: bool = False, max_examples: int = 10, **inputs: Unpack[Inputs]
) -> None:
    """Assert that a function accepts and returns what its annotations say, and refuses all else.

    Valid calls run, and what they return has the annotated type, shapes and dtype families; the
    floating parts of it have the dtype of the floating arguments (float32 for half precision).
    Each way to break each argument raises a `TypeError` that names the argument. With size 0 of an
    axis that `sizes` does not name, the function returns such a result, or refuses it with a
    `TypeError`, a `ValueError` or a `NotImplementedError`.

    Args:
        fn: a function under [`contract`][termwise.contract], or any under jaxtyping.
        compiled: whether a valid call runs whole, and each argument is refused by name with a wrong
            axis, dtype or rank (one of them for each argument, by turns), under
            `torch.compile(fullgraph=True)` too, as `contract` does and bare jaxtyping does not.
            It takes a second or two.
        max_examples: calls to draw.
        **inputs: `sizes`, `dtypes`, `elements` and `overrides`, as
            [`calls`][termwise.testing.calls] takes them.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
    """
    signature = Signature(fn)
    tried = False

    def check(call: Call) -> None:
        nonlocal tried
        result = _accepted(call, call.mapped(same_tensor))
        if result is _REFUSED:
            return
        _check_result(signature, call, result)
        for broken in violations(call) if empty_axis(call) is None else ():
            tried = True
            _check_refusal(broken, broken)

    def check_compiled(call: Call) -> None:
        run = torch.compile(fn, fullgraph=True, backend="eager")
        try:
            # Without gradients, for which Dynamo has ways of its own: assert_compiles has some.
            with failing("compiled", call):
                run(**call.mapped(same_tensor))
            for broken in _one_of_each_argument(signature, call):
                _check_refusal(broken, functools.partial(run, **broken), "compiled: ")
        finally:
            torch.compiler.reset()

    hold("assert_contract", drawn(fn, inputs), check, max_examples)
    hold_extremes("assert_contract", fn, inputs, check)
    if not tried:
        raise MisuseError(f"assert_contract: {signature.name} takes nothing that can be broken")
    if compiled:
        hold(
            "assert_contract",
            drawn(fn, inputs),
            check_compiled,
            1,
            shrink=False,  # which would compile hundreds of times
            simplest=False,
        )


def empty_axis(call: Call) -> str | None:
    return next((axis for axis, size in call.sizes.items() if size == 0), None)


_REFUSED: Final = object()


def _accepted(call: Call, here: Call) -> Any:
    """Return the result, or a mark: an empty axis may be refused, in an error of the caller's."""
    axis = empty_axis(call)
    try:
        return here()
    except Exception as error:
        if axis is None:
            raise
        if isinstance(error, TypeError | ValueError | NotImplementedError):
            return _REFUSED
        raise BrokenLawError(
            f"{axis} of size 0 ends in {type(error).__name__}: {_first_line(str(error))}; return a "
            f"result, or raise a ValueError that says what is needed (or name {axis} in `sizes`)",
            call,
        ) from error


def _one_of_each_argument(signature: Signature, call: Call) -> list[BrokenCall]:
    """Choose what is traced, for a trace takes a tenth of a second."""
    of_argument: dict[str, list[BrokenCall]] = {}
    for broken in violations(call):
        if broken.kind in ("dtype", "rank", "axis"):
            of_argument.setdefault(broken.argument, []).append(broken)
    return [
        next((one for one in found if one.kind == ("axis", "dtype", "rank")[turn % 3]), found[0])
        for turn, found in enumerate(of_argument.values())
    ]


@contextlib.contextmanager
def failing(how: str, call: Call) -> Generator[None]:
    """Take an error for a broken law, in the first line that it says."""
    try:
        yield
    except (BrokenLawError, MisuseError, HypothesisException):
        raise
    except Exception as error:
        problem = f"{how}, {type(error).__name__}: {_first_line(str(error))}"
        raise BrokenLawError(problem, call) from None


def _check_result(signature: Signature, call: Call, result: Any) -> None:
    wanted = signature.returns
    with jaxtyped("context"):
        for name, value in {**signature.held, **call}.items():
            if name in signature.hints:
                fits(value, signature.hint(name, call))
        if not fits(result, wanted):
            raise BrokenLawError(f"the result needs {spell(wanted)}, got {show(result)}", call)
        for record in _records(result):
            hints = typing.get_type_hints(type(record), include_extras=True)
            for field in dataclasses.fields(record):
                part: object = getattr(record, field.name)
                if not fits(part, hints[field.name]):
                    needs = spell(hints[field.name])
                    raise BrokenLawError(
                        f"the result's {field.name} needs {needs}, got {show(part)}", call
                    )
    # A complex number has the precision of its parts.
    floating = [t.dtype.to_real() for t in call.tensors().values() if is_inexact(t.dtype)]
    if not floating:
        return
    widest = max((_LIFTED.get(d, d) for d in floating), key=lambda d: d.itemsize)
    for name, value in outputs(result, numbers=False).items():
        if is_inexact(value.dtype) and value.dtype.to_real() not in (widest, *floating):
            arguments = str(widest).removeprefix("torch.")
            raise BrokenLawError(f"{name} is {show(value)}, and the arguments {arguments}", call)


def _records(result: Any) -> list[Terms]:
    """List a result that is a record, or the records within it."""
    if isinstance(result, Terms):
        return [result]
    return [record for part in _parts(result).values() for record in _records(part)]


def _check_refusal(broken: Any, run: Callable[[], Any], how: str = "") -> None:
    argument, violation = broken.argument, broken.violation
    try:
        run()
    except Exception as error:
        said = str(error).partition("from user code")[0]  # below it Dynamo quotes source
        if not re.search(rf"\b{argument}\b", said):
            raise BrokenLawError(
                f"{how}{argument} is broken ({violation}), and {type(error).__name__} does not "
                f"name it: {_first_line(said)}",
                broken,
            ) from None
        if not how and not isinstance(error, TypeError):
            raise BrokenLawError(
                f"{argument} is broken ({violation}), and instead of a TypeError there came "
                f"{type(error).__name__}: {_first_line(said)}",
                broken,
            ) from None
    else:
        raise BrokenLawError(f"{how}{argument} is broken ({violation}), and was taken", broken)


def assert_pure(
    fn: Function,
    *,
    aliases: Collection[str] = (),
    max_examples: int = 10,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that a function depends on its arguments alone, and changes nothing.

    The same call gives the same result bit by bit, also after another call in between. Arguments
    keep their values, their versions and their `.grad`; the global generators of torch, Python and
    NumPy, the default dtype, the grad mode, the precision of matrix products, whether algorithms
    are deterministic, and the parameters and buffers of a module, stay as they were. No part of the
    result shares memory with an argument. What is kept between calls, as in a cache by shape,
    changes no result: a call gives after another one what it gives as the first. Kept is what is in
    global names, attributes, closures and `functools.cache`s of the function, and of those it calls
    in its own package; it is put back for one call.

    Args:
        fn: the function.
        aliases: parts of the result, by name, that may share memory with an argument: what is
            returned as it was given. A single result is called "result".
        max_examples: calls to draw.
        **inputs: as [`calls`][termwise.testing.calls] takes them.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
    """
    state = State(fn)

    def check(pair: list[Call]) -> None:
        call, other = pair
        used = call.mapped(leaf)
        before = {path: (t._version, t.detach().clone()) for path, t in used.tensors().items()}
        with _other_seeds():
            surroundings = _surroundings(fn)
            try:
                result = called(used)
                first = _copied(result)
            except RuntimeError as error:
                if "in-place" in str(error) or "inplace" in str(error):
                    problem = f"an argument is changed in place: {error}"
                    raise BrokenLawError(problem, call) from None
                raise
            changed = _first_difference(surroundings, _surroundings(fn))
        for path, tensor in used.tensors().items():
            if path not in before:
                raise BrokenLawError(f"{path} is put into an argument", call)
            version, value = before[path]
            if tensor._version != version or not equal(tensor.detach(), value):
                raise BrokenLawError(f"{path} is changed in place", call)
            if tensor.is_leaf and tensor.grad is not None:
                raise BrokenLawError(f"{path} is given a gradient", call)
        if changed:
            raise BrokenLawError(f"{changed} is changed", call)
        own = {name: value for name, value in result.items() if name not in aliases}
        _check_memory(call, own, used.tensors())
        later = _copied(called(other.mapped(same_tensor)))
        again = called(call.mapped(leaf))
        for name, value in first.items():
            if not equal(value, again[name].detach()):
                one, two = told_apart(value, again[name])
                raise BrokenLawError(f"{name} of the same call is {one}, then {two}", call)
        with state.first() as kept:
            alone = _copied(called(other.mapped(same_tensor))) if kept else later
        for name, value in alone.items():
            if not equal(later[name], value):
                one, two = told_apart(value, later[name])
                raise BrokenLawError(
                    f"{name} is {one} as a first call, and {two} after a call of the same shapes "
                    "(a value of that call is kept)",
                    other,
                )

    hold("assert_pure", drawn_calls(fn, inputs, count=2, large=True), check, max_examples)


def _check_memory(call: Call, result: Numbers, arguments: Numbers) -> None:
    """Refuse a result that a change in place of it would carry into an argument."""
    for name, value in result.items():
        for path, tensor in arguments.items():
            kept = value.layout == tensor.layout == torch.strided and value.numel()
            if kept and value.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                is_all = "is" if value.data_ptr() == tensor.data_ptr() else "is a view of"
                raise BrokenLawError(
                    f'{name} {is_all} {path}: copy it, or say aliases=["{name}"]', call
                )


def _surroundings(fn: Function) -> dict[str, Any]:
    held = fn.state_dict() if isinstance(fn, nn.Module) else {}
    return {
        **{f"the module's {name}": value.tolist() for name, value in held.items()},
        "the global generator's state": torch.get_rng_state().tolist(),
        "the state of random": random.getstate(),
        "the state of numpy.random": repr(_numpy_state()),
        "the precision of matrix products": torch.get_float32_matmul_precision(),
        "whether algorithms are deterministic": torch.are_deterministic_algorithms_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "the grad mode": torch.is_grad_enabled(),
        "the number of threads": torch.get_num_threads(),
    }


def _numpy_state() -> object:
    """Return the state of NumPy's global generator, if anything has imported NumPy."""
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state(legacy=False)["state"]


@contextlib.contextmanager
def _other_seeds() -> Generator[None]:
    """Set the global generators to other states: a seed that is set in a body then shows."""
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
    """Assert that finite arguments give finite results, and that no NaN is repaired.

    Values and gradients are finite for arguments as drawn, for all zeros, for rows that are all
    equal (one row, expanded), and for elements `scale` times as large. A NaN in the first element
    of any floating argument gives a result that is not finite; where the result does not depend on
    that element, as of a node without an edge, a NaN in all of them.

    Args:
        fn: the function.
        ignores: arguments (or fields, "f.values") of which an element need not reach the result.
        scale: how large elements are tried, or how large by argument, the others by 1000:
            `{"log_variance": 10}` of what is exponentiated.
        max_examples: calls to draw.
        **inputs: as [`calls`][termwise.testing.calls] takes them. Arguments with `elements` or
            `overrides` of their own, or `given`, are not scaled or made equal.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
    """
    scales: Mapping[str, float] = scale if isinstance(scale, Mapping) else {}
    usual = 1e3 if isinstance(scale, Mapping) else scale
    refuse_unknown_arguments("assert_finite", fn, [*ignores, *scales])
    elements = inputs.get("elements")
    limited: dict[str, Any] = dict(elements) if isinstance(elements, Mapping) else {}
    for names in inputs.get("overrides") or {}:
        limited.update(dict.fromkeys((names,) if isinstance(names, str) else names, True))
    everywhere = isinstance(elements, st.SearchStrategy)

    def is_free(call: Call, path: str, tensor: Tensor) -> bool:
        known = everywhere or path.partition(".")[0] in call.given
        return is_inexact(tensor.dtype) and not known and given_for(path, limited) is None

    def times(path: str) -> float:
        return usual if (own := given_for(path, scales)) is None else own

    def changed(call: Call, change: Callable[[Tensor, float], Tensor]) -> Call:
        return call.mapped(
            lambda path, t: change(t, times(path)) if is_free(call, path, t) else t.clone()
        )

    def check(call: Call) -> None:
        for kind, change in _EXTREMES.items():
            extreme = changed(call, change)
            with failing(kind, extreme):
                values, gradients = values_and_gradients(extreme)
            for name, value in {**values, **gradients}.items():
                if not torch.isfinite(value).all():
                    worst = value[~torch.isfinite(value)][0]
                    raise BrokenLawError(f"{name} is {few(worst)} for {kind}", extreme)
        for path, tensor in call.tensors().items():
            if is_inexact(tensor.dtype) and tensor.numel() and path not in ignores:
                poisoned = _unharmed(call, path)
                if poisoned is not None:
                    raise BrokenLawError(
                        f"a NaN in {path} does not reach the result (where it need not: "
                        f'ignores=["{path}"])',
                        poisoned,
                    )

    hold("assert_finite", drawn(fn, inputs), check, max_examples)


def _equal_rows(tensor: Tensor, scale: float) -> Tensor:
    one = tensor[:1] if tensor.ndim and tensor.numel() else tensor
    return one.expand_as(tensor)


_EXTREMES: Final[dict[str, Callable[[Tensor, float], Tensor]]] = {
    "arguments as drawn": lambda t, scale: t.clone(),
    "zeros": lambda t, scale: torch.zeros_like(t),
    "equal rows": _equal_rows,
    "large numbers (scale= says how large)": lambda t, scale: t * scale,
}


def _unharmed(call: Call, path: str) -> Call | None:
    """Return the call with a NaN that does not reach the result; None if there is none.

    The first element counts, or else all of them: a gather leaves elements out.
    """
    first = torch.zeros(call.tensors()[path].numel(), dtype=torch.bool)
    first[0] = True
    for some in (first, torch.ones_like(first)):
        poisoned = _filled(call, path, some, lambda t: torch.full_like(t, torch.nan))
        found = called(poisoned)
        parts = [found["loss"]] if "loss" in found else list(found.values())
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            return None
        values = called(call.mapped(same_tensor))
        others = [called(_filled(call, path, some, change)) for change in (_larger, torch.neg)]
        used = any(not equal(other[name], values[name]) for other in others for name in values)
        if used or some.all():
            # Of an empty tensor no element is used.
            empty = not used and any(not t.numel() for t in call.tensors().values())
            return None if empty else poisoned
    return None


def _filled(call: Call, path: str, some: Tensor, change: Callable[[Tensor], Tensor]) -> Call:
    """Return the call with some elements of a tensor changed."""

    def filled(at: str, t: Tensor) -> Tensor:
        return torch.where(some.reshape(t.shape), change(t), t) if at == path else t.clone()

    return call.mapped(filled)


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
    """Assert that a loss is the weighted sum of its terms, in value and in gradient.

    Every other term is a diagnostic: it must be detached.

    Args:
        fn: a function that returns a [`Terms`][termwise.Terms].
        weights: weight of each term in `loss`: a number, the argument that holds it, or a function
            of the call that gives it. Empty: the loss has no parts, and only the diagnostics are
            looked at.
        also_in_graph: terms that are in the graph, but not in the sum.
        detached: whether the terms of the sum are to be outside the graph too; their gradients
            are compared otherwise.
        max_examples: calls to draw.
        **inputs: as [`calls`][termwise.testing.calls] takes them; float64 unless `dtypes` says
            otherwise.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
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
                raise MisuseError(f"assert_terms_sum: what {function} returns has no {name}")
        weighted = [terms[t] * _number(w, live) for t, w in weights.items() if t in terms]
        total = sum(weighted, start=torch.tensor(0))
        if weights and not close(terms["loss"], total):
            one, two = told_apart(terms["loss"], total)
            raise BrokenLawError(f"loss is {one}, the terms' sum {two}", call)
        leaves = {path: t for path, t in live.tensors().items() if t.requires_grad}
        both = [] if detached or not weights else [terms["loss"], total]
        derived = [derivatives(one, list(leaves.values()), keep=True) for one in both]
        for path, ours, wanted in zip(leaves, *derived, strict=True) if derived else ():
            if not close(ours, wanted):
                one, two = told_apart(ours, wanted)
                raise BrokenLawError(
                    f"loss's gradient with respect to {path} is {one}, the terms' sum's {two}", call
                )
        in_graph = ("loss", *also_in_graph, *(() if detached else weights))
        for name, value in terms.items():
            if name not in in_graph and value.requires_grad:
                raise BrokenLawError(f"{name} is not detached, and no part of the sum", call)

    inputs.setdefault("dtypes", _DOUBLE)
    hold("assert_terms_sum", drawn(fn, inputs), check, max_examples)


def _number(weight: Weight, call: Call) -> float | Tensor:
    if isinstance(weight, str):
        return cast("float", call[weight])
    return weight(call) if callable(weight) else weight


def assert_permutation_invariant(
    fn: Function, axis: str, *, max_examples: int = 10, **inputs: Unpack[Inputs]
) -> None:
    """Assert that the order along a named axis does not matter.

    All arguments that have the axis are permuted alike. What the result holds stays the same, or
    is permuted with them where its annotation has the axis; so do gradients.

    Args:
        fn: the function.
        axis: name of the axis.
        max_examples: calls to draw.
        **inputs: as [`calls`][termwise.testing.calls] takes them; float64 unless `dtypes` says
            otherwise.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
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

        moved = call.mapped(lambda path, t: permuted(t, axes.get(path, ())).clone())
        ours, our_gradients = values_and_gradients(moved)
        wanted = {
            name: permuted(value, result_axes(signature, name, value))
            for name, value in values.items()
        }
        # A result that is not one number is summed with weights of its places, for gradients.
        if "loss" in values or all(value.numel() == 1 for value in values.values()):
            for name, value in gradients.items():
                wanted[name] = permuted(value, axes.get(name.removeprefix(GRADIENT), ()))
        for name, value in wanted.items():
            found = {**ours, **our_gradients}[name]
            if not close(found, value):
                one, two = told_apart(value, found)
                raise BrokenLawError(
                    f"{name} is {one}, and {two} where {axis} is in the order {order.tolist()}",
                    call,
                )

    inputs.setdefault("dtypes", _DOUBLE)
    strategy = drawn(fn, inputs, at_least_two=axis)
    hold("assert_permutation_invariant", strategy, check, max_examples)
    if not compared:
        raise MisuseError(
            f"assert_permutation_invariant: no call of {signature.name} had two places along {axis}"
        )


def _orders(size: int) -> list[list[int]]:
    """Return orders in which every place changes, and neighbours do not stay neighbours."""
    places = list(range(size))
    orders = [places[::-1], places[1:] + places[:1], places[1::2] + places[::2]]
    return [order for index, order in enumerate(orders) if order not in [places, *orders[:index]]]


def assert_symmetric(
    fn: Function, first: str, second: str, *, max_examples: int = 10, **inputs: Unpack[Inputs]
) -> None:
    """Assert that two arguments can change places, in value and in gradient.

    Args:
        fn: the function.
        first: one argument.
        second: the other, of the same shape.
        max_examples: calls to draw.
        **inputs: as [`calls`][termwise.testing.calls] takes them; float64 unless `dtypes` says
            otherwise.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
    """
    refuse_unknown_arguments("assert_symmetric", fn, [first, second], whole=True)

    def check(call: Call) -> None:
        swapped = call.changed(**{first: call[second], second: call[first]})
        values, gradients = values_and_gradients(call)
        ours, our_gradients = values_and_gradients(swapped)
        for name, value in values.items():
            if not close(ours[name], value):
                one, two = told_apart(value, ours[name])
                raise BrokenLawError(
                    f"{name} is {one}, and {two} where {first} and {second} change places", call
                )
        other = {first: second, second: first}
        for name, value in gradients.items():
            path = name.removeprefix(GRADIENT)
            head, dot, field = path.partition(".")
            moved = our_gradients[GRADIENT + other.get(head, head) + dot + field]
            if not close(moved, value):
                one, two = told_apart(value, moved)
                raise BrokenLawError(
                    f"{name} is {one}, and {two} where {first} and {second} change places", call
                )

    inputs.setdefault("dtypes", _DOUBLE)
    hold("assert_symmetric", drawn(fn, inputs), check, max_examples)


def assert_shift_invariant(
    fn: Function,
    axis: str,
    *,
    arguments: Collection[str] | None = None,
    max_examples: int = 10,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that adding the same numbers all along an axis changes nothing.

    What is added varies over the other axes, and is the same for all tensors of one shape: what
    is computed from deviations from a mean along the axis, or from differences of two such
    arguments, is invariant.

    Args:
        fn: the function.
        axis: name of the axis along which the shift is constant.
        arguments: tensors to shift; all floating ones that have the axis, if None.
        max_examples: calls to draw.
        **inputs: as [`calls`][termwise.testing.calls] takes them; float64 unless `dtypes` says
            otherwise.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
    """
    refuse_unknown_arguments("assert_shift_invariant", fn, arguments or ())
    shifted = False

    def check(call: Call) -> None:
        if _size("assert_shift_invariant", call, axis) is None:
            return
        axes = call.axes()

        def shift(path: str, tensor: Tensor) -> Tensor:
            nonlocal shifted
            chosen = is_of(path, arguments)
            names = axes.get(path, ())
            inexact = is_inexact(tensor.dtype)
            if not chosen or axis not in names or not inexact or not tensor.numel():
                return tensor.clone()
            shifted = True
            index = names.index(axis)
            one = tensor.select(index, 0)
            ramp = torch.arange(one.numel(), dtype=torch.float64).reshape(one.shape)
            return tensor + (1.5 + ramp.sin()).unsqueeze(index).to(tensor.dtype)

        values = called(call.mapped(same_tensor))
        for name, ours in called(call.mapped(shift)).items():
            if not close(ours, values[name]):
                one, two = told_apart(values[name], ours)
                raise BrokenLawError(f"{name} is {one}, and {two} when shifted", call)

    inputs.setdefault("dtypes", _DOUBLE)
    hold("assert_shift_invariant", drawn(fn, inputs), check, max_examples)
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
    """Assert how a loss grows with its arguments: c times as large, c^degree times the loss.

    Args:
        fn: the function.
        arguments: tensors (or numbers) that are multiplied together.
        degree: of `loss`, or of each term by name.
        factor: c.
        max_examples: calls to draw.
        **inputs: as [`calls`][termwise.testing.calls] takes them; float64 unless `dtypes` says
            otherwise.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
    """
    refuse_unknown_arguments("assert_scale", fn, arguments)
    if not arguments or factor == 1 or degree == {}:
        raise MisuseError("assert_scale needs arguments, a degree, and a factor that is not 1")

    def check(call: Call) -> None:
        given = {name: call.get(name) for name in arguments}
        numbers = {name: x * factor for name, x in given.items() if isinstance(x, float | int)}
        larger = call.changed(**numbers).mapped(
            lambda path, t: t * factor if is_of(path, arguments) else t.clone()
        )
        values, ours = (called(one) for one in (call.mapped(same_tensor), larger))
        loss = "loss" if "loss" in values else "result"
        degrees = degree if isinstance(degree, Mapping) else {loss: degree}
        for name, power in degrees.items():
            wanted = term("assert_scale", fn, values, name) * factor**power
            if not close(ours[name], wanted):
                one, two = told_apart(ours[name], wanted)
                raise BrokenLawError(
                    f"{name} is {one} for {factor:g} times {', '.join(arguments)}, and {two} if it "
                    f"is of degree {power:g}",
                    call,
                )

    inputs.setdefault("dtypes", _DOUBLE)
    hold("assert_scale", drawn(fn, inputs), check, max_examples)


def assert_formula(
    fn: Function,
    reference: Callable[..., Any],
    *,
    max_examples: int = 25,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that a function equals a formula, in value and in gradient.

    An axis that `sizes` does not name is tried longer than 64 too, so that code that works in
    blocks is seen, and empty: then the function may refuse it (with a `ValueError`, say), and has
    no finite loss where the formula raises an error.

    Args:
        fn: the function.
        reference: the formula written plainly. Takes the same keywords and returns the loss, or a
            record or a dict of terms by name, of which each is compared with the term of that
            name, and so is its gradient where both have one.
        max_examples: calls to draw.
        **inputs: as [`calls`][termwise.testing.calls] takes them; float64 unless `dtypes` says
            otherwise.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
    """

    def check(call: Call) -> None:
        live, plain = call.mapped(leaf), call.mapped(leaf)
        result = _accepted(call, live)
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
                    f"{name} is {few(values[name])} where {axis} has size 0, for which the formula "
                    f"has no value: {type(error).__name__}: {_first_line(str(error))}",
                    call,
                ) from None
            return
        if "result" in formula and "loss" in values:
            formula = {"loss": formula["result"]}
        if not formula:
            raise MisuseError("assert_formula: the reference gives no tensor")
        for name, wanted in formula.items():
            ours = term("assert_formula", fn, values, name)
            if not close(ours, wanted):
                one, two = told_apart(ours, wanted)
                raise BrokenLawError(f"{name} is {one}, the formula's {two}", call)
            if name in ("loss", "result") and wanted.requires_grad and not ours.requires_grad:
                raise BrokenLawError(f"{name} has no gradient, and the formula has one", call)
            if not (ours.requires_grad and wanted.requires_grad):
                continue
            leaves = {path: t for path, t in live.tensors().items() if t.requires_grad}
            theirs = [plain.tensors()[path] for path in leaves]
            for path, derived, by_formula in zip(
                leaves,
                derivatives(ours.sum(), list(leaves.values()), keep=True),
                derivatives(wanted.sum(), theirs, keep=True),
                strict=True,
            ):
                if not close(derived, by_formula):
                    one, two = told_apart(derived, by_formula)
                    raise BrokenLawError(
                        f"{name}'s gradient with respect to {path} is {one}, the formula's {two}",
                        call,
                    )

    inputs.setdefault("dtypes", _DOUBLE)
    hold("assert_formula", drawn(fn, inputs), check, max_examples)
    hold_extremes("assert_formula", fn, inputs, check, large=True)


def assert_gradients(
    fn: Function,
    *,
    arguments: Collection[str] | None = None,
    second: bool = False,
    max_examples: int = 5,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that gradients are those of finite differences, in float64.

    Every part of the result that is in the graph is compared. Elements are drawn from a normal
    distribution unless `elements` says otherwise, so that no call sits on a kink.

    Args:
        fn: the function.
        arguments: tensors (or fields, "f.values") to differentiate by; all floating ones, if None.
        second: whether second derivatives are compared too.
        max_examples: calls to draw.
        **inputs: as [`calls`][termwise.testing.calls] takes them.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
    """
    refuse_unknown_arguments("assert_gradients", fn, arguments or ())
    compared = False

    def check(several: list[Call]) -> None:
        nonlocal compared
        (call,) = several
        paths = [
            path
            for path, t in call.tensors().items()
            if is_inexact(t.dtype) and t.numel() and is_of(path, arguments)
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
            first = [GRADIENT + path for path in paths]
            by = [*paths, *(f"{name}'s incoming gradient" for name in names)]
            raise BrokenLawError(_in_names(str(error), first, by), call) from None

    inputs["dtypes"] = _DOUBLE
    hold("assert_gradients", drawn_calls(fn, inputs, generic=True), check, max_examples)
    if not compared:
        raise MisuseError(
            f"assert_gradients: no part of what {Signature(fn).name} returns has a gradient with "
            f"respect to {', '.join(arguments) if arguments else 'a tensor it takes'}"
        )


def _in_names(said: str, outs: Sequence[str], ins: Sequence[str]) -> str:
    """Put names and numbers from gradcheck's report into one sentence."""
    text = " ".join(re.sub(", dtype=torch.(float64|complex128)", "", said).split())
    places = re.search(r"output (\d+) with respect to input (\d+)", text)
    numbers = re.search(r"numerical:\s*(.*?)\s*analytical:\s*(.*)", text)
    if not places or not numbers:
        return text
    name, by = outs[int(places[1])], ins[int(places[2])]
    numerical, analytical = (part.removeprefix("tensor(").rstrip(")") for part in numbers.groups())
    return (
        f"{name}'s gradient with respect to {by} is {analytical}, by finite differences {numerical}"
    )


def assert_compiles(
    fn: Function,
    *,
    backend: str = "aot_eager",
    max_examples: int = 1,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that a function compiles whole, with the results of eager mode.

    One compiled function, `fullgraph=True`, takes two calls that differ in sizes and options;
    values and gradients are compared.

    Args:
        fn: the function.
        backend: of `torch.compile`.
        max_examples: pairs of calls to draw, each compiled again.
        **inputs: as [`calls`][termwise.testing.calls] takes them; float64 unless `dtypes` says
            otherwise.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
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
    one = drawn_calls(fn, inputs).map(lambda several: several[0])
    hold("assert_compiles", st.tuples(one, one), check, max_examples, shrink=False, simplest=False)


def same_compiled(call: Call, run: Function) -> None:
    """Compare values and gradients of a call with those of the compiled function."""
    values, gradients = values_and_gradients(call)
    with failing("compiled", call):
        ours, our_gradients = values_and_gradients(call, run)
    for name, value in {**values, **gradients}.items():
        compiled = {**ours, **our_gradients}.get(name)
        if compiled is None:
            raise BrokenLawError(f"{name} is absent when compiled", call)
        if not close(compiled, value):
            one, two = told_apart(value, compiled)
            raise BrokenLawError(f"{name} is {one}, compiled {two}", call)


def assert_vmaps(
    fn: Function,
    *,
    arguments: Collection[str] | None = None,
    max_examples: int = 3,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that `torch.vmap` equals a loop, also with `torch.func.grad` inside it.

    Args:
        fn: the function.
        arguments: tensors (or fields, "f.values") to map over; all floating ones, if None.
        max_examples: sets of three calls to draw.
        **inputs: as [`calls`][termwise.testing.calls] takes them; float64 unless `dtypes` says
            otherwise.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
    """
    refuse_unknown_arguments("assert_vmaps", fn, arguments or ())
    compared = False

    def check(three: list[Call]) -> None:
        nonlocal compared
        call = three[0]
        paths = [
            path
            for path, t in call.tensors().items()
            if is_inexact(t.dtype) and is_of(path, arguments)
        ]
        if not paths:
            return
        compared = True

        def of_tensors(*tensors: Tensor) -> Numbers:
            given = dict(zip(paths, tensors, strict=True))
            return called(call.mapped(lambda path, t: given.get(path, t)))

        rows = [[one.tensors()[path] for path in paths] for one in three]
        stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
        looped = [of_tensors(*row) for row in rows]
        with failing("under vmap", call):
            together = torch.vmap(of_tensors)(*stacked)
        for index, values in enumerate(looped):
            for name, value in values.items():
                if not close(together[name][index], value):
                    one, two = told_apart(value, together[name][index])
                    raise BrokenLawError(f"{name} is {one}, under vmap {two}", three[index])
        leaves = [[tensor.clone().requires_grad_() for tensor in row] for row in rows]
        losses = [scalar(of_tensors(*row)) for row in leaves]
        if not losses[0].requires_grad:
            return
        by = tuple(range(len(paths)))
        gradient: Function = torch.func.grad(lambda *xs: scalar(of_tensors(*xs)), by)
        with failing("grad under vmap", call):
            mapped = torch.vmap(gradient)(*stacked)
        for index, (loss, row) in enumerate(zip(losses, leaves, strict=True)):
            for path, ours, wanted in zip(paths, mapped, derivatives(loss, row), strict=True):
                if not close(ours[index], wanted):
                    one, two = told_apart(wanted, ours[index])
                    raise BrokenLawError(
                        f"{GRADIENT}{path} is {one}, under vmap {two}", three[index]
                    )

    inputs.setdefault("dtypes", _DOUBLE)
    hold("assert_vmaps", drawn_calls(fn, inputs, count=3, large=True), check, max_examples)
    if not compared:
        raise MisuseError(
            f"assert_vmaps: {Signature(fn).name} takes no floating tensor to map over"
        )


def drawn(fn: Function, inputs: Inputs, *, at_least_two: str = "") -> st.SearchStrategy[Call]:
    """Draw the calls of a law: now and then with an axis that is large."""
    several = drawn_calls(fn, inputs, large=True, at_least_two=at_least_two)
    return several.map(lambda calls: calls[0])


# Above the blocks that code reads at once.
_LARGE: Final = (257, 65)


def hold_extremes(
    law: str, fn: Function, inputs: Inputs, check: Callable[[Call], None], *, large: bool = False
) -> None:
    """Run a law on calls in which one axis after another, of those without a size, is empty.

    Large: and then on calls in which one of the first two is longer than blocks are.
    """
    named = inputs.get("sizes") or {}

    def at(free: list[str]) -> list[dict[str, int]]:
        axes = [axis for axis in free if axis not in named]
        longer = [{axis: n} for axis, n in zip(axes, _LARGE, strict=False)]
        return [{axis: 0} for axis in axes] + longer * large

    def each(several: list[Call]) -> None:
        for call in several:
            check(call)

    hold(law, drawn_calls(fn, inputs, at=at), each, 1, shrink=False, simplest=False)


def hold(
    law: str,
    strategy: st.SearchStrategy[Any],
    check: Callable[[Any], None],
    examples: int,
    *,
    shrink: bool = True,
    simplest: bool = True,
) -> None:
    """Run a law on drawn calls; of a failure keep the smallest call, and write it as code.

    The first call that hypothesis tries is the simplest: all sizes 1, all elements 0. Not
    `simplest`: it is tried only where there is no other, and does not count.
    """
    if simplest and shrink:  # the others compile
        examples = max(examples, _asked_for())
    left_out: list[Any] = []
    tried = 0
    failures: list[BrokenLawError] = []
    kept = {Phase.reuse: simplest, Phase.generate: True, Phase.shrink: shrink}

    def attempt(drawn: Any) -> None:
        nonlocal tried
        if not simplest and not left_out:
            left_out.append(drawn)
            return
        tried += 1
        try:
            try:
                check(drawn)
            except (BrokenLawError, MisuseError, HypothesisException):
                raise
            except Exception as error:
                call = drawn if isinstance(drawn, Call) else drawn[0]
                said = str(error).strip()
                raise BrokenLawError(f"{type(error).__name__}: {said}", call) from error
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

    try:
        with warnings.catch_warnings():  # that a call to be printed is a large one
            warnings.simplefilter("ignore", HypothesisWarning)
            run()
            if left_out and not tried:
                run()
    except (BrokenLawError, Flaky):
        if not failures:
            raise
        broken = failures[-1]  # a function that remembers may pass when it is tried once more
        name = Signature(broken.call.fn).name
        text = f"{law}: {name}: {broken.problem}\n\n{broken.call.code()}"
        raise AssertionError(text) from broken.__cause__


# Hypothesis's own default, which is no choice of the user's.
_USUAL: Final = 100


def _asked_for() -> int:
    """Return how many calls the environment or hypothesis's profile asks of every law."""
    profile = settings().max_examples
    asked = int(os.environ.get("TERMWISE_EXAMPLES", "0"))
    return max(asked, profile if profile > _USUAL else 0)


GRADIENT: Final = "the gradient with respect to "


def outputs(result: Any, *, numbers: bool = True) -> Numbers:
    """Name the tensors and numbers of a result: fields of a record, keys, places, or "result".

    What is within another part has both names: "result 0.loss". A number is a tensor without axes.
    """
    if isinstance(result, Tensor):
        return {"result": result}
    if isinstance(result, bool | int | float | complex):
        dtype = _WIDE.get(type(result))
        return {"result": torch.tensor(result, dtype=dtype)} if numbers else {}
    place = "result " if type(result) in (tuple, list) else ""
    named: Numbers = {}
    for key, part in _parts(result).items():
        for name, value in outputs(part, numbers=numbers).items():
            within = "" if name == "result" else f".{name.removeprefix('result ')}"
            named[f"{place}{key}{within}"] = value
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


def called(call: Call, run: Function | None = None) -> Numbers:
    """Call, and name what comes out."""
    values = outputs(call() if run is None else run(**call))
    if not values:
        raise MisuseError(f"{Signature(call.fn).name} returns no tensor and no number to compare")
    return values


def scalar(values: Numbers) -> Tensor:
    """Return the loss, or a sum of all floating elements, each with a weight of its own."""
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
    """Call on fresh leaves; return the results, and the gradients, by path."""
    live = call.mapped(leaf)
    values = called(live, run)
    loss = scalar(values)
    leaves = {path: t for path, t in live.tensors().items() if t.requires_grad}
    gradients: Numbers = {}
    if loss.requires_grad:
        derived = derivatives(loss, list(leaves.values()))
        gradients = {GRADIENT + path: value for path, value in zip(leaves, derived, strict=True)}
    return {name: value.detach() for name, value in values.items()}, gradients


def result_axes(signature: Signature, name: str, value: Tensor) -> tuple[str | None, ...]:
    """Name the axes of a part of a result, as its annotation does."""
    hint: Any = signature.returns
    for part in name.removeprefix("result ").split(".") if name != "result" else ():
        hint = _hint_of(hint, part)
    return named_axes(hint, value, "").get("", ())


def _hint_of(hint: Any, part: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(cast("object", hint)):
        return typing.get_type_hints(hint, include_extras=True).get(part)
    kinds: tuple[Any, ...] = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return kinds[0 if Ellipsis in kinds else int(part)]
    return kinds[-1] if kinds else None


def derivatives(
    loss: Tensor, leaves: Sequence[Tensor], *, keep: bool = False, create_graph: bool = False
) -> list[Tensor]:
    """Return the gradient with respect to each leaf, 0 for one that the loss does not reach."""
    if not leaves or not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(
        loss,
        leaves,
        create_graph=create_graph,
        retain_graph=keep or create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return list(found)


def replaced(call: Call, others: Numbers) -> Call:
    """Return the call with other tensors in some places."""
    return call.mapped(lambda path, t: others.get(path, t))


def _size(law: str, call: Call, axis: str) -> int | None:
    """Return the size of an axis in a call; None where the arguments that have it are None."""
    size: int | None = call.sizes.get(axis)
    if isinstance(size, tuple):
        raise MisuseError(f"{law}: {axis} of {Signature(call.fn).name} is any number of axes")
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
        raise MisuseError(f"{law}: the size of {axis} is that of a given tensor")


def is_of(path: str, arguments: Collection[str] | None) -> bool:
    """Whether a tensor is one of these arguments, or within one; None: of all."""
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
        raise MisuseError(f"{law}: what {Signature(fn).name} returns has no {name}, only {known}")
    return values[name]


def leaf(path: str, tensor: Tensor) -> Tensor:
    copied = same_tensor(path, tensor.detach())
    return copied.requires_grad_() if is_inexact(copied.dtype) else copied


def same_tensor(path: str, tensor: Tensor) -> Tensor:
    """Copy a tensor with its strides, which `clone` keeps only where they leave nothing out."""
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
    """Compare to the precision of the dtype, with the size of the larger number as the unit."""
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


def few(value: Tensor) -> str:
    numbers = cast("list[float]", value.detach().reshape(-1)[:4].tolist())
    text = ", ".join(f"{number:.6g}" for number in numbers)
    if value.ndim == 0:
        return text
    return f"[{text}{', ...' if value.numel() > 4 else ''}]"


def told_apart(one: Tensor, two: Tensor) -> tuple[str, str]:
    """Write the elements in which two tensors differ most, in as many digits as that takes."""
    one, two = one.detach(), two.detach()
    if one.shape != two.shape:
        return show(one), show(two)
    same = (one == two) | ((one != one) & (two != two))
    apart = (one - two).abs().nan_to_num(torch.inf) if is_inexact(one.dtype) else ~same
    index = int(torch.where(same, 0, apart.double()).argmax())
    numbers = [cast("float", tensor.reshape(-1)[index].item()) for tensor in (one, two)]
    digits = next((n for n in (6, 9, 17) if f"{numbers[0]:.{n}g}" != f"{numbers[1]:.{n}g}"), 17)
    first, second = (f"{number:.{digits}g}" for number in numbers)
    if one.ndim == 0:
        return first, second
    place = [int(i) for i in torch.unravel_index(torch.tensor(index), one.shape)]
    return f"{first} at {place}", second


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")
