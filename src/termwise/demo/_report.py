"""What a run shows: a progress bar with live terms, a table, a line, a figure and JSON."""

import io
import json
import math
import textwrap
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image  # which matplotlib needs itself
from PIL.PngImagePlugin import PngInfo
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

from ._distill import Chunk, Distillation
from ._energy_report import energies_figure, energies_json, energies_tables
from ._training import Curves, Energies, Frontier, Result, Show

# Okabe and Ito's colours, which stay apart for colour-blind eyes.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#8C8C8C"
_GREEN = "#009E73"
_MARKS = ((_BLUE, "o"), (_ORANGE, "s"), (_GREEN, "^"), ("#CC79A7", "D"))
_STUDENT_MARKS = ((_GREY, "o"), (_BLUE, "s"), (_ORANGE, "^"))
_COLUMNS = 3
_PALETTE = 160  # colours, none of which is far from the one that was drawn


@contextmanager
def following(console: Console, label: str, steps: int) -> Generator[Show, None, None]:
    """Show a progress bar with live terms, or nothing where it could not be redrawn in place."""
    progress = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        # What is left of the line: a narrow terminal cuts the terms, not the count.
        TextColumn("[dim]{task.fields[terms]}", table_column=Column(ratio=1, no_wrap=True)),
        console=console,
        expand=True,
        transient=True,
        disable=not console.is_interactive,
    )
    with progress:
        task = progress.add_task(label, total=steps, terms="")
        yield lambda metrics: progress.update(task, advance=1, terms=_line(metrics))


