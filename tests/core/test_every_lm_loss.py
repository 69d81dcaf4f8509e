"""What holds for every loss, of the language-model family."""

from typing import Any

import torch
from every_loss import *  # noqa: F403
from losses import Case

import termwise as tw
from termwise import lm
from termwise.lm import TargetedVarianceLoss, targeted_variance_loss


def tokens(rows: int) -> dict[str, torch.Tensor]:
    return {"tokens": torch.arange(rows * 4).reshape(rows, 4) % 4 - 1}


def marked(rows: int) -> dict[str, torch.Tensor]:
    return {"mask": torch.arange(rows * 4).reshape(rows, 4) % 3 != 1}


def aligned(rows: int) -> dict[str, lm.Alignment]:
    ids = torch.tensor([0, 0, 1, 2]).expand(rows, 4).clone()
    valid = torch.arange(rows * 3).reshape(rows, 3) % 5 != 1
    return {"alignment": lm.Alignment(ids, ids.clamp(max=1), valid, valid)}


FAMILY = tw.lm
VARIANCE = {"coefficient": 0.7, "target": 2.0}


def taught(rows: int) -> dict[str, Any]:
    """Two teachers, one of the student's tokenizer and one of another."""
    logits = torch.sin(torch.arange(rows * 12.0)).reshape(rows, 4, 3)
    other = lm.Teacher(logits.flip(2), **aligned(rows), projection=PROJECTION)
    return {**tokens(rows), "teachers": (lm.Teacher(logits), other)}


LOGITS = ("rows time columns", "rows time columns")
PROJECTION = lm.VocabProjection.from_pairs(
    {(0, 0): 1.0, (1, 1): 1.0, (2, 1): 0.5, (2, 2): 0.5}, student_vocab=3, teacher_vocab=3
)
PARTITION = lm.vocab_partition(PROJECTION, rule="strict")
CASES = {
    "next token": Case(
        lm.next_token_loss, lm.NextTokenLoss(), {}, ("rows time columns",), made=tokens
    ),
    "distillation": Case(
        lm.distillation_loss,
        lm.DistillationLoss(divergence="jensen_shannon", temperature=2.0),
        {"divergence": "jensen_shannon", "temperature": 2.0},
        LOGITS,
        made=marked,
    ),
    "projected kl": Case(
        lm.projected_kl_loss,
        lm.ProjectedKLLoss(PROJECTION, temperature=2.0),
        {"projection": PROJECTION, "temperature": 2.0},
        LOGITS,
        made=aligned,
    ),
    "linear projected kl": Case(
        lm.linear_projected_kl_loss,
        lm.LinearProjectedKLLoss(PROJECTION, temperature=2.0),
        {"projection": PROJECTION, "temperature": 2.0},
        ("rows time columns", "columns columns", "rows time columns"),
        made=aligned,
    ),
    "universal logit": Case(
        lm.universal_logit_loss, lm.UniversalLogitLoss(), {}, LOGITS, made=aligned
    ),
    "cross tokenizer": Case(
        lm.cross_tokenizer_loss,
        lm.CrossTokenizerLoss(scale="match"),
        {"scale": "match"},
        ("rows time columns",),
        made=taught,
    ),
    "partitioned": Case(
        lm.partitioned_loss,
        lm.PartitionedLoss(PARTITION, tail_top_k=2),
        {"partition": PARTITION, "tail_top_k": 2},
        LOGITS,
        made=aligned,
    ),
    "targeted variance": Case(targeted_variance_loss, TargetedVarianceLoss(**VARIANCE), VARIANCE),
    "targeted variance, masked": Case(
        targeted_variance_loss,
        TargetedVarianceLoss(**VARIANCE),
        VARIANCE,
        masks=("valid_rows",),
    ),
}
