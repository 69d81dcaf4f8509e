"""Compare a training term by term with a control, which lacks the main ingredient."""

import dataclasses
import math
from typing import Any

from . import _report
from ._training import Curves

_TRAINING = "all terms"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A training, its control, and measurements of both."""

    terms: Curves
    control: Curves
    control_name: str
    about: dict[str, str]
    """Title of the panel of each term."""
    levels: dict[str, tuple[str, float]]
    """Horizontal lines in the panels of terms: a label and a value."""
    measured: dict[str, float]
    sentence: str
    """The result on held-out data, in words."""
    bars: dict[str, float]
    """Measurements to draw as bars; the last one is that of the training."""
    bars_about: str
    bars_format: str
    bars_start: float = 0.0
    """Where the bars start, such as the accuracy of chance."""
    gradient_norms: dict[str, dict[int, float]] | None = None
    """Norm of the gradient of each weighted term with respect to the parameters, by step."""

    def table(self, name: str, seconds: float) -> "_report.Table":
        title = f"{name}: {_report.length(self.terms)} steps each, {seconds:.1f} s"
        trainings = (_TRAINING, self.control_name)
        ends = ("first step", "last step")
        columns = [f"{training}\n{end}" for training in trainings for end in ends]
        table = _report.new_table(title, "\nterm", *columns)
        for term in self.terms:
            curves = (self.terms[term], self.control[term])
            table.add_row(term, *(f"{curve[end]:.4g}" for curve in curves for end in (0, -1)))
        return table

    def as_json(self) -> dict[str, object]:
        measured = (self.gradient_norms or {}).items()
        norms = {name: _report.json_numbers(by_step) for name, by_step in measured}
        return {
            "terms": _report.json_curves(self.terms),
            "control": {"name": self.control_name, "terms": _report.json_curves(self.control)},
            **({"gradient_norms": norms} if norms else {}),
            "measured": _report.json_numbers(self.measured),
        }

    def figure(self) -> "_report.Figure":
        """Draw a panel for each term, one for the norms of gradients, and the bars."""
        count = len(self.terms) + bool(self.gradient_norms)
        columns = 3 if count < 6 else 4
        rows = math.ceil((count + 1) / columns)
        figure = _report.new_figure(3.6 * columns + 0.2, 2.7 * rows + 1.3)
        grid = figure.add_gridspec(rows, columns)
        panels = [figure.add_subplot(grid[divmod(i, columns)]) for i in range(count)]
        for panel, term in zip(panels, self.terms, strict=False):
            self._draw_term(panel, term)
        if self.gradient_norms:
            self._draw_norms(panels[-1], self.gradient_norms)
        row, column = divmod(count, columns)
        self._draw_bars(figure.add_subplot(grid[row, column:]))
        _report.draw_legend(figure, panels[1])
        return figure

    def _draw_term(self, panel: "_report.Axes", term: str) -> None:
        _report.draw_curve(panel, self.terms[term], _TRAINING, _report.BLUE)
        if term != "loss":  # losses with different weights cannot be compared
            control = self.control[term]
            _report.draw_curve(panel, control, self.control_name, _report.ORANGE, ls="--")
        bottom, top = panel.get_ylim()
        if term in self.levels:
            name, level = self.levels[term]
            top = max(top, 1.15 * level)
            panel.axhline(level, color=_report.GREY, linewidth=1, linestyle=":", zorder=0)
            look: dict[str, Any] = {"va": "bottom", "color": _report.GREY, "fontsize": 8}
            text = f"{name} {level:g}"
            panel.text(0.02, level, text, transform=panel.get_yaxis_transform(), **look)
        panel.set_ylim(min(bottom, -0.03 * top), 1.04 * top)
        _report.label_panel(panel, self.about[term], term)

    def _draw_norms(self, panel: "_report.Axes", terms: dict[str, dict[int, float]]) -> None:
        colors = (_report.GREEN, _report.PINK, "black")
        for (name, norms), color in zip(terms.items(), colors, strict=False):
            _report.draw_curve(panel, norms, name, color, marker=".")
        panel.set_yscale("log")
        _report.plain_numbers(panel.yaxis)
        # A fixed location: searching for the best one takes seconds on a busy machine.
        panel.legend(loc="lower right", frameon=False, fontsize=8, handlelength=1.2)
        title = "norm of the gradient of each weighted term\nwith respect to the parameters"
        _report.label_panel(panel, title, "norm")

    def _draw_bars(self, panel: "_report.Axes") -> None:
        colors = [_report.GREY for _ in self.bars]
        colors[list(self.bars).index(self.control_name)] = _report.ORANGE
        colors[-1] = _report.BLUE
        start, end = self.bars_start, max(self.bars.values())
        lengths = [value - start for value in self.bars.values()]
        bars = panel.barh(range(len(lengths)), lengths, left=start, color=colors, height=0.45)
        numbers = [self.bars_format.format(value) for value in self.bars.values()]
        panel.bar_label(bars, numbers, padding=4, fontsize=9)
        for index, name in enumerate(self.bars):  # above the bar, so that bars have the full width
            panel.text(start, index + 0.27, f" {name}", fontsize=8, va="bottom")
        panel.set_xlim(start, start + (end - start) * 1.2)
        panel.set_ylim(-0.4, len(lengths) - 0.3)
        panel.set_title(self.bars_about, fontsize=9)
        panel.xaxis.set_visible(False)
        panel.yaxis.set_visible(False)
        _report.tidy(panel)
        panel.spines["bottom"].set_visible(False)
