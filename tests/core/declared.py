"""Each exported function that takes tensors, with what is declared of it, by its name."""

import inspect
from collections.abc import Callable
from typing import Any

from exports import EXPORTS, FUNCTIONS
from losses import Declaration, Variant, declared


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
VARIANTS: dict[str, tuple[Declaration, Variant]] = {
    f"{name} {variant}".strip(): (declaration, held)
    for name, declaration in DECLARED.items()
    for variant, held in declaration.variants.items()
}
