"""VICReg on scikit-learn's handwritten digits, and its collapse without two terms."""

import importlib
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .._term_gradients import term_gradients
from ..joint_embedding import VICRegLoss, VICRegTerms
from ._comparison import Comparison
from ._training import Curves, Run, Setting, train

_BATCH = 255  # odd, so that two ranks hold different numbers of rows
_RATE = 4e-3
_HELD_OUT = 500  # of 1797 images, used to train neither the network nor the probe
LABELS = 10  # per digit, for the probe
DRAWS = 10  # random choices of the labels, to average over
_NORMS = 20  # measurements of the gradient norms during training
_CONTROL = "without var, cov"


def run(setting: Setting) -> Comparison:
    """Train with all three terms and without var and cov, and train linear probes on both."""
    images, digits = load_digits()
    order = torch.randperm(len(images), generator=setting.generator())
    held_out, kept = order[:_HELD_OUT], order[_HELD_OUT:]

    network = Network(setting)
    untrained = _represent(network, images, setting)
    terms, norms = _train("vicreg", network, VICRegLoss(), images[kept], setting)
    trained = _represent(network, images, setting)

    network = Network(setting)
    invariance_only = VICRegLoss(var_weight=0.0, cov_weight=0.0)
    control, _ = _train(_CONTROL, network, invariance_only, images[kept], setting)
    collapsed = _represent(network, images, setting)

    accuracies = {
        name: probe(features, digits, kept, held_out, setting)
        for name, features in (
            ("raw_pixels", images.flatten(1)),
            ("untrained", untrained),
            ("collapsed", collapsed),
            ("trained", trained),
        )
    }
    return Comparison(
        terms=terms,
        control=control,
        control_name=_CONTROL,
        about={
            "loss": "25 sim + 25 var + cov",
            "sim": "squared distance between two views: it starts near 0,\n"
            "and rises while var pulls embeddings apart",
            "var": "hinge on the standard deviation of columns",
            "cov": "squared covariances between columns",
            "std": "standard deviation of columns (0: collapse)",
            "rank": "effective rank: number of directions,\nat any scale (1: all on a line)",
        },
        levels={"std": ("gamma", 1.0)},
        measured={f"probe_accuracy_{name}": value for name, value in accuracies.items()},
        sentence=(
            f"The accuracy of a linear probe on {_HELD_OUT} held-out digits is "
            f"{accuracies['trained']:.1%} on the encoder's output (before the expander). It is "
            f"{accuracies['collapsed']:.1%} after a training without var and cov, "
            f"{accuracies['untrained']:.1%} with the untrained network, and "
            f"{accuracies['raw_pixels']:.1%} on raw pixels. The probe uses {LABELS} labels per "
            f"digit (mean of {DRAWS} random choices)."
        ),
        bars={
            _CONTROL: accuracies["collapsed"],
            "untrained": accuracies["untrained"],
            "raw pixels": accuracies["raw_pixels"],
            "trained": accuracies["trained"],
        },
        bars_about="held-out accuracy of a linear probe\n"
        "(higher is better; bars start at chance, 10%)",
        bars_format="{:.1%}",
        bars_start=0.1,
        gradient_norms=norms,
    )


RUN = Run(
    about="VICReg on scikit-learn's digits, and its collapse without var and cov",
    train=run,
    steps=150,
    shared=True,
)


