"""What the runs share: what a run is, where it trains, the one loop, and what it returns."""

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

if TYPE_CHECKING:  # they come with the extra, which `--list` does without
    from matplotlib.figure import Figure
    from rich.console import RenderableType

Curves = dict[str, list[float]]
"""Each term at each step, before that step's update."""
Show = Callable[[dict[str, float]], None]

_WARM_UP = 20  # steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how a run trains."""

    steps: int
    seed: int
    device: torch.device
    group: ProcessGroup | None
    """Ranks that share each batch. None: this process alone."""
    follow: Callable[[str, int], AbstractContextManager[Show]]
    """Opens a progress bar (its label, its number of steps) that is shown each step's terms."""

    def generator(self) -> torch.Generator:
        """Return a new generator, on the CPU, so that no draw depends on the device or the rank."""
        return torch.Generator().manual_seed(self.seed)

    def own_rows(self, batch: Tensor) -> Tensor:
        """Return this rank's rows of a global batch, on its device."""
        if self.group is None:
            return batch.to(self.device)
        return batch.tensor_split(self.group.size())[self.group.rank()].to(self.device)


class Shown(Protocol):
    """What a run returns: a result that tells, tabulates, draws and writes itself.

    The sentence says what was measured on held-out data. The table is given the run's name and how
    long it took; the figure gets its title later; JSON has every curve and measurement.
    """

    @property
    def sentence(self) -> str: ...
    def table(self, name: str, seconds: float) -> "RenderableType": ...
    def figure(self) -> "Figure": ...
    def as_json(self) -> dict[str, object]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What the command line knows of a run."""

    about: str
    train: Callable[[Setting], Shown]
    steps: int
    shared: bool = False
    """Whether ranks share each batch. If not, rank 0 trains alone."""


def help_paragraphs(setting: Setting) -> tuple[list[str], list[str]]:
    """Return the paragraphs of `help()`, without repeats and shuffled, and a tenth held out."""
    topics = pydoc_data.topics.topics
    # Topics repeat each other's paragraphs: no held-out text may be in the rest too.
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
    """Train parameters, each group at its learning rate, on the `loss` of each step's terms."""
    parameters = [{"params": [*group], "lr": rate} for group, rate in groups]
    # eps is well above rounding errors: gradients that are only rounding must not part the ranks.
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
    """Warm up, then decay to 0 along a cosine."""
    return min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
