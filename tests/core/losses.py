"""A loss as the checks in `every_loss.py` take it, and inputs for one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import termwise as tw

PAIR = ("rows columns", "rows columns")


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss, its module with the same numbers, and the shapes of its tensors."""

    function: Callable[..., tw.Terms]
    module: nn.Module
    options: dict[str, Any]
    shapes: tuple[str, ...] = ("rows columns",)
    """Of the tensors by position; the first one's name is what a wrong rank is blamed on."""
    named: dict[str, str] = dataclasses.field(default_factory=dict)
    """Shapes of the tensors by name."""
    masks: tuple[str, ...] = ()
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What else a call needs, of the function and the module alike."""
    made: Callable[[int], dict[str, Any]] = lambda rows: {}
    """The same, where it depends on the number of rows."""
    first: tuple[Any, ...] = ()
    """What the function takes before its tensors, and the module holds: an energy."""
    of_the_module: tuple[str, ...] = ()
    """Fields that are no keywords of the function, such as where a parameter starts, or that have
    another default in a config."""

    def tensors(self, rows: int = 7, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [draw(shape, rows, generator) for shape in self.shapes]

    def extra(self, rows: int = 7) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(9)
        masks = {name: torch.arange(rows) % 3 != 1 for name in self.masks}
        drawn = {name: draw(shape, rows, generator) for name, shape in self.named.items()}
        return {**drawn, **masks, **self.fixed, **self.made(rows)}

    def call_function(self, *inputs: Tensor, **extra: Any) -> tw.Terms:
        return self.function(*self.first, *inputs, **self.options, **extra)

    def call_module(self, *inputs: Tensor, **extra: Any) -> tw.Terms:
        return self.call(self.module, *inputs, **extra)

    def call(self, module: nn.Module, *inputs: Tensor, **extra: Any) -> tw.Terms:
        return module(*inputs, **extra)


def draw(shape: str, rows: int, generator: torch.Generator) -> Tensor:
    sizes = {"rows": rows, "columns": 3, "latents": 5, "layers": 2, "noises": 2, "time": 4}
    return torch.randn([sizes[axis] for axis in shape.split()], generator=generator)
