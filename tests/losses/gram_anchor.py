"""Gram anchoring."""

import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from losses import Declaration, Variant
from losses._bench import Case, normal
from termwise.joint_embedding import GramAnchorLoss, gram_anchor_loss


def formula(student, teacher, *, normalize, negatives, level, **_):
    grams = []
    for x in (student, teacher.detach()):
        if normalize:
            x = x / x.norm(dim=2, keepdim=True).clamp(min=1e-12)
        if level == "batch":
            x = x.flatten(0, 1)[None]
        grams.append(x @ x.mT)
    own, wanted = grams
    if negatives == "both":
        own = own.relu()
    elif negatives == "teacher":
        own = own.where((own > 0) | (wanted > 0), 0)
    if negatives != "keep":
        wanted = wanted.clamp(min=0)
    norms = own.detach().norm() * wanted.norm()
    return {
        "loss": ((own - wanted) ** 2).mean(),
        "agreement": (own.detach() * wanted).sum() / norms.clamp(min=1e-300),
    }


PAIR = ("rows time columns", "rows time latents")
BATCH = {"negatives": "teacher", "level": "batch"}
KEEP = {"negatives": "keep", "normalize": False}


# What the benches measure.


def two_models(images: int, patches: int, dim: int) -> list[Tensor]:
    return [normal(images, patches, dim).requires_grad_(), normal(images, patches, dim)]


def plain_gram(student: Tensor, teacher: Tensor) -> Tensor:
    own, wanted = (F.normalize(x, dim=2) for x in (student, teacher))
    return F.mse_loss((own @ own.mT).relu(), (wanted @ wanted.mT).relu())


GRAM_ANCHOR = Declaration(
    function=gram_anchor_loss,
    formula=formula,
    bench={
        "": Case(
            ((1, 64, 128), (4, 196, 384), (8, 784, 384)),
            two_models,
            plain_gram,
            rows=128,
            size_of=lambda rows: (rows, 512, 512),
        )
    },
    formula_at=({}, {"negatives": "keep"}, {"negatives": "teacher"}),
    paths=({}, {"termwise.joint_embedding._gram_anchor._FEW_PAIRS": 0}),
    second=("right", "refused"),
    variants={
        "": Variant(module=GramAnchorLoss(), shapes=PAIR),
        "batch": Variant(module=GramAnchorLoss(**BATCH), options=BATCH, shapes=PAIR),
    },
    sizes={"images": st.integers(1, 3), "patches": st.integers(1, 4), "dim": st.integers(1, 3)},
    weights={},
    permuted=("images", "patches"),
    optimum=lambda call: {"teacher": call["student"].detach()},
    shards={"batch_group": ("images", {})},
    by={"assert_gradients": ("student",)},
)