def tell(
    console: Console,
    name: str,
    result: Result | Frontier | Energies | Distillation,
    seconds: float,
    figure: Path,
) -> None:
    """Print the table, the line that says what was learnt, and where the figure is."""
    if isinstance(result, Energies):
        table: RenderableType = energies_tables(name, result, seconds)
    elif isinstance(result, Result):
        table = _terms_table(name, result, seconds)
    elif isinstance(result, Frontier):
        table = _frontier_table(name, result, seconds)
    else:
        table = _students_table(name, result, seconds)
    console.print(table)
    console.print(f"measured: {result.sentence}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"figure: {figure}\n", soft_wrap=True, highlight=False, markup=False)


def _terms_table(name: str, result: Result, seconds: float) -> Table:
    steps, control_steps = _length(result.terms), _length(result.control)
    title = f"{name}: {steps} steps ({result.control_name}: {control_steps}), {seconds:.1f} s"
    table = Table("\nterm", title=title, title_style="bold")
    for training in ("", result.control_name):
        for moment in ("first", "last"):
            table.add_column(f"{training}\n{moment}", justify="right")
    for term in result.terms:
        curves = (result.terms[term], result.control[term])
        table.add_row(term, *(f"{curve[end]:.4g}" for curve in curves for end in (0, -1)))
    return table


def _frontier_table(name: str, result: Frontier, seconds: float) -> Table:
    title = f"{name}: {_length(result.network)} steps each, {seconds:.1f} s"
    table = Table("\nobjective", "\nsetting", title=title, title_style="bold")
    few = f"with {result.few}\nlatents alone"
    for column in ("\nl0", "held-out\nFVU", few, "\ndead"):
        table.add_column(column, justify="right")
    for objective, trainings in result.trainings.items():
        for one in trainings:
            table.add_row(
                objective,
                one.called,
                f"{one.measured['l0']:.1f}",
                f"{one.measured['fvu']:.4f}",
                f"{one.measured['fvu_of_few']:.4f}",
                f"{one.measured['dead']:.0f}",
            )
        table.add_section()
    return table


def _students_table(name: str, result: Distillation, seconds: float) -> Table:
    title = f"{name}: {_length(result.teacher)} steps each, {seconds:.1f} s"
    table = Table("\nstudent", title=title, title_style="bold")
    terms = ("cross_entropy", "distillation", "top1_agreement")
    for column in (*(term.replace("_", "\n", 1) for term in terms), "held-out\nbits per byte"):
        table.add_column(column, justify="right")
    for training, student in result.students.items():
        last = [f"{student.terms[t][-1]:.4g}" if t in student.terms else "" for t in terms]
        table.add_row(training, *last, f"{_last(student.held_out):.3f}")
    return table


def as_json(result: Result | Frontier | Energies | Distillation) -> dict[str, object]:
    """Give every curve and measurement as JSON has them: a number that is not finite is null."""
    if isinstance(result, Energies):
        return energies_json(result, _json_curves, _json_numbers)
    if isinstance(result, Frontier):
        return {
            "network": {"terms": _json_curves(result.network)},
            "trainings": [
                {
                    "objective": objective,
                    "setting": one.called,
                    "terms": _json_curves(one.terms),
                    "measured": _json_numbers(one.measured),
                }
                for objective, trainings in result.trainings.items()
                for one in trainings
            ],
            "measured": _json_numbers(result.measured),
        }
    if isinstance(result, Distillation):
        return {
            "teacher": {"terms": _json_curves(result.teacher)},
            "students": {
                training: {
                    "terms": _json_curves(student.terms),
                    "held_out_bits_per_byte": {
                        str(steps): _finite(bits) for steps, bits in student.held_out.items()
                    },
                }
                for training, student in result.students.items()
            },
            "measured": _json_numbers(result.measured),
        }
    return {
        "terms": _json_curves(result.terms),
        "control": {"name": result.control_name, "terms": _json_curves(result.control)},
        "measured": _json_numbers(result.measured),
    }


def write_json(path: Path, results: dict[str, Result | Frontier | Energies | Distillation]) -> None:
    """Write one object for each run, by its name."""
    objects = {name: as_json(result) for name, result in results.items()}
    path.write_text(json.dumps(objects, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def draw(path: Path, name: str, result: Result | Frontier | Energies | Distillation) -> None:
    """Draw the run's figure."""
    if isinstance(result, Energies):
        figure = energies_figure(result)
        figure.suptitle(
            _title(name, result.sentence, 165), fontsize=10, x=0.01, horizontalalignment="left"
        )
        _save(figure, path, result.sentence, dpi=110)
        return
    rows = math.ceil((len(result.terms) + 1) / _COLUMNS) if isinstance(result, Result) else 2
    figure = Figure(figsize=(11, 2.7 * rows + 1.3), layout="constrained")
    if isinstance(result, Frontier):
        panel = _draw_frontier(figure, result)
    elif isinstance(result, Distillation):
        panel = _draw_distillation(figure, result)
    else:
        panel = _draw_terms(figure, rows, result)
    figure.suptitle(
        _title(name, result.sentence, 140), fontsize=10, x=0.01, horizontalalignment="left"
    )
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9
    )
    _save(figure, path, result.sentence, dpi=150)


def _save(figure: Figure, path: Path, sentence: str, dpi: int) -> None:
    """Write a PNG that holds the sentence too; of few colours, it takes a third of the bytes."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi)
    about = PngInfo()
    about.add_text("Description", sentence)
    with Image.open(drawn) as picture:
        few = picture.convert("RGB").quantize(_PALETTE, method=Image.Quantize.MAXCOVERAGE)
        few.save(path, "PNG", optimize=True, pnginfo=about)


def _title(name: str, sentence: str, width: int) -> str:
    bold = name.replace("-", "\N{HYPHEN}")  # a hyphen is a minus in a formula, which bold text is
    return "\n".join(
        [f"$\\bf{{{bold}}}$", *textwrap.wrap(sentence, width=width, break_on_hyphens=False)]
    )


def _draw_terms(figure: Figure, rows: int, result: Result) -> Axes:
    """Draw a panel for each term, with the control beside it, and one of what was measured.

    Returns:
        The panel whose curves the legend names.
    """
    grid = figure.add_gridspec(rows, _COLUMNS)
    panels = [figure.add_subplot(grid[divmod(i, _COLUMNS)]) for i in range(len(result.terms))]
    for panel, term in zip(panels, result.terms, strict=True):
        _draw_term(panel, term, result)
    row, column = divmod(len(panels), _COLUMNS)
    _draw_bars(figure.add_subplot(grid[row, column:]), result)
    return panels[1]


def _draw_frontier(figure: Figure, result: Frontier) -> Axes:
    """Draw what is left unexplained against sparsity, with all latents and with few, and curves.

    Returns:
        The panel whose curves the legend names.
    """
    grid = figure.add_gridspec(2, _COLUMNS)
    frontier = figure.add_subplot(grid[:, :2])
    few, curves = (figure.add_subplot(grid[row, 2]) for row in range(2))
    for (objective, trainings), (color, marker) in zip(
        result.trainings.items(), _MARKS, strict=True
    ):
        for panel, measurement in ((frontier, "fvu"), (few, "fvu_of_few")):
            points = sorted((one.measured["l0"], one.measured[measurement]) for one in trainings)
            panel.plot(*zip(*points, strict=True), color=color, marker=marker, label=objective)
        middle = trainings[len(trainings) // 2]
        _draw_curve(curves, middle.terms["mse"], f"{objective}, {middle.called}", color, "-")
    for panel in (frontier, few):
        panel.set_xscale("log")
        _plain_numbers(panel.xaxis)
        panel.set_xlabel("l0: active latents of a row", fontsize=8)
    for panel in (frontier, few, curves):
        panel.set_yscale("log")
        _plain_numbers(panel.yaxis)
        panel.grid(color=_GREY, alpha=0.25, linewidth=0.5, which="both")
        _tidy(panel)
    frontier.set_title("held-out variance left unexplained (down and left is better)", fontsize=9)
    frontier.set_ylabel("FVU", fontsize=9, fontweight="bold")
    few.set_title(f"the same with {result.few} latents alone", fontsize=9)
    few.set_ylabel("FVU", fontsize=9, fontweight="bold")
    curves.set_title("squared error, middle settings\n(matryoshka: mean over prefixes)", fontsize=9)
    curves.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    curves.set_xlabel("step", fontsize=8)
    curves.set_ylabel("mse", fontsize=9, fontweight="bold")
    return frontier


def _draw_distillation(figure: Figure, result: Distillation) -> Axes:
    """Draw bits per byte along the trainings, two of their terms, and the alignment of a sentence.

    Returns:
        The panel whose curves the legend names.
    """
    grid = figure.add_gridspec(3, _COLUMNS, height_ratios=(1, 1, 0.6))
    bits = figure.add_subplot(grid[:2, :2])
    seen, taught = (figure.add_subplot(grid[row, 2]) for row in range(2))
    for (training, student), (color, marker) in zip(
        result.students.items(), _STUDENT_MARKS, strict=True
    ):
        steps, values = list(student.held_out), list(student.held_out.values())
        bits.plot(steps, values, color=color, marker=marker, markersize=4, label=training)
        _draw_curve(seen, student.terms["cross_entropy"], training, color, "-")
        if "distillation" in student.terms:
            _draw_curve(taught, student.terms["distillation"], training, color, "-")
    teacher = result.measured["bits_per_byte_teacher"]
    bits.axhline(teacher, color=_GREY, linewidth=1, linestyle=":", zorder=0)
    ends = {teacher: (f"{teacher:.3f} the teacher", _GREY)}
    for student, (color, _) in zip(result.students.values(), _STUDENT_MARKS, strict=True):
        ends[_last(student.held_out)] = (f"{_last(student.held_out):.3f}", color)
    bottom, top = bits.get_ylim()
    above = math.inf
    for value, (text, color) in sorted(ends.items(), reverse=True):
        above = min(value, above - 0.04 * (top - bottom))  # where it covers none above it
        bits.text(
            1.01,
            above,
            text,
            transform=bits.get_yaxis_transform(),
            verticalalignment="center",
            color=color,
            fontsize=9,
        )
    for panel, title, label in (
        (bits, "held-out text (lower is better)", "bits per byte"),
        (seen, "text that was seen, nats a token", "cross_entropy"),
        (taught, "student from teacher, a chunk", "distillation"),
    ):
        panel.set_title(title, fontsize=9)
        panel.set_ylabel(label, fontsize=9, fontweight="bold")
        panel.set_xlabel("step", fontsize=8)
        panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        _tidy(panel)
    bits.grid(color=_GREY, alpha=0.25, linewidth=0.5)
    _draw_alignment(figure.add_subplot(grid[2, :]), result.aligned, result.chunks)
    return bits


def _draw_alignment(panel: Axes, sentence: str, chunks: list[Chunk]) -> None:
    """Draw a sentence's tokens on either side, and between them the chunks they make up."""
    for chunk in chunks:
        several = max(len(chunk.student), len(chunk.teacher)) > 1
        color = _GREEN if several else "#5A5A5A"
        start, stop = chunk.student[0][0], chunk.student[-1][1]
        gap = 0.06  # characters, on either side, so that tokens show where they end
        ends = [start + gap, stop - gap]
        panel.fill_between(ends, 0.8, 1.2, color=color, alpha=0.25, linewidth=0)
        for spans, bottom in ((chunk.student, 1.2), (chunk.teacher, 0.0)):
            for first, end in spans:
                ends = [first + gap, end - gap]
                panel.fill_between(ends, bottom, bottom + 0.8, color=color, linewidth=0)
    for place, character in enumerate(sentence):
        for bottom in (1.2, 0.0):
            panel.text(
                place + 0.5,
                bottom + 0.38,
                "\N{MIDDLE DOT}" if character == " " else character,
                family="monospace",
                fontsize=9.5,
                color="white",
                horizontalalignment="center",
                verticalalignment="center",
            )
    panel.set_xlim(0, len(sentence))
    panel.set_ylim(-0.05, 2.05)
    panel.set_yticks([0.4, 1.6], ["teacher", "student"], fontsize=9, fontweight="bold")
    panel.tick_params(axis="y", length=0)
    panel.xaxis.set_visible(False)
    panel.spines[:].set_visible(False)
    panel.set_title(
        "a held-out sentence as its tokens: a chunk is the shortest text that both cut alike "
        "(green: in other tokens)",
        fontsize=9,
    )


def _last(held_out: dict[int, float]) -> float:
    return list(held_out.values())[-1]


def _plain_numbers(axis: Axis) -> None:
    """Write 0.1, 0.2 and 0.5 on a logarithmic axis, which would have powers of ten alone."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _draw_term(panel: Axes, term: str, result: Result) -> None:
    _draw_curve(panel, result.terms[term], "trained on all terms", _BLUE, "-")
    if term != "loss":  # the trainings weigh their terms differently: their losses do not compare
        _draw_curve(panel, result.control[term], result.control_name, _ORANGE, "--")
    bottom, top = panel.get_ylim()
    if term in result.levels:
        called, level = result.levels[term]
        top = max(top, 1.15 * level)
        panel.axhline(level, color=_GREY, linewidth=1, linestyle=":", zorder=0)
        panel.text(
            1,
            level,
            f"{called} {level:g}",
            transform=panel.get_yaxis_transform(),
            horizontalalignment="right",
            verticalalignment="bottom",
            color=_GREY,
            fontsize=8,
        )
    panel.set_ylim(min(bottom, -0.03 * top), 1.04 * top)
    panel.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    panel.set_title(result.about[term], fontsize=9)
    panel.set_xlabel("step", fontsize=8)
    panel.set_ylabel(term, fontsize=9, fontweight="bold")
    _tidy(panel)


def _draw_curve(panel: Axes, curve: list[float], label: str, color: str, style: str) -> None:
    marker = "o" if len(curve) == 1 else None  # a line through one point would not be seen
    steps = range(1, len(curve) + 1)
    panel.plot(steps, curve, style, color=color, linewidth=1.5, marker=marker, label=label)


def _draw_bars(panel: Axes, result: Result) -> None:
    colors = [_GREY for _ in result.bars]
    colors[list(result.bars).index(result.control_name)] = _ORANGE
    colors[-1] = _BLUE
    values = list(result.bars.values())
    bars = panel.barh(range(len(values)), values, color=colors, height=0.45)
    panel.bar_label(bars, [result.bars_format.format(v) for v in values], padding=4, fontsize=9)
    for place, name in enumerate(result.bars):  # above its bar, where it takes no panel's width
        panel.text(0, place + 0.27, f" {name}", fontsize=8, verticalalignment="bottom")
    panel.set_xlim(0, max(values) * 1.2)
    panel.set_ylim(-0.4, len(values) - 0.3)
    panel.set_title(result.bars_about, fontsize=9)
    panel.xaxis.set_visible(False)
    panel.yaxis.set_visible(False)
    _tidy(panel)
    panel.spines["bottom"].set_visible(False)


def _tidy(panel: Axes) -> None:
    panel.tick_params(labelsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _line(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in metrics.items())


def _json_curves(curves: Curves) -> dict[str, object]:
    return {
        term: {
            "first": _finite(curve[0]),
            "last": _finite(curve[-1]),
            "curve": [_finite(value) for value in curve],
        }
        for term, curve in curves.items()
    }


def _json_numbers(numbers: dict[str, float]) -> dict[str, float | None]:
    return {name: _finite(value) for name, value in numbers.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _length(curves: Curves) -> int:
    return len(next(iter(curves.values())))
