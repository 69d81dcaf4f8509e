"""Several teachers beside cross-entropy: the formula is by the losses that each is compared by."""

import torch
from torch import Tensor

from losses import Declaration, Variant
from losses._bench import (
    alignment_of,
    over_chunks,
    plain_next_token,
    plain_projected_kl,
    projection_of,
)
from losses._chunks import NARROW, NORMALIZER, TEXT, aligned, masks, some_tokens, tokens, zeros
from termwise import lm


def formula(student_logits, tokens, teachers, *, kd_weight, ce_weight, mask, **options):
    """Summed teachers, one of the student's tokenizer and one of another, without a projection."""
    sample_mask, normalizer = options["sample_mask"], options["normalizer"]
    counts = tokens >= 0 if mask is None else (tokens >= 0) & mask
    samples = counts if sample_mask is None else counts & sample_mask[:, None]
    soft = {"temperature": options["temperature"]}
    student = lm.next_token_loss(student_logits, tokens, mask=samples, normalizer=normalizer)
    same, other = teachers
    each = torch.stack(
        [
            lm.distillation_loss(
                student_logits,
                same.logits,
                mask=samples,
                divergence=options["divergence"],
                normalizer=normalizer,
                **soft,
            ).loss,
            lm.universal_logit_loss(
                student_logits,
                other.logits,
                alignment=other.alignment,
                mask=samples,
                exact_only=options["exact_only"],
                **soft,
            ).loss,
        ]
    )
    weights = each.new_tensor([same.weight, other.weight])
    kd = (weights * each).sum()
    return {
        "loss": kd_weight * kd + ce_weight * student.loss,
        "kd": kd,
        "cross_entropy": student.loss,
        "kd_scale": torch.ones_like(kd).detach(),
        "teacher_kd": each,
        "teacher_weight": weights,
        "num_tokens": student.num_tokens,
        "accuracy": student.accuracy,
    }


def two_teachers(sizes):
    batch, time, vocab = sizes["batch"], sizes["time"], sizes["vocab"]
    logits = torch.sin(torch.arange(float(batch * time * vocab))).reshape(batch, time, vocab)
    ids = (torch.arange(time) // 2).clamp(max=1).expand(batch, time).clone()
    valid = torch.ones(batch, 2, dtype=torch.bool)
    return lm.Teacher(logits), lm.Teacher(
        logits.flip(2), lm.Alignment(ids, ids, valid, valid), weight=0.5
    )


def taught(rows):
    logits = torch.sin(torch.arange(rows * 12.0)).reshape(rows, 4, 3)
    other = lm.Teacher(logits.flip(2), **aligned(rows), projection=NARROW)
    return {**tokens(rows), "teachers": (lm.Teacher(logits), other)}


# What the benches measure.


def our_cross_tokenizer(student: Tensor, teacher: Tensor, *others: Tensor) -> Tensor:
    ids, valid, *projection = others
    of_teacher = lm.Teacher(
        teacher, alignment_of(ids, valid), projection=projection_of(*projection)
    )
    return lm.cross_tokenizer_loss(student, ids, of_teacher).loss


def plain_cross_tokenizer(student: Tensor, teacher: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    return plain_next_token(student, ids) + plain_projected_kl(student, teacher, ids, *_)


CROSS_TOKENIZER = Declaration(
    function=lm.cross_tokenizer_loss,
    formula=formula,
    bench={"": over_chunks(plain_cross_tokenizer, our_cross_tokenizer)},
    variants={
        "": Variant(
            module=lm.CrossTokenizerLoss(scale="match"),
            options={"scale": "match"},
            shapes=("rows time columns",),
            made=taught,
        )
    },
    sizes=TEXT,
    elements={"tokens": some_tokens("vocab")},
    overrides={
        "teachers": two_teachers,
        "combine": "sum",
        "score": None,
        "log_vocab": False,
        "teacher_top_k": None,
        "columns_top_k": None,
        "scale": "fixed",
        "student_vocab": lambda sizes: sizes["vocab"],
        **NORMALIZER,
    },
    weights={"kd": lambda call: call["kd_weight"], "cross_entropy": "ce_weight"},
    also_in_graph=("teacher_kd",),
    masked=masks("student_logits"),
    shards={
        "batch_group": ("batch", {}),
        "vocab_group": None,
        "sequence_group": (
            ("time", "student_time", "teacher_time"),
            {"grad_reduction": "sum"},
        ),
    },
    by={"assert_gradients": ("student_logits",)},
    # A chunk with a token that does not count is left out: here all count.
    more={"assert_finite": {"tokens": zeros}},
)
