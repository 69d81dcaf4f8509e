"""Draw prefix_laws.svg: what `termwise.sae.sample_prefixes` draws from, and what it draws.

Run it as `python docs/pages/prefix_laws.py`, with a file's name to draw there instead.
"""

import math
import sys
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from termwise.sae import sample_prefixes

PrefixLaw = Literal["nabeshima", "saev"]

D_SAE = 16384
DRAWS = 2000
# Okabe and Ito's colours, which stay apart for colour-blind eyes.
COLORS: dict[PrefixLaw, str] = {"nabeshima": "#0072B2", "saev": "#D55E00"}
GREY = "#8C8C8C"


def distribution(law: PrefixLaw, m: float) -> float:
    """Return the probability that one draw is at most m."""
    if law == "nabeshima":
        return math.sqrt(m / (D_SAE - 1))
    return (1 - 1 / math.sqrt(m)) / (1 - 1 / math.sqrt(D_SAE - 1))


def median(law: PrefixLaw) -> int:
    """Return the first length that half of the draws do not pass."""
    return next(m for m in range(1, D_SAE) if distribution(law, m) >= 0.5)


def drawn(law: PrefixLaw) -> list[int]:
    """Draw single prefixes: of two, the other one is D_SAE."""
    generator = torch.Generator().manual_seed(0)
    return [sample_prefixes(D_SAE, 2, law=law, generator=generator)[0] for _ in range(DRAWS)]


def draw(path: Path) -> None:
    """Write the figure."""
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    panel = figure.add_subplot()
    for law in COLORS:
        draw_law(panel, law)
    panel.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    panel.set_xscale("log", base=2)
    panel.set_xlim(1, D_SAE)
    panel.set_ylim(0, 1)
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.set_xlabel("prefix length m")
    panel.set_ylabel("share of draws up to m")
    panel.set_title(
        f"One draw for d_sae = {D_SAE}: the law (line) and {DRAWS} draws (circles)", fontsize=10
    )
    panel.spines[["top", "right"]].set_visible(False)
    # The file is the same wherever and whenever it is written.
    mpl.rcParams["svg.hashsalt"] = "prefix_laws"
    figure.savefig(path, metadata={"Date": None})


def draw_law(panel: Axes, law: PrefixLaw) -> None:
    """Draw a law, what was drawn from it, its median and its name."""
    color = COLORS[law]
    lengths = [2 ** (place / 8) for place in range(8 * 14 + 1)]
    panel.plot(
        lengths, [min(1.0, distribution(law, m)) for m in lengths], color=color, linewidth=1.5
    )
    # At powers of two alone, rather than a step for each draw: the file stays small.
    draws, powers = torch.tensor(drawn(law)), lengths[::8]
    shares = [float((draws <= m).double().mean()) for m in powers]
    panel.plot(powers, shares, "o", color=color, fillstyle="none", clip_on=False)
    middle = median(law)
    panel.plot([middle, middle], [0, 0.5], color=color, linewidth=0.8, linestyle=":")
    panel.plot([middle], [0.5], "D", color=color)
    side = "right" if law == "nabeshima" else "left"
    panel.annotate(
        f'"{law}"\nmedian {middle}',
        (middle, 0.5),
        xytext=(-9 if side == "right" else 9, 9 if side == "right" else -9),
        textcoords="offset points",
        horizontalalignment=side,
        verticalalignment="bottom" if side == "right" else "top",
        color=color,
    )


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
