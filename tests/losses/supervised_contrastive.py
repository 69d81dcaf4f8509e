"""Supervised contrastive loss."""

import torch
from hypothesis import strategies as st

from losses import GROUPS, Declaration, Variant
from losses._contrast import ELEMENTS, PATHS, log_sum, nearest, unit
from termwise.joint_embedding import SupervisedContrastiveLoss, supervised_contrastive_loss


def formula(z, labels, *, temperature, base_temperature, positives, **_):
    L = unit(z) @ unit(z).T / temperature
    itself = torch.eye(len(z), dtype=torch.bool)
    positive = (labels[:, None] == labels) & ~itself
    number = positive.sum(1)
    total = log_sum(L, ~itself)
    if positives == "outside":
        losses = total - (L * positive).sum(1) / number.clamp_min(1)
    else:
        losses = total - log_sum(L, positive)
    counted, right = number > 0, nearest(L, positive, itself)
    loss = losses[counted].sum() / counted.sum().clamp_min(1)
    factor = 1.0 if base_temperature is None else temperature / base_temperature
    return {
        "loss": factor * loss,
        "accuracy": (right & counted).sum().double() / counted.sum().clamp_min(1),
        "n_without_positive": (~counted).sum(),
    }


def classes(rows: int) -> dict[str, torch.Tensor]:
    """Make two classes, and a sample that is alone in its own."""
    return {"labels": (torch.arange(rows) % 2).masked_fill(torch.arange(rows) == 2, 7)}


SHARP = {"temperature": 0.2, "base_temperature": 0.07}
SUPERVISED_CONTRASTIVE = Declaration(
    function=supervised_contrastive_loss,
    formula=formula,
    formula_at=({"positives": "outside"}, {"positives": "inside"}),
    paths=PATHS,
    variants={
        "": Variant(module=SupervisedContrastiveLoss(**SHARP), options=SHARP, made=classes),
    },
    sizes={"batch": st.integers(2, 5), "dim": st.integers(2, 3)},
    elements={"z": ELEMENTS, "labels": st.integers(0, 1)},
    weights={},
    # A sample that is alone in its class is not counted.
    more={"assert_finite": {"labels": lambda sizes: torch.zeros(sizes["batch"]).long()}},
    permuted=("batch", "dim"),
    scaled={("z",): {"loss": 0}},
    shards=GROUPS,
)
