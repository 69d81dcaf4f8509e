"""Calls of a function, drawn from the shapes in its signature, and calls that break it."""

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
_SEVERAL: Final = st.integers(2, 4)
_NUMBERS: Final = (0.5, 1.0, 2.0, 0.25, 1.5)
_COUNTS: Final = (1, 2, 3)
# Multiples of 1/32 between -3 and 3: exact in every dtype but the eighths, short when printed.
# In the order in which failures shrink: 0, then whole numbers, then the others.
_FLOATS: Final = tuple(
    sorted((n / 32 for n in range(-96, 97)), key=lambda x: (x % 1 != 0, abs(x), x < 0))
)
_INTEGERS: Final = (0, 1, 2, 3)
_MANY: Final = 64  # more elements are drawn as one seed: hypothesis holds some thousand choices
# Of an axis in about one of eight calls of a law: above the blocks that code reads at once.
_LARGE: Final = st.integers(65, 257)
# Which dtype stands for a family where `dtypes` names none of it.
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
    """How [`calls`][termwise.testing.calls] draws; every law takes these as keywords."""

    sizes: Mapping[str, Any]
    """Size of an axis by name: a number, or a strategy. Of a `*batch`: a tuple, or a strategy."""
    dtypes: Sequence[torch.dtype]
    """Dtypes to draw from. All floating tensors of a call have one."""
    elements: Mapping[str, Any] | st.SearchStrategy[float] | None
    """Strategy for the elements of floating tensors, or of one tensor by its argument; of complex
    tensors for their real and imaginary parts."""
    overrides: Mapping[Any, Any]
    """What an argument is given instead: a value, a strategy, or a function of the sizes. Of a
    tuple of names: what they are given together."""
    given: Given | None
    """Strategy for several arguments that are drawn together, by name, or for whole calls."""


class Call(dict[str, Any]):
    """Keyword arguments for one call of a function: `call()` makes it, `fn(**call)` too.

    Printed, it is the call as code.
    """

    fn: Callable[..., Any]
    """What is called."""
    sizes: dict[str, Any]
    """Size of each axis by name; a tuple of sizes for a `*batch`."""
    hints: dict[str, Any]
    """The annotation that an argument was drawn from, where an override narrowed it."""
    given: frozenset[str]
    """Arguments that were given together, by `given`."""

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
        """Call the function."""
        return self.fn(**self)

    def __repr__(self) -> str:
        return write_call(self.fn, self)[1]

    def code(self) -> str:
        """Write the call with its imports, to be pasted into a file."""
        imports, text = write_call(self.fn, self)
        return f"{imports}\n\n{text}"

    def changed(self, **arguments: Any) -> Self:
        """Return the same call with some arguments replaced."""
        other = copy.copy(self)
        other.update(arguments)
        return other

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        """Return the same call with each tensor replaced by `change(path, tensor)`.

        A tensor in a record, a dict or a sequence has the path "argument.field" or "argument.0". A
        `torch.Generator` is copied, in the state it has.
        """
        return self.changed(**{name: _mapped(value, name, change) for name, value in self.items()})

    def tensors(self) -> dict[str, Tensor]:
        """List the tensors by path."""
        found: dict[str, Tensor] = {}

        def keep(path: str, value: Tensor) -> Tensor:
            found[path] = value
            return value

        self.mapped(keep)
        return found

    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """Name the axes of each tensor by path; None for one that the annotation does not name."""
        signature = Signature(self.fn)
        named: dict[str, tuple[str | None, ...]] = {}
        for name, value in self.items():
            hint = self.hints.get(name) or signature.hint(name, self)
            named.update(named_axes(filled_in(hint, self), value, name))
        return named


class BrokenCall(Call):
    """A call in which one argument does not fit the signature."""

    argument: str
    """The argument that was broken."""
    violation: str
    """How, in a few words."""
    kind: Literal["rank", "axis", "dtype", "array", "none", "literal"]
    """Which sort of violation it is."""


