"""Parts that all results share: progress bar, figures, HTML report, JSON, and helpers for plots.

matplotlib and rich belong to the extra. They are imported inside functions, so that importing this
file does not need them.
"""

import base64
import html
import json
import math
import platform
import textwrap
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import __version__
from ._training import Curves, Result, Show

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure as Figure
    from matplotlib.figure import SubFigure as SubFigure
    from rich.console import Console, RenderableType
    from rich.console import Group as Group
    from rich.table import Table as Table

# The palette of Okabe and Ito, which is readable with color blindness.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C8C8C"
_PALETTE = 160  # colors of a PNG, enough that it looks the same
_CHARACTERS = 12.7  # of the title per inch


@contextmanager
def show_progress(console: "Console", label: str, steps: int) -> Generator[Show, None, None]:
    """Show a progress bar with the current terms, if the console is interactive."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    progress = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        # The terms come last: a narrow terminal truncates them, not the count.
        TextColumn("[dim]{task.fields[terms]}", table_column=Column(ratio=1, no_wrap=True)),
        console=console,
        expand=True,
        transient=True,
        disable=not console.is_interactive,
    )
    with progress:
        task = progress.add_task(label, total=steps, terms="")
        yield lambda metrics: progress.update(
            task, advance=1, terms="  ".join(f"{name} {x:.3g}" for name, x in metrics.items())
        )


def print_result(
    console: "Console", name: str, result: Result, seconds: float, picture: Path
) -> None:
    """Print the table, the result on held-out data, and the path of the figure."""
    console.print(result.table(name, seconds))
    console.print(f"measured: {result.sentence}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"figure: {picture}\n", soft_wrap=True, highlight=False, markup=False)


def write_json(path: Path, results: Mapping[str, Result]) -> None:
    """Write the results of all runs as one JSON object, by name."""
    objects = {name: result.as_json() for name, result in results.items()}
    path.write_text(json.dumps(objects, indent=1, allow_nan=False) + "\n", encoding="utf-8")


class Finished(NamedTuple):
    """A run that has finished."""

    result: Result
    seconds: float
    picture: Path
    command: str


_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>termwise: $names</title>
<style>
:root { color-scheme: light dark; font-family: system-ui, sans-serif; line-height: 1.5; }
body { max-width: 64rem; margin: 0 auto; padding: 1rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; }
section { margin-top: 2.5rem; border-top: 1px solid #8886; }
code { padding: 0.2em 0.5em; border-radius: 0.2em; background: #8882; }
label { display: block; overflow-x: auto; cursor: zoom-in; }
label:has(:checked) { cursor: zoom-out; }
img { max-width: 100%; height: auto; border-radius: 0.25rem; background: white; }
:checked + img { max-width: none; }
label > input { position: absolute; opacity: 0; }
label:focus-within { outline: 2px solid; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
caption { padding-bottom: 0.25rem; font-weight: bold; text-align: left; }
th, td { padding: 0.15rem 0.9rem 0.15rem 0; text-align: left; vertical-align: bottom; }
tr > :last-child { padding-right: 0; }
.right { text-align: right; }
@media (max-width: 40rem) { table { font-size: 0.72rem; } th, td { padding-right: 0.5rem; } }
thead, tbody + tbody { border-top: 1px solid #8886; }
thead { border-bottom: 1px solid #888; }
footer { margin-top: 2.5rem; opacity: 0.7; font-size: 0.85rem; }
</style>
<h1>termwise: training runs</h1>
<nav>$links</nav>
$sections
<footer>$versions</footer>
</html>
""")
_SECTION = Template("""<section id="$name">
<h2>$name</h2>
<p>$sentence</p>
<p><code>$command</code></p>
<label title="Enlarge"><input type="checkbox" aria-label="Enlarge the figure">
<img src="data:image/png;base64,$picture" alt="$sentence"></label>
$table
</section>
""")


def write_page(path: Path, runs: Mapping[str, Finished]) -> None:
    """Write a self-contained HTML page with the results, figures and tables of all runs."""
    sections = [
        _SECTION.substitute(
            name=html.escape(name),
            sentence=html.escape(one.result.sentence),
            command=html.escape(one.command),
            picture=base64.b64encode(one.picture.read_bytes()).decode(),
            table=_as_html(one.result.table(name, one.seconds)),
        )
        for name, one in runs.items()
    ]
    versions = (
        f"termwise {__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.platform()}"
    )
    page = _PAGE.substitute(
        names=html.escape(", ".join(runs)),
        links=" ".join(f'<a href="#{html.escape(name)}">{html.escape(name)}</a>' for name in runs),
        sections="".join(sections),
        versions=html.escape(versions),
    )
    path.write_text(page, encoding="utf-8")


