"""What a function keeps between calls."""

import contextlib
import copy
import dis
import functools
import inspect
import operator
import types
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Final, cast

from torch import nn

# Wrappers whose own caches say nothing of a loss.
_OTHERS: Final = ("termwise._contract", "termwise._annotations", "jaxtyping", "beartype", "torch")
_KINDS: Final = (dict, list, set)


class State:
    """The collections and names that a function can change, as they are before its first call."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.caches: list[Any] = []
        self.collections: list[tuple[Any, Any]] = []
        self.names: list[tuple[Any, str, Any]] = []
        self.cells: list[tuple[types.CellType, Any]] = []
        seen: dict[int, Any] = {}  # which keeps them, or another would have the same id
        waiting: list[Any] = [fn]
        while waiting:
            one = waiting.pop()
            if id(one) not in seen:
                seen[id(one)] = one
                waiting.extend(self._looked_at(one))

    def _looked_at(self, one: Any) -> Iterator[Any]:
        """Keep what is in a function or an object, and yield what else it reaches."""
        if isinstance(one, _KINDS):
            held = cast("object", one)
            self.collections.append((held, copy.copy(held)))
        elif isinstance(one, functools.partial):
            yield cast("functools.partial[object]", one).func
        elif hasattr(one, "cache_clear"):
            self.caches.append(one)
            yield one.__wrapped__
        elif isinstance(one, types.MethodType):
            yield one.__func__
            yield one.__self__
        elif isinstance(one, types.FunctionType):
            yield from self._looked_at_function(one)
        elif callable(one) and hasattr(one, "__dict__") and not isinstance(one, type):
            yield vars(one)
            yield from vars(one).values()
            yield type(one).forward if isinstance(one, nn.Module) else type(one).__call__

    def _looked_at_function(self, one: types.FunctionType) -> Iterator[Any]:
        wrapped = getattr(one, "__wrapped__", None)
        if wrapped is not None:
            yield wrapped
        module = one.__module__ or ""
        if module.startswith(_OTHERS):
            return
        yield from (vars(one), *vars(one).values())
        for default in (*(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values()):
            if isinstance(default, _KINDS):
                yield default
        for cell in one.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # not yet filled
                continue
            self.cells.append((cell, held))
            yield held
        own = module.partition(".")[0]
        codes = [one.__code__]
        for code in codes:  # which grows by what is defined within
            codes += [inner for inner in code.co_consts if inspect.iscode(inner)]
            assigned = _assigned(code)
            for name in code.co_names:
                held = one.__globals__.get(name)
                if name in assigned:
                    self.names.append((one.__globals__, name, held))
                of = getattr(held, "__module__", None) or type(held).__module__
                if isinstance(held, _KINDS) or str(of).partition(".")[0] == own:
                    yield held

    @contextlib.contextmanager
    def first(self) -> Generator[bool]:
        """Put everything back for a while; say whether anything had changed."""
        filled = [cache for cache in self.caches if cache.cache_info().currsize > 0]
        for cache in filled:
            cache.cache_clear()
        later = [(held, copy.copy(held)) for held, _ in self.collections]
        names = [(where, name, where.get(name)) for where, name, _ in self.names]
        cells = [(cell, cell.cell_contents) for cell, _ in self.cells]
        kept = zip(later, self.collections, strict=True)
        changed = bool(filled) or any(not _same(after, before) for (_, after), (_, before) in kept)
        changed = changed or any(
            after is not before
            for (*_, after), (*_, before) in zip(
                [*names, *cells], [*self.names, *self.cells], strict=True
            )
        )
        _put(self.collections, self.names, self.cells)
        try:
            yield changed
        finally:
            _put(later, names, cells)


def _assigned(code: types.CodeType) -> set[str]:
    """List the global names that a function assigns to."""
    if dis.opmap["STORE_GLOBAL"] not in code.co_code[::2]:  # to list instructions takes long
        return set()
    lines = dis.get_instructions(code)
    return {line.argval for line in lines if line.opname == "STORE_GLOBAL"}


def _put(
    collections: Sequence[tuple[Any, Any]],
    names: Sequence[tuple[dict[str, Any], str, Any]],
    cells: Sequence[tuple[types.CellType, Any]],
) -> None:
    for held, contents in collections:
        held.clear()
        held.extend(contents) if isinstance(held, list) else held.update(contents)
    for where, name, value in names:
        where[name] = value
    for cell, value in cells:
        cell.cell_contents = value


def _same(one: Any, two: Any) -> bool:
    """Whether two collections hold the same objects: tensors have no truth to compare."""
    of_one, of_two = (_items(held) for held in (one, two))
    return len(of_one) == len(of_two) and all(map(operator.is_, of_one, of_two))


def _items(held: Any) -> list[object]:
    if isinstance(held, dict):
        entries = cast("dict[object, object]", held)
        return [part for entry in entries.items() for part in entry]
    return list(cast("Iterable[object]", held))
