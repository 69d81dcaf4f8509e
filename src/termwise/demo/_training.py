"""Parts that all runs share: their settings, the training loop, and the protocol of results."""

import dataclasses
import math
import pydoc_data.topics
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .._terms import Terms

if TYPE_CHECKING:  # these packages belong to the extra, which `--list` does not need
    from matplotlib.figure import Figure
    from rich.console import RenderableType

Curves = dict[str, list[float]]
"""Values of each term, one for each step, before its update."""
Show = Callable[[dict[str, float]], None]

_WARM_UP = 20  # steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings of a run."""

    steps: int
    seed: int
    device: torch.device
    group: ProcessGroup | None
    """Ranks that hold different rows of each batch. None: this process alone."""
    follow: Callable[[str, int], AbstractContextManager[Show]]
    """Opens a progress bar with a label and a number of steps; it is called with the terms."""

    def generator(self) -> torch.Generator:
        """Return a new generator on the CPU: draws do not depend on the device or the rank."""
        return torch.Generator().manual_seed(self.seed)

    def own_rows(self, batch: Tensor) -> Tensor:
        """Return this rank's rows of a global batch, on its device."""
        if self.group is None:
            return batch.to(self.device)
        return batch.tensor_split(self.group.size())[self.group.rank()].to(self.device)


class Result(Protocol):
    """The result of a run, which formats itself as a sentence, a table, a figure and JSON.

    The sentence states the result on held-out data. The table takes the name of the run and its
    duration. The title of the figure is added later. The JSON contains all curves and measurements.
    """

    @property
    def sentence(self) -> str: ...
    def table(self, name: str, seconds: float) -> "RenderableType": ...
    def figure(self) -> "Figure": ...
    def as_json(self) -> dict[str, object]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run of the command line."""

    about: str
    """Description in one line, for `--list`."""
    train: Callable[[Setting], Result]
    steps: int
    shared: bool = False
    """Whether the ranks hold different rows of each batch. If not, only rank 0 trains."""


def help_paragraphs(setting: Setting) -> tuple[list[str], list[str]]:
    """Return the paragraphs of Python's `help()`, shuffled: training ones, and a tenth held out."""
    topics = pydoc_data.topics.topics
    # Topics share paragraphs; no held-out paragraph may be in the training text.
    found = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    paragraphs = list(dict.fromkeys(paragraph.strip("\n") for paragraph in found))
    order = torch.randperm(len(paragraphs), generator=setting.generator())
    shuffled = [paragraphs[int(place)] for place in order]
    held_out = len(paragraphs) // 10
    return shuffled[held_out:], shuffled[:held_out]


def train(
    label: str,
    setting: Setting,
    groups: Iterable[tuple[Iterable[nn.Parameter], float]],
    step_terms: Callable[[], Terms],
) -> Curves:
    """Minimize the `loss` of each step's terms; each group of parameters has its learning rate."""
    parameters = [{"params": [*group], "lr": rate} for group, rate in groups]
    # eps is above rounding errors: gradients that are only rounding must not separate the ranks.
    optimizer = torch.optim.AdamW(parameters, eps=1e-6, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, setting.steps))
    curves: Curves = {}
    with setting.follow(label, setting.steps) as show:
        for _ in range(setting.steps):
            terms = step_terms()
            optimizer.zero_grad()
            terms.loss.backward()
            optimizer.step()
            schedule.step()
            metrics = terms.metrics()
            for name, value in metrics.items():
                curves.setdefault(name, []).append(value)
            show(metrics)
    return curves


def _rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate: a linear warm-up, and a cosine decay to 0."""
    return min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
