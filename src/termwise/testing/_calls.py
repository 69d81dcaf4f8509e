"""Strategies that draw calls of a function from the annotations in its signature."""

import ast
import contextlib
import copy
import dataclasses
import functools
import inspect
import typing
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, Literal, Self, TypeAlias, TypedDict, cast, is_typeddict

import torch
from beartype.door import is_bearable
from hypothesis import assume
from hypothesis import strategies as st
from jaxtyping import jaxtyped
from torch import Tensor, nn

from .._annotations import (
    BEARTYPE,
    MAPPINGS,
    SEQUENCES,
    Axis,
    Bindings,
    Expected,
    Shape,
    field_hints,
    filled_in,
    has_arrays,
    has_fields,
    is_array,
    options_of,
    show,
    spell,
)
from .._groups import ProcessGroup
from ._code import is_named_tuple, write_call

_SIZES: Final = st.integers(1, 4)
_TWO_OR_MORE: Final = st.integers(2, 4)
_NUMBERS: Final = (0.5, 1.0, 2.0, 0.25, 1.5)
_COUNTS: Final = (1, 2, 3)
# Multiples of 1/32 between -3 and 3: exact in every dtype but float8, and short when printed.
# The order is that in which failures shrink: 0, then integers, then the others.
_FLOATS: Final = tuple(
    sorted((n / 32 for n in range(-96, 97)), key=lambda x: (x % 1 != 0, abs(x), x < 0))
)
_INTEGERS: Final = (0, 1, 2, 3)
# A tensor with more elements is generated from one drawn seed: hypothesis limits the number of
# choices in an example.
_MAX_DRAWN: Final = 64
# Size of one axis in about one of seven calls of a law: larger than the blocks that losses use.
_LARGE: Final = st.integers(65, 257)
# The dtype to use, in this order, where `dtypes` has none that the annotation allows.
_PREFERRED: Final = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)


Given: TypeAlias = st.SearchStrategy[Any] | Callable[[dict[str, Any]], Any]


class Inputs(TypedDict, total=False):
    """Keyword arguments of [`calls`][termwise.testing.calls], accepted by every law too."""

    sizes: Mapping[str, Any]
    """Size of each axis by name: a number or a strategy. For `*batch`: a tuple, or a strategy of
    tuples."""
    dtypes: Sequence[torch.dtype]
    """Dtypes to draw from; all floating tensors of a call have the same one."""
    elements: Mapping[str, Any] | st.SearchStrategy[float] | None
    """Strategy for the elements of all floating tensors, or a strategy for each argument by name.
    In complex tensors it is used for the real and the imaginary parts."""
    overrides: Mapping[Any, Any]
    """What to pass for an argument instead of a drawn value: a value, a strategy, or a function of
    the sizes. A tuple of names stands for arguments that belong together."""
    given: Given | None
    """Strategy for several arguments that belong together, by name, or for whole calls."""


