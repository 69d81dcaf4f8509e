"""KL divergences of chunks from a teacher of another vocabulary, from logits or a linear head."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from losses import Variant
from losses._bench import (
    CHUNKED,
    Case,
    alignment_of,
    chunked,
    normal,
    over_chunks,
    plain_projected_kl,
    projection_of,
)
from losses._chunks import (
    LOGITS,
    NARROW,
    aligned,
    counted_chunks,
    divided,
    nothing,
    of_chunks,
    share,
    squared_temperature,
)
from termwise import lm


def formula(student_logits, teacher_logits, *, alignment, projection, temperature, **options):
    """Chunk by chunk, with a dense projection."""
    teacher, eps = teacher_logits.detach(), options["eps"]
    M = matrix_of(projection)
    counts = (options[name] for name in ("mask", "sample_mask", "exact_only"))
    chunks = list(counted_chunks(alignment, *counts))
    columns = torch.arange(teacher.shape[2])
    if options["teacher_columns"] is not None:
        columns = options["teacher_columns"]
    if options["columns_top_k"] is not None and chunks:
        rows = torch.stack([teacher[b, t] for b, _, theirs in chunks for t in theirs])
        columns = rows.amax(0).topk(options["columns_top_k"]).indices.sort().values
    covered = [j for j in columns.tolist() if M[:, j].sum() > 0]
    total, agreements, uncovered = nothing(student_logits), [], []
    for b, ours, theirs in chunks:
        P = torch.stack([(student_logits[b, t] / temperature).softmax(0) for t in ours]).mean(0)
        Q = (P @ M)[columns]
        q = Q / (Q.sum() + eps) + eps
        scaled = torch.stack([teacher[b, t] / temperature for t in theirs])
        among = scaled[:, columns].log_softmax(1)
        if options["teacher_mean"] == "prob":
            log_p, whole = among.exp().mean(0).log(), scaled.softmax(1).mean(0)
        else:
            log_p, whole = among.mean(0), scaled.mean(0).softmax(0)
        if options["teacher_mean"] == "log_normalized":
            log_p = log_p - log_p.logsumexp(0)
        if options["divergence"] == "forward":
            total = total + (log_p.exp() * (log_p - q.log())).sum()
        else:
            total = total + (q * (q.log() - log_p)).sum()
        agreements.append(float(Q.argmax() == log_p.argmax()))
        uncovered.append(1 - whole[covered].sum().item())
    kl = divided(total, options["normalizer"], len(chunks))
    return {
        "loss": temperature**2 * kl,
        "kl": kl,
        "num_chunks": kl.new_tensor(len(chunks)),
        "top1_agreement": share(agreements, kl),
        "uncovered_teacher_mass": share(uncovered, kl),
    }


def matrix_of(projection):
    dense = torch.zeros(projection.student_vocab, projection.teacher_vocab, dtype=torch.float64)
    for s in range(projection.student_vocab):
        for entry in range(*projection.student_pointers[s : s + 2].tolist()):
            dense[s, projection.student_columns[entry]] = projection.student_weights[entry].detach()
    return dense


def of_a_head(hidden, weight, teacher_logits, **options):
    return formula(hidden @ weight.T, teacher_logits, **options)


SOFT = {"projection": NARROW, "temperature": 2.0}
AT = (
    {},
    {"columns_top_k": 3, "exact_only": True},
    {"teacher_columns": st.just(torch.tensor([0, 2, 3]))},
)


# What the benches measure.


def chunked_head(time: int, vocab: int) -> list[Tensor]:
    hidden, *others = chunked(time, vocab, 256)
    return [hidden, *others, normal(vocab, 256, scale=0.06).requires_grad_()]


def our_projected_kl(student: Tensor, teacher: Tensor, *others: Tensor) -> Tensor:
    ids, valid, *projection = others
    return lm.projected_kl_loss(
        student, teacher, alignment=alignment_of(ids, valid), projection=projection_of(*projection)
    ).loss


def plain_linear_projected_kl(hidden: Tensor, *others: Tensor) -> Tensor:
    *chunks, weight = others
    return plain_projected_kl(hidden @ weight.mT, *chunks)


def our_linear_projected_kl(hidden: Tensor, teacher: Tensor, *others: Tensor) -> Tensor:
    ids, valid, *projection, weight = others
    return lm.linear_projected_kl_loss(
        hidden,
        weight,
        teacher,
        alignment=alignment_of(ids, valid),
        projection=projection_of(*projection),
    ).loss


PROJECTED_KL = of_chunks(
    function=lm.projected_kl_loss,
    formula=formula,
    bench={"": over_chunks(plain_projected_kl, our_projected_kl)},
    formula_at=AT,
    variants={
        "": Variant(
            module=lm.ProjectedKLLoss(NARROW, temperature=2.0),
            options=SOFT,
            shapes=LOGITS,
            made=aligned,
            masks=("sample_mask",),
        )
    },
    weights={"kl": squared_temperature},
)
LINEAR_PROJECTED_KL = of_chunks(
    function=lm.linear_projected_kl_loss,
    formula=of_a_head,
    bench={
        "": Case(
            CHUNKED,
            chunked_head,
            plain_linear_projected_kl,
            our_linear_projected_kl,
            rows=1024,
            size_of=lambda rows: (rows, 32_768),
        )
    },
    formula_at=AT,
    variants={
        "": Variant(
            module=lm.LinearProjectedKLLoss(NARROW, temperature=2.0),
            options=SOFT,
            shapes=("rows time columns", "columns columns", "rows time columns"),
            made=aligned,
        )
    },
    weights={"kl": squared_temperature},
    by=("hidden", "weight"),
)
