"""Remember energies that need reverse mode, and warn about the cause."""

import contextlib
import functools
import warnings
import weakref
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

from .._autograd import transformed
from ._energies import Energy, modules_of
from ._forward_laplacian import NoCarrierError, saved_tensors_hooks

_warned: set[Any] = set()
"""Energies, by `_identity`, that were warned about."""

_failed: set[Any] = set()
"""Energies that needed reverse mode, with all that this depends on."""

_MOST = 1000
"""Maximum number of energies to remember, since an energy may be a new object in each step."""


class Attempt:
    """An attempt to differentiate an energy in forward mode, which is not repeated after a failure.

    A failure is identified by the energy, the modes of its modules, the dtype and the event of x,
    the options, and the modes of the call (saved-tensor hooks, anomaly mode, transforms). If one of
    these differs, forward mode is tried again. The batch size only matters if it is 1.
    """

    def __init__(self, caller: str, energy: Energy, x: Tensor, way: str, *options: object) -> None:
        self.caller, self.energy, self.x, self.way, self.options = caller, energy, x, way, options

    @functools.cached_property
    def key(self) -> tuple[object, ...]:
        """Return what the outcome depends on."""
        x = self.x
        return (
            _identity(self.energy),
            tuple(module.training for module in modules_of(self.energy)),
            (x.shape[1:], min(len(x), 2), x.dtype, x.device),
            (self.way, *self.options),
            (saved_tensors_hooks(True) is not None, torch.is_anomaly_enabled(), transformed()),
        )

    def has_failed(self) -> bool:
        """Whether the same attempt failed before."""
        return bool(_failed) and self.key in _failed

    def remember(self) -> None:
        """Remember that this failed."""
        _room(_failed).add(self.key)

    def fail(self, problem: Exception) -> None:
        """Remember that this failed and that reverse mode worked; warn once for each energy."""
        if isinstance(problem, NoCarrierError):
            return
        if not isinstance(problem, torch.OutOfMemoryError):  # which may not happen the next time
            self.remember()
        if self.key[0] in _warned:
            return
        _room(_warned).add(self.key[0])
        reason = f"{type(problem).__name__}: {problem}".partition("\n")[0]
        warnings.warn(
            f"{self.caller}: {self.way} does not go through this energy ({reason}), so that the "
            "gradient is differentiated backward instead, which is slower and gives the same "
            "numbers",
            UserWarning,
            stacklevel=3,
        )


def _room(memory: set[Any]) -> set[Any]:
    """Return the set with room for one more entry."""
    if len(memory) >= _MOST:
        memory.clear()
    return memory


def touch_saved_tensors(results: Iterable[Tensor]) -> None:
    """Read the saved tensors of a graph, which raises the errors of a backward pass.

    In PyTorch 2.13 the derivative of a norm (so of cdist, std, normalize) by a tangent that is
    batched writes to a tensor that it has saved: the values are correct, but `backward` raises an
    error.
    """
    front: list[Any] = [result.grad_fn for result in results]
    seen: set[Any] = {None}
    while front:
        node = front.pop()
        if node in seen:
            continue
        seen.add(node)
        for name in dir(cast("object", node)):
            if name.startswith("_saved_"):
                getattr(node, name)
        front.extend(previous for previous, _ in node.next_functions)


def _identity(energy: Any, depth: int = 3) -> Any:
    """Return an identity of an energy.

    A function is identified by its code and by the functions and objects that it calls, since a
    closure over a model may be a new object in every step.
    """
    code = getattr(energy, "__code__", None)
    if code is None and not isinstance(cast("object", energy), functools.partial):
        try:
            reference = weakref.ref(energy)
            hash(reference)
            return reference
        except TypeError:  # no weak reference, or no hash
            return id(energy)
    held: list[object] = [getattr(energy, "func", None), getattr(energy, "__self__", None)]
    for cell in getattr(energy, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    parts = [_identity(part, depth - 1) for part in held if callable(part)] if depth else []
    return code, *parts
