"""Draw how a loss and its terms change along one axis, as SVG with the page's font and colours."""

import html
import io
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

import termwise as tw

# Colours by which lines, text and grid are found in the SVG; the style sheet has the real ones.
_LINES = [f"#00000{number}" for number in range(1, 5)]
_DASHES = [(), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2)]  # as long as in site.css
_TEXT, _GRID = "#00000a", "#00000b"


# One for all panels: to make axes anew takes longer than to draw them.
_FIGURE = Figure(figsize=(3.9, 2.5))
_AXES = _FIGURE.add_axes((0.13, 0.19, 0.85, 0.7))
_AXES.grid(color=_GRID, linewidth=0.8)
_AXES.locator_params(nbins=6)
_AXES.tick_params(length=0, labelsize=9, labelcolor=_TEXT, pad=4)
_AXES.spines[:].set_visible(False)
_AXES.patch.set_visible(False)
_AXES.xaxis.set_label_coords(0.5, -0.135)  # else it is placed anew, below the numbers, each time
_AXES.yaxis.set_label_coords(-0.1, 0.5)
_FIGURE.patch.set_visible(False)


Loss = Callable[..., Any]


class Picture(NamedTuple):
    """What is varied, over which range, and what is drawn."""

    # Of the page's loss and of a scalar, which may have a graph.
    call: Callable[[Loss, Tensor], tw.Terms | Mapping[str, Tensor]]
    axis: str
    over: tuple[float, float]
    terms: tuple[str, ...]  # of what the call returns
    unit: str
    says: str  # what the figure shows, and what is to be seen
    slope: bool = True  # whether to draw the derivatives too
    points: int = 33


def figure(picture: Picture, loss: Loss) -> str:
    """Return the figure as HTML: the terms, their derivatives, a legend and the sentence."""
    places = torch.linspace(*picture.over, picture.points, dtype=torch.float64)
    values = {name: [] for name in picture.terms}
    slopes = {name: [] for name in picture.terms}
    for place in places:
        at = place.clone().requires_grad_(picture.slope)
        terms = picture.call(loss, at)
        named = dict(terms.items()) if isinstance(terms, tw.Terms) else terms
        for name in picture.terms:
            value = named[name]
            values[name].append(value.item())
            if value.requires_grad:
                (slope,) = torch.autograd.grad(value, at, retain_graph=True, allow_unused=True)
                slopes[name].append(0.0 if slope is None else slope.item())
    panels = [_panel(places.tolist(), values, f"value ({picture.unit})", picture.axis)]
    if picture.slope:
        title = "derivative (for each unit of the axis)"
        panels.append(_panel(places.tolist(), slopes, title, picture.axis))
    legend = "".join(
        f'<span class="line-{number}">{html.escape(name)}</span>'
        for number, name in enumerate(picture.terms, 1)
    )
    return (
        f'<figure class="picture"><div role="img" aria-label="{html.escape(picture.says)}" '
        f"data-search-exclude>{''.join(panels)}</div>"
        f'<figcaption><p class="legend" data-search-exclude>{legend}</p>'
        f"<p>{html.escape(picture.says)}</p></figcaption></figure>"
    )


def _panel(x: list[float], lines: Mapping[str, list[float]], title: str, axis: str) -> str:
    for line in [*_AXES.lines]:
        line.remove()
    for y, color, dashes in zip(lines.values(), _LINES, _DASHES, strict=False):
        if y:  # what is detached has no derivative
            _AXES.plot(x, y, dashes=dashes, color=color, linewidth=1.8, clip_on=False)
    _AXES.relim()
    _AXES.autoscale_view()
    _AXES.set_title(title, fontsize=9.5, color=_TEXT, loc="left", x=-0.12, y=1.02)
    _AXES.set_xlabel(axis, fontsize=9.5, color=_TEXT)
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        _FIGURE.savefig(written, format="svg", metadata={"Date": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>.*?</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:id|width|height)="[^"]*"|font-family: [^;"]*;?', "", svg)
    for number, color in enumerate(_LINES, 1):
        svg = svg.replace(color, f"var(--line-{number})")
    svg = svg.replace(_TEXT, "currentColor").replace(_GRID, "var(--line-grid)")
    return re.sub(r"\s+", " ", svg)
