"""Train one encoder of digits with six joint-embedding losses, and with three that lack a term."""

import copy
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._terms import Terms
from ..joint_embedding import (
    barlow_twins_loss,
    dino_loss,
    info_nce_loss,
    lejepa_loss,
    multi_view_vicreg_loss,
    sigmoid_contrastive_loss,
    sinkhorn,
)
from . import _report
from . import _vicreg as vicreg
from ._training import Curves, Run, Setting, train
from ._vicreg import DRAWS, LABELS, augment, labelled, load_digits, probe

_HELD_OUT = 500  # of 1797 images, used to train neither the network nor a probe
_PAIRS = 255  # images per batch, with two views each
_CROPS = 128  # images per batch, with two global and four local views each
_GLOBAL, _LOCAL = 2, 4
_ZOOM = 0.75  # width of a local view, as a share of the image's
_RATE = 4e-3
_TEMPERATURE = 0.1  # of InfoNCE
_SLICES = 256  # of LeJEPA
_PROTOTYPES = 128
_WIDTH = 128  # of an embedding
_TEACHER_TEMPERATURE = 0.02
_MOMENTUM = 0.95  # of DINO's teacher
_NEIGHBOURS = 5
_MEASURED = 15  # measurements of the rank during training
_SHOWN = 3  # digits whose views are drawn
_PROBE, _NEAREST = "probe_accuracy", "neighbour_accuracy"
_GEOMETRY = ("alignment", "uniformity", "rank")

Step = Callable[[Tensor], Terms]
"""Computes the terms of a loss from the views of a batch, "views batch height width"."""


class Network(vicreg.Network):
    """The network of the run `vicreg`, with batch normalization and a bias in its expander.

    LeJEPA and DINO learn better with batch normalization. Without the bias, losses that normalize
    embeddings would separate them again after they collapse to zero.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.expander = nn.Sequential(
            nn.Linear(256, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, _WIDTH)
        )
        self.to(setting.device)


def _embed(network: nn.Module, views: Tensor) -> Tensor:
    """Return the embeddings of views, "views batch dim", in one forward pass."""
    z = cast("Tensor", network(views.flatten(0, 1)))
    return z.view(*views.shape[:2], -1)


def _info_nce(network: Network) -> tuple[nn.Module, Step]:
    def step(views: Tensor) -> Terms:
        z1, z2 = _embed(network, views)
        return info_nce_loss(z1, z2, scale=1 / _TEMPERATURE, symmetric=True)

    return network, step


class _Scaled(nn.Module):
    """A network with the learnable scale and bias of SigLIP, at the initial values of its paper."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(-10.0))


def _siglip(network: Network) -> tuple[nn.Module, Step]:
    scaled = _Scaled(network).to(next(network.parameters()).device)

    def step(views: Tensor) -> Terms:
        z1, z2 = _embed(network, views)
        return sigmoid_contrastive_loss(z1, z2, scale=scaled.log_scale.exp(), bias=scaled.bias)

    return scaled, step


def _barlow(network: Network, off_weight: float = 5e-3) -> tuple[nn.Module, Step]:
    def step(views: Tensor) -> Terms:
        z1, z2 = _embed(network, views)
        return barlow_twins_loss(z1, z2, off_weight=off_weight)

    return network, step


def _vicreg(network: Network, weight: float = 1.0) -> tuple[nn.Module, Step]:
    def step(views: Tensor) -> Terms:
        return multi_view_vicreg_loss(
            _embed(network, views),
            num_global=_GLOBAL,
            var_weight=25.0 * weight,
            cov_weight=weight,
        )

    return network, step


def _lejepa(network: Network) -> tuple[nn.Module, Step]:
    generator = torch.Generator(next(network.parameters()).device).manual_seed(0)

    def step(views: Tensor) -> Terms:
        z = _embed(network, views)
        return lejepa_loss(
            z, num_global=_GLOBAL, centre="global", num_slices=_SLICES, generator=generator
        )

    return network, step


