"""A decorator that enforces the shapes and dtypes in a signature, in eager mode and compiled.

Each function gets one check, generated as straight-line code from its annotations at its first
call. The check only accepts calls: what it does not accept is examined by `Expected`, which says
what is wrong.
"""

import builtins
import dataclasses
import functools
import inspect
import numbers
import sys
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, ParamSpec, TypeVar, cast

import torch
from jaxtyping import TypeCheckError, config
from torch import Tensor, nn

from ._annotations import (
    RESULT,
    Axis,
    Bindings,
    Collection,
    Expected,
    Record,
    Shape,
    element_of,
    expected_of,
    field_of,
    hints_of,
    is_another_real,
    is_of_own_class,
    is_plain,
    place,
)
from ._annotations import show as show
from ._annotations import spell as spell
from ._groups import ProcessGroup
from ._terms import Terms

P = ParamSpec("P")
R = TypeVar("R")


class ContractError(TypeCheckError):
    """An argument or a result does not have the shape, dtype or type of its annotation.

    A subclass of jaxtyping's `TypeCheckError`, and so of `TypeError`. The message is one sentence
    with the function, the argument, its annotation, what was passed, and which argument has another
    size for the axis.
    """


def contract(fn: Callable[P, R]) -> Callable[P, R]:
    """Enforce a function's jaxtyping annotations on every call.

    The arguments are checked before the function runs, and then the result with the same axis
    sizes, including each field of a [`Terms`][termwise.Terms] record. Under `torch.compile` or
    `torch.export` the check runs once, while tracing, and leaves nothing in the graph, so compiled
    calls take no time for it. In eager mode a check takes a few microseconds.

    `JAXTYPING_DISABLE=1` in the environment disables all checks.

    Args:
        fn: a function, a method or an `async` function. Annotate tensors with jaxtyping types
            (`Float[Tensor, "batch dim"]`); an axis name has one size in a call. Also checked are
            defaults, each value of `*zs: Float[...]` and `**zs: Float[...]`, each item of a
            collection (`list`, `tuple`, `Sequence`, `set`, `dict`, `Mapping`), whether a tensor or
            not, and each field of a `TypedDict`, or of a dataclass or `NamedTuple` that has shapes,
            in arguments and results. Every other annotation is enforced too (`Literal`, `float`,
            classes, unions, `Self`). A `float` may be any real number, which the function receives
            as a Python float. Sizes may be computed from other axes (`"n+1"`), in either order, and
            from arguments (`"{k}+1"`).

            Not checked: the items of an iterator or a generator, the signature of a callable, and,
            while Dynamo traces, the dtype of a NumPy array and what only beartype can check
            (protocols other than callables, `Annotated` with beartype's validators); the inner
            values of a recursive type alias.

    Returns:
        The function with checks. Its name, signature, docstring and static type are unchanged.

    Raises:
        ContractError: at the call, if a value does not match its annotation.
            `torch.compile(fullgraph=True)` raises an error of its own that contains the message.
        TypeError: at the definition, if fn is not a function (but a class, a `staticmethod`, a
            `property` or a `partial`), or an annotation cannot be checked.
        NameError: at the call, if an annotation contains a name that its module does not define.

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
    _refuse_misuse(fn)
    function = cast("types.FunctionType", fn)
    check = _Check(function)

    # Because it is marked as constant, Dynamo runs it while tracing instead of tracing it.
    def ready() -> None:
        if check.made is None:
            check.made = check.generated()

    ready._dynamo_marked_constant = True  # type: ignore[attr-defined]

    # Dynamo names what a function reads by where it lies. It makes a new name for globals without
    # a module each time that it traces, and would trace again for each number among them.
    def stub(*args: Any, **kwargs: Any) -> Any:
        ready()
        return check.made(*args, **kwargs)  # type: ignore[misc]

    async def stub_of_coroutine(*args: Any, **kwargs: Any) -> Any:
        ready()
        return await check.made(*args, **kwargs)  # type: ignore[misc]

    chosen = stub_of_coroutine if inspect.iscoroutinefunction(fn) else stub
    # Dynamo keeps its caches and its recompile limit by code object: without a copy for each
    # function, the ninth loss compiled in a process would fail.
    code = chosen.__code__.replace(co_name=function.__name__)
    checked = types.FunctionType(code, globals(), function.__name__, None, chosen.__closure__)
    return cast("Callable[P, R]", functools.wraps(fn)(checked))


ContractError.__module__ = "termwise"  # the name under which users import it, shown in tracebacks


def _refuse_misuse(fn: Any) -> None:
    """Return what to write if contract decorates something other than a function."""
    kind = type(fn).__name__
    name = getattr(fn, "__qualname__", kind)
    if isinstance(fn, type):
        what = "dataclass" if dataclasses.is_dataclass(fn) else "class"
        if issubclass(fn, nn.Module):
            raise TypeError(f"contract takes a function, and {name} is a Module: put it on forward")
        raise TypeError(f"contract takes a function, and {name} is a {what}: put it on its methods")
    if isinstance(fn, (staticmethod, classmethod, property, functools.cached_property)):
        raise TypeError(
            f"contract takes a function, and {_inner_name(fn)} is a {kind}: put @{kind} above "
            f"@tw.contract"
        )
    if isinstance(fn, (functools.partial, functools.partialmethod, types.MethodType)):
        raise TypeError(
            f"contract takes a function, and this is a {kind} of {_inner_name(fn)}: put it on "
            f"{_inner_name(fn)}"
        )
    if hasattr(fn, "cache_info"):
        raise TypeError(
            f"contract takes a function, and {name} is cached by its arguments: put @lru_cache "
            f"above @tw.contract"
        )
    if isinstance(fn, nn.Module):
        raise TypeError(f"contract takes a function, and this is a {kind}: put it on forward")
    if not isinstance(fn, types.FunctionType):
        raise TypeError(f"contract takes a function with annotations, got {kind}")


def _inner_name(holder: Any) -> str:
    inner: Any = next(
        (f for n in ("__func__", "fget", "func") if (f := getattr(holder, n, None)) is not None),
        holder,
    )
    return str(getattr(inner, "__qualname__", type(inner).__name__))


class _Check:
    """The requirements of a signature, and the function that checks them in a call."""

    def __init__(self, fn: types.FunctionType) -> None:
        self.fn = fn
        self.name = fn.__qualname__.rpartition("<locals>.")[2]
        self.owner = fn.__qualname__.rpartition(".")[0]
        self.parameters = tuple(inspect.signature(fn).parameters.values())
        self.groups = tuple(p.name for p in self.parameters if p.name.endswith("_group"))
        self.expected: dict[str, Expected] | None = None
        self.returns = Expected(Any)
        self.made: Callable[..., Any] | None = None
        # Names that are defined later, such as a method's own class, are resolved at the first
        # call.
        try:
            self.parse()
        except NameError:
            self.expected = None

    def parse(self) -> dict[str, Expected]:
        """Parse the annotations, and raise an error for those that cannot be checked."""
        if self.expected is not None:
            return self.expected
        hints = hints_of(self.fn, self.name)
        expected: dict[str, Expected] = {}
        for parameter, hint in hints.items():
            which = RESULT if parameter == "return" else parameter
            try:
                expected[parameter] = expected_of(hint)
            except (TypeError, NameError) as error:
                raise type(error)(f"{self.name}: {which}: {error}") from None
        self.returns = expected.pop("return", self.returns)
        for record in _forgotten(self.returns):
            raise TypeError(
                f"{self.name} returns {record.__qualname__}, a subclass of Terms that has no "
                f"@tw.terms above it"
            )
        self.expected = expected
        # Values that are not arrays first: "{k}+1" can only be computed if k is a number.
        self.order = sorted(
            (index for index, p in enumerate(self.parameters) if p.name in expected),
            key=lambda index: _rank(expected[self.parameters[index].name]),
        )
        return expected

    def values_of(self, values: tuple[Any, ...]) -> "Iterator[tuple[Expected, str, Any]]":
        """List annotation, name and value of each argument, those without a shape first."""
        expected = self.parse()
        for index in self.order:
            parameter, value = self.parameters[index], values[index]
            asked = expected[parameter.name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                for position, one in enumerate(value):
                    yield asked, f"{parameter.name}[{position}]", one
            elif parameter.kind is parameter.VAR_KEYWORD:
                for key, one in value.items():
                    yield asked, key, one
            else:
                yield asked, parameter.name, value

    def bindings(self, values: tuple[Any, ...]) -> Bindings:
        arguments = {p.name: value for p, value in zip(self.parameters, values, strict=True)}
        return Bindings(arguments, self.groups, values[0] if values else None, self.owner)

    def judge(self, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], Bindings]:
        """Examine a call; return its values and what they bind, or raise an error."""
        known = self.bindings(values)
        for asked, owner, value in self.values_of(values):
            problem = asked.problem(value, owner, known)
            if problem:
                raise ContractError(f"{self.name}: {problem}")
        problem = known.finish()
        if problem:
            raise ContractError(f"{self.name}: {problem}")
        return self.with_floats(values), known

    def with_floats(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Convert real numbers of any class to floats, which can be multiplied with tensors."""
        expected = self.parse()
        given: list[Any] = []
        for parameter, value in zip(self.parameters, values, strict=True):
            asked = expected.get(parameter.name)
            if asked is not None and asked.real:
                if parameter.kind is parameter.VAR_POSITIONAL:
                    value = tuple(_float_of(one) for one in value)
                elif parameter.kind is parameter.VAR_KEYWORD:
                    value = {key: _float_of(one) for key, one in value.items()}
                else:
                    value = _float_of(value)
            given.append(value)
        return tuple(given)

    def judged_result(self, result: Any, known: Bindings) -> Any:
        problem = self.returns.problem(result, RESULT, known) or known.finish()
        if problem:
            raise ContractError(f"{self.name}: {problem}")
        return result

    def body(self) -> Callable[..., Any]:
        """Return the function as a function of all parameters by position."""
        names = [parameter.name for parameter in self.parameters]
        own = "_" * (1 + max(map(len, names), default=0))  # longer than any of them
        source = f"lambda {', '.join(names)}: {own}({_passed(self.parameters)})"
        return cast("Callable[..., Any]", eval(source, {own: self.fn}))

    def generated(self) -> Callable[..., Any]:
        """Generate the check of this signature."""
        expected = self.parse()

        # Below a frame that Dynamo cannot trace, it still tries to trace each frame, including
        # those of `judge`. `torch.compiler.disable` imports Dynamo, which takes a second, so it is
        # used only once Dynamo is imported.
        @functools.cache
        def shielded() -> Callable[..., Any]:
            return cast("Callable[..., Any]", torch.compiler.disable(self.judge))

        def judge(values: tuple[Any, ...]) -> tuple[tuple[Any, ...], Bindings]:
            if not torch.compiler.is_compiling() and "torch._dynamo" in sys.modules:
                return cast("tuple[tuple[Any, ...], Bindings]", shielded()(values))
            return self.judge(values)

        body = self.body()

        def again(values: tuple[Any, ...]) -> Any:
            values, known = judge(values)
            return self.judged_result(body(*values), known)

        async def again_as_coroutine(values: tuple[Any, ...]) -> Any:
            values, known = judge(values)
            return self.judged_result(await body(*values), known)

        def wrong(result: Any, values: tuple[Any, ...], axes: Iterable[Any]) -> Any:
            known = self.bindings(values)
            known.axes = {key: (size, owner, False) for key, size, owner in axes if owner}
            return self.judged_result(result, known)

        of_coroutine = inspect.iscoroutinefunction(self.fn)
        return _Writer(self, of_coroutine).written(
            expected, again_as_coroutine if of_coroutine else again, wrong
        )


