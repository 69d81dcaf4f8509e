"""NT-Xent."""

import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from losses import GROUPS, Declaration, Variant
from losses._bench import between_views, of_pairs, two_embeddings
from losses._contrast import ELEMENTS, PATHS, log_sum, nearest, two_views
from termwise.joint_embedding import NTXentLoss, nt_xent_loss


def formula(z1, z2, *, temperature, **_):
    cosines, itself, pair = two_views(z1, z2)
    L = cosines / temperature
    losses = log_sum(L, ~itself) - L[pair]
    return {"loss": losses.mean(), "accuracy": nearest(L, pair, itself).double().mean()}


SHARP = {"temperature": 0.2}


# What the benches measure.


def plain_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    logits, _, other = between_views(z1, z2, 0.5)
    return F.cross_entropy(logits, other)


NT_XENT = Declaration(
    function=nt_xent_loss,
    formula=formula,
    bench={"": of_pairs(two_embeddings, plain_nt_xent)},
    paths=PATHS,
    second=("right", "refused"),
    variants={
        "": Variant(
            module=NTXentLoss(**SHARP), options=SHARP, shapes=("rows columns", "rows columns")
        )
    },
    # Among many samples some cosines are equal but for rounding, and accuracy compares them.
    sizes={"batch": st.integers(1, 6)},
    elements={"z1": ELEMENTS, "z2": ELEMENTS},
    weights={},
    permuted=("batch", "dim"),
    symmetric=(("z1", "z2"),),
    scaled={("z1",): {"loss": 0}, ("z2",): {"loss": 0}},
    shards=GROUPS,
)
