"""What the energy run returns: densities and digits that were learnt, in tables and a figure."""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _report
from ._densities import SPACING
from ._training import Curves

_COLUMNS = 7
_COLORS = (_report.BLUE, _report.ORANGE, _report.GREY)


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
    """Some of those that were trained on."""
    half_width: float
    """Of the square that the grids cover."""
    learnt: dict[str, Learnt]
    measured: dict[str, float]
    """Of the truth: its log-likelihood on the held-out samples, and its negative entropy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Energies:
    """Losses of energy-based models compared, and a model of digits."""

    densities: dict[str, Density]
    control_name: str
    """The one of `learnt` whose loss is wrong on purpose."""
    energy: str
    """The formula of the energy."""
    digits: Curves
    """Terms of the model of digits."""
    images: dict[str, Tensor]
    """To be drawn: as many of each kind."""
    energies: dict[str, Tensor]
    """Of each kind of images, by the model of digits."""
    measured: dict[str, float]
    sentence: str
    """What was measured on held-out data, in words."""

    def table(self, name: str, seconds: float) -> "_report.Group":
        from rich.console import Group

        first = next(iter(self.densities.values()))
        steps = _report.length(next(iter(first.learnt.values())).terms)
        of_each = [
            heading
            for called in self.densities
            for heading in (f"{called}, held-out\nnats a sample", "\nKL")
        ]
        title = f"{name}: {steps} steps each, {seconds:.1f} s"
        table = _report.new_table(title, "\nloss", *of_each, "ms a\nstep")
        truths = [density.measured for density in self.densities.values()]
        table.add_row("the truth", *_cells([(of["log_likelihood"], 0.0) for of in truths]), "")
        entropies = _cells([(of["negative_entropy"], None) for of in truths])
        table.add_row("minus its entropy", *entropies)
        table.add_section()
        for loss in first.learnt:
            learnt = [density.learnt[loss] for density in self.densities.values()]
            numbers = [(one.measured["log_likelihood"], one.measured["kl"]) for one in learnt]
            spent = sum(one.seconds for one in learnt) / (len(learnt) * steps)
            if loss == self.control_name:
                table.add_section()
            table.add_row(loss, *_cells(numbers), f"{1000 * spent:.1f}")
        table.caption = (
            f"E(x) = {self.energy}: every normalizer is finite. Z by quadrature with spacing "
            f"{SPACING:g}, log Z wrong by at most {self.measured['log_z_error']:.0e}."
        )
        digits = _report.new_table("digits: contrastive divergence", "term", "first", "last")
        for term, curve in self.digits.items():
            digits.add_row(term, f"{curve[0]:.4g}", f"{curve[-1]:.4g}")
        return Group(table, digits)

    def as_json(self) -> dict[str, object]:
        """Return all but the pictures, and the times, which do not repeat."""
        return {
            "densities": {
                called: {
                    "truth": _report.json_numbers(density.measured),
                    "losses": {
                        loss: {
                            "terms": _report.json_curves(one.terms),
                            "measured": _report.json_numbers(one.measured),
                        }
                        for loss, one in density.learnt.items()
                    },
                }
                for called, density in self.densities.items()
            },
            "digits": {"terms": _report.json_curves(self.digits)},
            "measured": _report.json_numbers(self.measured),
        }

    def figure(self) -> "_report.Figure":
        """Draw each density and what each loss learnt of it, then the digits and their energies."""
        panels = 2 + len(next(iter(self.densities.values())).learnt)
        rows = -(-panels // _COLUMNS)
        heights = [2.1 * rows + 0.45] * len(self.densities) + [3.4]
        figure = _report.new_figure(13, sum(heights) + 1, dpi=110)
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights, hspace=0.02)
        parts = [figure.add_subfigure(grid[row]) for row in range(len(heights))]
        named = self.densities.items()
        for part, letter, (called, density) in zip(parts, "ab", named, strict=False):
            _heading(part, f"({letter}) {called}: the truth, and what each loss learnt of it")
            _draw_density(part, rows, density, self.control_name)
        _heading(parts[-1], "(c) digits: persistent contrastive divergence")
        _draw_digits(parts[-1], self)
        return figure


def _cells(numbers: Sequence[tuple[float, float | None]]) -> list[str]:
    return [
        cell
        for value, kl in numbers
        for cell in (f"{value:.3f}", "" if kl is None else f"{kl:.4f}")
    ]


def _heading(part: "_report.SubFigure", text: str) -> None:
    part.suptitle(text, fontsize=10, fontweight="bold", x=0.005, horizontalalignment="left")


def _draw_density(
    part: "_report.SubFigure", rows: int, density: Density, control_name: str
) -> None:
    panels: list["_report.Axes"] = list(part.subplots(rows, _COLUMNS).flat)
    top = 1.2 * float(density.truth.max())
    half = density.half_width
    edge = half + SPACING / 2  # of the outermost cells
    drawn: dict[str, Tensor] = {"truth": density.truth}
    drawn |= {loss: one.density for loss, one in density.learnt.items()}
    across, up = density.samples.T.numpy()
    panels[1].scatter(across, up, s=0.4, linewidths=0, color="white")
    panels[1].set(facecolor="black", xlim=(-half, half), ylim=(-half, half), aspect="equal")
    panels[1].set_title("samples", fontsize=8.5)
    for panel, (called, values) in zip([panels[0], *panels[2:]], drawn.items(), strict=False):
        panel.imshow(
            values.T.numpy(),  # the first axis of the grid is x
            origin="lower",
            extent=(-edge, edge, -edge, edge),
            cmap="magma",
            interpolation="nearest",  # a cell is what was integrated
            vmin=0,
            vmax=top,
        )
        learnt = density.learnt.get(called)
        second = "" if learnt is None else f"\nKL {learnt.measured['kl']:.3f}"
        color = _COLORS[1] if called == control_name else "black"
        panel.set_title(called + second, fontsize=8.5, color=color)
    for panel in panels:
        panel.set_xticks([])
        panel.set_yticks([])
    panels[0].set_xticks([-2, 0, 2])  # all panels show the same square
    panels[0].set_yticks([-2, 0, 2])
    panels[0].tick_params(labelsize=7)
    for panel in panels[1 + len(drawn) :]:
        panel.set_visible(False)
    bar = part.colorbar(
        panels[0].images[0], ax=panels, shrink=0.8, pad=0.01, extend="max", aspect=30
    )
    bar.set_label("density", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _draw_digits(part: "_report.SubFigure", result: Energies) -> None:
    ratios = [1.0] * len(result.images) + [1.5]
    panels: list["_report.Axes"] = list(part.subplots(1, len(ratios), width_ratios=ratios))
    for panel, (called, images) in zip(panels, result.images.items(), strict=False):
        side = round(len(images) ** 0.5)
        framed = F.pad(images.reshape(side, side, 8, 8), (1, 1, 1, 1))
        tiles = framed.permute(0, 2, 1, 3).reshape(10 * side, 10 * side)
        panel.imshow(tiles.numpy(), cmap="gray_r", vmin=0, vmax=1)
        panel.set_title(called, fontsize=8.5)
        panel.set_xticks([])
        panel.set_yticks([])
    panel = panels[-1]
    together = torch.cat(list(result.energies.values()))
    span = (float(together.min()), float(together.max()))
    for (called, energies), color in zip(result.energies.items(), _COLORS, strict=True):
        auroc = result.measured.get(f"auroc_{called.replace(' ', '_').lower()}_model")
        label = called if auroc is None else f"{called} (AUROC {auroc:.3f})"
        panel.hist(energies.numpy(), bins=150, range=span, alpha=0.65, color=color, label=label)
    panel.set_xscale("symlog", linthresh=60)  # digits and Gaussian samples lie close to each other
    panel.set_xticks((0, 20, 40, 60, 200, 400), labels=["0", "20", "40", "60", "200", "400"])
    panel.set_ylim(0, 1.3 * panel.get_ylim()[1])  # with space for the legend
    panel.set_title("energies by the model", fontsize=8.5)
    panel.set_xlabel("energy (nats)", fontsize=8)
    panel.set_ylabel("images", fontsize=8)
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="upper right", frameon=False, fontsize=8)
