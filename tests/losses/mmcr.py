"""MMCR."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from losses import GROUPS, Declaration, Variant
from losses._bench import Case, Loss, four_views, lightly
from termwise.joint_embedding import MMCRLoss, mmcr_loss


def nuclear(matrices):
    """Sum singular values: the inner product with U V^T, of those that are not 0."""
    u, values, v = torch.linalg.svd(matrices.detach(), full_matrices=False)
    kept = values > 1e-6 * values[..., :1]
    return (matrices * (u * kept[..., None, :] @ v)).sum()


def formula(z, *, local_weight, **_):
    square = (z**2).sum(2, keepdim=True)
    unit = z / torch.where(square > 0, square, 1).sqrt()
    centroid = nuclear(unit.sum(0) / len(z))
    local = nuclear(unit.transpose(0, 1)) / z.shape[1]
    loss = local_weight * local - centroid
    return {"loss": loss, "centroid_nuclear": centroid, "local_nuclear": local}


SOME = {"local_weight": 0.3}


# What the benches measure.


def plain_mmcr(z: Tensor) -> Tensor:
    z = F.normalize(z, dim=2)
    local = torch.linalg.svdvals(z.transpose(0, 1)).sum() / z.shape[1]
    return 5e-3 * local - torch.linalg.svdvals(z.mean(0)).sum()


def lightly_mmcr() -> Loss:
    lightly()
    from lightly.loss import MMCRLoss

    def loss(z: Tensor) -> Tensor:
        unit = F.normalize(z, dim=2).transpose(0, 1)
        return MMCRLoss()(*unit.tensor_split(2, 1))

    return loss


MMCR = Declaration(
    function=mmcr_loss,
    formula=formula,
    bench={
        "": Case(
            ((64, 128), (256, 128), (512, 256)),
            four_views,
            plain_mmcr,
            lambda z: mmcr_loss(z, local_weight=5e-3).loss,
            rows=1024,
            size_of=lambda rows: (rows, 512),
            peer=("lightly", lightly_mmcr),
        )
    },
    variants={"": Variant(module=MMCRLoss(**SOME), options=SOME, shapes=("layers rows columns",))},
    # In one dimension every direction is a kink of the norm.
    sizes={"views": st.integers(2, 3), "dim": st.integers(2, 4)},
    weights={"centroid_nuclear": -1.0, "local_nuclear": "local_weight"},
    permuted=("views", "batch", "dim"),
    scaled={("z",): {"loss": 0}},
    shards=GROUPS,
    second=("right",),
)
