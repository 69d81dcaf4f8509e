"""Each loss, declared once for tests: what it is by its formula, and how it is called.

One file for each file of losses in src. tests/core runs every law from these declarations; what is
peculiar to a loss (known values, precision, refusals) is in its own test file. A function that is
exported and takes tensors has to be here.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import termwise as tw
from losses._bench import Case
from termwise import testing

GROUPS = {"batch_group": ("batch", {})}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A loss with some numbers, as a function and as a module that holds them, and its tensors.

    Shapes are named by axes: rows, which differ in number from call to call, and those of `SIZES`.
    """

    module: nn.Module
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the module holds, as keywords of the function."""
    shapes: tuple[str, ...] = ("rows columns",)
    """Of the tensors by position."""
    named: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Shapes of the tensors by name."""
    masks: tuple[str, ...] = ()
    """Names of masks over rows."""
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
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
        return [normal(shape, rows, generator) for shape in self.shapes]

    def extra(self, rows: int = 7) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(9)
        masks = {name: kept(rows) for name in self.masks}
        drawn = {name: normal(shape, rows, generator) for name, shape in self.named.items()}
        return {**drawn, **masks, **self.fixed, **self.made(rows)}


SIZES = {"columns": 3, "latents": 5, "layers": 2, "noises": 2, "time": 4}


def normal(shape: str, rows: int, generator: torch.Generator) -> Tensor:
    return torch.randn([{**SIZES, "rows": rows}[a] for a in shape.split()], generator=generator)


def kept(rows: int) -> Tensor:
    """Return a mask over rows that leaves out every third."""
    return torch.arange(rows) % 3 != 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declaration:
    """What the laws are told of a function.

    Without `sizes`, `elements` and `overrides`, which the test kit takes, it is called as its
    annotations alone allow.
    """

    function: Callable[..., Any]
    formula: Callable[..., Any] | None = None
    """The formula, written plainly; takes the same keywords, in float64. A loss has one."""
    formula_at: tuple[Mapping[str, Any], ...] = ({},)
    """Overrides under which the formula is compared, one after another."""
    paths: tuple[Mapping[str, Any], ...] = ({},)
    """What is set in modules of termwise, by name, so that another path is taken: the formula is
    that of each."""
    variants: Mapping[str, Variant] = dataclasses.field(default_factory=dict)
    """Of a loss, one at least: what it is as a module, compiled, exported, mapped and copied."""
    sizes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    elements: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, Any] | None = None
    """Of the terms in the loss: a number, an argument or a function of the call. {}: no parts."""
    also_in_graph: tuple[str, ...] = ()
    """Terms that are in the graph and not in the sum."""
    detached: bool = False
    """Whether the terms of the sum are outside the graph."""
    permuted: tuple[str, ...] = ("batch",)
    """Axes along which the order does not matter."""
    symmetric: tuple[tuple[str, str], ...] = ()
    """Pairs of arguments that can change places."""
    shifted: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Axes along which a constant can be added, and to which arguments."""
    scaled: Mapping[tuple[str, ...], Mapping[str, float]] = dataclasses.field(default_factory=dict)
    """Degrees of terms in arguments that are scaled together; a tensor that is returned alone is
    the term "result"."""
    optimum: Callable[[testing.Call], dict[str, Any]] | None = None
    """Arguments, by those of a call, at which the loss is 0 and has no gradient."""
    shards: Mapping[str, tuple[Any, dict[str, Any]] | None] = dataclasses.field(
        default_factory=dict
    )
    """For each group argument the axis that ranks share, and more for `assert_sharding`. None: no
    axis tells how to cut (ranks hold their own part of a projection or a teacher, or parts of one
    shape); tests/distributed holds those."""
    ignores: tuple[str, ...] = ()
    """Arguments of which a NaN need not reach the result."""
    aliases: tuple[str, ...] = ()
    """Parts of the result that are an argument as it was given."""
    more: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """More overrides, by law: so that every element counts, say."""
    large: float = 1e3
    """How large numbers are tried for finite results."""
    by: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Which tensors a law differentiates by or maps over, where not by all floating ones."""
    masked: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """For each argument that is a mask, more for `assert_masked`."""
    second: tuple[str, ...] = ("",)
    """Whether second derivatives are "right" or "refused" on each path, the last for all others.
    "": right or refused, from call to call."""
    not_held: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Laws that do not hold, with a pattern of what they say: there is a reason beside it."""
    bench: Mapping[str, Case] = dataclasses.field(default_factory=dict)
    """What the benches measure, by a label: "" alone, where there is one."""

    def expected(self, *arguments: Any, **numbers: Any) -> Any:
        """Return the formula's terms, called as the function is."""
        bound = inspect.signature(self.function).bind(*arguments, **numbers)
        bound.apply_defaults()
        return self.formula(**bound.arguments)

    def is_a_loss(self) -> bool:
        returned = self.function.__annotations__.get("return")
        return isinstance(returned, type) and issubclass(returned, tw.Terms)


def declared() -> list[Declaration]:
    """Collect what the files of this folder declare, at their top level."""
    files = sorted(Path(__file__).parent.glob("[a-z]*.py"))
    modules = [importlib.import_module(f"losses.{path.stem}") for path in files]
    found = [value for module in modules for value in vars(module).values()]
    return [value for value in found if isinstance(value, Declaration)]