def _float_of(value: Any) -> Any:
    if not is_another_real(value):
        return value
    if torch.compiler.is_compiling() and isinstance(value, numbers.Rational):
        rational: Any = value  # PyTorch 2.11 does not trace float(Fraction)
        return rational.numerator / rational.denominator
    return float(value)


def _forgotten(asked: Expected) -> Iterator[type]:
    """Yield the subclasses of Terms without `@terms` in an annotation."""
    for option in asked.options:
        if (
            isinstance(option, type)
            and issubclass(option, Terms)
            and "__dataclass_fields__" not in vars(option)
        ):
            yield option
    for collection in asked.collections:
        for kind in collection.kinds:
            yield from _forgotten(kind)


def _rank(asked: Expected) -> int:
    """Order annotations: without a shape, with one, and last those that bind local axes."""
    several = any(one.of_records for one in asked.collections)
    return 2 if several else int(_with_shapes(asked))


def _with_shapes(asked: Expected) -> bool:
    """Whether an annotation contains shapes."""
    return bool(asked.shapes or asked.collections or any(_shapes_in(r) for r in asked.records))


def _shapes_in(record: Record) -> bool:
    return any(_with_shapes(field) for field in record.fields.values())


class _NotWrittenError(Exception):
    """The fast path has no code for an annotation: each call is examined by `judge`."""


