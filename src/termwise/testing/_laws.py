"""Laws of losses: each is one call in a test, and its failure is code to be pasted."""

import dataclasses
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, TypeAlias, Unpack, cast

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException
from jaxtyping import jaxtyped
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from .._contract import show, spell
from .._terms import Terms
from ._calls import Call, Inputs, Signature, calls, drawn_calls, fits, named_axes, violations

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
_LIFTED: Final = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


class BrokenLawError(Exception):
    """A law does not hold for a call."""

    def __init__(self, problem: str, call: Call) -> None:
        super().__init__(problem)
        self.problem = problem
        self.call = call


def assert_contract(
    fn: Function, *, compiled: bool = True, max_examples: int = 10, **inputs: Unpack[Inputs]
) -> None:
    """Assert that a function takes what its annotations say, gives it, and refuses all else.

    Valid calls run, and what they return has the annotated type, shapes and dtype families; the
    floating parts of it have the dtype of the floating arguments (float32 for half precision).
    Each way to break each argument raises a `TypeError` that names the argument.

    Args:
        fn: a function under [`contract`][termwise.contract], or any under jaxtyping.
        compiled: whether a wrong rank, axis or dtype of each argument is refused by name under
            `torch.compile(fullgraph=True)` too, as `contract` does and bare jaxtyping does not.
        max_examples: calls to draw.
        **inputs: `sizes`, `dtypes`, `elements` and `overrides`, as
            [`calls`][termwise.testing.calls] takes them.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
    """
    signature = Signature(fn)

    def check(call: Call) -> None:
        _check_result(signature, call, call.mapped(_same_tensor)())
        for broken in violations(call):
            _check_refusal(broken, broken)

    def check_compiled(call: Call) -> None:
        run = torch.compile(fn, fullgraph=True, backend="eager")
        seen: set[str] = set()
        kinds = ("axis", "dtype", "rank")
        for broken in violations(call):  # one of each argument: a trace takes a tenth of a second
            if broken.argument not in seen and broken.kind == kinds[len(seen) % 3]:
                seen.add(broken.argument)
                _check_refusal(broken, lambda broken=broken: run(**broken), "compiled: ")
        torch.compiler.reset()

    hold("assert_contract", calls(fn, **inputs), check, max_examples)
    if compiled:
        hold("assert_contract", calls(fn, **inputs), check_compiled, 1)


def _check_result(signature: Signature, call: Call, result: Any) -> None:
    wanted = signature.returns
    with jaxtyped("context"):
        for name, value in call.items():
            if name in signature.hints:
                fits(value, signature.hint(name, call))
        if not fits(result, wanted):
            raise BrokenLawError(f"the result needs {spell(wanted)}, got {show(result)}", call)
        if isinstance(result, Terms):
            hints = typing.get_type_hints(type(result), include_extras=True)
            for field in dataclasses.fields(result):
                value: object = getattr(result, field.name)
                if not fits(value, hints[field.name]):
                    needs = spell(hints[field.name])
                    raise BrokenLawError(
                        f"the result's {field.name} needs {needs}, got {show(value)}", call
                    )
    floating = [t.dtype for t in call.tensors().values() if t.is_floating_point()]
    if not floating:
        return
    widest = max((_LIFTED.get(d, d) for d in floating), key=lambda d: d.itemsize)
    for name, value in outputs(result).items():
        if value.is_floating_point() and value.dtype not in (widest, *floating):
            raise BrokenLawError(f"{name} is {show(value)}, and the arguments are {widest}", call)


def _check_refusal(broken: Any, run: Callable[[], Any], how: str = "") -> None:
    argument, violation = broken.argument, broken.violation
    try:
        run()
    except Exception as error:
        said = str(error)
        if argument not in said:
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


