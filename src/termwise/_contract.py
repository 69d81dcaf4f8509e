"""One decorator that makes a signature's shapes and dtypes binding, in eager and compiled."""

import ast
import builtins
import functools
import inspect
import numbers
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, ParamSpec, TypeAlias, TypeVar, cast

import torch
from beartype import BeartypeConf, beartype
from beartype.door import is_bearable
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import AbstractArray, AnnotationError, TypeCheckError, config, jaxtyped
from torch import Tensor

from ._groups import ProcessGroup
from ._terms import Terms

P = ParamSpec("P")
R = TypeVar("R")

Axes: TypeAlias = dict[str, tuple[Any, str]]  # axis name -> (its size, the argument that fixed it)

# An int where a float is declared is what every caller means by `gamma=1`.
BEARTYPE: Final = BeartypeConf(is_pep484_tower=True)

# Each of their items is looked at, where beartype takes one of many.
SEQUENCES: Final[Any] = (list, tuple, Sequence)
MAPPINGS: Final[Any] = (dict, Mapping)

DTYPE_NAMES: Final = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


class ContractError(TypeCheckError):
    """An argument or a result does not have the shape, the dtype or the type its annotation asks.

    A subclass of jaxtyping's `TypeCheckError`, hence of `TypeError`. The message is one sentence:
    the function, the argument, the annotation, what came, and which argument had fixed the axis.
    """