def _as_html(table: "RenderableType") -> str:
    """Return a table, or several, as HTML, and anything else as preformatted text."""
    from rich.console import Group
    from rich.table import Table

    if isinstance(table, Group):
        return "\n".join(map(_as_html, table.renderables))
    if not isinstance(table, Table):
        return f"<pre>{html.escape(str(table))}</pre>"

    def row(tag: str, cells: Iterable["RenderableType"]) -> str:
        looks = [' class="right"' * (column.justify == "right") for column in table.columns]
        written = [
            f"<{tag}{look}>{html.escape(str(cell))}</{tag}>"
            for look, cell in zip(looks, cells, strict=True)
        ]
        return f"<tr>{''.join(written)}</tr>"

    head = row("th", [column.header for column in table.columns])
    rows = zip(*(column.cells for column in table.columns), strict=True)
    body = "\n".join(
        row("td", cells) + "</tbody><tbody>" * of.end_section
        for cells, of in zip(rows, table.rows, strict=True)
    )
    return (
        f'<div class="table"><table><caption>{html.escape(str(table.title))}</caption>\n'
        f"<thead>{head}</thead>\n<tbody>{body}</tbody></table>"
        f"<p>{html.escape(str(table.caption or ''))}</p></div>"
    )


def draw(path: Path, name: str, result: Result) -> None:
    """Draw the figure of a run, with its name and its result as the title."""
    figure = result.figure()
    bold = name.replace("-", "\N{HYPHEN}")  # bold text is a formula, where "-" is a minus sign
    width = round(_CHARACTERS * figure.get_figwidth())
    lines = textwrap.wrap(result.sentence, width=width, break_on_hyphens=False)
    title = "\n".join([f"$\\bf{{{bold}}}$", *lines])
    figure.suptitle(title, fontsize=10, x=0.01, horizontalalignment="left")
    _save(figure, path, result.sentence)


def _save(figure: "Figure", path: Path, sentence: str) -> None:
    """Write a PNG with the sentence as its description, and a palette, to save 2/3 of the bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image  # a dependency of matplotlib
    from PIL.PngImagePlugin import PngInfo

    canvas: Any = FigureCanvasAgg(figure)  # without types
    canvas.draw()  # once; savefig draws twice if there is a layout
    about = PngInfo()
    about.add_text("Description", sentence)
    picture = Image.frombytes("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    few = picture.convert("RGB").quantize(_PALETTE, method=Image.Quantize.MAXCOVERAGE)
    few.save(path, "PNG", optimize=True, pnginfo=about)


def new_table(title: str, *columns: str, left: int = 1) -> "Table":
    """Return an empty table; all columns but the first `left` ones are right-aligned."""
    from rich.table import Table

    table = Table(*columns[:left], title=title, title_style="bold")
    for column in columns[left:]:
        table.add_column(column, justify="right")
    return table


def new_figure(width: float, height: float, dpi: int = 150) -> "Figure":
    """Return an empty figure with a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def draw_curve(
    panel: "Axes", curve: list[float] | dict[int, float], label: str, color: str, **look: Any
) -> None:
    """Draw a curve over steps; the values of a list are those of steps 1, 2, ..."""
    by_step = curve if isinstance(curve, dict) else dict(enumerate(curve, 1))
    if len(by_step) == 1:
        look["marker"] = "o"  # a line through one point is invisible
    look = {"linewidth": 1.5, "markersize": 4, "color": color, "label": label, **look}
    panel.plot([*by_step], [*by_step.values()], **look)


def label_panel(panel: "Axes", title: str, y: str, x: str = "step") -> None:
    """Set the title and the labels of a panel, with integer ticks for steps."""
    from matplotlib.ticker import MaxNLocator

    panel.set_title(title, fontsize=9)
    panel.set_ylabel(y, fontsize=9, fontweight="bold")
    panel.set_xlabel(x, fontsize=8)
    if x == "step":
        panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    tidy(panel)


def tidy(panel: "Axes") -> None:
    """Remove the top and the right spine."""
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def plain_numbers(axis: "Axis") -> None:
    """Label a logarithmic axis with numbers such as 0.1, 0.2 and 0.5, not only powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def draw_legend(figure: "Figure", panel: "Axes") -> None:
    """Draw a legend for the curves of a panel below the figure."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9
    )


def json_curves(curves: Curves) -> dict[str, object]:
    return {
        term: {
            "first": json_number(curve[0]),
            "last": json_number(curve[-1]),
            "curve": [json_number(value) for value in curve],
        }
        for term, curve in curves.items()
    }


def json_numbers(numbers: Mapping[str, float] | Mapping[int, float]) -> dict[str, float | None]:
    return {str(name): json_number(value) for name, value in numbers.items()}


def json_number(value: float) -> float | None:
    """Return the number, or None if it is not finite."""
    return value if math.isfinite(value) else None


def length(curves: Curves) -> int:
    return len(next(iter(curves.values())))


def last(by_step: Mapping[int, float]) -> float:
    return list(by_step.values())[-1]
