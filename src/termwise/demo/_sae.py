"""Train four kinds of sparse autoencoders on activations, and compare error and sparsity."""

import dataclasses
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import sae
from .._terms import Terms
from . import _report
from ._training import Curves, Run, Setting, train
from ._vicreg import augment, load_digits

_BATCH = 256
_HELD_OUT = 500  # of 1797 images: neither they nor their views are used for training
_VIEWS = 8  # of each image, in addition to the image
_WIDTH = 128  # of the activations
_LATENTS = 256
_PREFIXES = (16, 32, 64, 128, 256)
_FEW = 32  # latents that reconstruct alone: Matryoshka's first ones, the largest of the others
_BANDWIDTH = 0.5  # large, because the batch is small
_DEAD_AFTER = 16 * _BATCH  # activations
_K_AUX = 32
_NETWORK_RATE = 1e-2
_RATE = 4e-3
_THRESHOLD_RATE = 3e-2  # of the logarithm of the thresholds, which change much
_MARKS = ((_report.BLUE, "o"), (_report.ORANGE, "s"), (_report.GREEN, "^"), (_report.PINK, "D"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """The training of one autoencoder."""

    label: str
    """Its hyperparameter, such as "k 8"."""
    terms: Curves
    measured: dict[str, float]
    """On held-out data: `fvu` (fraction of variance unexplained), `fvu_of_few`, `l0`, `dead`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frontier:
    """Error against sparsity for all trainings."""

    trainings: dict[str, list[Training]]
    """Trainings by objective."""
    network: Curves
    """Terms of the network whose activations the autoencoders reconstruct."""
    measured: dict[str, float]
    sentence: str
    """The result on held-out data, in words."""

    def table(self, name: str, seconds: float) -> "_report.Table":
        title = f"{name}: {_report.length(self.network)} steps each, {seconds:.1f} s"
        few = f"FVU with\n{_FEW} latents"
        columns = ("\nobjective", "\nsetting", "\nl0", "held-out\nFVU", few, "dead\nlatents")
        table = _report.new_table(title, *columns, left=2)
        for objective, trainings in self.trainings.items():
            for one in trainings:
                numbers = one.measured
                cells = [f"{numbers['l0']:.1f}"]
                cells += [f"{numbers[key]:.4f}" for key in ("fvu", "fvu_of_few")]
                table.add_row(objective, one.label, *cells, f"{numbers['dead']:.0f}")
            table.add_section()
        table.caption = (
            "l0: mean number of active latents. FVU: fraction of variance unexplained (lower is "
            "better)."
        )
        return table

    def as_json(self) -> dict[str, object]:
        return {
            "network": {"terms": _report.json_curves(self.network)},
            "trainings": [
                {
                    "objective": objective,
                    "setting": one.label,
                    "terms": _report.json_curves(one.terms),
                    "measured": _report.json_numbers(one.measured),
                }
                for objective, trainings in self.trainings.items()
                for one in trainings
            ],
            "measured": _report.json_numbers(self.measured),
        }

    def figure(self) -> "_report.Figure":
        """Draw the unexplained variance against l0, with all and with few latents, and errors."""
        figure = _report.new_figure(11, 6.7)
        grid = figure.add_gridspec(2, 3)
        frontier = figure.add_subplot(grid[:, :2])
        few, curves = (figure.add_subplot(grid[row, 2]) for row in range(2))
        for (objective, trainings), (color, marker) in zip(
            self.trainings.items(), _MARKS, strict=True
        ):
            measured = [one.measured for one in trainings]
            for panel, measurement in ((frontier, "fvu"), (few, "fvu_of_few")):
                points = sorted((one["l0"], one[measurement]) for one in measured)
                panel.plot(*zip(*points, strict=True), color=color, marker=marker, label=objective)
            middle = trainings[len(trainings) // 2]
            _report.draw_curve(curves, middle.terms["mse"], f"{objective}, {middle.label}", color)
        for panel in (frontier, few, curves):
            panel.set_yscale("log")
            _report.plain_numbers(panel.yaxis)
            panel.grid(color=_report.GREY, alpha=0.25, linewidth=0.5, which="both")
        for panel in (frontier, few):
            panel.set_xscale("log")
            _report.plain_numbers(panel.xaxis)
        x = "l0: mean number of active latents"
        title = "fraction of held-out variance unexplained (down and left is better)"
        _report.label_panel(frontier, title, "FVU", x)
        _report.label_panel(few, f"the same with only {_FEW} latents", "FVU", x)
        title = "training error at each middle setting\n(matryoshka: mean over prefixes)"
        _report.label_panel(curves, title, "mse")
        _report.draw_legend(figure, frontier)
        return figure


def run(setting: Setting) -> Frontier:
    """Train a network, then each autoencoder with each setting on its activations."""
    images, digits = load_digits()
    order = torch.randperm(len(images), generator=setting.generator())
    held_out, kept = order[:_HELD_OUT], order[_HELD_OUT:]
    network = _Network(setting)
    curves = _train_network(network, images[kept], digits[kept], setting)
    accuracy = network.accuracy(images[held_out], digits[held_out], setting)

    generator = setting.generator()
    seen = network.activations(images[kept], generator, setting)
    unseen = network.activations(images[held_out], generator, setting)
    mean = seen.mean(0)
    scale = (seen - mean).square().mean().sqrt()
    seen, unseen = (seen - mean) / scale, (unseen - mean) / scale

    trainings = {
        kind.name: [
            _train(kind(value, setting), value, seen, unseen, setting) for value in kind.values
        ]
        for kind in (_Vanilla, _TopK, _JumpReLU, _Matryoshka)
    }
    return Frontier(
        trainings=trainings,
        network=curves,
        measured={"network_accuracy": accuracy},
        sentence=_sentence(trainings, accuracy, len(unseen)),
    )


def _sentence(trainings: dict[str, list[Training]], accuracy: float, rows: int) -> str:
    middle = {objective: group[len(group) // 2].measured for objective, group in trainings.items()}
    parts = [f"{name} {one['fvu']:.1%} at l0 {one['l0']:.1f}" for name, one in middle.items()]
    few = [
        f"{objective} {min(one.measured['fvu_of_few'] for one in group):.1%}"
        for objective, group in trainings.items()
    ]
    return (
        f"Unexplained variance of {rows:,} held-out activations of a classifier (accuracy "
        f"{accuracy:.1%}), with {_LATENTS} latents at the middle setting of each objective: "
        f"{', '.join(parts)}. With only {_FEW} of the latents, at the best setting: "
        f"{', '.join(few)}."
    )


RUN = Run(
    about="four kinds of sparse autoencoders on a classifier's activations: error and sparsity",
    train=run,
    steps=150,
)


class _Network(nn.Module):
    """A classifier; the autoencoders reconstruct the activations of its last hidden layer."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        torch.manual_seed(setting.seed)
        self.hidden = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 256),
            nn.ReLU(),
            nn.Linear(256, _WIDTH),
            nn.ReLU(),
        )
        self.classify = nn.Linear(_WIDTH, 10)
        self.to(setting.device)

    def forward(self, images: Tensor) -> Tensor:
        return cast("Tensor", self.classify(self.hidden(images)))

    @torch.no_grad()
    def accuracy(self, images: Tensor, digits: Tensor, setting: Setting) -> float:
        guessed = self(images.to(setting.device)).argmax(1).cpu()
        return float((guessed == digits).float().mean())

    @torch.no_grad()
    def activations(self, images: Tensor, generator: torch.Generator, setting: Setting) -> Tensor:
        """Return the activations of the images and of their views."""
        views = torch.cat([images, *(augment(images, generator) for _ in range(_VIEWS))])
        return cast("Tensor", self.hidden(views.to(setting.device)))