class _Prototypes(nn.Module):
    """A network and prototypes; the output is the cosine of each embedding and prototype."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        start = torch.randn(_PROTOTYPES, _WIDTH, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(start)

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.network(images)) @ F.normalize(self.weight).T


def _dino(network: Network, centred: bool = True) -> tuple[nn.Module, Step]:
    """Learn from a teacher: a moving average of the student, which gets only the global views."""
    student = _Prototypes(network).to(next(network.parameters()).device)
    teacher = copy.deepcopy(student)

    def step(views: Tensor) -> Terms:
        with torch.no_grad():
            for mean, new in zip(teacher.parameters(), student.parameters(), strict=True):
                mean.lerp_(new, 1 - _MOMENTUM)
            logits = _embed(teacher, views[:_GLOBAL])
            if centred:
                balanced = sinkhorn(logits.flatten(0, 1), temperature=_TEACHER_TEMPERATURE)
                targets = balanced.view(logits.shape)
            else:
                targets = (logits / _TEACHER_TEMPERATURE).softmax(-1)
        return dino_loss(_embed(student, views), targets)

    return student, step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A loss, and how to use and describe it."""

    build: Callable[[Network], tuple[nn.Module, Step]]
    """Returns the module to train, and a step."""
    local: bool
    """Whether it uses local views besides the two global ones."""
    about: str = ""
    """Description of the loss, in the title of its panel."""


