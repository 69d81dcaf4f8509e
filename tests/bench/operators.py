"""What each operator and backward pass written by hand saves, against the best plain formula.

`python tests/bench/operators.py --out docs/pages/numbers.md` writes its table. Those that are a
whole loss are measured by `run.py`, whose tables are on the pages of the losses; the others, which
are a part of one, are measured here in the same way. Some save nothing: no plain formula has their
value or their gradient.
"""

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import run
import torch
import torch.nn.functional as F
from formulas import CASES, PATHS, Case
from losses._bench import normal
from torch import Tensor

from termwise import lm
from termwise.energy import _forward_laplacian
from termwise.lm import _chunk_blocks
from termwise.sae import _penalties

PAGES = Path(__file__).parents[2] / "docs/pages"
BEGIN, END = "<!-- measured by tests/bench/operators.py -->", "<!-- end -->"

# Names in src of those that save time or memory, and the losses that consist of them.
LOSSES = {
    "contrast": ("info_nce", "nt_xent", "supervised_contrastive", "decoupled_contrastive"),
    "sigmoid_contrastive": ("sigmoid_contrastive",),
    "cross_entropy_of_views": ("dino", "ibot", "swapped_prediction"),
    "cosine_sums, cosine_series, _Sums, _Series": ("sigreg", "lejepa"),
    "quantile_distance": ("visreg",),
    "nearest_neighbours, koleo": ("koleo",),
    "gram_anchor": ("gram_anchor",),
    "_SumOfRoots, _HalfInverseRoot": ("mmcr",),
    "cross_moments, cross_moments_gradient": ("barlow_twins",),
    "second_moments, second_moments_gradient": ("vicreg", "multi_view_vicreg"),
    "row_variances, centred_times, _SumOfVariances": ("targeted_variance",),
    "_Blocks": ("next_token", "distillation"),
    "linear_rows": ("linear_next_token", "linear_distillation"),
    "projected_kl": ("projected_kl",),
    "linear_projected_kl": ("linear_projected_kl",),
    "partitioned": ("partitioned",),
    "universal_logit": ("universal_logit",),
    "prefix_errors, prefix_gradients": ("matryoshka",),
    "_RowsDivergence": ("end_to_end",),
}
# Those that have a value or a gradient that no plain formula has.
ONLY_WAY = {
    "_TerminalSums, _SumOverRanks, _Replicated": "gradients of sums over ranks",
    "_Refusing, _Once, _HeldEnergies": "second derivatives that raise an error",
    "_WithGradients, _Differentiable": "the backward pass of each operator",
    "_JumpReLU, _ActiveCount, _TanhJump": "estimates of gradients that are 0 almost everywhere",
    "_SumOfRoots, _HalfInverseRoot": "finite derivatives where eigenvalues coincide",
    "_Magnitudes": "the derivative 1 of a latent's size at 0",
    "_Gated": "a gradient of 0 from a part of weight 0 that is infinite",
    "_Product": "products that autocast does not round in the backward pass",
    "_WeightedSum, _WeightedSumGradients": "`embedding_bag` with second derivatives, under `vmap`",
    "_Bits": "the bits of floats under `vmap`, up to PyTorch 2.11",
}


def rows_l1(f: Tensor) -> Tensor:
    return _penalties.penalty(f, None, 1.0).sum()


def square_sum(base: Tensor) -> Tensor:
    return _forward_laplacian._SquareSum.apply(base).sum()


@functools.cache
def projection(vocab: int) -> tuple[lm.VocabProjection, Tensor]:
    """Return a projection to four teacher tokens of each of the student, and its matrix."""
    generator = torch.Generator().manual_seed(0)
    students = torch.arange(vocab).repeat_interleave(4)
    teachers = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(4)], 1)
    weights = torch.full((4 * vocab,), 0.25)
    pairs = torch.stack([teachers.flatten(), students])
    matrix = torch.sparse_coo_tensor(pairs, weights, (vocab, vocab)).coalesce()
    places = map(tuple, matrix.indices().flip(0).T.tolist())
    entries = dict(zip(places, matrix.values().tolist(), strict=True))
    return lm.VocabProjection.from_pairs(entries, student_vocab=vocab, teacher_vocab=vocab), matrix