def contract(fn: Callable[P, R]) -> Callable[P, R]:
    """Enforce a function's jaxtyping annotations on every call.

    In eager, jaxtyping and beartype check the arguments before the body runs; then the result is
    checked, and where it is a [`Terms`][termwise.Terms] record its fields are, in the same axis
    bindings. While `torch.compile` or `torch.export` traces, jaxtyping cannot run, so rank, axis
    sizes, dtype family and literals are compared in plain Python: once, at trace time, with no
    trace left in the graph. A compiled call pays nothing for it.

    `JAXTYPING_DISABLE=1` in the environment turns all of it off.

    Args:
        fn: a function or method. Annotate tensors with jaxtyping types
            (`Float[Tensor, "batch dim"]`); an axis name that occurs twice has one size in one
            call. Each value of `*zs: Float[...]` and `**zs: Float[...]` is looked at, and each item
            of a `list`, `tuple`, `Sequence`, `dict` or `Mapping` of tensors, in a result too. Every
            other annotation is enforced as well (`Literal`, `float`, classes, unions).
            Axes computed from argument values (`"{k}+1"`) are compared in eager only.

    Returns:
        The same function, checked. Its name, signature, docstring and static type are kept.

    Raises:
        ContractError: at the call, naming what did not fit. `torch.compile(fullgraph=True)`
            reports it as an error of its own with this one's text inside.

    Examples:
        >>> import torch
        >>> from jaxtyping import Float
        >>> from torch import Tensor
        >>> import termwise as tw
        >>> @tw.contract
        ... def squared_distance(x: Float[Tensor, "batch dim"], y: Float[Tensor, "batch dim"]):
        ...     return (x - y).square().sum()
        >>> squared_distance(torch.zeros(8, 4), torch.zeros(1, 4))
        Traceback (most recent call last):
        termwise.ContractError: squared_distance: y needs Float[Tensor, "batch dim"], got
        float32[1, 4]: axis batch is 1, but it is 8 in x
    """
    signature = inspect.signature(fn)
    hints = typing.get_type_hints(fn, include_extras=True)
    returns = hints.pop("return", Any)
    name = fn.__qualname__.rpartition("<locals>.")[2]
    expected = {parameter: _Expected(hint) for parameter, hint in hints.items()}
    # A result is a record, a tuple, or one value; its parts are checked in the same axes.
    results = _expected_parts(returns)
    whole = None if results else _Expected(returns)
    kind = typing.get_origin(returns) or returns
    if not _is_class(kind):
        kind = object
    spread = _Spread(signature)
    looks_into = any(e.collections for e in expected.values()) or spread.rest in expected
    computed = any("{" in e.spelled for e in expected.values())
    run = _under_beartype(fn, computed=computed)
    groups = tuple(parameter for parameter in signature.parameters if parameter.endswith("_group"))
    floats = {parameter for parameter, hint in hints.items() if float in options_of(hint)}

    def prepared(
        args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Refuse what is sharded, and turn real numbers of any class into floats."""
        by_position, by_keyword = list(args), dict(kwargs)
        for index, (parameter, owner, value) in enumerate(spread(args, kwargs)):
            if is_sharded(value) and parameter in expected:
                raise ContractError(f"{name}: {of_shards(value, owner, hints[parameter], groups)}")
            if parameter in floats and is_another_real(value):
                if index < len(by_position):
                    by_position[index] = float(value)
                else:
                    by_keyword[owner] = float(value)
        return tuple(by_position), by_keyword

    def bind(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Axes:
        axes: Axes = {}
        for parameter, owner, value in spread(args, kwargs):
            if parameter in expected:
                problem = expected[parameter].problem(value, owner, axes)
                if problem:
                    raise ContractError(f"{name}: {problem}")
        return axes

    def check_result(result: Any, axes: Axes) -> None:
        if not isinstance(result, kind):
            raise ContractError(f"{name}: the result needs {spell(returns)}, got {show(result)}")
        for part, expectation in results.items():
            value = getattr(result, part) if isinstance(part, str) else result[part]
            problem = expectation.problem(value, f"{part}", axes)
            if problem:
                raise ContractError(f"{name}: the result's {problem}")
        if whole is not None:
            problem = whole.problem(result, "the result", axes)
            if problem:
                raise ContractError(f"{name}: {problem}")

    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        axes = bind(args, kwargs)
        result = fn(*args, **kwargs)
        check_result(result, axes)
        return result

    def eager(*args: P.args, **kwargs: P.kwargs) -> R:
        with jaxtyped("context"):
            # Before the body, which may put other items into a list.
            axes = bind(args, kwargs) if looks_into else None
            if looks_into and computed:
                problem = _misfit_of_computed(signature, hints, args, kwargs)
                if problem:
                    raise ContractError(f"{name}: {problem}")
            try:
                result = run(*args, **kwargs)
            except (BeartypeCallHintViolation, TypeCheckError, AnnotationError) as violation:
                if _is_below(fn, violation):  # it is about a call that the body made
                    raise
                message = _explain(name, signature, hints, args, kwargs)
                if message is None and isinstance(violation, AnnotationError):
                    raise
                message = message or f"{name}: {violation}"
                raise ContractError(message) from violation.__cause__
            check_result(result, bind(args, kwargs) if axes is None else axes)
        return result

    # Where Dynamo has given up on a caller it still tries each frame below, and there it answers
    # isinstance(x, Float[...]) with False. To ask for the shield imports Dynamo, which takes a
    # second: it is asked for only where Dynamo is there.
    @functools.cache
    def shielded() -> Callable[P, R]:
        return cast("Callable[P, R]", torch.compiler.disable(eager))

    @functools.wraps(fn)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if config.jaxtyping_disable:
            return fn(*args, **kwargs)
        args, kwargs = cast("Any", prepared(args, kwargs))
        if torch.compiler.is_compiling():
            return traced(*args, **kwargs)
        if "torch._dynamo" in sys.modules:
            return shielded()(*args, **kwargs)
        return eager(*args, **kwargs)

    # Dynamo keeps its caches and its recompile limit by code object, and closures share one:
    # without a copy for each function, the ninth loss compiled in a process would fail.
    unshared = cast("types.FunctionType", checked)
    unshared.__code__ = unshared.__code__.replace(co_name=fn.__name__)
    return checked


ContractError.__module__ = "termwise"  # as users import it, and as tracebacks print it


def _under_beartype(fn: Callable[P, R], *, computed: bool) -> Callable[P, R]:
    """Give fn with its arguments checked by beartype; the result is checked by `contract`."""
    arguments_only = types.FunctionType(
        fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__
    )
    arguments_only.__kwdefaults__ = fn.__kwdefaults__
    arguments_only.__qualname__, arguments_only.__module__ = fn.__qualname__, fn.__module__
    arguments_only.__annotations__ = {
        parameter: hint for parameter, hint in fn.__annotations__.items() if parameter != "return"
    }
    typechecker = beartype(conf=BEARTYPE)
    # Only jaxtyping's own decorator knows the arguments that an axis "{k}+1" needs. The context
    # that all others run in costs a third as much.
    return (
        jaxtyped(arguments_only, typechecker=typechecker)
        if computed
        else typechecker(arguments_only)
    )


def _expected_parts(returns: Any) -> dict[str | int, "_Expected"]:
    """List what is known of a result: the fields of a record, or the elements of a tuple."""
    if isinstance(returns, type) and issubclass(returns, Terms):
        return {field: _Expected(hint) for field, hint in typing.get_type_hints(returns).items()}
    if typing.get_origin(returns) is tuple and Ellipsis not in typing.get_args(returns):
        return {index: _Expected(hint) for index, hint in enumerate(typing.get_args(returns))}
    return {}


def _is_below(fn: Callable[..., Any], violation: BaseException) -> bool:
    """Tell whether an error comes from fn's body, and not from the check of its arguments."""
    frames = traceback.walk_tb(violation.__traceback__)
    return any(frame.f_code is fn.__code__ for frame, _ in frames)


def _explain(
    name: str,
    signature: inspect.Signature,
    hints: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> str | None:
    """Find the first argument that does not fit; None if all of them do."""
    axes: Axes = {}
    unknown: str | None = None
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    given = [one for one in _Spread(signature)(bound.args, bound.kwargs) if one[0] in hints]
    # What is no array first: "{k}+1" can be computed only from a k that is a number.
    for parameter, owner, value in sorted(given, key=lambda one: has_arrays(hints[one[0]])):
        hint = hints[parameter]
        try:
            problem = _misfit(filled_in(hint, bound.arguments), value, owner, axes)
        except Exception as error:  # of any class: "{k}+1" for a k that its annotation allows
            if "{" not in spell(hint):
                raise
            uncomputed = f"{owner} needs {spell(hint)}, got {show(value)}: {error}"
            unknown = unknown or f"{name}: {uncomputed}"
            continue
        if problem:
            return f"{name}: {problem}"
    return unknown


def _misfit_of_computed(
    signature: inspect.Signature,
    hints: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> str:
    """Say what does not fit where axes are computed from arguments, of what has been bound."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return ""
    bound.apply_defaults()
    axes: Axes = {}
    for parameter, owner, value in _Spread(signature)(bound.args, bound.kwargs):
        try:
            hint = filled_in(hints.get(parameter), bound.arguments)
        except Exception:  # of any class: a k that its annotation refuses, which beartype will say
            continue
        problem = _Expected(hint).problem(value, owner, axes)
        if problem:
            return problem
    return ""


def _misfit(hint: Any, value: Any, owner: str, axes: Axes) -> str:
    """Say what does not fit, a value or an item of it, or "" and bind all axes."""
    expected = _Expected(hint)
    problem = expected.problem(value, owner, axes)
    if problem or expected.judged:
        return problem
    # Alone, in bindings of its own: shared axes were compared above.
    with jaxtyped("context"):
        fits = any(is_bearable(value, option, conf=BEARTYPE) for option in options_of(hint))
    within = (
        _misfit(kind.hint, item, place, dict(axes))
        for collection in expected.collections
        if collection.takes(value)
        for kind, item, place in collection.items_of(value, owner)
    )
    # beartype may have looked at an item that fits.
    problem = "" if fits and not expected.closed else next(filter(None, within), "")
    return problem or ("" if fits else f"{owner} needs {expected.spelled}, got {show(value)}")


def filled_in(hint: Any, arguments: Mapping[str, Any]) -> Any:
    """Put argument values into shape strings, as jaxtyping does: "{k}+1" becomes "3+1"."""
    if is_array(hint):
        if "{" not in hint.dim_str:
            return hint
        shape = eval(f"f{hint.dim_str!r}", dict(arguments))
        return hint.dtype[hint.array_type, shape]
    if not has_arrays(hint):
        return hint
    options = options_of(hint)
    if len(options) > 1:
        return typing.Union[tuple(filled_in(option, arguments) for option in options)]  # noqa: UP007
    origin: Any = typing.get_origin(hint)
    kinds = typing.get_args(hint)
    if origin not in (*SEQUENCES, *MAPPINGS):
        return hint
    return origin[tuple(filled_in(kind, arguments) for kind in kinds)]


class _Spread:
    """The parameter of each value of a call, and the value's name: `zs[1]` in `*zs`."""

    def __init__(self, signature: inspect.Signature) -> None:
        names = {parameter.kind: name for name, parameter in signature.parameters.items()}
        self.rest = names.get(inspect.Parameter.VAR_POSITIONAL, "")
        self.others = names.get(inspect.Parameter.VAR_KEYWORD, "")
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
        self.positions = [name for name, kind in kinds.items() if kind in by_position]
        self.named = [name for name, kind in kinds.items() if kind in by_name]

    def __call__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Iterator[tuple[str, str, Any]]:
        """Give parameter, name and value, in the order of the signature."""
        for name, value in zip(self.positions, args, strict=False):
            yield name, name, value
        for index in range(len(self.positions), len(args)):
            place = index - len(self.positions)
            yield self.rest, f"{self.rest}[{place}]", args[index]
        for name in self.named:
            if name in kwargs:
                yield name, name, kwargs[name]
        if self.others:
            for name, value in kwargs.items():
                if name not in self.named:
                    yield self.others, name, value


class _Expected:
    """One annotation, parsed once, for the check that Dynamo can trace."""

    def __init__(self, hint: Any) -> None:
        options = options_of(hint)
        self.hint = hint
        self.spelled = spell(hint)
        self.shapes = tuple(Shape(option) for option in options if _is_of_tensors(option))
        self.literals: tuple[Any, ...] = tuple(
            value
            for option in options
            if typing.get_origin(option) is Literal
            for value in typing.get_args(option)
        )
        self.literal_types: tuple[type, ...] = tuple(value.__class__ for value in self.literals)
        classes = {option for option in options if _is_class(option)}
        # An int where a float is declared is fine, as BEARTYPE has it.
        tower = {complex: (float, int), float: (int,)}
        self.classes = (*classes, *(less for kind in classes for less in tower.get(kind, ())))
        self.collections = tuple(
            _Collection(option)
            for option in options
            if typing.get_origin(option) in (*SEQUENCES, *MAPPINGS) and has_arrays(option)
        )
        # What is none of these is left to beartype.
        others = len(options) - len(self.shapes) - len(classes) - len(self.collections)
        others -= sum(typing.get_origin(option) is Literal for option in options)
        self.closed = not others
        self.judged: bool = self.closed and all(one.judged for one in self.collections)

    def problem(self, value: Any, owner: str, axes: Axes) -> str:
        """Say what does not fit, a value or an item of it, or "" and bind its axes."""
        if isinstance(value, self.classes):
            return ""
        reason = ""
        for shape in self.shapes:
            reason = shape.mismatch(value, owner, axes)
            if not reason:
                return ""
        within = ""
        for collection in self.collections:
            if collection.takes(value):
                found = dict(axes)
                problem = collection.problem(value, owner, found)
                if not problem:
                    axes.update(found)
                    return ""
                within = within or problem
        if not self.closed or (isinstance(value, self.literal_types) and value in self.literals):
            return ""
        if within or not self.judged:
            return within
        only = reason if len(self.shapes) == 1 and isinstance(value, Tensor) else ""
        return f"{owner} needs {self.spelled}, got {show(value)}{': ' if only else ''}{only}"


class _Collection:
    """An annotation of several values with shapes: `list[Float[Tensor, "batch dim"]]`."""

    def __init__(self, hint: Any) -> None:
        self.origin: Any = typing.get_origin(hint)
        self.by_key = self.origin in MAPPINGS
        kinds = typing.get_args(hint)
        self.alike = self.origin is not tuple or Ellipsis in kinds
        self.key = _Expected(kinds[0] if self.by_key else int)
        if self.alike:
            kinds = kinds[1:] if self.by_key else kinds[:1]
        self.kinds = tuple(_Expected(kind) for kind in kinds)
        self.judged: bool = self.key.judged and all(kind.judged for kind in self.kinds)

    def takes(self, value: Any) -> bool:
        """Tell whether a value is such a collection, whatever its items are."""
        return isinstance(value, self.origin) and (self.alike or len(value) == len(self.kinds))

    def items_of(self, value: Any, owner: str) -> Iterator[tuple[_Expected, Any, str]]:
        """Give each item, what is expected of it and its name."""
        keys = list(value) if self.by_key else list(range(len(value)))
        kinds = self.kinds * len(keys) if self.alike else self.kinds
        for key, kind in zip(keys, kinds, strict=True):
            yield kind, value[key], f"{owner}[{_place(key)}]"

    def problem(self, value: Any, owner: str, axes: Axes) -> str:
        """Say which item does not fit, or "" and bind all axes."""
        if self.by_key:
            for key in value:
                problem = self.key.problem(key, f"a key of {owner}", axes)
                if problem:
                    return problem
        for kind, item, place in self.items_of(value, owner):
            problem = kind.problem(item, place, axes)
            if problem:
                return problem
        return ""


def _place(key: Any) -> str:
    """Write a key: of one that is no name and no number the class, its repr may cost anything."""
    return repr(key) if isinstance(key, (str, int)) else type(key).__name__


class Shape:
    """A jaxtyping annotation such as `Float[Tensor, "*batch dim"]`, parsed."""

    def __init__(self, hint: Any) -> None:
        self.array_type: type = hint.array_type
        self.family: str = hint.dtype.__name__
        # A tuple of names, or an object that stands for any dtype at all.
        known: Any = hint.dtypes
        if not isinstance(known, tuple):
            known = ()
        self.dtypes = frozenset(d for d, label in DTYPE_NAMES.items() if label in known)
        self.any_dtype = not known
        self.axes = tuple(Axis(word) for word in hint.dim_str.split())
        several = [index for index, axis in enumerate(self.axes) if axis.variadic]
        self.before = several[0] if several else len(self.axes)
        self.after = len(self.axes) - self.before - 1 if several else 0
        self.variadic = bool(several)

    def mismatch(self, value: Any, owner: str, axes: Axes) -> str:
        """Say why a value does not fit this shape, or "" and bind its axes."""
        if not isinstance(value, self.array_type) or not isinstance(value, Tensor):
            return f"not a {self.array_type.__name__}"
        if not self.any_dtype and value.dtype not in self.dtypes:
            return f"{DTYPE_NAMES[value.dtype]} is not a dtype of {self.family}"
        sizes = list(value.shape)
        needed = self.before + self.after
        if len(sizes) < needed or (len(sizes) > needed and not self.variadic):
            least = "at least " if self.variadic else ""
            return f"{len(sizes)} {'axis' if len(sizes) == 1 else 'axes'}, not {least}{needed}"
        middle = len(sizes) - self.after
        found: Axes = {}
        parts: list[Any] = [*sizes[: self.before]]
        if self.variadic:
            parts.append(tuple(sizes[self.before : middle]))
            parts.extend(sizes[middle:])
        for axis, size in zip(self.axes, parts, strict=True):
            reason = axis.mismatch(size, owner, axes, found)
            if reason:
                return reason
        axes.update(found)
        return ""


class Axis:
    """One word of a shape string."""

    def __init__(self, word: str) -> None:
        prefix = ""
        while word[:1] in tuple("#*?_") or (word.count("=") == 1 and "==" not in word):
            if word[0] in "#*?_":
                prefix, word = prefix + word[0], word[1:]
            else:
                word = word.partition("=")[2]
        self.name = word
        self.variadic = "*" in prefix or word == "..."
        self.stretches = "#" in prefix  # a size of 1 broadcasts
        self.free = (
            "_" in prefix or "?" in prefix or word == "..." or (self.variadic and self.stretches)
        )
        self.fixed = int(word) if word.lstrip("-").isdigit() else None
        self.formula: Any = None
        if not self.free and self.fixed is None and not word.isidentifier():
            # Axes computed from argument values, "{k}+1", are jaxtyping's to compare, in eager.
            self.free = "{" in word
            if not self.free:
                self.needs = _names_in(word)
                self.formula = eval(
                    f"lambda {', '.join(self.needs)}: {word}", vars(builtins).copy()
                )

    def mismatch(self, size: Any, owner: str, axes: Axes, found: Axes) -> str:
        if self.free or (self.stretches and size == 1):
            return ""
        if self.fixed is not None:
            return "" if size == self.fixed else f"an axis is {size}, not {self.fixed}"
        if self.formula is not None:
            known = {**axes, **found}
            if any(name not in known for name in self.needs):
                return ""
            wanted = self.formula(*[known[name][0] for name in self.needs])
            if size == wanted:
                return ""
            fixer = ", ".join(
                f"{name} is {known[name][0]} in {known[name][1]}" for name in self.needs
            )
            because = f", as {fixer}" if fixer else ""
            return f"axis {self.name} is {size}, but it needs {wanted}{because}"
        bound = found.get(self.name) or axes.get(self.name)
        if bound is None:
            found[self.name] = (size, owner)
            return ""
        if size == bound[0]:
            return ""
        shown = [list(s) if self.variadic else s for s in (size, bound[0])]
        return f"axis {self.name} is {shown[0]}, but it is {shown[1]} in {bound[1]}"


def _names_in(formula: str) -> tuple[str, ...]:
    """List the axes that a size is computed from: all names but a function's, as min(n,3) has."""
    nodes = list(ast.walk(ast.parse(formula, mode="eval")))
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    names = [node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in called]
    return tuple(dict.fromkeys(names))


def is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def _is_of_tensors(hint: Any) -> bool:
    """Tell whether an annotation is of tensors' shape; other arrays are left to beartype."""
    return (
        is_array(hint) and isinstance(hint.array_type, type) and issubclass(hint.array_type, Tensor)
    )


def has_arrays(hint: Any) -> bool:
    """Tell whether an annotation has shapes in it."""
    return is_array(hint) or any(has_arrays(part) for part in typing.get_args(hint))


def options_of(hint: Any) -> tuple[Any, ...]:
    """List what a union allows; of another annotation, itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def is_sharded(value: Any) -> bool:
    """Return whether a value is a DTensor; its class is told by name, for its import is slow."""
    return isinstance(value, Tensor) and type(value).__name__ == "DTensor"


def of_shards(value: Any, owner: str, hint: Any, groups: Sequence[str]) -> str:
    """Say what to pass in place of a DTensor: its own rows, and the group of its ranks."""
    words = next((o.dim_str.split() for o in options_of(hint) if is_array(o)), [])
    passed: list[str] = []
    local = True
    for dimension, placement in enumerate(value.placements):
        if placement.is_partial():
            local = False
        if not placement.is_shard():
            continue
        axis = words[placement.dim] if placement.dim < len(words) else ""
        takes = [group for group in groups if _shards(group, axis)]
        local = local and bool(takes)
        ranks = f"{owner}.device_mesh.get_group({dimension})"
        passed.append(f"{' or '.join(takes)}={ranks}")
    instead = " and ".join([f"{owner}.to_local()", *passed])
    return (
        f"{owner} needs {spell(hint)}, got a DTensor, {show(value)}: pass "
        f"{instead if local else f'{owner}.full_tensor()'}"
    )


def _shards(group: str, axis: str) -> bool:
    """Return whether a group argument is of the ranks that share an axis."""
    sharded = group.removesuffix("_group")
    sharded = {"latent": "d_sae", "sequence": "time"}.get(sharded, sharded)
    return bool(axis) and (sharded in axis)


def is_another_real(value: Any) -> bool:
    """Return whether a value is a real number that is neither a float nor an int."""
    if isinstance(value, (float, int, Tensor)):
        return False
    # Dynamo shows a NumPy scalar as an array without axes.
    if torch.compiler.is_compiling() and type(value).__name__ == "ndarray":
        return bool(value.ndim == 0)
    return isinstance(value, numbers.Real)


def _is_class(hint: Any) -> bool:
    """Tell whether isinstance answers for a hint."""
    return (
        isinstance(hint, type)
        and hint is not Any
        and hint is not ProcessGroup  # which Dynamo shows as an object of another class
        and not is_array(hint)
        and not getattr(hint, "_is_protocol", False)
        and not typing.is_typeddict(hint)
    )


def spell(hint: Any) -> str:
    """Write an annotation as it stands in the source."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(spell(option) for option in typing.get_args(hint))
    if is_array(hint):
        shape = f" {hint.dim_str}" if hint.dim_str.isidentifier() else hint.dim_str
        return f'{hint.dtype.__name__}[{hint.array_type.__name__}, "{shape}"]'
    if typing.get_origin(hint) is Literal:
        return f"Literal[{', '.join(_quote(value) for value in typing.get_args(hint))}]"
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) is Callable:
        return "Callable"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def show(value: Any) -> str:
    """Write a value in a few words: a tensor by dtype and shape."""
    if isinstance(value, Tensor):
        return f"{DTYPE_NAMES[value.dtype]}{[int(size) for size in value.shape]}"
    if value is None:
        return "None"
    kind = type(value).__name__
    if isinstance(value, (bool, str)):
        return f"{kind} {_quote(value)}"
    if isinstance(value, (int, float, complex)):
        # Of a number that changes from call to call Dynamo has no value.
        return kind if torch.compiler.is_compiling() else f"{kind} {_quote(value)}"
    # Dynamo does not trace a look into other arrays.
    if not torch.compiler.is_compiling() and hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__module__}.{kind} {value.dtype}{list(value.shape)}"
    return kind


def _quote(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
