"""Embeddings kept at a target variance."""

import math

from torch import Tensor

from losses import Declaration, Variant
from losses._bench import Case, normal
from termwise.lm import TargetedVarianceLoss, targeted_variance_loss


def formula(weight, *, coefficient, target, valid_rows, **_):
    rows = weight if valid_rows is None else weight[valid_rows]
    mean = rows.sum(1, keepdim=True) / rows.shape[1]
    variance = (((rows - mean) ** 2).sum(1) / max(rows.shape[1], 1)).sum() / len(rows)
    error = (variance - target) ** 2
    return {"loss": coefficient * error, "squared_error": error, "variance": variance}


NUMBERS = {"coefficient": 0.7, "target": 2.0}
MODULE = TargetedVarianceLoss(**NUMBERS)


# What the benches measure.


def embeddings(rows: int, dim: int) -> list[Tensor]:
    return [normal(rows, dim, scale=0.02).requires_grad_()]


def plain_variance(weight: Tensor) -> Tensor:
    return 0.1 * (weight.float().var(1, correction=0).mean() - 1).square()


def our_variance(weight: Tensor) -> Tensor:
    return targeted_variance_loss(weight).loss


TARGETED_VARIANCE = Declaration(
    function=targeted_variance_loss,
    formula=formula,
    bench={
        "": Case(
            ((256, 64), (4096, 512), (50_000, 1024)),
            embeddings,
            plain_variance,
            our_variance,
            rows=8192,
            size_of=lambda rows: (rows, 4096),
        )
    },
    variants={
        "": Variant(module=MODULE, options=NUMBERS),
        "masked": Variant(module=MODULE, options=NUMBERS, masks=("valid_rows",)),
    },
    weights={"squared_error": "coefficient"},
    also_in_graph=("variance",),
    permuted=("vocab", "dim"),
    shifted={"dim": ("weight",)},
    scaled={("weight",): {"variance": 2}},
    optimum=lambda call: {"weight": 0 * call["weight"], "target": 0.0, "valid_rows": None},
    shards={"vocab_group": ("vocab", {"grad_reduction": "sum"})},
    second=("right",),
    masked={"valid_rows": {"nothing": math.nan}},
)
