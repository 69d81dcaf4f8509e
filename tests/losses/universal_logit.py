"""Universal logit distillation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses import Variant
from losses._bench import alignment_of, chunk_means, over_chunks
from losses._chunks import LOGITS, aligned, counted_chunks, divided, nothing, of_chunks
from termwise import lm


def formula(student_logits, teacher_logits, *, alignment, temperature, **options):
    counts = (options[name] for name in ("mask", "sample_mask", "exact_only"))
    total, count = nothing(student_logits), 0
    for b, *sides in counted_chunks(alignment, *counts):
        p, q = [
            torch.stack([(x[b, t] / temperature).softmax(0) for t in rows]).mean(0)
            for x, rows in zip((student_logits, teacher_logits.detach()), sides, strict=True)
        ]
        p, q = (x.sort(descending=True).values for x in (p, q))
        p, q = F.pad(p, (0, max(len(q) - len(p), 0))), F.pad(q, (0, max(len(p) - len(q), 0)))
        total, count = total + (p - q).abs().sum(), count + 1
    loss = divided(total, options["normalizer"], count)
    return {"loss": loss, "num_chunks": loss.new_tensor(count)}


# What the benches measure.


def plain_universal_logit(student: Tensor, teacher: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    p, q = (chunk_means(x.softmax(2), ids).sort(1, descending=True)[0] for x in (student, teacher))
    return (p - q).abs().sum(1).mean()


def our_universal_logit(student: Tensor, teacher: Tensor, *others: Tensor) -> Tensor:
    return lm.universal_logit_loss(student, teacher, alignment=alignment_of(*others[:2])).loss


UNIVERSAL_LOGIT = of_chunks(
    function=lm.universal_logit_loss,
    formula=formula,
    bench={"": over_chunks(plain_universal_logit, our_universal_logit, ties=True)},
    variants={
        "": Variant(
            module=lm.UniversalLogitLoss(), shapes=LOGITS, made=aligned, masks=("sample_mask",)
        )
    },
    weights={},
    overrides={"student_vocab": 5},
    permuted=("batch", "student_vocab", "teacher_vocab"),
    vocab=(
        "student_vocab",
        {"grad_reduction": "sum", "sizes": {"student_vocab": [(3, 2), (2, 0, 3)]}},
    ),
)
