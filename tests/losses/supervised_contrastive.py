"""Supervised contrastive loss."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from losses import GROUPS, Declaration, Variant
from losses._bench import normal, of_pairs
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


# What the benches measure.


def of_ten_classes(batch: int, dim: int) -> list[Tensor]:
    labels = torch.arange(batch) % 10
    return [normal(batch, dim).requires_grad_(), labels]


def plain_supervised(z: Tensor, labels: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.mT / 0.5).masked_fill(itself, -torch.inf)
    positive = (labels[:, None] == labels) & ~itself
    total = (logits.log_softmax(1).masked_fill(~positive, 0)).sum(1)
    return -(total / positive.sum(1)).mean()


SUPERVISED_CONTRASTIVE = Declaration(
    function=supervised_contrastive_loss,
    formula=formula,
    bench={
        "": of_pairs(
            of_ten_classes,
            plain_supervised,
            lambda *x: supervised_contrastive_loss(*x, temperature=0.5).loss,
            rows=8192,
        )
    },
    formula_at=({"positives": "outside"}, {"positives": "inside"}),
    paths=PATHS,
    second=("right", "refused"),
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
