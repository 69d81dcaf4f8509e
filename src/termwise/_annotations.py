"""What an annotation requires of a value, parsed once, for the contract and the test kit."""

import ast
import builtins
import collections
import collections.abc
import dataclasses
import functools
import inspect
import numbers
import operator
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Self, TypeAlias, TypeVar, cast

import torch
from beartype import BeartypeConf
from beartype.door import is_bearable
from jaxtyping import AbstractArray, jaxtyped
from torch import Tensor

from ._groups import ProcessGroup

# For each axis: its size, the argument that set it, and whether that argument may still broadcast.
Axes: TypeAlias = dict[str, tuple[Any, str, bool]]

# An int where a float is declared is what every caller means by `gamma=1`.
BEARTYPE: Final = BeartypeConf(is_pep484_tower=True)

# Each item of these is checked; beartype checks one of many.
SEQUENCES: Final[Any] = (list, tuple, Sequence)
MAPPINGS: Final[Any] = (
    dict,
    Mapping,
    collections.abc.MutableMapping,
    collections.OrderedDict,
    collections.defaultdict,
)
# The items of these too, unless they are iterators: checking would consume them.
ITERABLES: Final[Any] = (
    *SEQUENCES,
    collections.abc.MutableSequence,
    collections.deque,
    set,
    frozenset,
    collections.abc.Set,
    collections.abc.MutableSet,
    collections.abc.Collection,
    Iterable,
)

RESULT: Final = "the result"