def _train_network(network: _Network, images: Tensor, digits: Tensor, setting: Setting) -> Curves:
    generator = setting.generator()

    def step_terms() -> Terms:
        rows = torch.randint(len(images), (_BATCH,), generator=generator)
        guessed = network(augment(images[rows], generator).to(setting.device))
        return Terms(loss=F.cross_entropy(guessed, digits[rows].to(setting.device)))

    return train("classifier", setting, [(network.parameters(), _NETWORK_RATE)], step_terms)


class _Autoencoder(nn.Module):
    """The weights of all four kinds, with the same initial values."""

    name: str
    hyperparameter: str
    """Name of the hyperparameter that controls the sparsity."""
    values: tuple[float, ...]
    """Its values, one for each training."""

    def __init__(self, value: float, setting: Setting) -> None:
        super().__init__()
        self.sparsity = value
        start = torch.randn(_LATENTS, _WIDTH, generator=setting.generator())
        start = F.normalize(start)
        self.W_dec = nn.Parameter(start)
        self.W_enc = nn.Parameter(start.T.clone())
        self.b_enc = nn.Parameter(torch.zeros(_LATENTS))
        self.b_dec = nn.Parameter(torch.zeros(_WIDTH))
        self.to(setting.device)

    def pre(self, x: Tensor) -> Tensor:
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec + self.b_dec

    def groups(self) -> list[tuple[Iterable[nn.Parameter], float]]:
        """Return the parameters by learning rate."""
        return [(self.parameters(), _RATE)]

    def terms(self, x: Tensor) -> Terms:
        """Compute the objective."""
        raise NotImplementedError

    def latents(self, x: Tensor) -> Tensor:
        """Return the latents as used after training."""
        raise NotImplementedError

    def by_size(self, x: Tensor) -> Tensor:
        """Return the indices of the latents, the largest contributions to reconstructions first."""
        contribution = self.latents(x).square().sum(0) * self.W_dec.square().sum(1)
        return contribution.argsort(descending=True)