# What the generated source calls: there, a parameter of one of these names would be called instead.
_CALLED = frozenset({"bool", "enumerate", "float", "int", "isinstance", "len", "str"})


class _Writer:
    """Generate the check of a signature as the source of a function.

    Axes are bound in local variables. One that may stay unbound, because what binds it is optional
    or in a collection, starts as None, and a second local has the name of the argument that bound
    it.
    """

    def __init__(self, check: _Check, of_coroutine: bool) -> None:
        self.check = check
        self.of_coroutine = of_coroutine
        taken = [parameter.name for parameter in check.parameters]
        self.prefix = "_"
        while any(name.startswith(self.prefix) for name in taken):
            self.prefix += "_"
        self.count = 0
        self.constants: dict[str, Any] = {}
        self.head: list[str] = []
        # For each axis: its local, the source of its owner's name, whether it is always bound.
        self.axes: dict[str, tuple[str, str, bool]] = {}
        # The local with the sizes, if all axes are bound.
        self.sizes: dict[tuple[str, ...], str] = {}
        self.waiting: list[tuple[Axis, str]] = []
        self.of_item = False  # in a loop over records: sizes wait for the record's end
        self.bad = ""
        self.open: list[Record] = []

    def new(self) -> str:
        self.count += 1
        return f"{self.prefix}{self.count}"

    def constant(self, value: Any) -> str:
        """Return a name for a value in the source; Dynamo guards each name once."""
        for name, one in self.constants.items():
            if one is value or (isinstance(value, frozenset) and one == value):
                return name
        name = f"{self.new()}c"
        self.constants[name] = value
        return name

    def written(
        self, expected: Mapping[str, Expected], again: Callable[..., Any], wrong: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Return the function."""
        fn, parameters = self.check.fn, self.check.parameters
        names = [parameter.name for parameter in parameters]
        values = f"({', '.join(names)}{',' if len(names) == 1 else ''})"
        awaited = "await " if self.of_coroutine else ""
        function = self.constant(fn)
        passed = _passed(parameters)
        self.bad = f"return {awaited}{self.constant(again)}({values})"
        switch = self.constant(config)
        first = f"    if {switch}.jaxtyping_disable: return {awaited}{function}({passed})"
        try:
            if not _CALLED.isdisjoint(names):
                raise _NotWrittenError
            lines: list[str] = []
            for index in self.check.order:
                lines += self.parameter(parameters[index], expected[names[index]])
            lines += self.compared_late()
            result = f"{self.prefix}result"
            after = [f"    {result} = {awaited}{function}({passed})"]
            wrongly = self.constant(wrong)
            self.bad = ""
            # For a wrong result: the sizes of the axes, and the arguments that bound them.
            axes = "".join(f"({key!r}, {v}, {owner})," for key, (v, owner, _) in self.axes.items())
            checks = self.one(self.check.returns, result, RESULT, "    ", sure=True)
            checks += self.compared_late()
            bad = f"return {wrongly}({result}, {values}, ({axes}))"
            after += [line.replace(_BAD, bad) for line in checks]
            lines = [*self.head, *lines, *after, f"    return {result}"]
        except _NotWrittenError:
            lines = [f"    return {awaited}{self.constant(again)}({values})"]
        is_free = fn.__name__.isidentifier() and fn.__name__ not in _CALLED
        name = fn.__name__ if is_free else "checked"  # not <lambda>
        head = f"{'async ' if self.of_coroutine else ''}def {name}({self.declared(parameters)}):"
        within = textwrap.indent("\n".join([head, first, *lines]), "    ")
        make = f"{self.new()}make"
        source = f"def {make}({', '.join(self.constants)}):\n{within}\n    return {name}"
        scope: dict[str, Any] = {"__builtins__": builtins}
        exec(compile(source, f"<contract of {fn.__qualname__}>", "exec"), scope)
        made = cast("types.FunctionType", scope[make](*self.constants.values()))
        made.__qualname__ = fn.__qualname__
        return made

    def declared(self, parameters: tuple[inspect.Parameter, ...]) -> str:
        """Write the parameters, with their defaults as constants."""
        parts: list[str] = []
        starred = False
        for index, parameter in enumerate(parameters):
            default = parameter.default
            given = "" if default is parameter.empty else f"={self.constant(default)}"
            if parameter.kind is parameter.KEYWORD_ONLY and not starred:
                parts.append("*")
                starred = True
            stars: dict[Any, str] = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
            starred = starred or parameter.kind is parameter.VAR_POSITIONAL
            parts.append(f"{stars.get(parameter.kind, '')}{parameter.name}{given}")
            last = index + 1 == len(parameters) or (
                parameters[index + 1].kind is not parameter.POSITIONAL_ONLY
            )
            if parameter.kind is parameter.POSITIONAL_ONLY and last:
                parts.append("/")
        return ", ".join(parts)

    def parameter(self, parameter: inspect.Parameter, asked: Expected) -> list[str]:
        """Write the check of one parameter, or of each value of `*zs` and `**zs`."""
        name = parameter.name
        key, one = f"{self.new()}k", f"{self.new()}v"
        if parameter.kind is parameter.VAR_POSITIONAL:
            body = self.one(asked, one, f"{name}[{{{key}}}]", " " * 8, sure=False)
            loop = [f"    for {key}, {one} in enumerate({name}):"]
            return loop + body if body else []
        if parameter.kind is parameter.VAR_KEYWORD:
            body = self.one(asked, one, f"{{{key}}}", " " * 8, sure=False)
            return [f"    for {key}, {one} in {name}.items():", *body] if body else []
        return self.one(asked, name, name, "    ", sure=True)

    def one(self, asked: Expected, value: str, owner: str, space: str, *, sure: bool) -> list[str]:
        """Write the check of one value; owner is the inside of an f-string that names it."""
        if asked.anything:
            return []
        if asked.validated is not None:
            raise _NotWrittenError
        branches: list[tuple[str, list[str]]] = []
        kinds = [kind for kind in asked.classes if kind is not type(None)]
        parts: tuple[Record | Collection, ...] = (*asked.records, *asked.collections)
        alone = len(asked.options) == 1
        optional = type(None) in asked.classes
        surely = sure and alone and not optional
        inner = space + "    "
        if optional:
            branches.append((f"{value} is None", []))
        for condition in self.conditions(asked, kinds, value):
            branches.append((condition, []))
        for shape in asked.shapes:
            branches.append(self.shape(shape, value, owner, space if surely else inner, surely))
        for part in parts:
            # In a separate branch: `judge` may find that another option accepts what this one does
            # not.
            branches.append(self.parts(part, value, owner, space if surely else inner, surely))
        if not branches:
            raise _NotWrittenError
        bad = self.bad or _BAD
        if len(branches) == 1:
            condition, body = branches[0]
            if not surely:
                body = [line[4:] for line in body]
            return [f"{space}if not ({condition}): {bad}", *body]
        empty = [condition for condition, body in branches if not body]
        lines: list[str] = []
        word = "if"
        if empty:
            lines = [f"{space}if {' or '.join(f'({c})' for c in empty)}: pass"]
            word = "elif"
        for condition, body in branches:
            if body:
                lines += [f"{space}{word} {condition}:", *body]
                word = "elif"
        if word == "elif" and len(lines) == 1:
            return [f"{space}if not ({' or '.join(f'({c})' for c in empty)}): {bad}"]
        return [*lines, f"{space}else: {bad}"]

    def conditions(self, asked: Expected, kinds: list[type], value: str) -> Iterator[str]:
        """Write the condition that accepts a value without examining its contents."""
        if asked.literals:
            by_type: dict[type, list[Any]] = {}
            for literal in asked.literals:
                by_type.setdefault(literal.__class__, []).append(literal)
            for kind, literals in by_type.items():
                named = "str" if kind is str else self.constant(kind)
                among = repr(tuple(literals)) if kind is str else self.constant(tuple(literals))
                yield f"{value}.__class__ is {named} and {value} in {among}"
        if kinds:
            exact = {float: "float", int: "int", str: "str", bool: "bool"}
            quick = next((exact[kind] for kind in exact if kind in kinds), "")
            simple = [exact.get(kind) or self.constant(kind) for kind in kinds]
            of_any = simple[0] if len(simple) == 1 else f"({', '.join(simple)})"
            test = f"isinstance({value}, {of_any})"
            yield f"{value}.__class__ is {quick} or {test}" if quick == "float" else test
        if asked.group:
            yield f"isinstance({value}, {self.constant(ProcessGroup)})"
        if asked.called:
            yield f"callable({value})"
        if asked.of_own_class:
            first = self.check.parameters[0].name if self.check.parameters else "None"
            own = self.constant(is_of_own_class)
            yield f"{own}({value}, {first}, {self.check.owner!r})"
        if asked.others:
            yield f"{self.constant(asked.fits_others)}({value})"

    def shape(
        self, shape: Shape, value: str, owner: str, space: str, sure: bool
    ) -> tuple[str, list[str]]:
        """Write the condition under which a tensor fits a shape, and the axes that it binds."""
        if not shape.of_tensors or any(a.variadic and a.stretches for a in shape.axes):
            raise _NotWrittenError
        kind = self.constant(shape.array_type)
        tests = [f"({value}.__class__ is {kind} or {self.constant(is_plain)}({value}))"]
        if shape.array_type is not Tensor:
            tests = [f"isinstance({value}, {kind})"]
        if not shape.any_dtype:
            tests.append(f"{value}.dtype in {self.constant(shape.dtypes)}")
        if not shape.axes:
            return " and ".join([*tests, f"{value}.ndim == 0"]), []
        named = tuple(axis.key for axis in shape.axes)
        if any(a.free or a.stretches or a.fixed is not None or a.formula for a in shape.axes):
            named = ()
        if named in self.sizes:
            return " and ".join([*tests, f"{value}.shape == {self.sizes[named]}"]), []
        sizes = f"{self.new()}s"
        needed, last = shape.before + shape.after, len(shape.axes)
        compared = ">=" if shape.variadic else "=="
        tests.append(f"len({sizes} := {value}.shape) {compared} {needed}")
        binds: list[str] = []
        within: dict[str, str] = {}
        formulas: list[tuple[Axis, str]] = []
        for index, axis in enumerate(shape.axes):
            size = f"{sizes}[{index if index < shape.before else index - last}]"
            if axis.variadic:
                size = f"{sizes}[{shape.before}:len({sizes}) - {shape.after}]"
            if axis.free:
                continue
            if axis.fixed is not None or axis.formula is not None:
                ones = f"{size} == 1 or " if axis.stretches else ""
                if axis.fixed is not None:
                    tests.append(f"({ones}{size} == {axis.fixed})")
                else:
                    formulas.append((axis, size))
                continue
            test, bound = self.axis(axis, size, owner, space, sure, within)
            tests += test
            binds += bound
        for axis, size in formulas:
            ones = f"{size} == 1 or " if axis.stretches else ""
            known = {name: local for name, (local, _, bound) in self.axes.items() if bound} | within
            if all(name in known for name in axis.needs):
                tests.append(f"({ones}{size} == {self.computed(axis, known)})")
            else:
                if "{" in owner and not self.of_item:  # in a loop nothing is deferred
                    raise _NotWrittenError
                deferred = f"{self.new()}w"
                self.head.append(f"    {deferred} = None")
                binds.append(f"{space}{deferred} = {size}")
                self.waiting.append((axis, deferred))
        # The sizes may replace the axes from here on only if this line always runs.
        if named and sure and all(self.axes[key][2] for key in named):
            self.sizes[named] = sizes
        return " and ".join(tests), binds

    def axis(
        self, axis: Axis, size: str, owner: str, space: str, sure: bool, within: dict[str, str]
    ) -> tuple[list[str], list[str]]:
        """Write the comparison of an axis by name, and what binds it."""
        ones = f"{size} == 1 or " if axis.stretches else ""
        if axis.key in within:
            return [f"({ones}{size} == {within[axis.key]})"], []
        if not axis.stretches:
            within[axis.key] = size
        if axis.key not in self.axes:
            local = f"{self.new()}a"
            if sure and not axis.stretches:
                self.axes[axis.key] = (local, repr(owner), True)
                return [], [f"{space}{local} = {size}"]
            self.head.append(f"    {local} = {local}o = None")
            self.axes[axis.key] = (local, f"{local}o", False)
        local, by, bound = self.axes[axis.key]
        if bound:
            return [f"({ones}{size} == {local})"], []
        open_still = f"{local} is None" + (f" and {size} != 1" if axis.stretches else "")
        binds = [f'{space}if {open_still}: {local} = {size}; {by} = f"{owner}"']
        return [f"({ones}{local} is None or {size} == {local})"], binds

    def computed(self, axis: Axis, known: Mapping[str, str]) -> str:
        """Write the size that a formula computes."""
        parameters = {parameter.name for parameter in self.check.parameters}
        asked = tuple(dict.fromkeys(name for _, _, names in axis.asks for name in names))
        if any(name not in parameters for name in asked):
            raise _NotWrittenError
        size = self.constant(_size_or_none(axis, asked))
        return f"{size}({', '.join([*(known[name] for name in axis.needs), *asked])})"

    def compared_late(self, space: str = "    ") -> list[str]:
        """Write the comparison of sizes with axes that were bound after them."""
        lines: list[str] = []
        for axis, deferred in self.waiting:
            if any(name not in self.axes for name in axis.needs):
                continue
            known = {name: self.axes[name][0] for name in axis.needs}
            bound = [f"{local} is not None" for local in (deferred, *known.values())]
            ones = [f"{deferred} != 1"] if axis.stretches else []
            size = self.computed(axis, known)
            test = " and ".join([*bound, *ones, f"{deferred} != {size}"])
            lines.append(f"{space}if {test}: {self.bad or _BAD}")
        self.waiting = []
        return lines

    def parts(
        self, part: Record | Collection, value: str, owner: str, space: str, sure: bool
    ) -> tuple[str, list[str]]:
        """Write the check of the fields of a record, or of the items of a collection."""
        one = f"{self.new()}v"
        lines: list[str] = []
        if isinstance(part, Record):
            if part in self.open:
                raise _NotWrittenError  # a record that holds its own kind
            self.open.append(part)
            for field, asked in part.fields.items():
                name = field_of(owner, field, by_key=part.by_key)
                got = f"{value}[{field!r}]" if part.by_key else f"{value}.{field}"
                if part.by_key and field not in part.required:
                    body = self.one(asked, one, name, space + "    ", sure=False)
                    lines += [
                        f"{space}if {field!r} in {value}:",
                        f"{space}    {one} = {got}",
                        *body,
                    ]
                    continue
                body = self.one(asked, one, name, space, sure=sure)
                lines += [f"{space}{one} = {got}", *body] if body else []
                one = f"{self.new()}v"
            self.open.pop()
            if part.by_key:
                keys = "".join(f" and {field!r} in {value}" for field in sorted(part.required))
                return f"isinstance({value}, {self.constant(Mapping)}){keys}", lines
            return f"isinstance({value}, {self.constant(part.kind)})", lines
        test = f"isinstance({value}, {self.constant(part.origin)})"
        if not part.alike:
            for index, asked in enumerate(part.kinds):
                body = self.one(asked, one, element_of(owner, index), space, sure=sure)
                lines += [f"{space}{one} = {value}[{index}]", *body] if body else []
                one = f"{self.new()}v"
            return f"{test} and len({value}) == {len(part.kinds)}", lines
        if part.origin is Iterable:
            raise _NotWrittenError
        key, inner = f"{self.new()}k", space + "    "
        before, outer = dict(self.axes), (self.waiting, self.of_item)
        if part.of_records:
            self.waiting, self.of_item = [], True
        if part.by_key:
            named = f"{self.constant(place)}({key})"
            lines = self.one(part.key, key, f"a key of {owner}", inner, sure=False)
            lines += self.one(part.kinds[0], one, f"{owner}[{{{named}}}]", inner, sure=False)
            loop = f"{space}for {key}, {one} in {value}.items():"
        else:
            lines = self.one(part.kinds[0], one, f"{owner}[{{{key}}}]", inner, sure=False)
            loop = f"{space}for {key}, {one} in enumerate({value}):"
        if not part.of_records:
            return test, [loop, *(lines or [f"{inner}pass"])]
        # Axes that one of several records binds are discarded after it.
        deferred = [size for _, size in self.waiting]
        lines += self.compared_late(inner)
        self.waiting, self.of_item = outer
        own = [local for name, (local, _, _) in self.axes.items() if name not in before]
        start = [f"{inner}{size} = None" for size in deferred]
        start += [f"{inner}{local} = {local}o = None" for local in own]
        saved: list[str] = []
        for local, by, bound in before.values():
            if not bound:
                was = self.new()
                saved.append(f"{space}{was} = {local}, {by}")
                start.append(f"{inner}{local}, {by} = {was}")
        after = [line.removeprefix("    ") for line in start]
        self.axes = before
        return test, [*saved, loop, *start, *(lines or [f"{inner}pass"]), *after]


_BAD: Final = "<what is done with a result that does not fit>"


def _passed(parameters: tuple[inspect.Parameter, ...]) -> str:
    """Write the arguments of the call of the body."""
    written: dict[Any, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*{0}",
        inspect.Parameter.VAR_KEYWORD: "**{0}",
        inspect.Parameter.KEYWORD_ONLY: "{0}={0}",
    }
    return ", ".join(written.get(p.kind, "{0}").format(p.name) for p in parameters)


def _size_or_none(axis: Axis, asked: tuple[str, ...]) -> Callable[..., Any]:
    """Compile a formula as a function of axes and arguments; None if it has no value."""
    formula, asks, count = axis.formula, axis.asks, len(axis.needs)

    def size(*values: Any) -> Any:
        named = dict(zip(asked, values[count:], strict=True))
        try:
            parts = [ask(*[named[name] for name in names]) for _, ask, names in asks]
            return formula(*values[:count], *parts)
        except Exception:  # of any class: `judge` reports it
            return None

    return size