class Call(dict[str, Any]):
    """Keyword arguments of one call of a function, which `call()` and `fn(**call)` run.

    Its `repr` is the call as Python code.
    """

    fn: Callable[..., Any]
    """The function to call."""
    sizes: dict[str, Any]
    """Size of each axis by name; a tuple of sizes for `*batch`."""
    hints: dict[str, Any]
    """Annotation that each tensor argument was drawn from: the override's, if there is one."""
    given: frozenset[str]
    """Names of the arguments that came from `given`."""

    def __init__(
        self,
        fn: Callable[..., Any],
        arguments: Mapping[str, Any],
        sizes: Mapping[str, Any],
        hints: Mapping[str, Any] | None = None,
        given: Collection[str] = (),
    ) -> None:
        super().__init__(arguments)
        self.given = frozenset(given)
        self.fn = fn
        self.sizes = dict(sizes)
        self.hints = dict(hints or {})

    def __call__(self) -> Any:
        """Call the function and return its result."""
        return self.fn(**self)

    def __repr__(self) -> str:
        return write_call(self.fn, self)[1]

    def code(self) -> str:
        """Return the call as Python code with its imports, ready to run."""
        imports, text = write_call(self.fn, self)
        return f"{imports}\n\n{text}"

    def changed(self, **arguments: Any) -> Self:
        """Return a copy of the call with some arguments replaced."""
        other = copy.copy(self)
        other.update(arguments)
        return other

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        """Return a copy of the call with each tensor replaced by `change(path, tensor)`.

        The path of a tensor is the name of its argument; inside a record, a dict or a sequence it
        is "argument.field", "argument.key" or "argument.0". An `nn.Parameter` is kept. A
        `torch.Generator` is copied with its current state.
        """
        return self.changed(**{name: _mapped(value, name, change) for name, value in self.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the call by path."""
        found: dict[str, Tensor] = {}

        def keep(path: str, value: Tensor) -> Tensor:
            found[path] = value
            return value

        self.mapped(keep)
        return found

    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """Return the axis names of each tensor by path; None for an axis without a name."""
        signature = Signature(self.fn)
        named: dict[str, tuple[str | None, ...]] = {}
        for name, value in self.items():
            hint = self.hints.get(name) or signature.hint(name, self)
            named.update(named_axes(filled_in(hint, self), value, name))
        return named


class BrokenCall(Call):
    """A call in which one argument violates its annotation."""

    argument: str
    """Name of the argument."""
    violation: str
    """What is wrong with it, in a few words."""
    kind: Literal["rank", "axis", "dtype", "array", "none", "literal"]
    """Kind of violation: the number of axes, the size of one, the dtype, a NumPy array, None, or a
    string that is not an option of the `Literal`."""


def calls(
    fn: Callable[..., Any],
    *,
    sizes: Mapping[str, Any] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    elements: Mapping[str, Any] | st.SearchStrategy[float] | None = None,
    overrides: Mapping[Any, Any] | None = None,
    given: Given | None = None,
) -> st.SearchStrategy[Call]:
    """Return a strategy that draws valid calls of a function, from its annotations.

    An axis name has the same size everywhere in a call. The supported annotations are fixed sizes,
    `*batch`, `...`, `_`, `#broadcast`, sizes computed from other axes (`"n-1"`) or from arguments
    (`"{k}+1"`), optional and union types, `Literal`, numbers, and sequences, mappings with `str`
    keys, dataclasses, named tuples and typed dicts of these. Fields share the axis names of the
    call, and an argument that an axis is computed from is never None. A process group is None, and
    a `torch.Generator` is seeded. An argument with any other annotation, such as a callable, takes
    its default; without a default it must be in `overrides`.

    Args:
        fn: a function decorated with [`contract`][termwise.contract], any other function with
            jaxtyping annotations, a method, or an `nn.Module` (its `forward` is used).
        sizes: size of each axis by name: a number or a strategy; for `*batch`, a tuple or a
            strategy of tuples. Default: 1 to 4, and up to two axes for `*batch`.
        dtypes: floating dtypes to draw from; all floating tensors of a call have the same one. An
            integer dtype in this list is used where an annotation allows several.
        elements: strategy for the elements of all floating tensors, or a strategy for each
            argument by name ("x"; "f.values" for a field of a record; "xs" for every item of a
            sequence). A function of the sizes may return the strategy: `{"tokens": lambda sizes:
            st.integers(0, sizes["vocab"] - 1)}`. Default: multiples of 1/32 from -3 to 3, and
            integers from 0 to 3. A tensor with more than 64 elements is filled from one drawn
            seed, or with 64 elements drawn from the strategy and repeated at random.
        overrides: what to pass for an argument (or a field, "f.indices") instead of a drawn value:
            a value, a strategy, a function of the sizes that returns a value or a strategy, or an
            annotation to use instead of the signature's (`Float[Tensor, "{steps} batch"]`). For an
            argument that is a callable, a function is passed as it is. A tuple of names gets
            values that belong together, from a strategy of tuples or a function that returns a
            tuple: `{("values", "indices"): lambda sizes: torch.rand(sizes["batch"], 9).topk(2)}`.
            In `overrides`, `sizes` and `elements`, names that the function does not have are
            ignored, so that several functions can share one mapping.
        given: a strategy for several arguments by name (`st.fixed_dictionaries`) or for whole calls
            (`calls(fn).filter(...)`). It takes precedence over the other options; the arguments
            that it leaves out are drawn with matching sizes. Or a function of the sizes that
            returns all arguments without a default, or a strategy of them; it may use sizes that
            no annotation names, if they are in `sizes`. Floating tensors are converted to the
            dtype of the call, where their annotation allows it.

    Returns:
        A strategy of [`Call`][termwise.testing.Call], a dict of keyword arguments. A failing
        example shrinks to few elements and short numbers, and prints as code.

    Raises:
        TypeError: when an example is drawn, if the annotation of an argument does not determine
            what to draw, and the argument has neither a default nor an override.

    Examples:
        >>> import torch
        >>> from hypothesis import given, settings
        >>> import termwise as tw
        >>> from termwise import testing
        >>> @settings(derandomize=True, max_examples=20)
        ... @given(testing.calls(tw.joint_embedding.vicreg_loss, sizes={"batch": 3}))
        ... def test_loss_is_not_negative(call):
        ...     assert call().loss >= 0 and call["z1"].shape[0] == 3
        >>> test_loss_is_not_negative()
    """
    inputs = Inputs(
        sizes=sizes or {},
        dtypes=dtypes,
        elements=elements,
        overrides=overrides or {},
        given=given,
    )
    return drawn_calls(fn, inputs).map(lambda drawn: drawn[0])


def broken_calls(
    fn: Callable[..., Any],
    *,
    sizes: Mapping[str, Any] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    elements: Mapping[str, Any] | st.SearchStrategy[float] | None = None,
    overrides: Mapping[Any, Any] | None = None,
    given: Given | None = None,
) -> st.SearchStrategy[BrokenCall]:
    """Return a strategy that draws calls in which one argument violates its annotation.

    The argument has an axis too many or too few; an axis that is one longer, or of size 1 (which
    would broadcast); a dtype of another kind; or it is a NumPy array, None, or a string that is not
    an option of the `Literal`. The violation may also be in a field of a record, in one item of a
    tuple, or in all items of a list. Calls that jaxtyping and beartype accept are not drawn.

    Args:
        fn: the function. All arguments are those of [`calls`][termwise.testing.calls].
        sizes: size of each axis by name.
        dtypes: floating dtypes to draw from.
        elements: strategies for the elements of tensors.
        overrides: what to pass for arguments instead of drawn values.
        given: a strategy for arguments that belong together.

    Returns:
        A strategy of [`BrokenCall`][termwise.testing.BrokenCall], whose `argument` and `violation`
        describe what is wrong.

    Raises:
        TypeError: when an example is drawn, if no argument can violate its annotation.

    Examples:
        >>> import pytest
        >>> from hypothesis import given, settings
        >>> import termwise as tw
        >>> from termwise import testing
        >>> @settings(derandomize=True, max_examples=20)
        ... @given(testing.broken_calls(tw.joint_embedding.vicreg_loss, sizes={"batch": 3}))
        ... def test_error_names_the_argument(broken):
        ...     with pytest.raises(TypeError, match=broken.argument):
        ...         broken()
        >>> test_error_names_the_argument()
    """
    inputs = Inputs(
        sizes=sizes or {},
        dtypes=dtypes,
        elements=elements,
        overrides=overrides or {},
        given=given,
    )
    return _broken(fn, inputs)


NOTHING_TO_BREAK: Final = (
    "has no argument that can violate its annotation: annotate its tensors with shapes, such as "
    'Float[Tensor, "batch dim"]'
)


@st.composite
def _broken(draw: st.DrawFn, fn: Callable[..., Any], inputs: Inputs) -> BrokenCall:
    call = draw(drawn_calls(fn, inputs))[0]
    found = violations(call)
    if not found:
        signature = Signature(fn)
        options = [option for hint in signature.hints.values() for option in options_of(hint)]
        # An optional tensor that is None in this call is a tensor in another one.
        assume(not any(is_array(option) for option in options))
        raise TypeError(f"broken_calls: {signature.name} {NOTHING_TO_BREAK}")
    # Draw the argument, then the kind: both stay the same while the sizes shrink.
    argument = draw(st.sampled_from(list(dict.fromkeys(one.argument for one in found))))
    found = [one for one in found if one.argument == argument]
    kind = draw(st.sampled_from(list(dict.fromkeys(one.kind for one in found))))
    return draw(st.sampled_from([one for one in found if one.kind == kind]))


class Signature:
    """The parameters of a function, with their annotations and defaults."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        inner: Any = fn
        by_position: tuple[Any, ...] = ()
        by_name: dict[str, Any] = {}
        while isinstance(inner, functools.partial):
            holder = cast("functools.partial[object]", inner)
            by_position = (*holder.args, *by_position)
            by_name = {**holder.keywords, **by_name}
            inner = holder.func
        self.name: str = getattr(inner, "__name__", None) or type(inner).__name__
        if isinstance(inner, type):
            raise TypeError(f"calls: {self.name} is a class: pass a function or an instance")
        owner = inner
        if isinstance(inner, nn.Module):
            owner = inner.forward
        elif not inspect.isroutine(inner):
            owner = inner.__call__
        # The arguments that a partial binds are not drawn, but "{k}" may use them.
        whole = inspect.signature(cast("Any", owner))
        bound = whole.bind_partial(*by_position, **by_name).arguments
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        self.bound: dict[str, Any] = {
            name: value
            for name, value in bound.items()
            if whole.parameters[name].kind not in variadic
        }
        self.parameters = {
            name: parameter
            for name, parameter in whole.parameters.items()
            if name not in self.bound
        }
        self.hints: dict[str, Any] = typing.get_type_hints(owner, include_extras=True)
        self.returns: Any = self.hints.get("return", Any)
        self.defaults: dict[str, Any] = {
            name: parameter.default
            for name, parameter in self.parameters.items()
            if parameter.default is not parameter.empty
        }
        for name, parameter in self.parameters.items():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise TypeError(
                    f"calls: {self.name} takes *{name}, whose number of arguments no annotation "
                    "limits: wrap it in a function with named arguments"
                )
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise TypeError(
                    f"calls: {self.name} takes {name} by position only: wrap it in a function with "
                    "named arguments"
                )

    @functools.cached_property
    def arrays_last(self) -> list[str]:
        """Return the argument names, tensors last: "{k}+1" needs a k that has been checked."""
        return sorted(self.hints, key=lambda name: has_arrays(self.hints[name]))

    def hint(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Return an argument's annotation with values filled in ("{k}+1" becomes "2+1")."""
        known = {**self.defaults, **self.bound, **arguments}
        options = [filled_in(option, known) for option in options_of(self.hints.get(name))]
        return options[0] if len(options) == 1 else typing.Union[tuple(options)]  # noqa: UP007


def axis_names(hint: Any) -> list[str]:
    """Return the axis names in an annotation."""
    if is_array(hint):
        return [a.name for a in (Axis(word) for word in hint.dim_str.split()) if _is_named(a)]
    within = typing.get_args(hint)
    if has_fields(hint):
        within = tuple(field_hints(hint).values())
    return [name for part in within for name in axis_names(part)]


def _shape_arguments(hint: Any) -> set[str]:
    """Return the names of the arguments that axes are computed from: k in "{k}+1"."""
    if is_array(hint):
        parts = ast.walk(ast.parse(f"f{hint.dim_str!r}", mode="eval"))
        return {part.id for part in parts if isinstance(part, ast.Name)}
    return {name for part in typing.get_args(hint) for name in _shape_arguments(part)}


@dataclasses.dataclass(frozen=True)
class _Array:
    """A tensor to draw once all sizes are known."""

    hint: Any


@dataclasses.dataclass(frozen=True)
class _Record:
    """A record or a dict to build once its fields are drawn."""

    kind: Callable[..., Any]
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Items:
    """A list or a tuple to build once its items are drawn."""

    kind: type[list[Any]] | type[tuple[Any, ...]]
    items: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _FromSizes:
    """A function to call with the sizes once they are known."""

    function: Callable[[dict[str, Any]], Any]


@st.composite
def drawn_calls(
    draw: st.DrawFn,
    fn: Callable[..., Any],
    inputs: Inputs,
    *,
    count: int = 1,
    normal: bool = False,
    large: bool = False,
    at_least_two: str = "",
    choose_sizes: Callable[[list[str]], Sequence[Mapping[str, int]]] | None = None,
    meta: bool = False,
) -> list[Call]:
    """Draw calls that differ only in their floating tensors, or in the sizes that are asked for.

    Args:
        draw: draws from a strategy; hypothesis passes it.
        fn: the function.
        inputs: the keyword arguments of `calls`.
        count: number of calls.
        normal: whether elements without a strategy are normal variates, so that no two are equal
            and none is 0, as a comparison with finite differences needs.
        large: whether an axis that `sizes` does not name has a size above 64 in some calls.
        at_least_two: an axis whose size is at least 2, unless `sizes` names it.
        choose_sizes: returns the sizes of each call from the names of the axes whose size no given
            tensor sets. The tensors of these calls are contiguous.
        meta: whether tensors are on the meta device.
    """
    if unknown := inputs.keys() - Inputs.__annotations__.keys():
        known = ", ".join(Inputs.__annotations__)
        raise TypeError(f"calls take no {', '.join(sorted(unknown))}, only {known}")
    signature = Signature(fn)
    given: Any = inputs.get("given")
    given_values: dict[str, Any] = {}
    # First everything that has no shape, then sizes, then tensors.
    chosen: dict[str, Any] = {}
    given_function = None if isinstance(given, st.SearchStrategy) else given
    if given_function is None:
        given_values = dict(draw(cast("Any", given))) if given is not None else {}
        chosen = _choose_all(draw, signature, inputs.get("overrides") or {}, given_values)
    values = dict(signature.bound)
    for name, value in chosen.items():
        if isinstance(value, _Items):  # drawn later, but "{len(xs)}" is known
            values[name] = value.items
        elif isinstance(value, _Record) and value.kind is dict:
            values[name] = value.fields
        elif not isinstance(value, _Array | _Record | _FromSizes):
            values[name] = value
    arrays: dict[str, Shape] = {}
    sizes: dict[str, Any] = {}
    from_sizes = [name for name, choice in chosen.items() if isinstance(choice, _FromSizes)]
    try:
        for name, value in signature.bound.items():
            _bind(signature.hint(name, values), value, sizes)
        for name, choice in chosen.items():
            _collect(choice, name, values, arrays)
            _bind(signature.hint(name, values), choice, sizes)
    except NameError as error:
        problem = f"calls: {signature.name} has an axis computed from {error.name}"
        if error.name in from_sizes:
            raise TypeError(
                f"{problem}, which overrides compute from the sizes: this is circular, override it "
                "with a value or a strategy"
            ) from None
        raise TypeError(
            f"{problem}, which is not known before the sizes: override it with a value"
        ) from None
    axis_sizes: dict[str, Any] = dict(inputs.get("sizes") or {})
    named = _named(arrays.values())
    if given_function is not None:
        hinted = [name for hint in signature.hints.values() for name in axis_names(hint)]
        named = dict.fromkeys((*hinted, *axis_sizes), False)
    free = [name for name, variadic in named.items() if not variadic and name not in sizes]
    chosen_sizes: Sequence[Mapping[str, int]] = choose_sizes(free) if choose_sizes else ({},)
    unnamed = [name for name in free if name not in axis_sizes]
    if large and unnamed and draw(st.sampled_from((False,) * 6 + (True,))):
        axis_sizes[draw(st.sampled_from(unnamed))] = _LARGE
    if at_least_two in free:
        axis_sizes.setdefault(at_least_two, _TWO_OR_MORE)
    _draw_sizes(draw, named, axis_sizes, sizes)
    possible = inputs.get("dtypes", (torch.float32,))
    floating = [d.to_real() if d.is_complex else d for d in possible if is_inexact(d)]
    dtype = draw(st.sampled_from(floating or [torch.float32]))
    dtypes = {path: _dtype(shape, dtype, inputs) for path, shape in arrays.items()}
    hints = {name: choice.hint for name, choice in chosen.items() if isinstance(choice, _Array)}
    drawn: list[Call] = []
    for other_sizes in chosen_sizes:
        call_sizes = {**sizes, **other_sizes}
        shapes = {path: _draw_shape(draw, shape, call_sizes) for path, shape in arrays.items()}
        evaluated = {name: _evaluate(draw, choice, call_sizes) for name, choice in chosen.items()}
        if given_function is not None:
            given_values = dict(_evaluate(draw, _FromSizes(given_function), call_sizes))
        for name in (name for name in signature.parameters if name in given_values):
            hint = signature.hint(name, {**values, **given_values})
            evaluated[name] = _of_dtype(given_values[name], hint, name, dtype)
        tensors: dict[str, Tensor] = {}
        for _ in range(count):
            for path, shape in shapes.items():
                if meta:
                    tensors[path] = torch.empty(shape, dtype=dtypes[path], device="meta")
                elif path not in tensors or is_inexact(dtypes[path]):
                    options = (call_sizes, inputs, normal)
                    tensor = _draw_tensor(draw, path, shape, dtypes[path], *options)
                    tensors[path] = tensor if choose_sizes else _vary_strides(draw, tensor)
            arguments = {name: _build(choice, name, tensors) for name, choice in evaluated.items()}
            call = Call(fn, arguments, call_sizes, hints, given_values)
            drawn.append(call.mapped(lambda path, t: t.to("meta")) if meta else call)
    return drawn


def _choose_all(
    draw: st.DrawFn,
    signature: Signature,
    overrides: Mapping[Any, Any],
    given_values: Mapping[str, Any],
) -> dict[str, Any]:
    """Choose a value for each argument, or what to build once sizes are known."""
    by_name = _split_overrides(draw, overrides)
    in_shapes = {name for hint in signature.hints.values() for name in _shape_arguments(hint)}
    chosen: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if name in given_values:
            chosen[name] = given_values[name]
            continue
        hint = signature.hints.get(name)
        if name in in_shapes:  # a size cannot be computed from None
            options = [option for option in options_of(hint) if option is not type(None)]
            hint = typing.Union[tuple(options)] if options else hint  # noqa: UP007
        chosen[name] = _choose(draw, signature.name, name, hint, parameter.default, by_name)
    return chosen


def _split_overrides(draw: st.DrawFn, overrides: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the overrides by single name, those of a tuple of names included."""
    parts: dict[str, Any] = {}
    for names, value in overrides.items():
        if isinstance(names, str):
            parts[names] = value
            continue
        if isinstance(value, st.SearchStrategy):
            value = draw(cast("Any", value))
        if inspect.isfunction(value):
            parts.update(_split_function(draw, names, value))
        else:
            parts.update(_zip_names(names, value))
    return parts


def _split_function(
    draw: st.DrawFn, names: tuple[str, ...], function: Callable[..., Any]
) -> dict[str, Any]:
    """Split a function of the sizes that returns several arguments; it is called once."""

    @functools.cache
    def evaluate(sizes: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
        return _zip_names(names, _evaluate(draw, _FromSizes(function), dict(sizes)))

    def part(name: str) -> _FromSizes:
        return _FromSizes(lambda sizes: evaluate(tuple(sizes.items()))[name])

    return {name: part(name) for name in names}


def _zip_names(names: tuple[str, ...], values: Sequence[Any]) -> dict[str, Any]:
    if len(values) != len(names):
        listed = ", ".join(names)
        raise TypeError(
            f"calls: overrides of ({listed}) need {len(names)} values, got {len(values)}"
        )
    return dict(zip(names, values, strict=True))


def _of_dtype(value: Any, hint: Any, path: str, dtype: torch.dtype) -> Any:
    """Convert floating tensors to the dtype of the call, if the annotation allows it."""

    def changed(path: str, tensor: Tensor) -> Tensor:
        wanted = dtype.to_complex() if tensor.is_complex() else dtype
        return tensor.to(wanted) if is_inexact(tensor.dtype) else tensor

    other = _mapped(value, path, changed)
    return value if Expected(hint).problem(other, path, Bindings()) else other


def _vary_strides(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """Return the tensor contiguous or, less often, as a slice, a transpose or channels-last."""
    if not tensor.ndim:
        return tensor
    contiguous: list[Callable[[Tensor], Tensor]] = [torch.clone] * 4
    others = [_slice, *[_transpose] * (tensor.ndim > 1), *[_channels_last] * (tensor.ndim == 4)]
    return draw(st.sampled_from([*contiguous, *others]))(tensor)


def _slice(tensor: Tensor) -> Tensor:
    """Return an equal tensor that is a slice of one twice as wide."""
    if tensor.ndim == 1:
        return tensor.repeat_interleave(2)[::2]
    return torch.cat((tensor, tensor), -1)[..., : tensor.shape[-1]]


def _transpose(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last)


def _choose(
    draw: st.DrawFn,
    function: str,
    path: str,
    hint: Any,
    default: Any,
    overrides: Mapping[str, Any],
) -> Any:
    """Choose a value for an argument, or what to build once sizes are known."""
    options = options_of(hint)
    if path in overrides:
        value: Any = overrides[path]
        if isinstance(value, _FromSizes):
            return value
        if isinstance(value, st.SearchStrategy):
            value = draw(cast("st.SearchStrategy[object]", value))
        if is_array(value):
            return _Array(value)
        from_sizes = inspect.isfunction(value) and not any(_is_callable(o) for o in options)
        return _FromSizes(cast("Callable[..., Any]", value)) if from_sizes else value
    if torch.Generator in options:
        return torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if ProcessGroup in options and type(None) in options:
        return None
    possible = [option for option in options if _derivable(option)]
    if not possible:
        if default is not inspect.Parameter.empty:
            return default
        problem = "it has no annotation"
        if hint is not None:
            problem = f"its annotation {spell(hint)} does not determine what to draw"
        raise TypeError(f"calls: {function} needs {path}, and {problem}: pass it in overrides")
    # None comes first, because hypothesis shrinks towards the first option.
    possible.sort(key=lambda option: option is not type(None))
    option = draw(st.sampled_from(possible)) if len(possible) > 1 else possible[0]
    return _chosen_option(draw, function, path, option, default, overrides)


def _chosen_option(
    draw: st.DrawFn,
    function: str,
    path: str,
    option: Any,
    default: Any,
    overrides: Mapping[str, Any],
) -> Any:
    if option is type(None):
        return None
    if is_array(option):
        return _Array(option)
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    empty = inspect.Parameter.empty
    if origin is Literal:
        return draw(st.sampled_from(arguments))
    if option in (bool, int, float):
        usual = {bool: (False, True), int: _COUNTS, float: _NUMBERS}[option]
        first = (default,) if type(default) is option else ()
        return draw(st.sampled_from((*first, *usual)))
    if has_fields(option):
        defaults = _defaults(option)
        fields = {
            field: _choose(
                draw, function, f"{path}.{field}", hint, defaults.get(field, empty), overrides
            )
            for field, hint in field_hints(option).items()
            if field not in defaults or defaults[field] is not _NOT_AN_ARGUMENT
        }
        return _Record(origin or option, fields)
    if origin in MAPPINGS:
        keys = "abc"[: draw(st.integers(1, 3))]
        entries = {
            key: _choose(draw, function, f"{path}.{key}", arguments[1], empty, overrides)
            for key in keys
        }
        return _Record(dict, entries)
    fixed = origin is tuple and Ellipsis not in arguments
    kinds = arguments if fixed else arguments[:1] * draw(st.integers(1, 3))
    items = (
        _choose(draw, function, f"{path}.{index}", kind, empty, overrides)
        for index, kind in enumerate(kinds)
    )
    return _Items(list if origin is list else tuple, tuple(items))


def _derivable(option: Any) -> bool:
    """Whether an annotation determines what to draw."""
    if option is type(None) or is_array(option) or option in (bool, int, float):
        return True
    origin = typing.get_origin(option)
    if origin is Literal or has_fields(option):
        return True
    if origin in MAPPINGS:
        key, value = typing.get_args(option)
        return key is str and any(_derivable(one) for one in options_of(value))
    if origin in SEQUENCES:
        return all(
            any(_derivable(one) for one in options_of(item))
            for item in typing.get_args(option)
            if item is not Ellipsis
        )
    return False


def _is_callable(option: Any) -> bool:
    """Whether an annotation is of a callable."""
    if option is Callable or typing.get_origin(option) is Callable:
        return True
    return getattr(option, "_is_protocol", False) and "__call__" in vars(option)


_NOT_AN_ARGUMENT: Final = object()


def _defaults(kind: Any) -> dict[str, Any]:
    """Return the defaults of a record's fields, and a mark for a field with `init=False`."""
    kind = typing.get_origin(kind) or kind
    if not dataclasses.is_dataclass(kind):
        return dict(getattr(kind, "_field_defaults", {}))
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if not field.init:
            found[field.name] = _NOT_AN_ARGUMENT
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    return found


def _collect(choice: Any, path: str, values: Mapping[str, Any], into: dict[str, Shape]) -> None:
    """Add the shapes of the tensors to draw, by path."""
    if isinstance(choice, _Array):
        into[path] = Shape(filled_in(choice.hint, dict(values)))
    elif isinstance(choice, _Record):
        for field, part in choice.fields.items():
            _collect(part, f"{path}.{field}", values, into)
    elif isinstance(choice, _Items):
        for index, part in enumerate(choice.items):
            _collect(part, f"{path}.{index}", values, into)


def _bind(hint: Any, value: Any, sizes: dict[str, Any]) -> None:
    """Add the sizes of axes that given tensors have."""
    if isinstance(value, Tensor):
        for option in options_of(hint):
            known = Bindings()
            known.axes = {
                key: (size, "", False)
                for name, size in sizes.items()
                for key in (f"*{name}" if isinstance(size, tuple) else name,)
            }
            if is_array(option) and not Shape(option).mismatch(value, "", known):
                sizes.update({key.lstrip("*"): size for key, (size, _, _) in known.axes.items()})
                return
    for kind, part in _parts(hint, value).values():
        _bind(kind, part, sizes)


def _parts(hint: Any, value: Any) -> dict[str, tuple[Any, Any]]:
    """Return the fields of a record or the items of a collection, each with its annotation."""
    if isinstance(value, _Items):
        value = value.items
    if is_named_tuple(value):
        hints = field_hints(_as_annotated(hint, type(value)))
        return {name: (hints[name], getattr(value, name)) for name in hints}
    if isinstance(value, tuple | list):
        items = cast("Sequence[Any]", value)
        kinds = next((args for o in options_of(hint) if (args := typing.get_args(o))), (None,))
        if Ellipsis in kinds or len(kinds) != len(items):
            kinds = kinds[:1] * len(items)
        return {str(i): both for i, both in enumerate(zip(kinds, items, strict=True))}
    if isinstance(value, _Record) and value.kind is dict:
        value = value.fields
    if isinstance(value, dict):
        records = (one for one in options_of(hint) if is_typeddict(typing.get_origin(one) or one))
        kind = next(records, None)
        if kind is not None:
            hints, given = field_hints(kind), cast("Mapping[str, Any]", value)
            return {name: (hints.get(name), part) for name, part in given.items()}
        mappings = (o for o in options_of(hint) if typing.get_origin(o) in MAPPINGS)
        value_hint = next((typing.get_args(option)[1] for option in mappings), None)
        entries = cast("Mapping[Any, Any]", value)
        return {str(key): (value_hint, part) for key, part in entries.items()}
    if isinstance(value, _Record):
        fields, kind = value.fields, value.kind
    elif dataclasses.is_dataclass(value) and not isinstance(value, type | _Array | _FromSizes):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        kind = type(value)
    else:
        return {}
    hints = field_hints(_as_annotated(hint, kind))
    return {name: (hints[name], part) for name, part in fields.items()}


def _as_annotated(hint: Any, kind: Any) -> Any:
    """Return a generic class with its parameters filled in as the annotation does, or the class."""
    return next((one for one in options_of(hint) if typing.get_origin(one) is kind), kind)


def _named(shapes: typing.Iterable[Shape]) -> dict[str, bool]:
    """Return the axes that need a size, and whether each is variadic (`*batch`)."""
    axes = [axis for shape in shapes for axis in shape.axes]
    needed = {name: False for axis in axes if axis.formula is not None for name in axis.needs}
    named = {axis.name: axis.variadic for axis in axes if _is_named(axis) or _broadcasts(axis)}
    return {**needed, **named}


def _draw_sizes(
    draw: st.DrawFn, named: Mapping[str, bool], choices: Mapping[str, Any], sizes: dict[str, Any]
) -> None:
    """Draw a size for each axis that has none."""
    for name, variadic in named.items():
        if name in sizes:
            continue
        size = choices.get(name, _variadic_sizes() if variadic else _SIZES)
        size = draw(cast("Any", size)) if isinstance(size, st.SearchStrategy) else size
        sizes[name] = tuple(size) if variadic else size


def _is_named(axis: Axis) -> bool:
    return not axis.free and axis.fixed is None and axis.formula is None


def _broadcasts(axis: Axis) -> bool:
    return axis.variadic and axis.stretches and axis.name.isidentifier()


def _variadic_sizes() -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(1, 3), max_size=2).map(tuple)


def _draw_shape(draw: st.DrawFn, shape: Shape, sizes: Mapping[str, Any]) -> tuple[int, ...]:
    whole: list[int] = []
    for axis in shape.axes:
        size = _size_of(draw, axis, sizes)
        whole.extend(size if isinstance(size, tuple) else (size,))
    return tuple(whole)


def _size_of(draw: st.DrawFn, axis: Axis, sizes: Mapping[str, Any]) -> int | tuple[int, ...]:
    if axis.formula is not None:
        computed = int(axis.formula(*[sizes[name] for name in axis.needs]))
        assume(computed >= 0)
        return computed
    if axis.fixed is not None:
        return axis.fixed
    if axis.free and not _broadcasts(axis):
        return draw(_variadic_sizes()) if axis.variadic else draw(_SIZES)
    size: int | tuple[int, ...] = sizes[axis.name]
    if not axis.stretches:
        return size
    if isinstance(size, int):
        return draw(st.sampled_from((size, 1)))
    return tuple(draw(st.sampled_from((one, 1))) for one in size)


def _dtype(shape: Shape, floating: torch.dtype, inputs: Inputs) -> torch.dtype:
    """Choose a tensor's dtype: the call's floating one, where the annotation allows it."""
    if shape.any_dtype or floating in shape.dtypes:
        return floating
    if (complex_dtype := floating.to_complex()) in shape.dtypes:
        return complex_dtype
    allowed = [d for d in (*inputs.get("dtypes", ()), *_PREFERRED) if d in shape.dtypes]
    return allowed[0] if allowed else next(iter(shape.dtypes))


def _draw_tensor(
    draw: st.DrawFn,
    path: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    sizes: dict[str, Any],
    inputs: Inputs,
    normal: bool,
) -> Tensor:
    if dtype.is_complex:
        options = (dtype.to_real(), sizes, inputs, normal)
        pairs = _draw_tensor(draw, path, (*shape, 2), *options)
        return torch.view_as_complex(pairs)
    elements = inputs.get("elements")
    strategy: Any = look_up(path, elements) if isinstance(elements, Mapping) else None
    if isinstance(elements, st.SearchStrategy) and dtype.is_floating_point:
        strategy = elements
    if inspect.isfunction(strategy):
        strategy = strategy(sizes)
    number = int(torch.Size(shape).numel())
    floating = dtype.is_floating_point
    if strategy is None and (number > _MAX_DRAWN or (normal and floating)):
        # The seed depends on the path: otherwise arguments with the same seed would be equal.
        seed = zlib.crc32(path.encode()) + draw(st.integers(0, 9999))
        generator = torch.Generator().manual_seed(seed)
        if normal and floating:
            variates = torch.randn(shape, generator=generator, dtype=torch.float64)
            return variates.round(decimals=6).to(dtype)  # shorter when printed
        low, high = (-96, 97) if floating else (0, 2 if dtype == torch.bool else 4)
        integers = torch.randint(low, high, shape, generator=generator)
        return (integers / 32 if floating else integers).to(dtype)
    few = min(number, _MAX_DRAWN)
    if strategy is None:  # hypothesis counts bytes as one choice, but each element of a list
        choices = (False, True) if dtype == torch.bool else _FLOATS if floating else _INTEGERS
        drawn_bytes = draw(st.binary(min_size=few, max_size=few))
        values = [choices[byte % len(choices)] for byte in drawn_bytes]
    else:
        values = draw(st.lists(strategy, min_size=few, max_size=few))
    drawn = torch.tensor(values, dtype=dtype)
    if few < number:
        generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
        drawn = drawn[torch.randint(few, (number,), generator=generator)]
    return drawn.reshape(shape)


def is_inexact(dtype: torch.dtype) -> bool:
    """Whether a dtype is floating or complex, so that tensors of it can have a gradient."""
    return dtype.is_floating_point or dtype.is_complex


def look_up(path: str, by_argument: Mapping[str, Any]) -> Any:
    """Return the entry of a tensor, or else that of the record or sequence that contains it."""
    while path and path not in by_argument:
        path = path.rpartition(".")[0]
    return by_argument.get(path)


def _evaluate(draw: st.DrawFn, choice: Any, sizes: dict[str, Any]) -> Any:
    """Evaluate what depends on the sizes."""
    if isinstance(choice, _FromSizes):
        value = choice.function(dict(sizes))
        if isinstance(value, st.SearchStrategy):
            return draw(cast("st.SearchStrategy[object]", value))
        return value
    if isinstance(choice, _Record):
        fields = {name: _evaluate(draw, part, sizes) for name, part in choice.fields.items()}
        return _Record(choice.kind, fields)
    if isinstance(choice, _Items):
        items = tuple(_evaluate(draw, part, sizes) for part in choice.items)
        return _Items(choice.kind, items)
    return choice


def _build(choice: Any, path: str, tensors: Mapping[str, Tensor]) -> Any:
    """Build an argument from the drawn tensors."""
    if isinstance(choice, _Array):
        return tensors[path]
    if isinstance(choice, _Record):
        parts = {
            name: _build(part, f"{path}.{name}", tensors) for name, part in choice.fields.items()
        }
        return choice.kind(**parts)
    if isinstance(choice, _Items):
        return choice.kind(
            _build(part, f"{path}.{index}", tensors) for index, part in enumerate(choice.items)
        )
    return choice


def _mapped(value: Any, path: str, change: Callable[[str, Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return change(path, value)
    if isinstance(value, torch.Generator):
        copied = torch.Generator(value.device)
        copied.manual_seed(value.initial_seed())
        copied.set_state(value.get_state())
        return copied
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: _mapped(getattr(value, field.name), f"{path}.{field.name}", change)
            for field in dataclasses.fields(value)
            if field.init
        }
        return dataclasses.replace(value, **fields)
    if isinstance(value, tuple | list):
        items = cast("Sequence[Any]", value)
        places: Sequence[Any] = getattr(items, "_fields", range(len(items)))
        parts = [
            _mapped(item, f"{path}.{name}", change)
            for name, item in zip(places, items, strict=True)
        ]
        if is_named_tuple(items):
            return cast("Any", type(items))(*parts)
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, dict):
        entries = cast("Mapping[Any, Any]", value)
        return {key: _mapped(part, f"{path}.{key}", change) for key, part in entries.items()}
    return value


def named_axes(hint: Any, value: Any, path: str) -> dict[str, tuple[str | None, ...]]:
    """Return the axis names of each tensor in a value, by path."""
    if isinstance(value, Tensor):
        for option in options_of(hint):
            if is_array(option) and not Shape(option).mismatch(value, path, Bindings()):
                return {path: _axis_names(Shape(option), value.ndim)}
        return {}
    found: dict[str, tuple[str | None, ...]] = {}
    for name, (kind, part) in _parts(hint, value).items():
        found.update(named_axes(kind, part, f"{path}.{name}"))
    return found


def _axis_names(shape: Shape, ndim: int) -> tuple[str | None, ...]:
    names: list[str | None] = []
    for axis in shape.axes:
        count = ndim - len(shape.axes) + 1 if axis.variadic else 1
        names.extend([axis.name if _is_named(axis) and not axis.variadic else None] * count)
    return tuple(names)


def violations(call: Call) -> list[BrokenCall]:
    """Return every call that differs from a valid one in one argument and is not valid."""
    signature = Signature(call.fn)
    found: list[BrokenCall] = []
    for name, value in call.items():
        for kind, how, wrong in _wrong_values(signature.hints.get(name), value):
            broken = BrokenCall(call.fn, {**call, name: wrong}, call.sizes)
            broken.argument, broken.violation, broken.kind = name, how, kind
            if not _fits(signature, broken):
                found.append(broken)
    return found


_Kind = Literal["rank", "axis", "dtype", "array", "none", "literal"]


def _wrong_values(hint: Any, value: Any) -> list[tuple[_Kind, str, Any]]:
    wrong: list[tuple[_Kind, str, Any]] = []
    options = options_of(hint)
    if isinstance(value, Tensor) and value.layout == torch.strided:
        sizes = list(value.shape)
        # Sizes that would broadcast come first: they are the worst to accept.
        for axis, size in enumerate(sizes):
            if size > 1:
                how = f"axis {axis} is 1, not {size}"
                wrong.append(("axis", how, value.narrow(axis, 0, 1)))
        for axis, size in enumerate(sizes):
            longer = value.new_zeros([*sizes[:axis], size + 1, *sizes[axis + 1 :]])
            wrong.append(("axis", f"axis {axis} is {size + 1}, not {size}", longer))
        wrong.append(("rank", "one axis more", value[None]))
        if sizes:
            wrong.append(("rank", "one axis fewer", value.new_zeros(sizes[1:])))
        dtype = torch.int64 if is_inexact(value.dtype) else torch.float32
        other = value.new_zeros(sizes, dtype=dtype)
        wrong.append(("dtype", f"{show(other)}, not {show(value)}", other))
        detached = value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
        with contextlib.suppress(RuntimeError):  # NumPy is not installed
            wrong.append(("array", "a NumPy array", detached.numpy()))
    if any(typing.get_origin(option) is Literal for option in options) and isinstance(value, str):
        wrong.append(("literal", "not an option of the Literal", f"not {value}"))
    wrong.extend(_wrong_items(options, value))
    if type(None) not in options:
        wrong.append(("none", "None", None))
    return wrong


def _wrong_items(options: tuple[Any, ...], value: Any) -> list[tuple[_Kind, str, Any]]:
    """Break a field of a record, an item of a tuple, or all items of another collection."""
    if any(has_fields(option) for option in options) and (
        isinstance(value, dict) or is_named_tuple(value) or dataclasses.is_dataclass(value)
    ):
        return _wrong_fields(options, value)
    if isinstance(value, dict):
        entries = cast("Mapping[Any, Any]", value)
        parts = _parts(typing.Union[options], value)  # noqa: UP007
        return [
            (kind, f"every item: {how}", dict.fromkeys(entries, other))
            for hint, item in list(parts.values())[:1]
            for kind, how, other in _wrong_values(hint, item)
        ]
    sequences = [option for option in options if typing.get_origin(option) in SEQUENCES]
    if not sequences or not isinstance(value, tuple | list):
        return []
    hint = sequences[0]
    items = list(cast("Sequence[Any]", value))
    build = cast("Callable[[list[Any]], Any]", list if isinstance(value, list) else tuple)
    # beartype checks one random item of a sequence: a single wrong item might pass.
    all_items = typing.get_origin(hint) is not tuple or Ellipsis in typing.get_args(hint)
    wrong: list[tuple[_Kind, str, Any]] = []
    for index, (item_hint, item) in enumerate(_parts(hint, value).values()):
        for kind, how, other in _wrong_values(item_hint, item):
            if all_items:
                wrong.append((kind, f"every item: {how}", build([other] * len(items))))
            else:
                others = [*items[:index], other, *items[index + 1 :]]
                wrong.append((kind, f"item {index}: {how}", build(others)))
        if all_items:
            break
    return wrong


def _wrong_fields(options: tuple[Any, ...], value: Any) -> list[tuple[_Kind, str, Any]]:
    """Break each field of a record, except in ways that its constructor refuses."""
    wrong: list[tuple[_Kind, str, Any]] = []
    for field, (hint, part) in _parts(typing.Union[options], value).items():  # noqa: UP007
        for kind, how, other in _wrong_values(hint, part):
            try:
                if isinstance(value, dict):
                    broken: Any = {**cast("Mapping[str, Any]", value), field: other}
                elif is_named_tuple(value):
                    broken = value._replace(**{field: other})
                else:
                    broken = dataclasses.replace(value, **{field: other})
            except (TypeError, ValueError, AttributeError):
                continue
            wrong.append((kind, f"{field}: {how}", broken))
    return wrong


def _fits(signature: Signature, call: Call) -> bool:
    """Whether all arguments fit, as jaxtyping and beartype judge it."""
    arguments = {**signature.bound, **call}
    in_order = [name for name in signature.arrays_last if name in arguments]
    with jaxtyped("context"):
        for name in in_order:
            try:
                hint = signature.hint(name, call)
            except (TypeError, AttributeError):  # "{len(xs)}" of a broken xs
                return False
            if not fits(arguments[name], hint):
                return False
    # jaxtyping and beartype do not check the fields of records.
    known = Bindings(arguments)
    problems = (
        Expected(signature.hints[name]).problem(arguments[name], name, known) for name in in_order
    )
    return not any(problems) and not known.finish()


def fits(value: Any, hint: Any) -> bool:
    """Whether a value fits an annotation, given the axis sizes that are already bound."""
    # Each option alone: beartype accepts no union of shapes that were created after its import.
    return any(_is_of(value, option) for option in options_of(hint))


def _is_of(value: Any, option: Any) -> bool:
    kind = typing.get_origin(option)
    if kind is None or not has_fields(option):
        return is_bearable(value, option, conf=BEARTYPE)
    # Of a generic record only the class is judged here, and beartype refuses a generic NamedTuple.
    return isinstance(value, dict if is_typeddict(kind) else kind)
