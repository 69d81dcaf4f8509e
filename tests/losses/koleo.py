"""KoLeo."""

import torch
from hypothesis import strategies as st

from losses import GROUPS, Declaration, Variant
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
KOLEO = Declaration(
    function=koleo_loss,
    formula=formula,
    formula_at=({}, {"group_size": 3}),
    variants={"": Variant(module=KoLeoLoss(**SOME), options=SOME)},
    sizes={"batch": st.just(6), "dim": st.integers(2, 3)},
    overrides={"group_size": None, "top_k": st.integers(1, 2)},
    weights={},
    shards=GROUPS,
    second=("right",),
)