def calls(
    fn: Callable[..., Any],
    *,
    sizes: Mapping[str, Any] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    elements: Mapping[str, Any] | st.SearchStrategy[float] | None = None,
    overrides: Mapping[Any, Any] | None = None,
    given: Given | None = None,
) -> st.SearchStrategy[Call]:
    """Draw keyword arguments that satisfy a function's annotations.

    An axis name has one size in a call, wherever it stands. Fixed sizes, `*batch`, `...`, `_`,
    `#broadcast`, sizes computed from others (`"n-1"`) and from arguments (`"{k}+1"`), optional and
    union arguments, `Literal`, numbers, and sequences, mappings by `str` and frozen dataclasses of
    all these are understood. A field of a dataclass shares the axis names, and what an axis is
    computed from is never None. Process groups are None, a `torch.Generator` is a seeded one. What
    cannot be derived, as a callable, takes its default, or must be in `overrides`.

    Args:
        fn: a function under [`contract`][termwise.contract] or any other with jaxtyping
            annotations, a method, or an `nn.Module`, whose `forward` is meant.
        sizes: size of an axis by name, a number or a strategy; for `*batch` a tuple or a strategy
            of tuples. 1 to 4 otherwise, and up to two axes for `*batch`.
        dtypes: floating dtypes to draw one from, which all floating tensors of the call have. An
            integer dtype here is taken where the annotation allows several.
        elements: strategy for the elements of all floating tensors, or a strategy by argument
            ("x", or "f.values" for a field of a record, or "xs" for all of a sequence); a function
            of the sizes gives one that depends on them: `{"tokens": lambda sizes:
            st.integers(0, sizes["vocab"] - 1)}`. Multiples of 1/32 from -3 to 3 otherwise,
            integers from 0 to 3; in a tensor of more than 64 elements from one drawn seed, or
            from 64 elements that the strategy gives.
        overrides: what an argument (or field, "f.indices") is given instead: a value, a strategy,
            a function of the sizes that gives either, or an annotation that is narrower than the
            signature's (`Float[Tensor, "{steps} batch"]`). For an argument that is itself a
            callable, the function is the value. A tuple of names is given values that belong
            together, by a strategy or a function of tuples: `{("values", "indices"): lambda sizes:
            torch.rand(sizes["batch"], 9).topk(2)}`. Here as in `sizes` and `elements`, names that
            the function does not have are passed over, so that one mapping serves a family.
        given: a strategy of arguments by name (`st.fixed_dictionaries`, or calls:
            `calls(fn).filter(...)`), which stand before all others; what it leaves out is drawn, in
            the sizes of what it gives. Or a function of the sizes that returns all arguments
            without a default, or a strategy of them; it may ask for sizes that no annotation names,
            if `sizes` has them. Floating tensors get the dtype of the call, where their annotation
            allows it.

    Returns:
        A strategy of [`Call`][termwise.testing.Call], which is a dict. Shrinks to few, small,
        short numbers; printed, it is code to be pasted.

    Raises:
        TypeError: when drawing, if an argument has no annotation that says what to draw, and
            neither a default nor an override.

    Examples:
        >>> import torch
        >>> from hypothesis import given, settings
        >>> import termwise as tw
        >>> from termwise import testing
        >>> @settings(derandomize=True, max_examples=20)
        ... @given(testing.calls(tw.joint_embedding.vicreg_loss, sizes={"batch": 3}))
        ... def test_nothing_is_negative(call):
        ...     assert call().loss >= 0 and call["z1"].shape[0] == 3
        >>> test_nothing_is_negative()
    """
    inputs = Inputs(
        sizes=sizes or {},
        dtypes=dtypes,
        elements=elements,
        overrides=overrides or {},
        given=given,
    )
    return drawn_calls(fn, inputs).map(lambda several: several[0])


def broken_calls(
    fn: Callable[..., Any],
    *,
    sizes: Mapping[str, Any] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    elements: Mapping[str, Any] | st.SearchStrategy[float] | None = None,
    overrides: Mapping[Any, Any] | None = None,
    given: Given | None = None,
) -> st.SearchStrategy[BrokenCall]:
    """Draw calls in which one argument, named, does not fit its annotation.

    One of: an axis more or fewer; a shared axis one longer, or of size 1 (which would broadcast);
    a dtype of another family; a NumPy array; None; a string that is none of a `Literal`'s. An item
    of a tuple too, or all items of a list, is broken so. What jaxtyping and beartype themselves
    would accept is not drawn.

    Args:
        fn: as for [`calls`][termwise.testing.calls], as are all others.
        sizes: size of an axis by name.
        dtypes: floating dtypes to draw from.
        elements: strategies for elements.
        overrides: what arguments are given.
        given: arguments that are drawn together.

    Returns:
        A strategy of [`BrokenCall`][termwise.testing.BrokenCall], which says what is broken in
        `argument` and `violation`.

    Raises:
        TypeError: when drawing, if nothing in the signature can be broken.

    Examples:
        >>> import pytest
        >>> from hypothesis import given, settings
        >>> import termwise as tw
        >>> from termwise import testing
        >>> @settings(derandomize=True, max_examples=20)
        ... @given(testing.broken_calls(tw.joint_embedding.vicreg_loss, sizes={"batch": 3}))
        ... def test_refused_by_name(broken):
        ...     with pytest.raises(TypeError, match=broken.argument):
        ...         broken()
        >>> test_refused_by_name()
    """
    inputs = Inputs(
        sizes=sizes or {},
        dtypes=dtypes,
        elements=elements,
        overrides=overrides or {},
        given=given,
    )
    return _broken(fn, inputs)