METHODS = {
    "InfoNCE": Method(build=_info_nce, local=False, about=f"nats; chance: log {_PAIRS}"),
    "SigLIP": Method(build=_siglip, local=False, about="nats per sample"),
    "Barlow Twins": Method(build=_barlow, local=False, about="on- + 0.005 off-diagonal"),
    "VICReg": Method(build=_vicreg, local=True, about="25 invariance + 25 var + cov"),
    "LeJEPA": Method(build=_lejepa, local=True, about="0.95 invariance + 0.05 sigreg"),
    "DINO": Method(build=_dino, local=True, about=f"nats; uniform: log {_PROTOTYPES}"),
}
CONTROLS = {
    "Barlow, no off-diagonal": Method(
        build=lambda network: _barlow(network, off_weight=0.0), local=False
    ),
    "VICReg, no var, cov": Method(build=lambda network: _vicreg(network, weight=0.0), local=True),
    "DINO, no Sinkhorn": Method(build=lambda network: _dino(network, centred=False), local=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learnt:
    """The training of an encoder with one loss, and its measurements."""

    terms: Curves
    ranks: dict[int, float]
    """Effective rank of the held-out embeddings, by step."""
    measured: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Representations:
    """Encoders trained with several losses, compared on held-out data."""

    learnt: dict[str, Learnt]
    references: dict[str, dict[str, float]]
    """The same measurements for raw pixels and the untrained network."""
    views: Tensor
    """Some digits with their global and local views, "digits views height width"."""
    sentence: str
    """The result on held-out data, in words."""

    def measured(self) -> dict[str, dict[str, float]]:
        """Return all measurements by name, in the order of the rows of the table."""
        return {**self.references, **{name: one.measured for name, one in self.learnt.items()}}

    def table(self, name: str, seconds: float) -> "_report.Table":
        steps = _report.length(next(iter(self.learnt.values())).terms)
        title = f"{name}: {steps} steps each, {seconds:.1f} s"
        columns = ["\nprobe", f"\n{_NEIGHBOURS}-NN", "\nalign", "\nunif", "\nrank"]
        table = _report.new_table(title, "\nmethod", *columns, "first\nloss", "last\nloss")
        for method, measured in self.measured().items():
            if method in ("InfoNCE", next(iter(CONTROLS))):
                table.add_section()
            cells = [f"{measured[accuracy]:.1%}" for accuracy in (_PROBE, _NEAREST)]
            cells += [f"{measured[key]:.2f}" if key in measured else "" for key in _GEOMETRY]
            if method in self.learnt:
                curve = self.learnt[method].terms["loss"]
                cells += [f"{curve[end]:.4g}" for end in (0, -1)]
            table.add_row(method, *cells)
        table.caption = (
            f"Held-out accuracy of a linear probe and of {_NEIGHBOURS} nearest neighbours, "
            "alignment (lower: the views of a digit are closer), uniformity (lower: embeddings are "
            "more spread out), and effective rank of the embeddings."
        )
        return table

    def as_json(self) -> dict[str, object]:
        return {
            "references": {
                name: _report.json_numbers(measured) for name, measured in self.references.items()
            },
            "trainings": {
                name: {
                    "terms": _report.json_curves(one.terms),
                    "rank": _report.json_numbers(one.ranks),
                    "measured": _report.json_numbers(one.measured),
                }
                for name, one in self.learnt.items()
            },
        }

    def figure(self) -> "_report.Figure":
        """Draw each loss, the collapse without a term, and the measurements."""
        figure = _report.new_figure(13, 10.6, dpi=110)
        grid = figure.add_gridspec(3, 1, height_ratios=[2.6, 2.9, 4.3])
        losses, collapses, measured = (figure.add_subfigure(grid[row]) for row in range(3))
        _heading(
            losses, "(a) losses during training (lower is better; not comparable between methods)"
        )
        panels: list["_report.Axes"] = list(losses.subplots(1, len(METHODS)))
        for panel, (name, method) in zip(panels, METHODS.items(), strict=True):
            _report.draw_curve(panel, self.learnt[name].terms["loss"], name, _report.BLUE)
            panel.set_ylim(bottom=0)
            _report.label_panel(panel, f"{name}\n{method.about}", "loss")
            panel.title.set_fontsize(8)
        _heading(collapses, "(b) global and local views, and the collapse without a term (orange)")
        self._draw_collapses(collapses)
        _heading(measured, f"(c) measurements on {_HELD_OUT} held-out digits after training")
        self._draw_measured(measured)
        return figure

    def _draw_collapses(self, part: "_report.SubFigure") -> None:
        panels: list["_report.Axes"] = list(part.subplots(1, 4, width_ratios=[1.35, 1, 1, 1]))
        tiles = F.pad(self.views, (1, 1, 1, 1), value=0.25)  # "digits views height width"
        sheet = tiles.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        panels[0].imshow(sheet.numpy(), cmap="gray_r", vmin=0, vmax=1)
        panels[0].set_xticks([4.5, 19.5, 49.5], labels=["digit", "2 global views", "4 local views"])
        panels[0].set_yticks([])
        panels[0].tick_params(length=0, labelsize=8)
        panels[0].set_title("views are drawn again for each batch", fontsize=9)
        shown = (
            (
                "Barlow Twins",
                "effective rank",
                "of held-out embeddings\n(1: one line; higher: more directions)",
            ),
            ("VICReg", "std", "standard deviation of columns\n(0: one point for all digits)"),
            (
                "DINO",
                "marginal_entropy",
                "of the teacher's prototypes, nats\n(0: one is used; "
                f"{math.log(_PROTOTYPES):.2f}: all equally)",
            ),
        )
        for panel, (name, term, about), control in zip(panels[1:], shown, CONTROLS, strict=True):
            for label, color, look in ((name, _report.BLUE, "-"), (control, _report.ORANGE, "--")):
                one = self.learnt[label]
                curve = one.terms.get(term) or one.ranks
                _report.draw_curve(panel, curve, label, color, ls=look)
            bottom, top = panel.get_ylim()
            panel.set_ylim(min(0, bottom), top + 0.3 * (top - min(0, bottom)))
            _report.label_panel(panel, about, term.replace("_", " "))
            panel.legend(frameon=False, fontsize=8, loc="upper left")

    def _draw_measured(self, part: "_report.SubFigure") -> None:
        panels: list["_report.Axes"] = list(part.subplots(1, 4, width_ratios=[1, 1, 0.8, 1.5]))
        measured = self.measured()
        chance = "(bars start at chance, 10%)"
        about = f"accuracy of a linear probe,\n{LABELS} labels per digit\n{chance}"
        _draw_bars(panels[0], about, measured, _PROBE, start=0.1, form="{:.1%}")
        panels[0].set_yticks(range(len(measured)), labels=[*measured])
        about = f"accuracy of {_NEIGHBOURS} nearest neighbours,\nthe same labels\n{chance}"
        _draw_bars(panels[1], about, measured, _NEAREST, start=0.1, form="{:.1%}")
        about = "effective rank of\nthe embeddings\n(bars start at 1: one direction)"
        _draw_bars(panels[2], about, measured, "rank", start=1.0, form="{:.1f}")
        self._draw_geometry(panels[3], measured)

    def _draw_geometry(self, panel: "_report.Axes", measured: dict[str, dict[str, float]]) -> None:
        points = {
            name: (one["uniformity"], one["alignment"])
            for name, one in measured.items()
            if "rank" in one
        }
        middle = statistics.median(points[name][0] for name in METHODS)
        labels: list[tuple[float, float, bool]] = []
        for name, (x, y) in sorted(points.items(), key=lambda item: item[1][1]):
            panel.scatter(x, y, color=_color(name), s=28, zorder=2)
            at_left, height = x < middle, y
            while any(  # another label is in the way
                at_left == left and abs(x - label_x) < 0.5 and abs(height - label_y) < 0.035
                for label_x, label_y, left in labels
            ):
                height += 0.005
            labels.append((x, height, at_left))
            shift, side = (-0.07, "right") if at_left else (0.07, "left")
            panel.text(x + shift, height, name, fontsize=7.5, va="center", ha=side)
        panel.set_xlim(-3.6, 1.4)  # with space for labels
        panel.set_xticks([-3, -2, -1, 0])
        panel.set_title("normalized embeddings", fontsize=8.5)
        panel.set_xlabel("uniformity (lower: more spread out; 0: one point)", fontsize=8)
        panel.set_ylabel("alignment: squared distance of two views\n(lower: closer)", fontsize=8)
        panel.grid(color=_report.GREY, alpha=0.25, linewidth=0.5)
        _report.tidy(panel)


def _heading(part: "_report.SubFigure", text: str) -> None:
    part.suptitle(text, fontsize=10, fontweight="bold", x=0.005, horizontalalignment="left")


def _draw_bars(
    panel: "_report.Axes",
    about: str,
    measured: dict[str, dict[str, float]],
    key: str,
    *,
    start: float,
    form: str,
) -> None:
    """Draw a measurement of each method as a bar that starts at `start`."""
    values = {name: one[key] for name, one in measured.items() if key in one}
    rows = [list(measured).index(name) for name in values]
    lengths = [value - start for value in values.values()]
    colors = [_color(name) for name in values]
    bars = panel.barh(rows, lengths, left=start, color=colors, height=0.6)
    texts = [form.format(value) for value in values.values()]
    panel.bar_label(bars, texts, padding=3, fontsize=8)
    panel.set_xlim(start, start + 1.3 * max(lengths))
    panel.set_ylim(len(measured) - 0.4, -0.6)
    panel.set_yticks(range(len(measured)), labels=[])
    panel.set_xticks([])
    panel.set_title(about, fontsize=8.5)
    _report.tidy(panel)
    panel.spines["bottom"].set_visible(False)


def _color(name: str) -> str:
    if name in METHODS:
        return _report.BLUE
    return _report.ORANGE if name in CONTROLS else _report.GREY


def run(setting: Setting) -> Representations:
    """Train the encoder with each loss, then with the losses that lack a term, and compare them."""
    digits = _Digits(setting)
    untrained = Network(setting)
    references = {
        "raw pixels": digits.accuracies(digits.images.flatten(1), setting),
        "untrained": digits.measure(untrained, setting),
    }
    methods = {**METHODS, **CONTROLS}
    learnt = {name: _learn(name, method, digits, setting) for name, method in methods.items()}
    shown = digits.images[digits.held_out[:_SHOWN]]
    views = draw_views(shown, True, setting.generator())
    return Representations(
        learnt=learnt,
        references=references,
        views=torch.cat([shown[None], views]).transpose(0, 1),
        sentence=_sentence(learnt, references),
    )


def _sentence(learnt: dict[str, Learnt], references: dict[str, dict[str, float]]) -> str:
    measured = {**references, **{name: one.measured for name, one in learnt.items()}}

    def listed(names: Iterable[str]) -> str:
        return "; ".join(
            f"{name} {100 * measured[name][_PROBE]:.1f} / {100 * measured[name][_NEAREST]:.1f}"
            for name in names
        )

    return (
        f"Accuracy in percent of a linear probe / of {_NEIGHBOURS} nearest neighbours on "
        f"{_HELD_OUT} held-out digits, from the encoder's output and {LABELS} labels per digit "
        f"(mean of {DRAWS} random choices). Losses: {listed(METHODS)}. Without training: "
        f"{listed(references)}. Without a term: {listed(CONTROLS)}."
    )


RUN = Run(
    about="six joint-embedding losses on one encoder, and the collapse of three without a term",
    train=run,
    steps=100,
)


def draw_views(images: Tensor, local: bool, generator: torch.Generator) -> Tensor:
    """Draw two views of each image, or six with local ones, "views batch height width"."""
    views = [augment(images, generator) for _ in range(_GLOBAL)]
    if local:
        views += [augment(_zoom(images, generator), generator) for _ in range(_LOCAL)]
    return torch.stack(views)


def _zoom(images: Tensor, generator: torch.Generator) -> Tensor:
    """Crop a random part of each image, and resize it to the size of the image."""
    count, height, width = images.shape
    offset = (1 - _ZOOM) * (2 * torch.rand(count, 2, 1, generator=generator) - 1)
    window = torch.cat([_ZOOM * torch.eye(2).expand(count, 2, 2), offset], dim=2)
    grid = F.affine_grid(window, [count, 1, height, width], align_corners=False)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def _learn(name: str, method: Method, digits: "_Digits", setting: Setting) -> Learnt:
    network = Network(setting)
    trained, step = method.build(network)
    generator = setting.generator()
    interval = max(1, setting.steps // _MEASURED)
    ranks: dict[int, float] = {}
    number = 0

    def step_terms() -> Terms:
        nonlocal number
        number += 1
        if number % interval == 1 % interval:
            ranks[number] = digits.rank(network, setting)
        batch = digits.draw(_CROPS if method.local else _PAIRS, generator)
        return step(draw_views(batch, method.local, generator).to(setting.device))

    curves = train(name, setting, [(trained.parameters(), _RATE)], step_terms)
    return Learnt(terms=curves, ranks=ranks, measured=digits.measure(network, setting))


class _Digits:
    """Training images and held-out images, and measurements on them."""

    def __init__(self, setting: Setting) -> None:
        self.images, self.digits = load_digits()
        order = torch.randperm(len(self.images), generator=setting.generator())
        self.held_out, self.kept = order[:_HELD_OUT], order[_HELD_OUT:]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(self.kept), (count,), generator=generator)
        return self.images[self.kept[rows]]

    @torch.no_grad()
    def measure(self, network: Network, setting: Setting) -> dict[str, float]:
        network.eval()
        unseen = self.images[self.held_out]
        views = draw_views(unseen, False, setting.generator()).to(setting.device)
        z1, z2 = F.normalize(_embed(network, views), dim=2).cpu()
        features = network.encoder(self.images[:, None].to(setting.device)).cpu()
        return {
            **self.accuracies(features, setting),
            "alignment": float((z1 - z2).square().sum(1).mean()),
            "uniformity": float(torch.pdist(z1).square().mul(-2).exp().mean().log()),
            "rank": self.rank(network, setting),
        }

    def accuracies(self, features: Tensor, setting: Setting) -> dict[str, float]:
        split = (self.digits, self.kept, self.held_out, setting)
        return {
            _PROBE: probe(features, *split),
            _NEAREST: self._neighbours(features, setting),
        }

    def _neighbours(self, features: Tensor, setting: Setting) -> float:
        """Return the held-out accuracy of the nearest labelled images, by cosine."""
        features = F.normalize(features, dim=1)
        accuracies: list[float] = []
        for rows in labelled(self.digits, self.kept, setting):
            cosines = features[self.held_out] @ features[rows].T
            nearest = cosines.topk(_NEIGHBOURS, dim=1).indices
            guessed = self.digits[rows][nearest].mode(1).values
            accuracies.append(float((guessed == self.digits[self.held_out]).float().mean()))
        return sum(accuracies) / len(accuracies)

    @torch.no_grad()
    def rank(self, network: Network, setting: Setting) -> float:
        """Return the effective rank of the normalized embeddings: (sum lambda)^2 / sum lambda^2.

        lambda are the eigenvalues of the second moments about zero, not of the covariance, so that
        the rank of embeddings at one point is 1 too.
        """
        was_training = network.training
        z = cast("Tensor", network.eval()(self.images[self.held_out].to(setting.device)))
        network.train(was_training)
        z = F.normalize(z.cpu().double(), dim=1)
        moments = z.T @ z
        return float(moments.trace().square() / moments.square().sum())