class _Vanilla(_Autoencoder):
    name = "vanilla"
    hyperparameter = "sparsity_coeff"
    values = (1e-2, 2e-2, 4e-2)

    def terms(self, x: Tensor) -> sae.VanillaTerms:
        f = self.latents(x)
        norm = cast("Tensor", torch.linalg.vector_norm(self.W_dec, dim=1))
        x_hat = self.decode(f)
        return sae.vanilla_loss(x, f, x_hat, sparsity_coeff=self.sparsity, decoder_norm=norm)

    def latents(self, x: Tensor) -> Tensor:
        return self.pre(x).relu()


class _TopK(_Autoencoder):
    name = "topk"
    hyperparameter = "k"
    values = (4, 8, 16)

    def __init__(self, value: float, setting: Setting) -> None:
        super().__init__(value, setting)
        self.k = int(value)
        self.state = sae.DeadLatents.start(_LATENTS, device=setting.device)

    def terms(self, x: Tensor) -> sae.TopKTerms:
        pre = self.pre(x)
        f = sae.topk(pre, k=self.k)
        x_hat = f.decode(self.W_dec, self.b_dec)
        self.state = self.state.update(f.fired(_LATENTS), len(x))
        dead = self.state.dead(after=_DEAD_AFTER)
        aux = sae.auxiliary_k_loss(x, x_hat, pre, self.W_dec, dead=dead, k_aux=_K_AUX)
        return sae.topk_loss(x, f, x_hat, aux=aux, dead=dead)

    def latents(self, x: Tensor) -> Tensor:
        return sae.topk(self.pre(x), k=self.k).dense(_LATENTS)


class _JumpReLU(_Autoencoder):
    name = "jumprelu"
    hyperparameter = "sparsity_coeff"
    values = (1e-3, 4e-3, 1.6e-2)

    def __init__(self, value: float, setting: Setting) -> None:
        super().__init__(value, setting)
        self.log_threshold = nn.Parameter(torch.zeros(_LATENTS, device=setting.device))

    def groups(self) -> list[tuple[Iterable[nn.Parameter], float]]:
        weights = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        return [(weights, _RATE), ([self.log_threshold], _THRESHOLD_RATE)]

    def terms(self, x: Tensor) -> sae.JumpReLUTerms:
        return sae.jumprelu_loss(
            x,
            self.pre(x),
            self.W_dec,
            self.b_dec,
            log_threshold=self.log_threshold,
            sparsity_coeff=self.sparsity,
            bandwidth=_BANDWIDTH,
        )

    def latents(self, x: Tensor) -> Tensor:
        return sae.jumprelu(self.pre(x), self.log_threshold.exp())


class _Matryoshka(_Autoencoder):
    name = "matryoshka"
    hyperparameter = "k"
    values = (4, 8, 16)

    def __init__(self, value: float, setting: Setting) -> None:
        super().__init__(value, setting)
        self.k = int(value)
        self.state = sae.ActivationThreshold.start(device=setting.device)

    def terms(self, x: Tensor) -> sae.MatryoshkaTerms:
        f = sae.batch_topk(self.pre(x), k=self.k)
        self.state = self.state.update(f, decay=0.9)
        return sae.matryoshka_loss(x, f, self.W_dec, self.b_dec, prefixes=_PREFIXES)

    def latents(self, x: Tensor) -> Tensor:
        # With a fixed threshold, the latents of a row do not depend on the other rows.
        return sae.threshold_gate(self.pre(x), self.state.value)

    def by_size(self, x: Tensor) -> Tensor:
        return torch.arange(_LATENTS, device=x.device)  # the order of the prefixes


def _train(
    model: _Autoencoder, value: float, seen: Tensor, unseen: Tensor, setting: Setting
) -> Training:
    generator = setting.generator()

    def step_terms() -> Terms:
        rows = torch.randint(len(seen), (_BATCH,), generator=generator)
        return model.terms(seen[rows.to(seen.device)])

    label = f"{model.hyperparameter} {value:g}"
    curves = train(f"{model.name}, {label}", setting, model.groups(), step_terms)
    with torch.no_grad():
        f = model.latents(unseen)
        few = torch.zeros_like(f)
        largest = model.by_size(seen)[:_FEW]
        few[:, largest] = f[:, largest]
        fvu, fvu_of_few = (
            sae.fraction_of_variance_unexplained(unseen, model.decode(chosen))
            for chosen in (f, few)
        )
        active = f != 0
    return Training(
        label=label,
        terms=curves,
        measured={
            "fvu": float(fvu),
            "fvu_of_few": float(fvu_of_few),
            "l0": float(active.sum(1).double().mean()),
            "dead": float((~active.any(0)).sum()),
        },
    )