def assert_pure(fn: Function, *, max_examples: int = 10, **inputs: Unpack[Inputs]) -> None:
    """Assert that a function depends on its arguments alone, and changes nothing.

    The same call gives the same result bit by bit, also after another call in between. Arguments
    keep their values, their versions and their `.grad`; the global generator, the default dtype
    and the grad mode stay as they were.

    Args:
        fn: the function.
        max_examples: calls to draw.
        **inputs: as [`calls`][termwise.testing.calls] takes them.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
    """

    def check(pair: list[Call]) -> None:
        call, other = pair
        used = call.mapped(_leaf)
        before = {path: (t._version, t.detach().clone()) for path, t in used.tensors().items()}
        surroundings = _surroundings()
        try:
            first = _copied(outputs(used()))
        except RuntimeError as error:
            if "in-place" in str(error) or "inplace" in str(error):
                raise BrokenLawError(f"an argument is changed in place: {error}", call) from None
            raise
        for path, tensor in used.tensors().items():
            version, value = before[path]
            if tensor._version != version or not _equal(tensor.detach(), value):
                raise BrokenLawError(f"{path} is changed in place", call)
            if tensor.is_leaf and tensor.grad is not None:
                raise BrokenLawError(f"{path} is given a gradient", call)
        if problem := _first_difference(surroundings, _surroundings()):
            raise BrokenLawError(f"{problem} is changed", call)
        other.mapped(_same_tensor)()
        again = outputs(call.mapped(_leaf)())
        for name, value in first.items():
            if not _equal(value, again[name].detach()):
                raise BrokenLawError(
                    f"{name} of the same call is {few(value)}, then {few(again[name])}", call
                )

    hold("assert_pure", drawn_calls(fn, inputs, count=2), check, max_examples)


def _surroundings() -> dict[str, Any]:
    return {
        "the global generator's state": torch.get_rng_state().tolist(),
        "the default dtype": torch.get_default_dtype(),
        "the grad mode": torch.is_grad_enabled(),
        "the number of threads": torch.get_num_threads(),
    }


def _first_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    return next((name for name in before if before[name] != after[name]), "")