@st.composite
def _broken(draw: st.DrawFn, fn: Callable[..., Any], inputs: Inputs) -> BrokenCall:
    call = draw(drawn_calls(fn, inputs))[0]
    found = violations(call)
    if not found:
        signature = Signature(fn)
        options = [option for hint in signature.hints.values() for option in options_of(hint)]
        # An optional tensor that is None here is a tensor in another call.
        assume(not any(is_array(option) for option in options))
        raise TypeError(f"broken_calls: {signature.name} takes nothing that can be broken")
    # Argument by argument and kind by kind: they stay the same while the sizes shrink.
    argument = draw(st.sampled_from(list(dict.fromkeys(one.argument for one in found))))
    found = [one for one in found if one.argument == argument]
    kind = draw(st.sampled_from(list(dict.fromkeys(one.kind for one in found))))
    return draw(st.sampled_from([one for one in found if one.kind == kind]))


class Signature:
    """A function's parameters, each with its annotation."""

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
            raise TypeError(f"calls: {self.name} is a class: give a function, or an instance")
        owner = inner
        if isinstance(inner, nn.Module):
            owner = inner.forward
        elif not inspect.isroutine(inner):
            owner = inner.__call__
        # What a partial holds is not drawn, but "{k}" may ask for it.
        taken = inspect.signature(cast("Any", owner))
        bound = taken.bind_partial(*by_position, **by_name).arguments
        unlimited = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        self.held: dict[str, Any] = {
            name: value
            for name, value in bound.items()
            if taken.parameters[name].kind not in unlimited
        }
        self.parameters = {
            name: parameter for name, parameter in taken.parameters.items() if name not in self.held
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
                raise TypeError(f"calls: {self.name} takes *{name}, which no annotation limits")
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise TypeError(f"calls: {self.name} takes {name} by position only")

    @functools.cached_property
    def arrays_last(self) -> list[str]:
        """List all names: "{k}+1" can be computed only from a k that is known to be a number."""
        return sorted(self.hints, key=lambda name: has_arrays(self.hints[name]))

    def hint(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Return an argument's annotation, with the arguments' values in it ("{k}+1" is "2+1")."""
        known = {**self.defaults, **self.held, **arguments}
        options = [filled_in(option, known) for option in options_of(self.hints.get(name))]
        return options[0] if len(options) == 1 else typing.Union[tuple(options)]  # noqa: UP007


def axis_names(hint: Any) -> list[str]:
    """List the names of axes in an annotation."""
    if is_array(hint):
        return [a.name for a in (Axis(word) for word in hint.dim_str.split()) if _is_named(a)]
    within = typing.get_args(hint)
    if has_fields(hint):
        within = tuple(field_hints(hint).values())
    return [name for part in within for name in axis_names(part)]


def _asked_for(hint: Any) -> set[str]:
    """List the names that axes are computed from: k in "{k}+1"."""
    if is_array(hint):
        parts = ast.walk(ast.parse(f"f{hint.dim_str!r}", mode="eval"))
        return {part.id for part in parts if isinstance(part, ast.Name)}
    return {name for part in typing.get_args(hint) for name in _asked_for(part)}


@dataclasses.dataclass(frozen=True)
class _Array:
    """A tensor to be drawn once all sizes are known."""

    hint: Any


@dataclasses.dataclass(frozen=True)
class _Record:
    """A dataclass, or a dict, to be made once its fields are drawn."""

    kind: Callable[..., Any]
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Several:
    """A sequence of what is to be drawn."""

    kind: type[list[Any]] | type[tuple[Any, ...]]
    items: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _OfSizes:
    """A function of the sizes."""

    function: Callable[[dict[str, Any]], Any]


@st.composite
def drawn_calls(
    draw: st.DrawFn,
    fn: Callable[..., Any],
    inputs: Inputs,
    *,
    count: int = 1,
    generic: bool = False,
    large: bool = False,
    at_least_two: str = "",
    at: Callable[[list[str]], Sequence[Mapping[str, int]]] | None = None,
    meta: bool = False,
) -> list[Call]:
    """Draw calls that differ in their floating tensors alone, or else in the sizes `at` asks for.

    Generic: elements that no strategy was given for are normal variates, so that no two are equal
    and none is 0, as gradients compared with finite differences need. Large: now and then an axis
    that `sizes` does not name has such a size. At least two: the size of this axis, if `sizes` does
    not name it. At: from the axes whose sizes no tensor sets, the sizes of one call after another,
    of contiguous tensors. Meta: tensors without data.
    """
    if unknown := inputs.keys() - Inputs.__annotations__.keys():
        known = ", ".join(Inputs.__annotations__)
        raise TypeError(f"calls take no {', '.join(sorted(unknown))}, only {known}")
    signature = Signature(fn)
    given: Any = inputs.get("given")
    together: dict[str, Any] = {}
    # First what each argument is, and all that has no shape; then sizes; then tensors.
    chosen: dict[str, Any] = {}
    of_sizes = None if isinstance(given, st.SearchStrategy) else given
    if of_sizes is None:
        together = dict(draw(cast("Any", given))) if given is not None else {}
        chosen = _choose_all(draw, signature, inputs.get("overrides") or {}, together)
    values = dict(signature.held)
    for name, value in chosen.items():
        if isinstance(value, _Several):  # drawn later, but "{len(xs)}" is known
            values[name] = value.items
        elif isinstance(value, _Record) and value.kind is dict:
            values[name] = value.fields
        elif not isinstance(value, _Array | _Record | _OfSizes):
            values[name] = value
    arrays: dict[str, Shape] = {}
    sizes: dict[str, Any] = {}
    late = [name for name, choice in chosen.items() if isinstance(choice, _OfSizes)]
    try:
        for name, value in signature.held.items():
            _bind(signature.hint(name, values), value, sizes)
        for name, choice in chosen.items():
            _collect(choice, name, values, arrays)
            _bind(signature.hint(name, values), choice, sizes)
    except NameError as error:
        asked = f"calls: {signature.name} has an axis computed from {error.name}"
        if error.name in late:
            raise TypeError(
                f"{asked}, which overrides compute from the sizes: this is circular, give a value"
            ) from None
        raise TypeError(f"{asked}, which is not known before the sizes: give a value") from None
    of_axes: dict[str, Any] = dict(inputs.get("sizes") or {})
    named = _named(arrays.values())
    if of_sizes is not None:
        hinted = [name for hint in signature.hints.values() for name in axis_names(hint)]
        named = dict.fromkeys((*hinted, *of_axes), False)
    free = [name for name, variadic in named.items() if not variadic and name not in sizes]
    several: Sequence[Mapping[str, int]] = at(free) if at is not None else ({},)
    unnamed = [name for name in free if name not in of_axes]
    if large and unnamed and draw(st.sampled_from((False,) * 6 + (True,))):
        of_axes[draw(st.sampled_from(unnamed))] = _LARGE
    if at_least_two in free:
        of_axes.setdefault(at_least_two, _SEVERAL)
    _draw_sizes(draw, named, of_axes, sizes)
    possible = inputs.get("dtypes", (torch.float32,))
    floating = [d.to_real() if d.is_complex else d for d in possible if is_inexact(d)]
    dtype = draw(st.sampled_from(floating or [torch.float32]))
    dtypes = {path: _dtype(shape, dtype, inputs) for path, shape in arrays.items()}
    hints = {name: choice.hint for name, choice in chosen.items() if isinstance(choice, _Array)}
    drawn: list[Call] = []
    for other_sizes in several:
        here = {**sizes, **other_sizes}
        shapes = {path: _draw_shape(draw, shape, here) for path, shape in arrays.items()}
        ready = {name: _settled(draw, choice, here) for name, choice in chosen.items()}
        if of_sizes is not None:
            together = dict(_settled(draw, _OfSizes(of_sizes), here))
        for name in (name for name in signature.parameters if name in together):
            hint = signature.hint(name, {**values, **together})
            ready[name] = _of_dtype(together[name], hint, name, dtype)
        tensors: dict[str, Tensor] = {}
        for _ in range(count):
            for path, shape in shapes.items():
                if meta:
                    tensors[path] = torch.empty(shape, dtype=dtypes[path], device="meta")
                elif path not in tensors or is_inexact(dtypes[path]):
                    tensor = _draw_tensor(draw, path, shape, dtypes[path], here, inputs, generic)
                    tensors[path] = tensor if at is not None else _laid_out(draw, tensor)
            arguments = {name: _made(choice, name, tensors) for name, choice in ready.items()}
            call = Call(fn, arguments, here, hints, together)
            drawn.append(call.mapped(lambda path, t: t.to("meta")) if meta else call)
    return drawn


def _choose_all(
    draw: st.DrawFn,
    signature: Signature,
    overrides: Mapping[Any, Any],
    together: Mapping[str, Any],
) -> dict[str, Any]:
    """Decide what each argument is."""
    one_by_one = _one_by_one(draw, overrides)
    measures = {name for hint in signature.hints.values() for name in _asked_for(hint)}
    chosen: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if name in together:
            chosen[name] = together[name]
            continue
        hint = signature.hints.get(name)
        if name in measures:  # None has no size
            some = [option for option in options_of(hint) if option is not type(None)]
            hint = typing.Union[tuple(some)] if some else hint  # noqa: UP007
        chosen[name] = _choose(draw, signature.name, name, hint, parameter.default, one_by_one)
    return chosen


def _one_by_one(draw: st.DrawFn, overrides: Mapping[Any, Any]) -> dict[str, Any]:
    """Take apart what several arguments are given together."""
    parts: dict[str, Any] = {}
    for names, value in overrides.items():
        if isinstance(names, str):
            parts[names] = value
            continue
        if isinstance(value, st.SearchStrategy):
            value = draw(cast("Any", value))
        if inspect.isfunction(value):
            parts.update(_late_parts(draw, names, value))
        else:
            parts.update(_each(names, value))
    return parts


def _late_parts(
    draw: st.DrawFn, names: tuple[str, ...], function: Callable[..., Any]
) -> dict[str, Any]:
    """Evaluate a function of the sizes once for all the arguments that it gives."""

    @functools.cache
    def whole(sizes: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
        return _each(names, _settled(draw, _OfSizes(function), dict(sizes)))

    def part(name: str) -> _OfSizes:
        return _OfSizes(lambda sizes: whole(tuple(sizes.items()))[name])

    return {name: part(name) for name in names}


def _each(names: tuple[str, ...], values: Sequence[Any]) -> dict[str, Any]:
    if len(values) != len(names):
        asked = ", ".join(names)
        raise TypeError(
            f"calls: overrides of ({asked}) need {len(names)} values, got {len(values)}"
        )
    return dict(zip(names, values, strict=True))


def _of_dtype(value: Any, hint: Any, path: str, dtype: torch.dtype) -> Any:
    """Convert floating tensors to the dtype of the call, if the annotation takes it."""

    def changed(path: str, tensor: Tensor) -> Tensor:
        wanted = dtype.to_complex() if tensor.is_complex() else dtype
        return tensor.to(wanted) if is_inexact(tensor.dtype) else tensor

    other = _mapped(value, path, changed)
    return value if Expected(hint).problem(other, path, Bindings()) else other


def _laid_out(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """Now and then return a tensor with strides as users have them: a `.view(-1)` of it fails."""
    if not tensor.ndim:
        return tensor
    plain: list[Callable[[Tensor], Tensor]] = [torch.clone] * 4
    ways = [_sliced, *[_turned] * (tensor.ndim > 1), *[_channels_last] * (tensor.ndim == 4)]
    return draw(st.sampled_from([*plain, *ways]))(tensor)


def _sliced(tensor: Tensor) -> Tensor:
    """Return the first columns of more columns, or every second element of more elements."""
    if tensor.ndim == 1:
        return tensor.repeat_interleave(2)[::2]
    return torch.cat((tensor, tensor), -1)[..., : tensor.shape[-1]]


def _turned(tensor: Tensor) -> Tensor:
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
    """Decide what an argument is: a value, or something to be drawn once sizes are known."""
    options = options_of(hint)
    if path in overrides:
        value: Any = overrides[path]
        if isinstance(value, _OfSizes):
            return value
        if isinstance(value, st.SearchStrategy):
            value = draw(cast("st.SearchStrategy[object]", value))
        if is_array(value):
            return _Array(value)
        of_sizes = inspect.isfunction(value) and not any(_is_callable(o) for o in options)
        return _OfSizes(cast("Callable[..., Any]", value)) if of_sizes else value
    if torch.Generator in options:
        return torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if ProcessGroup in options and type(None) in options:
        return None
    possible = [option for option in options if _derivable(option)]
    if not possible:
        if default is not inspect.Parameter.empty:
            return default
        given = "no annotation" if hint is None else f"the annotation {spell(hint)}"
        raise TypeError(
            f"calls: {function} needs {path}, and {given} does not say what to draw: "
            f"name it in overrides"
        )
    possible.sort(key=lambda option: option is not type(None))  # None shrinks best
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
            if field not in defaults or defaults[field] is not _NOT_GIVEN
        }
        return _Record(option, fields)
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
    return _Several(list if origin is list else tuple, tuple(items))


def _derivable(option: Any) -> bool:
    """Whether an annotation says what to draw."""
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
    """Whether an annotation asks for something to call."""
    if option is Callable or typing.get_origin(option) is Callable:
        return True
    return getattr(option, "_is_protocol", False) and "__call__" in vars(option)


_NOT_GIVEN: Final = object()


def _defaults(kind: Any) -> dict[str, Any]:
    """List the defaults of a record's fields; of a field that is not given, a mark of its own."""
    if not dataclasses.is_dataclass(kind):
        return dict(getattr(kind, "_field_defaults", {}))
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if not field.init:
            found[field.name] = _NOT_GIVEN
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    return found


def _collect(choice: Any, path: str, values: Mapping[str, Any], into: dict[str, Shape]) -> None:
    """List the tensors to be drawn by path."""
    if isinstance(choice, _Array):
        into[path] = Shape(filled_in(choice.hint, dict(values)))
    elif isinstance(choice, _Record):
        for field, part in choice.fields.items():
            _collect(part, f"{path}.{field}", values, into)
    elif isinstance(choice, _Several):
        for index, part in enumerate(choice.items):
            _collect(part, f"{path}.{index}", values, into)


def _bind(hint: Any, value: Any, sizes: dict[str, Any]) -> None:
    """Take the sizes of axes from the tensors that were given."""
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
    """List the fields of a record or the items of a collection, each with its annotation."""
    if isinstance(value, _Several):
        value = value.items
    if is_named_tuple(value):
        hints = field_hints(value.__class__)
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
        kind = next((option for option in options_of(hint) if is_typeddict(option)), None)
        if kind is not None:
            hints, given = field_hints(kind), cast("Mapping[str, Any]", value)
            return {name: (hints.get(name), part) for name, part in given.items()}
        asked = (option for option in options_of(hint) if typing.get_origin(option) in MAPPINGS)
        of_values = next((typing.get_args(option)[1] for option in asked), None)
        entries = cast("Mapping[Any, Any]", value)
        return {str(key): (of_values, part) for key, part in entries.items()}
    if isinstance(value, _Record):
        fields, kind = value.fields, value.kind
    elif dataclasses.is_dataclass(value) and not isinstance(value, type | _Array | _OfSizes):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        kind = type(value)
    else:
        return {}
    hints = field_hints(kind)
    return {name: (hints[name], part) for name, part in fields.items()}


def _named(shapes: typing.Iterable[Shape]) -> dict[str, bool]:
    """List the axes that need a size, and whether each stands for any number of axes."""
    axes = [axis for shape in shapes for axis in shape.axes]
    needed = {name: False for axis in axes if axis.formula is not None for name in axis.needs}
    named = {axis.name: axis.variadic for axis in axes if _is_named(axis) or _broadcasts(axis)}
    return {**needed, **named}


def _draw_sizes(
    draw: st.DrawFn, named: Mapping[str, bool], given: Mapping[str, Any], sizes: dict[str, Any]
) -> None:
    """Draw a size for each name that has none."""
    for name, variadic in named.items():
        if name in sizes:
            continue
        size = given.get(name, _several_sizes() if variadic else _SIZES)
        size = draw(cast("Any", size)) if isinstance(size, st.SearchStrategy) else size
        sizes[name] = tuple(size) if variadic else size


def _is_named(axis: Axis) -> bool:
    return not axis.free and axis.fixed is None and axis.formula is None


def _broadcasts(axis: Axis) -> bool:
    return axis.variadic and axis.stretches and axis.name.isidentifier()


def _several_sizes() -> st.SearchStrategy[tuple[int, ...]]:
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
        return draw(_several_sizes()) if axis.variadic else draw(_SIZES)
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
    if (of_complex := floating.to_complex()) in shape.dtypes:
        return of_complex
    wanted = [d for d in (*inputs.get("dtypes", ()), *_PREFERRED) if d in shape.dtypes]
    return wanted[0] if wanted else next(iter(shape.dtypes))


def _draw_tensor(
    draw: st.DrawFn,
    path: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    sizes: dict[str, Any],
    inputs: Inputs,
    generic: bool,
) -> Tensor:
    if dtype.is_complex:
        parts = (dtype.to_real(), sizes, inputs, generic)
        pairs = _draw_tensor(draw, path, (*shape, 2), *parts)
        return torch.view_as_complex(pairs)
    elements = inputs.get("elements")
    known: Any = given_for(path, elements) if isinstance(elements, Mapping) else None
    if isinstance(elements, st.SearchStrategy) and dtype.is_floating_point:
        known = elements
    if inspect.isfunction(known):
        known = known(sizes)
    number = int(torch.Size(shape).numel())
    of_numbers = dtype.is_floating_point
    if known is None and (number > _MANY or (generic and dtype.is_floating_point)):
        # The path is in the seed, or arguments with one seed would be equal.
        seed = zlib.crc32(path.encode()) + draw(st.integers(0, 9999))
        generator = torch.Generator().manual_seed(seed)
        if generic and dtype.is_floating_point:
            normal = torch.randn(shape, generator=generator, dtype=torch.float64)
            return normal.round(decimals=6).to(dtype)  # shorter when printed
        low, high = (-96, 97) if of_numbers else (0, 2 if dtype == torch.bool else 4)
        whole = torch.randint(low, high, shape, generator=generator)
        return (whole / 32 if of_numbers else whole).to(dtype)
    few = min(number, _MANY)
    if known is None:  # bytes are one choice for hypothesis, a list is one or two for each element
        usual = (False, True) if dtype == torch.bool else _FLOATS if of_numbers else _INTEGERS
        drawn_bytes = draw(st.binary(min_size=few, max_size=few))
        values = [usual[byte % len(usual)] for byte in drawn_bytes]
    else:
        values = draw(st.lists(known, min_size=few, max_size=few))
    drawn = torch.tensor(values, dtype=dtype)
    if few < number:
        generator = torch.Generator().manual_seed(zlib.crc32(path.encode()))
        drawn = drawn[torch.randint(few, (number,), generator=generator)]
    return drawn.reshape(shape)


def is_inexact(dtype: torch.dtype) -> bool:
    """Whether a dtype is of real or complex numbers, which laws differentiate by."""
    return dtype.is_floating_point or dtype.is_complex


def given_for(path: str, by_argument: Mapping[str, Any]) -> Any:
    """Look up a tensor, or else the record or the sequence that it is in."""
    while path and path not in by_argument:
        path = path.rpartition(".")[0]
    return by_argument.get(path)


def _settled(draw: st.DrawFn, choice: Any, sizes: dict[str, Any]) -> Any:
    """Evaluate what depends on the sizes."""
    if isinstance(choice, _OfSizes):
        value = choice.function(dict(sizes))
        if isinstance(value, st.SearchStrategy):
            return draw(cast("st.SearchStrategy[object]", value))
        return value
    if isinstance(choice, _Record):
        fields = {name: _settled(draw, part, sizes) for name, part in choice.fields.items()}
        return _Record(choice.kind, fields)
    if isinstance(choice, _Several):
        items = tuple(_settled(draw, part, sizes) for part in choice.items)
        return _Several(choice.kind, items)
    return choice


def _made(choice: Any, path: str, tensors: Mapping[str, Tensor]) -> Any:
    """Put tensors in their places."""
    if isinstance(choice, _Array):
        return tensors[path]
    if isinstance(choice, _Record):
        parts = {
            name: _made(part, f"{path}.{name}", tensors) for name, part in choice.fields.items()
        }
        return choice.kind(**parts)
    if isinstance(choice, _Several):
        return choice.kind(
            _made(part, f"{path}.{index}", tensors) for index, part in enumerate(choice.items)
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
    """Name the axes of each tensor in a value by path."""
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
        several = ndim - len(shape.axes) + 1 if axis.variadic else 1
        names.extend([axis.name if _is_named(axis) and not axis.variadic else None] * several)
    return tuple(names)


def violations(call: Call) -> list[BrokenCall]:
    """List every call that differs from a valid one in one argument that no longer fits."""
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
        # First what would broadcast: it is the worst to be taken.
        for axis, size in enumerate(sizes):
            if size > 1:
                how = f"axis {axis} is 1, not {size}"
                wrong.append(("axis", how, value.narrow(axis, 0, 1)))
        for axis, size in enumerate(sizes):
            longer = value.new_zeros([*sizes[:axis], size + 1, *sizes[axis + 1 :]])
            wrong.append(("axis", f"axis {axis} is {size + 1}, not {size}", longer))
        wrong.append(("rank", "an axis more", value[None]))
        if sizes:
            wrong.append(("rank", "an axis fewer", value.new_zeros(sizes[1:])))
        family = torch.int64 if is_inexact(value.dtype) else torch.float32
        other = value.new_zeros(sizes, dtype=family)
        wrong.append(("dtype", f"{show(other)}, not {show(value)}", other))
        plain = value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
        with contextlib.suppress(RuntimeError):  # NumPy is not installed: nobody passes its arrays
            wrong.append(("array", "a NumPy array", plain.numpy()))
    if any(typing.get_origin(option) is Literal for option in options) and isinstance(value, str):
        wrong.append(("literal", "no such option", f"not {value}"))
    wrong.extend(_wrong_items(options, value))
    if type(None) not in options:
        wrong.append(("none", "None", None))
    return wrong


def _wrong_items(options: tuple[Any, ...], value: Any) -> list[tuple[_Kind, str, Any]]:
    """Break a field, or an item of a tuple; of what has any length, all items alike."""
    if any(has_fields(option) for option in options) and (
        isinstance(value, dict) or is_named_tuple(value) or dataclasses.is_dataclass(value)
    ):
        return _wrong_fields(options, value)
    if isinstance(value, dict):
        entries = cast("Mapping[Any, Any]", value)
        kind_of = _parts(typing.Union[options], value)  # noqa: UP007
        return [
            (kind, f"every item: {how}", dict.fromkeys(entries, other))
            for hint, item in list(kind_of.values())[:1]
            for kind, how, other in _wrong_values(hint, item)
        ]
    asked = [option for option in options if typing.get_origin(option) in SEQUENCES]
    if not asked or not isinstance(value, tuple | list):
        return []
    items = list(cast("Sequence[Any]", value))
    made = cast("Callable[[list[Any]], Any]", list if isinstance(value, list) else tuple)
    # Of a sequence beartype looks at one item, by chance: one wrong item among others might pass.
    alike = typing.get_origin(asked[0]) is not tuple or Ellipsis in typing.get_args(asked[0])
    wrong: list[tuple[_Kind, str, Any]] = []
    for index, (hint, item) in enumerate(_parts(asked[0], value).values()):
        for kind, how, other in _wrong_values(hint, item):
            if alike:
                wrong.append((kind, f"every item: {how}", made([other] * len(items))))
            else:
                others = [*items[:index], other, *items[index + 1 :]]
                wrong.append((kind, f"item {index}: {how}", made(others)))
        if alike:
            break
    return wrong


def _wrong_fields(options: tuple[Any, ...], value: Any) -> list[tuple[_Kind, str, Any]]:
    """Break a field of a record; what its own constructor refuses is left out."""
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
    """Ask jaxtyping and beartype themselves whether all arguments fit."""
    arguments = {**signature.held, **call}
    in_order = [name for name in signature.arrays_last if name in arguments]
    with jaxtyped("context"):
        for name in in_order:
            try:
                hint = signature.hint(name, call)
            except (TypeError, AttributeError):  # "{len(xs)}" of a broken xs
                return False
            if not fits(arguments[name], hint):
                return False
    # Jaxtyping and beartype do not look into records.
    known = Bindings(arguments)
    problems = (
        Expected(signature.hints[name]).problem(arguments[name], name, known) for name in in_order
    )
    return not any(problems) and not known.finish()


def fits(value: Any, hint: Any) -> bool:
    """Ask jaxtyping and beartype whether a value is of an annotation, in the bindings so far."""
    # Option by option: beartype takes no union of shapes that were made after its import.
    return any(is_bearable(value, option, conf=BEARTYPE) for option in options_of(hint))
