"""Embeddings kept at a target variance."""

from losses import Declaration, Variant
from termwise.lm import TargetedVarianceLoss, targeted_variance_loss


def formula(weight, *, coefficient, target, valid_rows, **_):
    rows = weight if valid_rows is None else weight[valid_rows]
    mean = rows.sum(1, keepdim=True) / rows.shape[1]
    variance = (((rows - mean) ** 2).sum(1) / max(rows.shape[1], 1)).sum() / len(rows)
    error = (variance - target) ** 2
    return {"loss": coefficient * error, "squared_error": error, "variance": variance}


NUMBERS = {"coefficient": 0.7, "target": 2.0}
MODULE = TargetedVarianceLoss(**NUMBERS)
TARGETED_VARIANCE = Declaration(
    function=targeted_variance_loss,
    formula=formula,
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
    second=True,
)
