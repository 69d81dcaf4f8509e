"""What the runs share: where they train, the one loop, and what they hand back."""

import dataclasses
import math
import pydoc_data.topics
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .._terms import Terms

Curves = dict[str, list[float]]
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
        """Give a fresh generator, on the CPU, so that no draw depends on the device or the rank."""
        return torch.Generator().manual_seed(self.seed)

    def own_rows(self, batch: Tensor) -> Tensor:
        """Give the rows of a global batch that are this rank's, on its device."""
        if self.group is None:
            return batch.to(self.device)
        return batch.tensor_split(self.group.size())[self.group.rank()].to(self.device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a run hands back to be shown: two trainings, and what was learnt."""

    terms: Curves
    """Each term at each step, before that step's update."""
    control: Curves
    """The same terms of the training that the first one is compared with."""
    control_name: str
    about: dict[str, str]
    """A few words on each term."""
    levels: dict[str, tuple[str, float]]
    """Lines to draw across a term's panel: what the level is called, and its value."""
    measured: dict[str, float]
    sentence: str
    """What was measured on held-out data, in words."""
    bars: dict[str, float]
    """The measurement to draw, last the one of the training itself."""
    bars_about: str
    bars_format: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """One of a frontier's trainings."""

    called: str
    """Its setting, such as "k 8"."""
    terms: Curves
    measured: dict[str, float]
    """On held-out data: `fvu`, `fvu_of_few`, `l0` and `dead`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frontier:
    """What a run hands back that compares many trainings of sparse autoencoders."""

    trainings: dict[str, list[Training]]
    """Those of each objective."""
    few: int
    """Latents that reconstruct alone for `fvu_of_few`."""
    network: Curves
    """Terms of the network whose activations they were trained on."""
    measured: dict[str, float]
    sentence: str
    """What was measured on held-out data, in words."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learnt:
    """A density that was learnt with one loss."""

    terms: Curves
    measured: dict[str, float]
    """In nats: held-out log-likelihood, distance from the truth, log Z and the error of it."""
    density: Tensor
    """On a grid, to be drawn."""
    seconds: float
    """Of the training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Density:
    """A known density, and what each loss made of samples of it."""

    truth: Tensor
    """On a grid, to be drawn."""
    samples: Tensor
    """Some of those that the losses saw."""
    half_width: float
    """Of the square that the grids cover."""
    learnt: dict[str, Learnt]
    measured: dict[str, float]
    """Of the truth: its log-likelihood on the held-out samples, and its negative entropy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Energies:
    """What a run hands back that compares losses of energy-based models."""

    densities: dict[str, Density]
    control_name: str
    """The one of `learnt` whose loss is wrong on purpose."""
    digits: Curves
    """Terms of the model of digits."""
    images: dict[str, Tensor]
    """To be drawn: 64 images of each kind."""
    energies: dict[str, Tensor]
    """Of each kind of images, by the model of digits."""
    measured: dict[str, float]
    sentence: str
    """What was measured on held-out data, in words."""


def help_paragraphs(setting: Setting) -> tuple[list[str], list[str]]:
    """Give the paragraphs of `help()`, each once and shuffled, and a tenth of them held out."""
    topics = pydoc_data.topics.topics
    # Topics repeat each other's paragraphs: held-out text must not stand in the rest too.
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
    """Train parameters, each group at its learning rate, on whatever a step's terms call `loss`."""
    parameters = [{"params": [*group], "lr": rate} for group, rate in groups]
    # eps well above rounding: ranks must not part over gradients that are nothing but rounding.
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
    """Warm up, then follow a cosine down to 0."""
    return min(1.0, (step + 1) / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
