"""Each exported function that takes tensors, with what is declared of it, by its name."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from exports import EXPORTS, FUNCTIONS
from losses import Declaration, Variant, declared
from torch import Tensor

import termwise as tw


def takes_tensors(function: Callable[..., Any]) -> bool:
    hints = [p.annotation for p in inspect.signature(function).parameters.values()]
    return any("Tensor" in str(hint) and "Callable" not in str(hint)[:40] for hint in hints)


PUBLIC = {
    name: EXPORTS[name]
    for name in FUNCTIONS
    if not name.startswith(("termwise.", "testing."))
    and takes_tensors(EXPORTS[name])
    # It reads tensors as lists, where batches are made: there is no graph to hold a law.
    and name != "lm.align_spans"
}
_BY_FUNCTION = {declaration.function: declaration for declaration in declared()}
DECLARED: dict[str, Declaration] = {
    name: _BY_FUNCTION[function] for name, function in PUBLIC.items() if function in _BY_FUNCTION
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A variant of a loss, to be called on so many rows."""

    name: str
    loss: Callable[..., tw.Terms]
    held: Variant

    def tensors(self, rows: int = 7) -> list[Tensor]:
        return self.held.tensors(rows)

    def extra(self, rows: int = 7) -> dict[str, Any]:
        return self.held.extra(rows)

    def function(self, *inputs: Tensor, **extra: Any) -> tw.Terms:
        return self.loss(*self.held.first, *inputs, **self.held.options, **extra)

    def module(self, *inputs: Tensor, **extra: Any) -> tw.Terms:
        return self.held.module(*inputs, **extra)

    def changed(self, rows: int = 7, **given: Any) -> tw.Terms:
        """Call the function with some arguments in place of the declared ones, of what it takes."""
        signature = inspect.signature(self.loss)
        options = {**self.held.options, **self.extra(rows)}
        call = signature.bind(*self.held.first, *self.tensors(rows), **options)
        taken = {name: value for name, value in given.items() if name in signature.parameters}
        return self.loss(**call.arguments | taken)


CASES = {
    (label := f"{name} {variant}".strip()): Case(label, declaration.function, held)
    for name, declaration in DECLARED.items()
    for variant, held in declaration.variants.items()
}
