"""Result of the energy run: tables and a figure of the learnt densities and digits."""

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
    """A density learnt with one loss."""

    terms: Curves
    measured: dict[str, float]
    """In nats: held-out log-likelihood, KL divergence from the truth, log Z and its error bound."""
    density: Tensor
    """Values on a grid, for the figure."""
    seconds: float
    """Duration of the training."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Density:
    """A known density, and the densities learnt from its samples."""

    truth: Tensor
    """Values on a grid, for the figure."""
    samples: Tensor
    """Some of the training samples."""
    half_width: float
    """Half the width of the square that the grids cover."""
    learnt: dict[str, Learnt]
    """Learnt densities by loss."""
    measured: dict[str, float]
    """Log-likelihood of the held-out samples under the true density, and its negative entropy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Energies:
    """A comparison of losses for energy-based models, and a model of digits."""

    densities: dict[str, Density]
    control_name: str
    """Name of the loss that is wrong on purpose."""
    energy: str
    """The formula of the energy."""
    digits: Curves
    """Terms of the training on digits."""
    images: dict[str, Tensor]
    """Images of each kind, for the figure."""
    energies: dict[str, Tensor]
    """Energies of each kind of image under the model of digits."""
    measured: dict[str, float]
    sentence: str
    """The result on held-out data, in words."""

    def table(self, name: str, seconds: float) -> "_report.Group":
        from rich.console import Group

        first = next(iter(self.densities.values()))
        steps = _report.length(next(iter(first.learnt.values())).terms)
        headings = [
            heading for label in self.densities for heading in (f"{label}\nlog-likelihood", "\nKL")
        ]
        title = f"{name}: {steps} steps each, {seconds:.1f} s"
        table = _report.new_table(title, "\nloss", *headings, "ms per\nstep")
        truths = [density.measured for density in self.densities.values()]
        table.add_row("true density", *_cells([(t["log_likelihood"], 0.0) for t in truths]), "")
        entropies = _cells([(t["negative_entropy"], None) for t in truths])
        table.add_row("negative entropy", *entropies)
        table.add_section()
        for loss in first.learnt:
            learnt = [density.learnt[loss] for density in self.densities.values()]
            numbers = [(one.measured["log_likelihood"], one.measured["kl"]) for one in learnt]
            per_step = sum(one.seconds for one in learnt) / (len(learnt) * steps)
            if loss == self.control_name:
                table.add_section()
            table.add_row(loss, *_cells(numbers), f"{1000 * per_step:.1f}")
        table.caption = (
            "Log-likelihood of held-out samples (higher is better) and KL divergence from the true "
            f"density (lower is better), in nats. E(x) = {self.energy}, with a finite normalizer "
            f"Z. Z is computed by quadrature with spacing {SPACING:g}; the error of log Z is at "
            f"most {self.measured['log_z_error']:.0e}."
        )
        title = "digits: persistent contrastive divergence"
        digits = _report.new_table(title, "term", "first step", "last step")
        for term, curve in self.digits.items():
            digits.add_row(term, f"{curve[0]:.4g}", f"{curve[-1]:.4g}")
        return Group(table, digits)

    def as_json(self) -> dict[str, object]:
        """Return everything but the images, and the times, which are not reproducible."""
        return {
            "densities": {
                label: {
                    "truth": _report.json_numbers(density.measured),
                    "losses": {
                        loss: {
                            "terms": _report.json_curves(one.terms),
                            "measured": _report.json_numbers(one.measured),
                        }
                        for loss, one in density.learnt.items()
                    },
                }
                for label, density in self.densities.items()
            },
            "digits": {"terms": _report.json_curves(self.digits)},
            "measured": _report.json_numbers(self.measured),
        }

    def figure(self) -> "_report.Figure":
        """Draw each density as learnt with each loss, then the digits and their energies."""
        panels = 2 + len(next(iter(self.densities.values())).learnt)
        rows = -(-panels // _COLUMNS)
        heights = [2.1 * rows + 0.45] * len(self.densities) + [3.4]
        figure = _report.new_figure(13, sum(heights) + 1, dpi=110)
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights, hspace=0.02)
        parts = [figure.add_subfigure(grid[row]) for row in range(len(heights))]
        named = self.densities.items()
        for part, letter, (label, density) in zip(parts, "ab", named, strict=False):
            _heading(
                part,
                f"({letter}) {label}: true density, and density learnt with each loss (KL: "
                "divergence from the true density in nats, lower is better)",
            )
            _draw_density(part, rows, density, self.control_name)
        _heading(parts[-1], "(c) digits: a model trained with persistent contrastive divergence")
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
    drawn: dict[str, Tensor] = {"true density": density.truth}
    drawn |= {loss: one.density for loss, one in density.learnt.items()}
    x, y = density.samples.T.numpy()
    panels[1].scatter(x, y, s=0.4, linewidths=0, color="white")
    panels[1].set(facecolor="black", xlim=(-half, half), ylim=(-half, half), aspect="equal")
    panels[1].set_title("training samples", fontsize=8.5)
    for panel, (label, values) in zip([panels[0], *panels[2:]], drawn.items(), strict=False):
        panel.imshow(
            values.T.numpy(),  # the first axis of the grid is x
            origin="lower",
            extent=(-edge, edge, -edge, edge),
            cmap="magma",
            interpolation="nearest",  # show the cells of the quadrature
            vmin=0,
            vmax=top,
        )
        learnt = density.learnt.get(label)
        second_line = "" if learnt is None else f"\nKL {learnt.measured['kl']:.3f}"
        color = _COLORS[1] if label == control_name else "black"
        panel.set_title(label + second_line, fontsize=8.5, color=color)
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
    for panel, (label, images) in zip(panels, result.images.items(), strict=False):
        side = round(len(images) ** 0.5)
        framed = F.pad(images.reshape(side, side, 8, 8), (1, 1, 1, 1))
        tiles = framed.permute(0, 2, 1, 3).reshape(10 * side, 10 * side)
        panel.imshow(tiles.numpy(), cmap="gray_r", vmin=0, vmax=1)
        panel.set_title(label, fontsize=8.5)
        panel.set_xticks([])
        panel.set_yticks([])
    panel = panels[-1]
    everything = torch.cat(list(result.energies.values()))
    span = (float(everything.min()), float(everything.max()))
    for (name, energies), color in zip(result.energies.items(), _COLORS, strict=True):
        auroc = result.measured.get(f"auroc_{name.replace(' ', '_').lower()}_model")
        label = name if auroc is None else f"{name} (AUROC {auroc:.3f})"
        panel.hist(energies.numpy(), bins=150, range=span, alpha=0.65, color=color, label=label)
    panel.set_xscale("symlog", linthresh=60)  # energies of digits and Gaussian samples are small
    panel.set_xticks((0, 20, 40, 60, 200, 400), labels=["0", "20", "40", "60", "200", "400"])
    panel.set_ylim(0, 1.3 * panel.get_ylim()[1])  # with space for the legend
    panel.set_title("energies under the model (lower: more probable)", fontsize=8.5)
    panel.set_xlabel("energy (nats)", fontsize=8)
    panel.set_ylabel("number of images", fontsize=8)
    panel.tick_params(labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="upper right", frameon=False, fontsize=8)