DTYPE_NAMES: Final = {
    dtype: str(dtype).removeprefix("torch.")
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


class Bindings:
    """What one call has bound so far: sizes of axes, and values that sizes are computed from."""

    def __init__(
        self,
        arguments: Mapping[str, Any] | None = None,
        groups: Sequence[str] = (),
        first: Any = None,
        owner: str = "",
    ) -> None:
        self.axes: Axes = {}
        self.arguments: Mapping[str, Any] = arguments or {}
        self.groups = groups  # parameters that take a process group
        self.first = first  # the object, or the class, of a method
        self.owner = owner  # the name of its class
        # Sizes that are computed from axes that no argument has fixed yet.
        self.later: list[tuple[Axis, Any, str]] = []

    def copy(self) -> "Bindings":
        other = Bindings(self.arguments, self.groups, self.first, self.owner)
        other.axes = dict(self.axes)
        other.later = list(self.later)
        return other

    def take(self, other: "Bindings") -> None:
        self.axes, self.later = other.axes, other.later

    def finish(self) -> str:
        """Compare the deferred sizes; accept those that depend on an unbound axis."""
        waiting, self.later = self.later, []
        for axis, size, needs in waiting:
            reason = axis.computed(size, self, self.axes)
            if reason:
                return f"{needs}: {reason}"
        return ""


class Expected:
    """One annotation: its shapes, classes, literals, collections and records."""

    def __init__(self, hint: Any, within: tuple[Any, ...] = ()) -> None:
        options = options_of(hint, within)
        self.hint = hint
        self.options = options
        self.spelled = spell(hint)
        self.anything = self.of_own_class = self.called = self.group = False
        shapes: list[Shape] = []
        literals: list[Any] = []
        records: list[Record] = []
        collected: list[Collection] = []
        classes: list[type] = []
        others: list[Any] = []
        for option in options:
            if option is Any or option is object:
                self.anything = True
            elif option is Self:
                self.of_own_class = True
            elif option is ProcessGroup:
                self.group = True
            elif _is_called(option):
                self.called = True
            elif is_array(option):
                shapes.append(Shape(option))
            elif typing.get_origin(option) is Literal:
                literals.extend(typing.get_args(option))
            elif is_record(option):
                records.append(record_of(option))
            elif _is_collection(option):
                collected.append(Collection(option, (*within, *_aliases(hint))))
            else:
                (classes if _is_class(option) else others).append(option)
        self.shapes, self.records = tuple(shapes), tuple(records)
        self.collections = tuple(collected)
        self.literals = tuple(literals)
        self.literal_types: tuple[type, ...] = tuple(value.__class__ for value in literals)
        # An int where a float is declared is fine, as BEARTYPE has it.
        tower = {complex: (float, int), float: (int,)}
        self.classes: tuple[type, ...] = (
            *classes,
            *(less for kind in classes for less in tower.get(kind, ())),
        )
        self.real = float in classes or complex in classes
        # Checked by beartype: generators, protocols, iterables of items without a shape.
        self.others = tuple(others)
        self.other_classes: tuple[type, ...] = tuple(
            kind
            for option in self.others
            if isinstance(kind := typing.get_origin(option), type) and kind is not type
        )
        # The validators of `Annotated`, which only beartype checks.
        self.validated = hint if _has_validators(hint) else None

    def problem(self, value: Any, owner: str, known: Bindings) -> str:
        """Return which value or item does not fit, or "" and bind its axes."""
        problem = self._problem(value, owner, known)
        if problem or self.validated is None or torch.compiler.is_compiling():
            return problem
        fits = is_bearable(value, self.validated, conf=BEARTYPE)
        return "" if fits else f"{owner} needs {self.spelled}, got {show(value)}"

    def _problem(self, value: Any, owner: str, known: Bindings) -> str:
        if self.anything or isinstance(value, self.classes):
            return ""
        if self.real and is_another_real(value):
            return ""
        if self.called and callable(value):
            return ""
        if self.of_own_class and is_of_own_class(value, known.first, known.owner):
            return ""
        # In Dynamo a group is an object of another class.
        if self.group and (torch.compiler.is_compiling() or isinstance(value, ProcessGroup)):
            return ""
        reason = fitting = ""
        for shape in self.shapes:
            if is_sharded(value):
                return of_shards(value, owner, shape, self.spelled, known.groups)
            reason = shape.mismatch(value, owner, known, self.spelled)
            if not reason:
                return ""
            if isinstance(value, Tensor) and value.dtype in shape.dtypes:
                fitting = reason  # of several shapes, report on the one with the value's dtype
        within = ""
        several: tuple[Record | Collection, ...] = (*self.records, *self.collections)
        for parts in several:
            if parts.takes(value):
                found = known.copy()
                problem = parts.problem(value, owner, found)
                if not problem:
                    known.take(found)
                    return ""
                within = within or problem
        if isinstance(value, self.literal_types) and value in self.literals:
            return ""
        if self.others and self.fits_others(value):
            return ""
        if within:
            return within
        of_kind = isinstance(value, Tensor) or reason[:4] != "not "
        only = reason if len(self.shapes) == 1 and of_kind else fitting
        for one in self.records:
            only = only or one.missing(value)
        return f"{owner} needs {self.spelled}, got {show(value)}{': ' if only else ''}{only}"

    def fits_others(self, value: Any) -> bool:
        """Check by beartype, or by isinstance while Dynamo traces, which cannot trace beartype."""
        if torch.compiler.is_compiling():
            plain = len(self.other_classes) == len(self.others)
            return not plain or isinstance(value, self.other_classes)
        with jaxtyped("context"):
            return any(is_bearable(value, option, conf=BEARTYPE) for option in self.others)


_EXPECTED: Final[dict[Any, Expected]] = {}


def expected_of(hint: Any) -> Expected:
    """Parse an annotation, each once: most signatures share their annotations."""
    # Unions with another order of options are equal, but errors show the order as written.
    key = (hint, str(hint))
    try:
        known = _EXPECTED.get(key)
    except TypeError:  # beartype's validators may not be hashable
        return Expected(hint)
    if known is None:
        known = _EXPECTED[key] = Expected(hint)
    return known


class Collection:
    """An annotation of several values with shapes: `list[Float[Tensor, "batch dim"]]`."""

    def __init__(self, hint: Any, within: tuple[Any, ...] = ()) -> None:
        self.origin: Any = typing.get_origin(hint)
        self.by_key = self.origin in MAPPINGS
        kinds = typing.get_args(hint)
        self.alike = self.origin is not tuple or Ellipsis in kinds
        self.key = Expected(kinds[0] if self.by_key else int)
        if self.alike:
            kinds = kinds[1:] if self.by_key else kinds[:1]
        self.kinds = tuple(Expected(kind, within) for kind in kinds)
        # Records of one list may differ in axes that no other argument binds.
        records = (record for kind in self.kinds for record in kind.records)
        self.of_records = self.alike and any(has_arrays(record.hint) for record in records)

    def takes(self, value: Any) -> bool:
        """Whether a value is such a collection, regardless of its items."""
        if isinstance(value, str) and str not in self.kinds[0].classes:  # not the letters of a str
            return False
        return isinstance(value, self.origin) and (self.alike or len(value) == len(self.kinds))

    def items_of(self, value: Any, owner: str) -> Iterator[tuple[Expected, Any, str]]:
        """Return each item, what is expected of it and its name."""
        if self.by_key:
            for key in list(value):
                yield self.kinds[0], value[key], f"{owner}[{place(key)}]"
        elif self.alike:
            for index, item in enumerate(list(value)):
                yield self.kinds[0], item, f"{owner}[{index}]"
        else:
            for index, kind in enumerate(self.kinds):
                yield kind, value[index], element_of(owner, index)

    def problem(self, value: Any, owner: str, known: Bindings) -> str:
        """Return which item does not fit, or "" and bind all axes."""
        if self.origin is Iterable and not isinstance(value, collections.abc.Collection):
            return ""
        if self.by_key:
            for key in cast("Mapping[Any, Any]", value):
                problem = self.key.problem(key, f"a key of {owner}", known)
                if problem:
                    return problem
        for kind, item, name in self.items_of(value, owner):
            own = known.copy() if self.of_records else known
            problem = kind.problem(item, name, own)
            if self.of_records:
                problem = problem or own.finish()
            if problem:
                return problem
        return ""


class Record:
    """A dataclass, NamedTuple or TypedDict: each field is checked with the axes of the call."""

    def __init__(self, hint: Any) -> None:
        self.hint = hint
        self.kind: Any = typing.get_origin(hint) or hint
        self.by_key: bool = typing.is_typeddict(self.kind)
        self.required: frozenset[str] = getattr(self.kind, "__required_keys__", frozenset())
        self.fields: dict[str, Expected] = {}
        self._parsed = False

    def parse(self) -> dict[str, Expected]:
        """Parse the fields' annotations; deferred, since records may contain their own class."""
        if not self._parsed:
            self._parsed = True
            for field, hint in field_hints(self.hint).items():
                self.fields[field] = expected_of(hint)
        return self.fields

    def takes(self, value: Any) -> bool:
        """Whether a value is such a record, regardless of its fields."""
        if self.by_key:
            return isinstance(value, Mapping) and not self.missing(value)
        return isinstance(value, self.kind)

    def missing(self, value: Any) -> str:
        """Return which key a dict lacks."""
        if not self.by_key or not isinstance(value, Mapping):
            return ""
        lacking = [field for field in self.fields if field in self.required and field not in value]
        # Not !r, which PyTorch 2.10 drops as it traces in Python 3.13.
        return f"it has no '{lacking[0]}'" if lacking else ""

    def problem(self, value: Any, owner: str, known: Bindings) -> str:
        """Return which field does not fit, or "" and bind all axes."""
        for field, expected in self.fields.items():
            if self.by_key:
                if field not in value:
                    continue
                part = value[field]
            else:
                part = getattr(value, field)
            problem = expected.problem(part, field_of(owner, field, by_key=self.by_key), known)
            if problem:
                return problem
        return ""


_RECORDS: Final[dict[Any, Record]] = {}


def record_of(hint: Any) -> Record:
    """Return the one Record of a class, its fields parsed."""
    if hint not in _RECORDS:
        _RECORDS[hint] = Record(hint)
        try:
            _RECORDS[hint].parse()
        except BaseException:
            del _RECORDS[hint]
            raise
    return _RECORDS[hint]


def field_of(owner: str, field: str, *, by_key: bool = False) -> str:
    """Name the field of an argument, or of the result."""
    if by_key:
        return f"{owner}['{field}']"
    return f"{owner}'s {field}" if owner == RESULT else f"{owner}.{field}"


def element_of(owner: str, index: int) -> str:
    """Name the element of a tuple."""
    return f"{owner}'s {index}" if owner == RESULT else f"{owner}[{index}]"


def place(key: Any) -> str:
    """Write a key: a string or number by value, any other by class (repr may be slow)."""
    return repr(key) if isinstance(key, (str, int)) else type(key).__name__


class Shape:
    """A jaxtyping annotation such as `Float[Tensor, "*batch dim"]`, parsed."""

    def __init__(self, hint: Any) -> None:
        self.hint = hint
        self.array_type: Any = hint.array_type
        self.of_tensors = isinstance(self.array_type, type) and issubclass(self.array_type, Tensor)
        self.family: str = hint.dtype.__name__
        # A tuple of names, or an object that means any dtype.
        labels: Any = hint.dtypes
        known: tuple[str, ...] = cast("Any", labels) if isinstance(labels, tuple) else ()
        self.dtypes = _dtypes_of(known)
        self.any_dtype = not known
        self.axes = tuple(Axis(word) for word in hint.dim_str.split())
        several = [index for index, axis in enumerate(self.axes) if axis.variadic]
        self.before = several[0] if several else len(self.axes)
        self.after = len(self.axes) - self.before - 1 if several else 0
        self.variadic = bool(several)

    def mismatch(self, value: Any, owner: str, known: Bindings, spelled: str = "") -> str:
        """Return why a value does not fit this shape, or "" and bind its axes."""
        if not self.of_tensors or not isinstance(value, Tensor):
            if not self._is_bearable(value):
                return f"not a {_name_of(self.array_type)}"
        elif not isinstance(value, self.array_type):
            return f"not a {self.array_type.__name__}"
        elif not self.any_dtype and value.dtype not in self.dtypes:
            reason = f"{DTYPE_NAMES[value.dtype]} is not a dtype of {self.family}"
            if self.family == "Bool" and not value.dtype.is_floating_point:
                reason += f"; if it is a mask of 0 and 1, pass {owner}.bool()"
            return reason
        sizes = list(value.shape)
        needed = self.before + self.after
        if len(sizes) < needed or (len(sizes) > needed and not self.variadic):
            least = "at least " if self.variadic else ""
            said = f"{len(sizes)} {'axis' if len(sizes) == 1 else 'axes'}, not {least}{needed}"
            return said + self._of_positions(sizes, owner)
        middle = len(sizes) - self.after
        parts: list[Any] = [*sizes[: self.before]]
        if self.variadic:
            parts.append(tuple(sizes[self.before : middle]))
            parts.extend(sizes[middle:])
        found: Axes = dict(known.axes)
        waiting: list[tuple[Axis, Any, str]] = []
        for axis, size in zip(self.axes, parts, strict=True):
            if axis.formula is None:
                reason = axis.mismatch(size, owner, found)
                if reason:
                    return reason
        for axis, size in zip(self.axes, parts, strict=True):
            if axis.formula is not None and not (axis.stretches and size == 1):
                if any(name not in found for name in axis.needs) or not axis.is_asked(known):
                    waiting.append((axis, size, f"{owner} needs {spelled}, got {show(value)}"))
                    continue
                reason = axis.computed(size, known, found)
                if reason:
                    return reason
        known.axes = found
        known.later.extend(waiting)
        return ""

    def _of_positions(self, sizes: list[Any], owner: str) -> str:
        """Return what to write if rows are needed and a tensor with positions was passed.

        A feature map or a sequence of tokens can be passed in two ways; only the user can choose.
        """
        named = [axis.name for axis in self.axes]
        first = "".join(f"{name} " for name in named[:-2])
        given = {3: "b t d", 4: "b d h w"}.get(len(sizes) - len(named) + 2)
        if named[-2:] != ["batch", "dim"] or given is None:
            return ""
        positions = "t" if given == "b t d" else "h w"
        as_samples, as_features = (
            f'einops.rearrange({owner}, "{first}{given} -> {first}{axes}")'
            for axes in (f"(b {positions}) d", f"b ({given[2:]})")
        )
        return f"; positions as samples: {as_samples}; as features: {as_features}"

    def _is_bearable(self, value: Any) -> bool:
        """Check class and dtype, but not shape, of a value that is no tensor, by jaxtyping."""
        if torch.compiler.is_compiling():
            return not self.of_tensors and hasattr(value, "shape")
        asked = self.hint.dtype[self.array_type, "..."]
        with jaxtyped("context"):
            return isinstance(value, asked)


@functools.cache
def _dtypes_of(labels: Any) -> frozenset[torch.dtype]:
    return frozenset(dtype for dtype, label in DTYPE_NAMES.items() if label in labels)


class Axis:
    """One word of a shape string."""

    def __init__(self, word: str) -> None:
        whole, prefix = word, ""
        while word[:1] in tuple("#*?_") or (word.count("=") == 1 and "==" not in word):
            if word[0] in "#*?_":
                prefix, word = prefix + word[0], word[1:]
            else:
                word = word.partition("=")[2]
        if "?" in prefix:
            raise TypeError(
                f"the axis {whole!r} has a size of its own in each leaf of a tree, which is not "
                f"checked: write a name, or _ for any size"
            )
        self.name = word
        self.variadic = "*" in prefix or word == "..."
        self.stretches = "#" in prefix  # a size of 1 broadcasts
        self.key = f"*{word}" if self.variadic else word
        self.free = "_" in prefix or word == "..."
        self.fixed = int(word) if word.lstrip("-").isdigit() else None
        self.formula: Any = None
        self.needs: tuple[str, ...] = ()
        self.asks: tuple[tuple[str, Any, tuple[str, ...]], ...] = ()
        if self.free or self.fixed is not None or word.isidentifier():
            return
        # Axes computed from argument values, "{k}+1": first these, then the rest.
        asked = re.findall(r"\{([^{}]*)\}", word)
        text = word
        for index, part in enumerate(asked):
            text = text.replace(f"{{{part}}}", f"(_asked_{index})", 1)
        try:
            names = _names_in(text)
            self.asks = tuple((part, *_compiled(part, _names_in(part))) for part in asked)
        except SyntaxError:
            match = re.fullmatch(r"(\d+)([A-Za-z_]\w*)", word)
            instead = f'"{match[1]}*{match[2]}"' if match else 'an expression, as "2*n" or "n+1"'
            raise TypeError(
                f"{word!r} is neither the name of an axis nor its size: write {instead}"
            ) from None
        self.needs = tuple(name for name in names if not name.startswith("_asked_"))
        places = tuple(f"_asked_{index}" for index in range(len(asked)))
        self.formula = _compiled(text, (*self.needs, *places))[0]

    def mismatch(self, size: Any, owner: str, found: Axes) -> str:
        """Return why a size is not that of a named or a fixed axis, or "" and bind it."""
        if self.free or (self.stretches and not self.variadic and size == 1):
            return ""
        if self.fixed is not None:
            return "" if size == self.fixed else f"an axis is {_written(size)}, not {self.fixed}"
        bound = found.get(self.key)
        if bound is None:
            found[self.key] = (size, owner, self.variadic and self.stretches)
            return ""
        before, fixer, stretches = bound
        if self.variadic and (self.stretches or stretches):
            both = _broadcast(size, before)
            fits = both is not None and (
                (stretches or both == before) and (self.stretches or both == size)
            )
            if fits and stretches:
                found[self.key] = (both, fixer, self.stretches)
        else:
            fits = size == before
        if fits:
            return ""
        return f"axis {self.name} is {_written(size)}, but it is {_written(before)} in {fixer}"

    def computed(self, size: Any, known: Bindings, axes: Axes) -> str:
        """Return why a size is not what its formula gives."""
        if any(name not in axes for name in self.needs):
            return ""
        try:
            asked = [ask(*[known.arguments[n] for n in names]) for _, ask, names in self.asks]
            if any(isinstance(value, str) for value in asked):  # it names an axis, or a formula
                return self._named_by(asked, size, known, axes)
            wanted = self.formula(*[axes[name][0] for name in self.needs], *asked)
        except Exception as error:  # of any class: "{k}+1" for a k that its annotation allows
            return str(error)
        if size == wanted:
            return ""
        word = self._filled(asked)
        if self.asks and word == _written(wanted):
            return f"an axis is {_written(size)}, not {word}"
        known_sizes = [(name, *axes[name][:2]) for name in self.needs]
        fixer = ", ".join(f"{name} is {_written(n)} in {by}" for name, n, by in known_sizes)
        because = f", as {fixer}" if fixer else ""
        return f"axis {word} is {_written(size)}, but it needs {_written(wanted)}{because}"

    def is_asked(self, known: Bindings) -> bool:
        """Whether the arguments have the values that the size is computed from."""
        try:
            for _, ask, names in self.asks:
                ask(*[known.arguments[name] for name in names])
        except Exception:  # of any class: "{len(xs)}" if xs is None, which is reported later
            return False
        return True

    def _named_by(self, asked: list[Any], size: Any, known: Bindings, axes: Axes) -> str:
        """Compare with the axis whose name is an argument's value: "{axis}" for a string."""
        if torch.compiler.is_compiling():  # Dynamo does not parse
            return ""
        axis = Axis(self._filled(asked))
        if axis.formula is not None:
            return axis.computed(size, known, axes)
        return axis.mismatch(size, self.name, axes)

    def _filled(self, asked: list[Any]) -> str:
        """Fill in the values that the word is computed from."""
        word = self.name
        for (part, _, _), value in zip(self.asks, asked, strict=True):
            word = word.replace(f"{{{part}}}", _written(value), 1)
        return word


def _written(size: Any) -> str:
    """Write a size; while Dynamo traces, as the constant it is in this call."""
    if isinstance(size, tuple):
        sizes: Any = size  # pyright: ignore[reportUnknownVariableType]
        return f"[{', '.join([_written(one) for one in sizes])}]"
    return f"{operator.index(size)}" if isinstance(size, int) else f"{size}"


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape that two shapes broadcast to, or None."""
    length = max(len(a), len(b))
    a, b = (1,) * (length - len(a)) + a, (1,) * (length - len(b)) + b
    if any(x != y and 1 not in (x, y) for x, y in zip(a, b, strict=True)):
        return None
    return tuple(y if x == 1 else x for x, y in zip(a, b, strict=True))


def _compiled(text: str, names: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """Compile an expression as a function of its names."""
    return eval(f"lambda {', '.join(names)}: {text}", vars(builtins).copy()), names


def _names_in(formula: str) -> tuple[str, ...]:
    """List the axes that a size is computed from: all names but functions, as in min(n,3)."""
    nodes = list(ast.walk(ast.parse(formula, mode="eval")))
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    names = [node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in called]
    return tuple(dict.fromkeys(names))


def is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def is_record(hint: Any) -> bool:
    """Whether an annotation is a class whose fields are checked."""
    kind = typing.get_origin(hint) or hint
    return has_fields(hint) and (_is_typeddict(kind) or has_arrays(hint))


def is_named_tuple_type(kind: Any) -> bool:
    of_tuples: bool = isinstance(kind, type) and issubclass(kind, tuple)
    fields: Any = getattr(cast("Any", kind), "_fields", None)
    return of_tuples and fields is not None


def has_fields(kind: Any) -> bool:
    """Whether a class, generic or not, is a dataclass, a NamedTuple or a TypedDict."""
    known: Any = typing.get_origin(kind) or kind
    if not isinstance(known, type):
        return False
    return dataclasses.is_dataclass(known) or is_named_tuple_type(known) or _is_typeddict(known)


def _is_typeddict(kind: Any) -> bool:
    return typing.is_typeddict(kind)


@functools.cache
def field_hints(kind: Any) -> dict[str, Any]:
    """List the fields of a dataclass, a NamedTuple or a TypedDict, each with its annotation."""
    generic: Any = typing.get_origin(kind)
    if generic is not None:
        given = dict(zip(generic.__parameters__, typing.get_args(kind), strict=False))
        return {name: _filled(hint, given) for name, hint in field_hints(generic).items()}
    try:
        hints = typing.get_type_hints(kind, include_extras=True)
    except NameError as error:
        raise NameError(f"{kind.__qualname__} has a field whose annotation {error}") from error
    own = inspect.get_annotations(kind)
    bases = cast("tuple[Any, ...]", vars(kind).get("__orig_bases__", kind.__bases__))
    for base in reversed(bases):
        if has_fields(base):
            hints |= {name: hint for name, hint in field_hints(base).items() if name not in own}
    if dataclasses.is_dataclass(kind):
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    if is_named_tuple_type(kind):
        return {name: hints.get(name, Any) for name in kind._fields}
    return hints


def _filled(hint: Any, given: Mapping[Any, Any]) -> Any:
    """Fill in the type parameters of a generic class."""
    if isinstance(hint, TypeVar):
        return given.get(hint, hint)
    parameters = getattr(hint, "__parameters__", ())
    return hint[tuple(given.get(one, one) for one in parameters)] if parameters else hint


def has_arrays(hint: Any, within: tuple[Any, ...] = ()) -> bool:
    """Whether an annotation contains shapes, including those in fields of records."""
    if is_array(hint):
        return True
    if any(hint is one for one in within):
        return False
    within = (*within, hint)
    options = options_of(hint, within[:-1])
    if len(options) != 1 or options[0] is not hint:
        return any(has_arrays(option, within) for option in options)
    parts = typing.get_args(hint)
    if has_fields(hint):
        parts = (*parts, *field_hints(typing.get_origin(hint) or hint).values())
    return any(has_arrays(part, within) for part in parts)


def options_of(hint: Any, within: tuple[Any, ...] = ()) -> tuple[Any, ...]:
    """List the options of a union, or the annotation itself; unwrap aliases and `Annotated`.

    A recursive alias, found in `within`, is not followed: its inner values are not checked.
    """
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        found: list[Any] = []
        for option in typing.get_args(hint):
            found.extend(options_of(option, within))
        return tuple(found)
    if origin is Annotated or origin in _QUALIFIERS:
        return options_of(typing.get_args(hint)[0], within)
    if _is_alias(hint):
        if any(hint is one for one in within):
            return (Any,)
        return options_of(hint.__value__, (*within, hint))
    if _is_alias(origin):
        return options_of(origin.__value__[typing.get_args(hint)], within)
    if isinstance(hint, typing.NewType):
        return options_of(hint.__supertype__, within)
    if isinstance(hint, TypeVar):
        if hint.__constraints__:
            return tuple(o for one in hint.__constraints__ for o in options_of(one, within))
        return options_of(hint.__bound__ if hint.__bound__ is not None else Any, within)
    if isinstance(hint, (typing.ParamSpecArgs, typing.ParamSpecKwargs)):
        return (Any,)
    return (hint,)


_QUALIFIERS: Final[Any] = (typing.Required, typing.NotRequired, typing.Final, typing.ClassVar)


def _is_alias(hint: Any) -> bool:
    return type(hint).__name__ == "TypeAliasType"


def _aliases(hint: Any) -> tuple[Any, ...]:
    """List the aliases at the top level of an annotation."""
    if typing.get_origin(hint) is Annotated:
        return _aliases(typing.get_args(hint)[0])
    return (hint, *_aliases(hint.__value__)) if _is_alias(hint) else ()


def _has_validators(hint: Any) -> bool:
    """Whether an annotation is `Annotated` with validators of beartype."""
    if typing.get_origin(hint) is not Annotated:
        return False
    return any(type(one).__module__.startswith("beartype.") for one in hint.__metadata__)


def _is_collection(hint: Any) -> bool:
    """Whether an annotation is a collection whose items are checked one by one."""
    origin = typing.get_origin(hint)
    # Beartype checks one item, chosen with the global generator of `random`.
    whole = origin is not Iterable and typing.get_args(hint) != ()
    return origin in (*ITERABLES, *MAPPINGS) and (whole or has_arrays(hint))


def _is_called(hint: Any) -> bool:
    return hint is Callable or hint is typing.Callable or typing.get_origin(hint) is Callable


def _is_class(hint: Any) -> bool:
    """Whether isinstance accepts a hint."""
    return (
        isinstance(hint, type)
        and typing.get_origin(hint) is None
        and not getattr(hint, "_is_protocol", False)
        and not typing.is_typeddict(hint)
    )


def is_of_own_class(value: Any, first: Any, owner: str) -> bool:
    """Whether a value is `Self`: an instance of `owner`, the class that defines the method."""
    kind = first if isinstance(first, type) else type(first)
    if isinstance(value, kind):
        return True
    return any(isinstance(value, one) for one in kind.__mro__ if one.__qualname__ == owner)


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor and not a DTensor."""
    return isinstance(value, Tensor) and not is_sharded(value)


def is_sharded(value: Any) -> bool:
    """Whether a value is a DTensor, recognized by the class's name, since importing it is slow."""
    return isinstance(value, Tensor) and type(value).__name__ == "DTensor"


def of_shards(value: Any, owner: str, shape: Shape, spelled: str, groups: Sequence[str]) -> str:
    """Return what to pass instead of a DTensor: its local part, and the group of its ranks."""
    passed: list[str] = []
    local = True
    for dimension, placement in enumerate(value.placements):
        if placement.is_partial():
            local = False
        if not placement.is_shard():
            continue
        dim: int = placement.dim
        axis = shape.axes[dim].name if dim < len(shape.axes) else ""
        takes = [group for group in groups if _shards(group, axis)]
        local = local and bool(takes)
        ranks = f"{owner}.device_mesh.get_group({dimension})"
        passed.append(f"{' or '.join(takes)}={ranks}")
    instead = " and ".join([f"{owner}.to_local()", *passed])
    return (
        f"{owner} needs {spelled}, got a DTensor, {show(value)}: pass "
        f"{instead if local else f'{owner}.full_tensor()'}"
    )


def _shards(group: str, axis: str) -> bool:
    """Whether a group argument is the group whose ranks shard an axis."""
    sharded = group.removesuffix("_group")
    sharded = {"latent": "d_sae", "sequence": "time"}.get(sharded, sharded)
    return bool(axis) and sharded in axis


def is_another_real(value: Any) -> bool:
    """Whether a value is a real number that is neither a float nor an int."""
    if isinstance(value, (float, int, Tensor)):
        return False
    # In Dynamo a NumPy scalar is an array without axes.
    if torch.compiler.is_compiling() and type(value).__name__ == "ndarray":
        return bool(value.ndim == 0)
    return isinstance(value, numbers.Real)


def filled_in(hint: Any, arguments: Mapping[str, Any]) -> Any:
    """Put argument values into shape strings, as jaxtyping does: "{k}+1" becomes "3+1"."""
    if is_array(hint):
        if "{" not in hint.dim_str:
            return hint
        shape = eval(f"f{hint.dim_str!r}", dict(arguments))
        return hint.dtype[hint.array_type, shape]
    options = options_of(hint)
    if len(options) > 1:
        return typing.Union[tuple(filled_in(option, arguments) for option in options)]  # noqa: UP007
    hint = next(iter(options))
    if is_array(hint):
        return filled_in(hint, arguments)
    origin: Any = typing.get_origin(hint)
    kinds = typing.get_args(hint)
    if origin not in (*ITERABLES, *MAPPINGS) or not has_arrays(hint):
        return hint
    return origin[tuple(filled_in(kind, arguments) for kind in kinds)]


def hints_of(fn: Any, name: str) -> dict[str, Any]:
    """Resolve a function's annotations; an error names the argument whose annotation it is."""
    try:
        return typing.get_type_hints(fn, include_extras=True)
    except NameError:
        annotated = inspect.get_annotations(fn)
    for parameter, hint in annotated.items():
        alone = types.SimpleNamespace(__annotations__={parameter: hint})
        try:
            typing.get_type_hints(alone, globalns=fn.__globals__, include_extras=True)
        except NameError as error:
            which = RESULT if parameter == "return" else parameter
            shown = hint if isinstance(hint, str) else spell(hint)
            raise NameError(
                f"{name}: the annotation {shown} of {which} cannot be resolved: {error}; names "
                f"have to be defined in the module, and not inside a function"
            ) from None
    raise AssertionError  # unreachable: one of them failed above


def spell(hint: Any) -> str:
    """Write an annotation as in the source."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(spell(option) for option in typing.get_args(hint))
    if is_array(hint):
        shape = f" {hint.dim_str}" if hint.dim_str.isidentifier() else hint.dim_str
        return f'{hint.dtype.__name__}[{_name_of(hint.array_type)}, "{shape}"]'
    if origin is Literal:
        return f"Literal[{', '.join(_quote(value) for value in typing.get_args(hint))}]"
    if origin in _QUALIFIERS or (origin is Annotated and not _has_validators(hint)):
        return spell(typing.get_args(hint)[0])
    if _is_alias(hint) and not has_arrays(hint):
        return str(hint.__name__)
    if _is_alias(hint):
        return spell(hint.__value__)
    if hint is type(None):
        return "None"
    if origin is Callable:
        return "Callable"
    if (isinstance(hint, type) and origin is None) or isinstance(hint, (typing.NewType, TypeVar)):
        return str(hint.__name__)
    if origin is not None and has_arrays(hint):
        # An alias by its name, since it may contain itself.
        parts = (one.__name__ if _is_alias(one) else spell(one) for one in typing.get_args(hint))
        return f"{_name_of(origin)}[{', '.join(parts)}]"
    if hint is Ellipsis:
        return "..."
    return str(hint).replace("typing.", "").replace("collections.abc.", "")


def _name_of(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind)).replace("typing.", "")


def show(value: Any) -> str:
    """Write a value in a few words: a tensor by dtype and shape."""
    if isinstance(value, Tensor):
        return f"{DTYPE_NAMES[value.dtype]}{_written(tuple(value.shape))}"
    if value is None:
        return "None"
    kind = type(value).__name__
    if isinstance(value, (bool, str)):
        return f"{kind} {_quote(value)}"
    if isinstance(value, (int, float, complex)):
        # Dynamo has no value for a number that changes between calls.
        return kind if torch.compiler.is_compiling() else f"{kind} {_quote(value)}"
    # Dynamo cannot trace access to other arrays.
    if not torch.compiler.is_compiling() and hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__module__}.{kind} {value.dtype}{list(value.shape)}"
    return kind


def _quote(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
