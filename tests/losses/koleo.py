"""KoLeo."""

import os

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from losses import GROUPS, Declaration, Variant
from losses._bench import Case, Loss, import_torchvision, normal
from termwise.joint_embedding import KoLeoLoss, koleo_loss


def formula(z, *, top_k, eps, group_size, **_):
    unit = z / z.norm(dim=1, keepdim=True).clamp(min=1e-12)
    n = len(z)
    group = torch.arange(n) // (group_size or n)
    cosines = (unit @ unit.T).masked_fill(group[:, None] != group, -torch.inf)
    cosines = cosines.masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf)
    neighbours = cosines.detach().topk(top_k, dim=1).indices
    distances = (unit[:, None] - unit[neighbours]).norm(dim=2)
    return {
        "loss": -(distances + eps).log().mean(),
        "nearest_distance": distances.detach()[:, 0].mean(),
        "min_distance": distances.detach().min(),
    }


SOME = {"top_k": 2, "eps": 0.01}


# What the benches measure.


def one_view(batch: int, dim: int) -> list[Tensor]:
    return [normal(batch, dim).requires_grad_()]


def plain_koleo(z: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    with torch.no_grad():
        nearest = (z @ z.mT).fill_diagonal_(-1).argmax(1)
    return -(F.pairwise_distance(z, z[nearest], eps=1e-8) + 1e-8).log().mean()


def lightly_koleo() -> Loss:
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
    import_torchvision()
    from lightly.loss import KoLeoLoss

    return KoLeoLoss()


KOLEO = Declaration(
    function=koleo_loss,
    formula=formula,
    bench={
        "": Case(
            ((64, 128), (256, 128), (4096, 512)),
            one_view,
            plain_koleo,
            rows=8192,
            size_of=lambda rows: (rows, 512),
            peer=("lightly", lightly_koleo),
        )
    },
    formula_at=({}, {"group_size": 3}),
    variants={"": Variant(module=KoLeoLoss(**SOME), options=SOME)},
    sizes={"batch": st.just(6), "dim": st.integers(2, 3)},
    overrides={"group_size": None, "top_k": st.integers(1, 2)},
    weights={},
    shards=GROUPS,
    second=("right",),
)