def assert_finite(
    fn: Function,
    *,
    ignores: Collection[str] = (),
    scale: float = 1e3,
    max_examples: int = 10,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that finite arguments give finite numbers, and that no NaN is repaired.

    Values and gradients are finite for arguments as drawn, for all zeros, for rows that are all
    equal, and for elements `scale` times as large. A NaN in the first element of any floating
    argument gives a result that is not finite.

    Args:
        fn: the function.
        ignores: arguments (or fields, "f.values") of which an element need not reach the result.
        scale: how large elements are tried.
        max_examples: calls to draw.
        **inputs: as [`calls`][termwise.testing.calls] takes them. Arguments with `elements` of
            their own are not scaled or made equal.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
    """
    elements = inputs.get("elements")
    limited = set(elements) if isinstance(elements, Mapping) else set[str]()

    def check(call: Call) -> None:
        for kind, change in _extremes(scale).items():
            extreme = call.mapped(
                lambda path, t, change=change: (
                    change(t) if t.is_floating_point() and path not in limited else t.clone()
                )
            )
            values, gradients = values_and_gradients(extreme)
            for name, value in {**values, **gradients}.items():
                if not torch.isfinite(value).all():
                    raise BrokenLawError(f"{name} is {few(value)} for {kind}", extreme)
        for path, tensor in call.tensors().items():
            if tensor.is_floating_point() and tensor.numel() and path not in ignores:
                poisoned = call.mapped(
                    lambda at, t, path=path: _with_nan(t) if at == path else t.clone()
                )
                values = outputs(poisoned())
                loss = values.get("loss")
                parts = [loss] if loss is not None else list(values.values())
                if all(bool(torch.isfinite(part).all()) for part in parts):
                    raise BrokenLawError(f"a NaN in {path} does not reach the result", poisoned)

    hold("assert_finite", calls(fn, **inputs), check, max_examples)


def _extremes(scale: float) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "arguments as drawn": torch.clone,
        "zeros": torch.zeros_like,
        "equal rows": lambda t: t[:1].expand_as(t).clone() if t.ndim and t.numel() else t.clone(),
        "large numbers": lambda t: t * scale,
    }


def _with_nan(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[0] = torch.nan
    return changed


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

    def check(call: Call) -> None:
        live = call.mapped(_leaf)
        terms = outputs(live())
        total = sum(
            (terms[t] * _number(w, live) for t, w in weights.items()), start=torch.tensor(0)
        )
        if weights and not close(terms["loss"], total):
            loss = few(terms["loss"])
            raise BrokenLawError(f"loss is {loss}, the terms' sum {few(total)}", call)
        leaves = {path: t for path, t in live.tensors().items() if t.requires_grad}
        both = [] if detached or not weights else [terms["loss"], total]
        derived = [_derivatives(one, list(leaves.values())) for one in both]
        for path, ours, wanted in zip(leaves, *derived, strict=True) if derived else ():
            if not close(ours, wanted):
                raise BrokenLawError(
                    f"loss's gradient by {path} is {few(ours)}, the terms' sum's {few(wanted)}",
                    call,
                )
        in_graph = ("loss", *also_in_graph, *(() if detached else weights))
        for name, value in terms.items():
            if name not in in_graph and value.requires_grad:
                raise BrokenLawError(f"{name} is in the graph, and not of the sum", call)

    inputs.setdefault("dtypes", _DOUBLE)
    hold("assert_terms_sum", calls(fn, **inputs), check, max_examples)


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

    def check(call: Call) -> None:
        size = _size(call, axis)
        order = torch.arange(size).roll(1) if size < 4 else torch.arange(size) * 3 % size
        if size % 3 == 0:
            order = torch.arange(size).flip(0)
        axes = call.axes()

        def permuted(tensor: Tensor, names: Sequence[str | None]) -> Tensor:
            for index, name in enumerate(names):
                if name == axis:
                    tensor = tensor.index_select(index, order)
            return tensor

        moved = call.mapped(lambda path, t: permuted(t, axes.get(path, ())).clone())
        values, gradients = values_and_gradients(call)
        ours, our_gradients = values_and_gradients(moved)
        for name, value in values.items():
            names = result_axes(signature, name, value)
            if not close(ours[name], permuted(value, names)):
                raise BrokenLawError(
                    f"{name} is {few(value)}, and {few(ours[name])} where {axis} is in the "
                    f"order {order.tolist()}",
                    call,
                )
        # A result that is not one number is summed with weights of its places, for gradients.
        one_number = "loss" in values or all(value.numel() == 1 for value in values.values())
        for name, value in gradients.items() if one_number else ():
            wanted = permuted(value, axes.get(name.removeprefix(GRADIENT), ()))
            if not close(our_gradients[name], wanted):
                raise BrokenLawError(f"{name} is not permuted with {axis}", call)

    inputs.setdefault("dtypes", _DOUBLE)
    hold("assert_permutation_invariant", calls(fn, **inputs), check, max_examples)


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

    def check(call: Call) -> None:
        swapped = call.changed(**{first: call[second], second: call[first]})
        values, gradients = values_and_gradients(call)
        ours, our_gradients = values_and_gradients(swapped)
        for name, value in values.items():
            if not close(ours[name], value):
                raise BrokenLawError(
                    f"{name} is {few(value)}, and {few(ours[name])} where {first} and {second} "
                    "change places",
                    call,
                )
        for one, two in ((first, second), (second, first)):
            if not close(our_gradients[GRADIENT + one], gradients[GRADIENT + two]):
                raise BrokenLawError(
                    f"the gradients of {first} and {second} do not change places", call
                )

    inputs.setdefault("dtypes", _DOUBLE)
    hold("assert_symmetric", calls(fn, **inputs), check, max_examples)


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

    def check(call: Call) -> None:
        axes = call.axes()

        def shift(path: str, tensor: Tensor) -> Tensor:
            chosen = arguments is None or path in arguments
            names = axes.get(path, ())
            if not chosen or axis not in names or not tensor.is_floating_point():
                return tensor.clone()
            index = names.index(axis)
            one = tensor.select(index, 0) if tensor.shape[index] else tensor.sum(index)
            ramp = torch.arange(one.numel(), dtype=tensor.dtype).reshape(one.shape)
            return tensor + (1.5 + ramp.sin()).unsqueeze(index)

        values = outputs(call.mapped(_same_tensor)())
        for name, ours in outputs(call.mapped(shift)()).items():
            if not close(ours, values[name]):
                raise BrokenLawError(
                    f"{name} is {few(values[name])}, and {few(ours)} when shifted", call
                )

    inputs.setdefault("dtypes", _DOUBLE)
    hold("assert_shift_invariant", calls(fn, **inputs), check, max_examples)


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

    def check(call: Call) -> None:
        larger = call.changed(**{name: call[name] * factor for name in arguments})
        values, ours = (outputs(one.mapped(_same_tensor)()) for one in (call, larger))
        loss = "loss" if "loss" in values else "result"
        degrees = degree if isinstance(degree, Mapping) else {loss: degree}
        for name, power in degrees.items():
            if not close(ours[name], values[name] * factor**power):
                raise BrokenLawError(
                    f"{name} is {few(values[name])}, and {few(ours[name])} for {factor:g} times "
                    f"the arguments: not of degree {power:g}",
                    call,
                )

    inputs.setdefault("dtypes", _DOUBLE)
    hold("assert_scale", calls(fn, **inputs), check, max_examples)


def assert_formula(
    fn: Function,
    reference: Callable[..., Any],
    *,
    max_examples: int = 25,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that a function gives what a formula gives, in value and in gradient.

    Args:
        fn: the function.
        reference: the formula written plainly. Takes the same keywords and gives the loss, or a
            record or a dict of terms by name, of which each is compared with the term of that
            name, and so is its gradient where both have one.
        max_examples: calls to draw.
        **inputs: as [`calls`][termwise.testing.calls] takes them; float64 unless `dtypes` says
            otherwise.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
    """

    def check(call: Call) -> None:
        live, plain = call.mapped(_leaf), call.mapped(_leaf)
        values, formula = outputs(live()), outputs(reference(**plain))
        if "result" in formula and "loss" in values:
            formula = {"loss": formula["result"]}
        for name, wanted in formula.items():
            ours = values[name]
            if not close(ours, wanted):
                raise BrokenLawError(f"{name} is {few(ours)}, the formula's {few(wanted)}", call)
            if not (ours.requires_grad and wanted.requires_grad):
                continue
            leaves = {path: t for path, t in live.tensors().items() if t.requires_grad}
            theirs = [plain.tensors()[path] for path in leaves]
            for path, one, two in zip(
                leaves,
                _derivatives(ours.sum(), list(leaves.values())),
                _derivatives(wanted.sum(), theirs),
                strict=True,
            ):
                if not close(one, two):
                    raise BrokenLawError(
                        f"{name}'s gradient by {path} is {few(one)}, the formula's {few(two)}",
                        call,
                    )

    inputs.setdefault("dtypes", _DOUBLE)
    hold("assert_formula", calls(fn, **inputs), check, max_examples)


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

    def check(several: list[Call]) -> None:
        (call,) = several
        paths = [
            path
            for path, t in call.tensors().items()
            if t.is_floating_point() and t.numel() and (arguments is None or path in arguments)
        ]

        def of_tensors(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(paths, tensors, strict=True))
            result = outputs(call.mapped(lambda path, t: given.get(path, t))())
            return tuple(value for value in result.values() if value.requires_grad)

        leaves = [call.tensors()[path].clone().requires_grad_() for path in paths]
        if not leaves or not of_tensors(*leaves):
            return
        try:
            torch.autograd.gradcheck(of_tensors, leaves)
            if second:
                torch.autograd.gradgradcheck(of_tensors, leaves)
        except GradcheckError as error:
            raise BrokenLawError(" ".join(str(error).split()), call) from None

    inputs["dtypes"] = _DOUBLE
    hold("assert_gradients", drawn_calls(fn, inputs, generic=True), check, max_examples)


def assert_compiles(
    fn: Function,
    *,
    backend: str = "aot_eager",
    max_examples: int = 1,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that a function compiles whole, and then gives what it gives in eager.

    One compiled function, `fullgraph=True`, takes two calls that differ in sizes and options;
    values and gradients are compared.

    Args:
        fn: the function.
        backend: of `torch.compile`.
        max_examples: pairs of calls to draw, each compiled anew.
        **inputs: as [`calls`][termwise.testing.calls] takes them; float64 unless `dtypes` says
            otherwise.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
    """

    def check(pair: tuple[Call, ...]) -> None:
        torch.compiler.reset()
        run = torch.compile(fn, fullgraph=True, backend=backend)
        for call in pair:
            values, gradients = values_and_gradients(call)
            try:
                ours, our_gradients = values_and_gradients(call, run)
            except Exception as error:
                problem = f"compiled, {type(error).__name__}: {_first_line(str(error))}"
                raise BrokenLawError(problem, call) from None
            for name, value in {**values, **gradients}.items():
                compiled = {**ours, **our_gradients}.get(name)
                if compiled is None or not close(compiled, value):
                    shown = "absent" if compiled is None else few(compiled)
                    raise BrokenLawError(f"{name} is {few(value)}, compiled {shown}", call)
        torch.compiler.reset()

    inputs.setdefault("dtypes", _DOUBLE)
    one = calls(fn, **inputs)
    hold("assert_compiles", st.tuples(one, one), check, max_examples)


def assert_vmaps(
    fn: Function,
    *,
    arguments: Collection[str] | None = None,
    max_examples: int = 3,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that `torch.vmap` gives what a loop gives, and `torch.func.grad` inside it too.

    Args:
        fn: the function.
        arguments: tensors (or fields, "f.values") to map over; all floating ones, if None.
        max_examples: sets of three calls to draw.
        **inputs: as [`calls`][termwise.testing.calls] takes them; float64 unless `dtypes` says
            otherwise.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
    """

    def check(three: list[Call]) -> None:
        call = three[0]
        paths = [
            path
            for path, t in call.tensors().items()
            if t.is_floating_point() and (arguments is None or path in arguments)
        ]
        if not paths:
            return

        def of_tensors(*tensors: Tensor) -> Numbers:
            given = dict(zip(paths, tensors, strict=True))
            return outputs(call.mapped(lambda path, t: given.get(path, t))())

        rows = [[one.tensors()[path] for path in paths] for one in three]
        stacked = [torch.stack(column) for column in zip(*rows, strict=True)]
        looped = [of_tensors(*row) for row in rows]
        try:
            together = torch.vmap(of_tensors)(*stacked)
        except Exception as error:
            problem = f"under vmap, {type(error).__name__}: {_first_line(str(error))}"
            raise BrokenLawError(problem, call) from None
        for index, values in enumerate(looped):
            for name, value in values.items():
                if not close(together[name][index], value):
                    shown = f"under vmap {few(together[name][index])}"
                    raise BrokenLawError(f"{name} is {few(value)}, {shown}", three[index])
        leaves = [tensor.clone().requires_grad_() for tensor in rows[0]]
        loss = scalar(of_tensors(*leaves))
        if not loss.requires_grad:
            return
        by = tuple(range(len(paths)))
        gradient = cast("Function", torch.func.grad(lambda *xs: scalar(of_tensors(*xs)), by))  # pyright: ignore[reportArgumentType]
        try:
            mapped = torch.vmap(gradient)(*stacked)
        except Exception as error:
            problem = f"grad under vmap, {type(error).__name__}: {_first_line(str(error))}"
            raise BrokenLawError(problem, call) from None
        for path, ours, wanted in zip(paths, mapped, _derivatives(loss, leaves), strict=True):
            if not close(ours[0], wanted):
                raise BrokenLawError(f"the gradient by {path} differs under vmap", call)

    inputs.setdefault("dtypes", _DOUBLE)
    hold("assert_vmaps", drawn_calls(fn, inputs, count=3), check, max_examples)


def hold(
    law: str,
    strategy: st.SearchStrategy[Any],
    check: Callable[[Any], None],
    examples: int,
    *,
    shrink: bool = True,
) -> None:
    """Run a law on drawn calls; of a failure keep the smallest call, and write it as code."""

    @settings(
        deadline=None,
        max_examples=examples,
        suppress_health_check=_PATIENT,
        report_multiple_bugs=False,
        print_blob=False,
        phases=[p for p in settings().phases if shrink or p is not Phase.shrink],
    )
    @given(strategy)
    def run(drawn: Any) -> None:
        try:
            check(drawn)
        except (BrokenLawError, HypothesisException):
            raise
        except Exception as error:
            call = drawn if isinstance(drawn, Call) else drawn[0]
            raise BrokenLawError(f"{type(error).__name__}: {error}", call) from error

    try:
        run()
    except BrokenLawError as broken:
        name = Signature(broken.call.fn).name
        text = f"{law}: {name}: {broken.problem}\n\n{broken.call.code()}"
        raise AssertionError(text) from broken.__cause__


GRADIENT: Final = "the gradient by "


def outputs(result: Any) -> Numbers:
    """Name the tensors of a result: a record's fields, or "result" of a single one."""
    if isinstance(result, Tensor):
        return {"result": result}
    if isinstance(result, Terms):
        return dict(result.items())
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        parts = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    elif isinstance(result, Mapping):
        parts = dict(cast("Mapping[str, Any]", result))
    elif isinstance(result, tuple | list):
        items = cast("Sequence[Any]", result)
        parts = {f"result {index}": item for index, item in enumerate(items)}
    else:
        parts = {}
    return {name: value for name, value in parts.items() if isinstance(value, Tensor)}


def scalar(values: Numbers) -> Tensor:
    """Give the loss, or a sum of all that is floating in which each element has its own weight."""
    if "loss" in values:
        return values["loss"]
    total = torch.zeros(())
    for value in values.values():
        if value.is_floating_point():
            ramp = torch.arange(1, value.numel() + 1, dtype=value.dtype).reshape(value.shape)
            total = total + (value * ramp.cos()).sum()
    return total


def values_and_gradients(call: Call, run: Function | None = None) -> tuple[Numbers, Numbers]:
    """Call on fresh leaves; give what comes out, and the gradients by path, named so."""
    live = call.mapped(_leaf)
    values = outputs(live() if run is None else run(**live))
    loss = scalar(values)
    leaves = {path: t for path, t in live.tensors().items() if t.requires_grad}
    gradients: Numbers = {}
    if loss.requires_grad:
        derived = _derivatives(loss, list(leaves.values()))
        gradients = {GRADIENT + path: value for path, value in zip(leaves, derived, strict=True)}
    return {name: value.detach() for name, value in values.items()}, gradients


def result_axes(signature: Signature, name: str, value: Tensor) -> tuple[str | None, ...]:
    """Name the axes of a part of a result, as its annotation does."""
    returns: Any = signature.returns
    hint: Any = returns
    if isinstance(returns, type) and dataclasses.is_dataclass(returns):
        hint = typing.get_type_hints(returns, include_extras=True).get(name)
    elif name.startswith("result "):
        hint = typing.get_args(returns)[int(name.removeprefix("result "))]
    return named_axes(hint, value, "").get("", ())


def _derivatives(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    if not leaves or not loss.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(
        loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return list(found)


def _size(call: Call, axis: str) -> int:
    if axis not in call.sizes:
        raise ValueError(f"{Signature(call.fn).name} has no axis {axis}, only {list(call.sizes)}")
    return call.sizes[axis]


def _leaf(path: str, tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return copied.requires_grad_() if copied.is_floating_point() else copied


def _same_tensor(path: str, tensor: Tensor) -> Tensor:
    return tensor.clone()


def _copied(values: Numbers) -> Numbers:
    return {name: value.detach().clone() for name, value in values.items()}


def _equal(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return torch.allclose(one, two, rtol=0, atol=0, equal_nan=True)


def close(one: Tensor, two: Tensor) -> bool:
    """Compare to the precision of the dtype, with the size of the larger number as the unit."""
    if one.shape != two.shape:
        return False
    one, two = one.detach().to(two.dtype), two.detach()
    if not two.is_floating_point():
        return bool(torch.equal(one, two))
    tolerance = 1e-8 if two.dtype == torch.float64 else 1e-4
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


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")
