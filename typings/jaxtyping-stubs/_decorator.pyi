# jaxtyping leaves the parameter `typechecker` without a type, so that a strict checker knows only
# a part of `jaxtyped`. Nothing else of jaxtyping is replaced here.
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, ParamSpec, TypeVar, overload

_P = ParamSpec("_P")
_R = TypeVar("_R")

@overload
def jaxtyped(fn: Literal["context"]) -> AbstractContextManager[None]: ...
@overload
def jaxtyped(
    fn: Callable[_P, _R], *, typechecker: Callable[..., Any] | None
) -> Callable[_P, _R]: ...
