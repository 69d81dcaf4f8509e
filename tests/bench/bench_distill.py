"""Losses over chunks, forward and backward, against their formulas as NeMo-RL writes them.

`python tests/bench/bench_distill.py`. The baselines multiply one-hot chunk matrices, hold whole
softmaxes in float32 and project every position by a sparse product; where columns are chosen, the
projection is cut to them first.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from termwise.lm import (
    Alignment,
    VocabPartition,
    VocabProjection,
    linear_projected_kl_loss,
    partitioned_loss,
    projected_kl_loss,
    vocab_partition,
)

BATCH, TIME, VOCAB, CHUNKS, HIDDEN, TOP_K = 2, 512, 32_768, 256, 256, 8192
EPS = 1e-10
ASKED = {
    "top_k": (f"projected KL, columns_top_k {TOP_K}", 0.25, 0.33),
    "all": ("projected KL, all columns", 0.15, 0.17),
    "partitioned": (f"partitioned (tail {TOP_K})", 0.4, 0.3),
    "linear": (f"linear projected KL (hidden {HIDDEN})", 0.5, 0.2),
}


@dataclasses.dataclass(frozen=True)
class Batch:
    inputs: tuple[Tensor, ...]
    """What gradients are taken of."""
    teacher: Tensor
    alignment: Alignment
    projection: VocabProjection
    partition: VocabPartition
    sparse: Tensor
    """The projection transposed, [teacher_vocab, student_vocab]."""


def batch_of(row: str, time: int = TIME, vocab: int = VOCAB) -> Batch:
    generator = torch.Generator().manual_seed(0)
    chunks = min(CHUNKS, time // 2)
    ids = [torch.stack([ids_of(time, chunks, generator) for _ in range(BATCH)]) for _ in range(2)]
    yes = torch.ones(BATCH, chunks, dtype=torch.bool)
    # Half of the tokens have a twin, the others go to three tokens.
    indices = torch.randint(0, vocab, (vocab, 3), generator=generator)
    weights = torch.rand(vocab, 3, generator=generator)
    twins = torch.arange(vocab) % 2 == 0
    indices[twins, 0] = torch.arange(vocab)[twins]
    indices[twins, 1:], weights[twins] = -1, torch.tensor([1.0, 0.0, 0.0])
    projection = VocabProjection.from_topk(
        indices, weights, student_vocab=vocab, teacher_vocab=vocab
    )
    rows = torch.arange(vocab).repeat_interleave(projection.student_pointers.diff())
    places = torch.stack([projection.student_columns, rows])
    sparse = torch.sparse_coo_tensor(places, projection.student_weights, (vocab, vocab))
    inputs = (2 * torch.randn(BATCH, time, vocab, generator=generator),)
    if row == "linear":
        hidden = torch.randn(BATCH, time, HIDDEN, generator=generator)
        inputs = hidden, torch.randn(vocab, HIDDEN, generator=generator) / HIDDEN**0.5
    return Batch(
        tuple(x.requires_grad_() for x in inputs),
        2 * torch.randn(BATCH, time, vocab, generator=generator),
        Alignment(ids[0], ids[1], yes, yes),
        projection,
        vocab_partition(projection, rule="strict"),
        sparse.coalesce(),
    )


def ids_of(time: int, chunks: int, generator: torch.Generator) -> Tensor:
    """Cut the time at random into chunks, none of which is empty or token 0 alone."""
    cuts = torch.randperm(time - 2, generator=generator)[: chunks - 1] + 2
    return torch.zeros(time, dtype=torch.int64).index_fill(0, cuts, 1).cumsum(0)


# --- the formulas as written ----------------------------------------------------------------


class SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix: Tensor, dense: Tensor) -> Tensor:
        ctx.matrix = matrix
        return torch.sparse.mm(matrix, dense)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        return None, torch.sparse.mm(ctx.matrix.t(), gradient)


def chunk_average(x: Tensor, chunk_id: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    shifted = F.pad(chunk_id[:, 1:], (0, 1), value=-1)
    hot = (shifted[..., None] == torch.arange(chunks)).to(x.dtype)
    sizes = hot.sum(1)
    return torch.bmm(hot.transpose(1, 2), x) / (sizes[..., None] + EPS), sizes


def projected_as_written(student: Tensor, batch: Batch, columns_top_k: int | None) -> Tensor:
    alignment, matrix, teacher = batch.alignment, batch.sparse, batch.teacher
    if columns_top_k is not None:
        highest = teacher[:, :-1].flatten(0, 1).amax(0)
        columns = highest.topk(min(columns_top_k, len(highest))).indices.sort().values
        matrix, teacher = matrix.index_select(0, columns).coalesce(), teacher[..., columns]
    probs = torch.log_softmax(student.float(), -1).exp()
    projected = SparseProduct.apply(matrix, probs.flatten(0, 1).t()).t()
    projected = projected.reshape(*student.shape[:2], -1)
    target = torch.log_softmax(teacher.float(), -1)
    chunks = alignment.max_chunks
    q, student_sizes = chunk_average(projected, alignment.student_chunk_id, chunks)
    log_p, teacher_sizes = chunk_average(target, alignment.teacher_chunk_id, chunks)
    q = q / (q.sum(-1, keepdim=True) + EPS)
    log_q = (q + EPS).log()
    log_p = log_p.log_softmax(-1)  # teacher_mean="log_normalized"
    mask = (student_sizes > 0) & (teacher_sizes > 0) & alignment.pair_valid
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return (kl * mask).sum() / mask.sum()


def partitioned_as_written(student: Tensor, batch: Batch) -> Tensor:
    alignment, partition = batch.alignment, batch.partition
    a, student_sizes = chunk_average(
        student.float().log_softmax(-1), alignment.student_chunk_id, alignment.max_chunks
    )
    b, teacher_sizes = chunk_average(
        batch.teacher.float().log_softmax(-1), alignment.teacher_chunk_id, alignment.max_chunks
    )
    mask = (student_sizes > 0) & (teacher_sizes > 0) & alignment.pair_valid
    kl = F.kl_div(
        a[..., partition.common_student],
        b[..., partition.common_teacher],
        reduction="none",
        log_target=True,
    ).sum(-1)
    ours = a[:, :, partition.rest_student][mask].exp()
    theirs = b[:, :, partition.rest_teacher][mask].exp()
    most = min(ours.shape[-1], theirs.shape[-1], TOP_K)
    tails = [x.topk(most, dim=-1).values for x in (ours, theirs)]
    l1 = F.l1_loss(*tails, reduction="none").sum(-1)
    return ((kl * mask).sum() + l1.sum()) / mask.sum()


def as_written(row: str, batch: Batch) -> Tensor:
    if row == "partitioned":
        return partitioned_as_written(batch.inputs[0], batch)
    if row == "linear":
        hidden, weight = batch.inputs
        return projected_as_written(hidden @ weight.T, batch, TOP_K)
    return projected_as_written(batch.inputs[0], batch, TOP_K if row == "top_k" else None)


def termwise(row: str, batch: Batch) -> Tensor:
    if row == "partitioned":
        return partitioned_loss(
            *batch.inputs,
            batch.teacher,
            alignment=batch.alignment,
            partition=batch.partition,
            tail_top_k=TOP_K,
        ).loss
    loss = linear_projected_kl_loss if row == "linear" else projected_kl_loss
    return loss(
        *batch.inputs,
        batch.teacher,
        alignment=batch.alignment,
        projection=batch.projection,
        columns_top_k=None if row == "all" else TOP_K,
    ).loss


LOSSES: dict[str, Callable[[str, Batch], Tensor]] = {"as written": as_written, "termwise": termwise}


def step(loss: Callable[[str, Batch], Tensor], row: str, batch: Batch) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(row, batch), batch.inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", default=list(ASKED), help=f"of {', '.join(ASKED)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        name, row = options.peak
        small, batch = batch_of(row, 8, 64), batch_of(row)
        run = functools.partial(step, LOSSES[name], row)
        print(measure.peak_growth(lambda: run(small), lambda: run(batch)))
        return

    print(
        f"torch {torch.__version__}, one thread, batch {BATCH}, time {TIME}, vocabularies {VOCAB}, "
        f"{CHUNKS} chunks, float32"
    )
    for row in options.rows:
        label, time_asked, peak_asked = ASKED[row]
        batch = batch_of(row)
        for ours, theirs in zip(*[step(loss, row, batch) for loss in LOSSES.values()], strict=True):
            # By their norms: of nearly equal probabilities in a tail either may come first.
            assert (ours - theirs).norm() < 1e-2 * theirs.norm()
        slow, fast = measure.seconds(
            {name: functools.partial(step, loss, row, batch) for name, loss in LOSSES.items()},
            repeats=options.repeats,
        ).values()
        large, small = (
            measure.peak_in_fresh_processes(__file__, name, row, times=options.processes)
            for name in LOSSES
        )
        print(
            f"{label}: time {fast:.2f} s of {slow:.2f} s: {fast / slow:.2f} (asked {time_asked}); "
            f"peak {small / 2**20:.0f} MiB of {large / 2**20:.0f} MiB: {small / large:.2f} "
            f"(asked {peak_asked})",
            flush=True,
        )


if __name__ == "__main__":
    main()
