"""Barlow Twins."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from losses import GROUPS, Declaration, Variant
from losses._bench import Case, Loss, lightly, two_embeddings
from termwise.joint_embedding import BarlowTwinsLoss, barlow_twins_loss


def formula(z1, z2, *, off_weight, eps, correction, eps_added_to, loss_scale, **_):
    n, dim = z1.shape
    scaled, deviations = [], []
    for z in (z1, z2):
        centred = z - z.sum(0) / n
        variance = (centred**2).sum(0) / (n - correction)
        # The gradient of a constant column's deviation is 0, as torch.std has it.
        deviation = torch.where(variance > 0, variance, 1).sqrt() * (variance > 0)
        root = (variance + eps).sqrt() if eps_added_to == "variance" else deviation + eps
        scaled.append(centred / root)
        deviations.append(deviation.detach().sum() / dim)
    correlation = scaled[0].T @ scaled[1] / n
    diagonal = correlation.diagonal()
    on = ((diagonal - 1) ** 2).sum()
    off = (correlation**2 * (1 - torch.eye(dim, dtype=z1.dtype))).sum()
    held = correlation.detach()
    squares = (held**2).sum()
    return {
        "loss": loss_scale * (on + off_weight * off),
        "on_diagonal": on,
        "off_diagonal": off,
        "alignment": held.trace() / dim,
        "std": sum(deviations) / 2,
        "rank": held.trace() ** 2 / squares if squares != 0 else squares,
    }


def never(*_):
    return False


def always(*_):
    return True


PAIR = ("rows columns", "rows columns")
SOME = {"off_weight": 0.3, "correction": 1, "eps_added_to": "deviation", "loss_scale": 0.5}


# What the benches measure.


def plain_barlow(z1: Tensor, z2: Tensor) -> Tensor:
    batch, dim = z1.shape
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))
    diagonal = (a * b).sum(0) / batch
    few_rows = 2 * batch <= dim
    square = (a @ a.mT * (b @ b.mT)).sum() if few_rows else (a.mT @ b).square().sum()
    off_diagonal = square / batch**2 - diagonal.square().sum()
    return (1 - diagonal).square().sum() + 5e-3 * off_diagonal


def lightly_barlow() -> Loss:
    lightly()
    from lightly.loss import BarlowTwinsLoss

    return BarlowTwinsLoss()


BARLOW_TWINS = Declaration(
    function=barlow_twins_loss,
    formula=formula,
    bench={
        "": Case(
            ((64, 128), (256, 128), (256, 8192)),
            two_embeddings,
            plain_barlow,
            rows=4096,
            size_of=lambda rows: (rows, 2048),
            peer=("lightly", lightly_barlow),
        )
    },
    formula_at=({}, {"correction": 1, "eps_added_to": "deviation", "off_weight": 0.5}),
    paths=(
        {},
        {"termwise._cross_moments.is_small": never, "termwise._cross_moments.takes_gram": always},
        {"termwise._cross_moments.is_small": never, "termwise._cross_moments.takes_gram": never},
    ),
    variants={"": Variant(module=BarlowTwinsLoss(**SOME), options=SOME, shapes=PAIR)},
    sizes={"batch": st.integers(2, 4)},
    weights={
        "on_diagonal": "loss_scale",
        "off_diagonal": lambda call: call["loss_scale"] * call["off_weight"],
    },
    permuted=("batch", "dim"),
    symmetric=(("z1", "z2"),),
    shifted={"batch": ("z1", "z2")},
    shards=GROUPS,
    second=("right",),
)