def projected(rows: Tensor) -> Tensor:
    return projection(rows.shape[1])[0].project(rows).square().sum()


def plain_projected(rows: Tensor) -> Tensor:
    return torch.sparse.mm(projection(rows.shape[1])[1], rows.T).square().sum()


def chunked(batch: int, time: int, vocab: int) -> list[Tensor]:
    ids = torch.arange(time).expand(batch, -1) // 2
    return [normal(batch, time, vocab), ids, torch.ones(batch, time // 2, dtype=torch.bool)]


def highest(logits: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    return _chunk_blocks.highest_logits(logits, ids, valid)


def plain_highest(logits: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    used = F.pad(valid, (1, 0)).gather(1, ids + 1)
    return logits.masked_fill(~used[..., None], -torch.inf).flatten(0, 1).amax(0)


PARTS = {
    "_RowsL1": Case(
        ((64, 1024), (256, 8192), (2048, 16_384)),
        lambda rows, width: [normal(rows, width).requires_grad_()],
        lambda f: f.abs().sum(),
        rows_l1,
    ),
    "_SquareSum": Case(
        ((16, 64, 64), (64, 128, 256), (784, 128, 256)),
        lambda *size: [normal(*size).requires_grad_()],
        lambda base: base.square().sum(),
        square_sum,
    ),
    "csr_product, _Product": Case(
        ((16, 1000), (64, 8000), (256, 32_768)),
        lambda rows, vocab: [normal(rows, vocab).requires_grad_()],
        plain_projected,
        projected,
        compiled=False,  # a sparse tensor has no compiled form
    ),
    "highest_logits": Case(
        ((2, 16, 1000), (2, 64, 8000), (2, 512, 32_768)), chunked, plain_highest, highest
    ),
}


def cells(name: str, rows: list[list[str]]) -> str:
    """Join the rows of a table of run.py, one for each size, into one row."""
    columns = list(zip(*rows, strict=True))
    sizes, plain, compiled, peak = (" / ".join(filter(None, columns[i])) for i in (1, 3, 6, 8))
    labelled = {"": plain, "; compiled ": compiled, "; peak ": peak}
    found = "".join(label + value for label, value in labelled.items() if value)
    return f"| {name}, {sizes.replace(' x ', 'x')} | {found} |"


def split(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def of_a_loss(loss: str) -> Iterator[str]:
    (page,) = PAGES.glob(f"api/*/{loss}.md")
    table = page.read_text().partition(run.BEGIN)[2].partition("\n## ")[0]
    rows = [split(line) for line in table.splitlines() if line.startswith("|")][2:]
    for label in dict.fromkeys(row[0] for row in rows):
        named = f"`{loss}_loss`" + (f", {label}" if label else "")
        yield cells(named, [row for row in rows if row[0] == label])


def table(options: argparse.Namespace) -> Iterator[str]:
    yield "| operator or backward pass | measured as | of plain |"
    yield "|---|---|---|"
    for operator, losses in LOSSES.items():
        for loss in losses:
            for line in of_a_loss(loss):
                yield f"| {code(operator)} {line}"
    for operator, case in PARTS.items():
        rows = [split(row) for row in run.rows_of(operator, case, options, __file__)]
        yield f"| {code(operator)} {cells('itself', rows)}"
    for operator, why in ONLY_WAY.items():
        yield f"| {code(operator)} | the only way: {why} | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="the page to write the table into")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    CASES.update(PARTS)
    PATHS.update(dict.fromkeys(PARTS, ({},)))
    if given.peak:
        name, which, index, device = given.peak
        print(run.peak(name, which, CASES[name].sizes[int(index)], device))
        return
    told: dict[str, Any] = {"sizes": 3, "budget": 1.0, "eager": False, "no_memory": False}
    lines = list(table(argparse.Namespace(device="cpu", **told)))
    print("\n".join(lines))
    if given.out:
        before, _, rest = given.out.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        given.out.write_text("\n".join([before + BEGIN, "", *lines, "", END]) + after)


if __name__ == "__main__":
    main()
