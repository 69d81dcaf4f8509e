"""Save and restore the state that a function keeps between calls."""

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

# Modules whose caches do not belong to a loss.
_IGNORED: Final = ("termwise._contract", "termwise._annotations", "jaxtyping", "beartype", "torch")
_KINDS: Final = (dict, list, set)


class State:
    """The collections and names that a function can change, with their values at construction."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.caches: list[Any] = []
        self.collections: list[tuple[Any, Any]] = []
        self.names: list[tuple[Any, str, Any]] = []
        self.cells: list[tuple[types.CellType, Any]] = []
        seen: dict[int, Any] = {}  # keeps the objects alive, so that no id is used twice
        pending: list[Any] = [fn]
        while pending:
            one = pending.pop()
            if id(one) not in seen:
                seen[id(one)] = one
                pending.extend(self._save(one))

    def _save(self, one: Any) -> Iterator[Any]:
        """Save the state of a function or an object, and yield the objects that it refers to."""
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
            yield from self._save_function(one)
        elif callable(one) and hasattr(one, "__dict__") and not isinstance(one, type):
            yield vars(one)
            yield from vars(one).values()
            yield type(one).forward if isinstance(one, nn.Module) else type(one).__call__

    def _save_function(self, one: types.FunctionType) -> Iterator[Any]:
        wrapped = getattr(one, "__wrapped__", None)
        if wrapped is not None:
            yield wrapped
        module = one.__module__ or ""
        if module.startswith(_IGNORED):
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
        package = module.partition(".")[0]
        codes = [one.__code__]
        for code in codes:  # the list grows by the functions that are defined inside
            codes += [inner for inner in code.co_consts if inspect.iscode(inner)]
            assigned = _assigned(code)
            for name in code.co_names:
                held = one.__globals__.get(name)
                if name in assigned:
                    self.names.append((one.__globals__, name, held))
                owner = getattr(held, "__module__", None) or type(held).__module__
                if isinstance(held, _KINDS) or str(owner).partition(".")[0] == package:
                    yield held

    @contextlib.contextmanager
    def initial(self) -> Generator[bool]:
        """Restore the saved state inside a `with` block, and yield whether it had changed."""
        filled = [cache for cache in self.caches if cache.cache_info().currsize > 0]
        for cache in filled:
            cache.cache_clear()
        collections = [(held, copy.copy(held)) for held, _ in self.collections]
        names = [(scope, name, scope.get(name)) for scope, name, _ in self.names]
        cells = [(cell, cell.cell_contents) for cell, _ in self.cells]
        pairs = zip(collections, self.collections, strict=True)
        changed = bool(filled) or any(not _same(after, before) for (_, after), (_, before) in pairs)
        changed = changed or any(
            after is not before
            for (*_, after), (*_, before) in zip(
                [*names, *cells], [*self.names, *self.cells], strict=True
            )
        )
        _restore(self.collections, self.names, self.cells)
        try:
            yield changed
        finally:
            _restore(collections, names, cells)


def _assigned(code: types.CodeType) -> set[str]:
    """Return the global names that a function assigns to."""
    if dis.opmap["STORE_GLOBAL"] not in code.co_code[::2]:  # listing instructions is slow
        return set()
    instructions = dis.get_instructions(code)
    return {one.argval for one in instructions if one.opname == "STORE_GLOBAL"}


def _restore(
    collections: Sequence[tuple[Any, Any]],
    names: Sequence[tuple[dict[str, Any], str, Any]],
    cells: Sequence[tuple[types.CellType, Any]],
) -> None:
    for held, contents in collections:
        held.clear()
        held.extend(contents) if isinstance(held, list) else held.update(contents)
    for scope, name, value in names:
        scope[name] = value
    for cell, value in cells:
        cell.cell_contents = value


def _same(one: Any, two: Any) -> bool:
    """Whether two collections contain the same objects (`==` of tensors gives no single bool)."""
    items, others = (_items(held) for held in (one, two))
    return len(items) == len(others) and all(map(operator.is_, items, others))


def _items(held: Any) -> list[object]:
    if isinstance(held, dict):
        entries = cast("dict[object, object]", held)
        return [part for entry in entries.items() for part in entry]
    return list(cast("Iterable[object]", held))