class Network(nn.Module):
    """A convolutional encoder and an expander, whose output only the loss uses, as in VICReg.

    It normalizes each sample alone: with batch normalization, an embedding would depend on the
    other samples of its rank.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        torch.manual_seed(setting.seed)  # the same weights on every rank and in both trainings
        self.encoder = nn.Sequential(
            *_convolution(1, 32),
            *_convolution(32, 64),
            nn.Flatten(),
            nn.Linear(64 * 2 * 2, 256),
            nn.LayerNorm(256),
            nn.ReLU(),
        )
        self.expander = nn.Sequential(
            nn.Linear(256, 128),
            nn.LayerNorm(128),
            nn.ReLU(),
            nn.Linear(128, 128, bias=False),  # no term depends on a shift of both views
        )
        self.to(setting.device)

    def forward(self, images: Tensor) -> Tensor:
        return cast("Tensor", self.expander(self.encoder(images[:, None])))


def _convolution(channels: int, width: int) -> list[nn.Module]:
    """Return layers that halve the height and the width."""
    return [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.GroupNorm(1, width), nn.ReLU()]


def _train(
    label: str, network: Network, loss_fn: VICRegLoss, images: Tensor, setting: Setting
) -> tuple[Curves, dict[str, dict[int, float]]]:
    """Return the curves, and the norm of the gradient of each weighted term at some steps."""
    embed: nn.Module = network
    if setting.group is not None:  # DDP averages gradients, as grad_reduction="mean" expects
        embed = DistributedDataParallel(network, process_group=setting.group)
    generator = setting.generator()
    weights = {"sim": loss_fn.sim_weight, "var": loss_fn.var_weight, "cov": loss_fn.cov_weight}
    norms: dict[str, dict[int, float]] = {name: {} for name in weights}
    interval = max(1, setting.steps // _NORMS)
    step = 0

    def step_terms() -> VICRegTerms:
        nonlocal step
        step += 1
        # Every rank draws the global batch and its two views, and keeps its own rows.
        batch = images[torch.randint(len(images), (_BATCH,), generator=generator)]
        first = setting.own_rows(augment(batch, generator))
        second = setting.own_rows(augment(batch, generator))
        z1, z2 = cast("Tensor", embed(torch.cat([first, second]))).tensor_split(2)
        terms = loss_fn(z1, z2, batch_group=setting.group)
        if all(weights.values()) and step % interval == 1 % interval:
            found = term_gradients(terms, weights, network.parameters(), batch_group=setting.group)
            for name, norm in zip(found.names, map(float, found.norms.cpu()), strict=True):
                norms[name][step] = norm
        return terms

    return train(label, setting, [(network.parameters(), _RATE)], step_terms), norms


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Augment each 8 x 8 image: shift, rotate, scale, shear, brighten, add noise, erase a patch."""
    warped = _warp(images, generator)
    brightened = warped * (1 + 0.3 * _uniform(generator, len(images), 1, 1))
    noisy = brightened + 0.1 * torch.randn(images.shape, generator=generator)
    return noisy.masked_fill(_patches(images, generator), 0.0).clamp(0, 1)


def _warp(images: Tensor, generator: torch.Generator) -> Tensor:
    count, height, width = images.shape
    angle = math.radians(15) * _uniform(generator, count)
    scale = 1 + 0.15 * _uniform(generator, count)
    shear = 0.2 * _uniform(generator, count)
    shift = 0.25 * _uniform(generator, count, 2)  # 1 pixel: the image is 2 units wide
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    rows = (
        torch.stack([cosine, shear - sine, shift[:, 0]], dim=1),
        torch.stack([sine, cosine, shift[:, 1]], dim=1),
    )
    grid = F.affine_grid(torch.stack(rows, dim=1), [count, 1, height, width], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def _patches(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a mask with a random patch of 2 x 2 pixels in about half of the images."""
    count, height, width = images.shape
    top = torch.randint(height - 1, (count, 1, 1), generator=generator)
    left = torch.randint(width - 1, (count, 1, 1), generator=generator)
    below = torch.arange(height)[:, None] - top
    right = torch.arange(width) - left
    erased = torch.rand(count, 1, 1, generator=generator) < 0.5
    return erased & (below >= 0) & (below < 2) & (right >= 0) & (right < 2)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw uniformly from -1 to 1."""
    return 2 * torch.rand(shape, generator=generator) - 1


@torch.no_grad()
def _represent(network: Network, images: Tensor, setting: Setting) -> Tensor:
    return cast("Tensor", network.encoder(images[:, None].to(setting.device)).cpu())


def probe(
    features: Tensor, digits: Tensor, kept: Tensor, held_out: Tensor, setting: Setting
) -> float:
    """Return the held-out accuracy of logistic regression, averaged over choices of few labels."""
    # One scale for all columns: the penalty then has the same effect for all representations, and
    # the columns keep their relative scales. No labels are used.
    seen = features[kept]
    features = (features - seen.mean(0)) / (seen - seen.mean(0)).std()
    accuracies: list[float] = []
    # One thread: for fits this small, more threads are several times slower.
    with importlib.import_module("threadpoolctl").threadpool_limits(1, user_api="blas"):
        for rows in labelled(digits, kept, setting):
            regression = _sklearn("linear_model").LogisticRegression(max_iter=2000)
            regression.fit(features[rows].numpy(), digits[rows].numpy())
            score = regression.score(features[held_out].numpy(), digits[held_out].numpy())
            accuracies.append(float(score))
    return sum(accuracies) / len(accuracies)


def labelled(digits: Tensor, kept: Tensor, setting: Setting) -> Iterator[Tensor]:
    """Yield several random choices of the few images of each digit whose labels a probe uses."""
    generator = setting.generator()
    for _ in range(DRAWS):
        shuffled = kept[torch.randperm(len(kept), generator=generator)]
        yield torch.cat([shuffled[digits[shuffled] == digit][:LABELS] for digit in range(10)])


def load_digits() -> tuple[Tensor, Tensor]:
    """Return 1797 images of 8 x 8 pixels, with values from 0 to 1, and their digits."""
    data = _sklearn("datasets").load_digits()
    return torch.from_numpy(data.images).float() / 16, torch.from_numpy(data.target)


def _sklearn(module: str) -> Any:
    """Import a module of scikit-learn, which only a run needs and which has no type hints."""
    return importlib.import_module(f"sklearn.{module}")
