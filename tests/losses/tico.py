"""TiCo, and its running second moments."""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses import GROUPS, Declaration, Variant
from losses._bench import Case, normal
from termwise.joint_embedding import TiCoLoss, tico_loss, updated_covariance


def rows_of_length_1(z):
    square = (z**2).sum(1, keepdim=True)
    return z / torch.where(square > 0, square, 1e-24).sqrt()


def formula(z, target, covariance, *, contrast_weight, stop_gradient, **_):
    z, t = rows_of_length_1(z), rows_of_length_1(target.detach() if stop_gradient else target)
    invariance = ((z - t) ** 2).sum(1).mean() / 2
    contrast = torch.stack([row @ covariance.detach() @ row for row in z]).mean()
    loss = invariance + contrast_weight * contrast
    return {"loss": loss, "invariance": invariance, "contrast": contrast}


def updated(covariance, z, *, momentum, **_):
    z = rows_of_length_1(z.detach())
    mean = sum(torch.outer(row, row) for row in z) / len(z) if len(z) else covariance
    return (momentum * covariance + (1 - momentum) * mean).detach()


SOME = {"contrast_weight": 0.5, "stop_gradient": False}


# What the benches measure.


def two_views_and_covariance(batch: int, dim: int) -> list[Tensor]:
    z = normal(batch, dim)
    return [normal(batch, dim).requires_grad_(), normal(batch, dim), z.T @ z / batch / dim]


def covariance_products(z: Tensor, _: Tensor, covariance: Tensor) -> None:
    z.detach() @ covariance
    z.detach() @ covariance.T


def plain_tico(z: Tensor, target: Tensor, covariance: Tensor) -> Tensor:
    z, target = F.normalize(z, dim=1), F.normalize(target, dim=1)
    return 1 - (z * target).sum(1).mean() + 8 * ((z @ covariance) * z).sum(1).mean()


TICO = Declaration(
    function=tico_loss,
    formula=formula,
    bench={
        "": Case(
            ((64, 128), (256, 128), (4096, 256)),
            two_views_and_covariance,
            plain_tico,
            rows=2**15,
            size_of=lambda rows: (rows, 1024),
            products=covariance_products,
        )
    },
    formula_at=({}, {"stop_gradient": False}),
    variants={
        "": Variant(
            module=TiCoLoss(**SOME),
            options=SOME,
            shapes=("rows columns", "rows columns", "columns columns"),
        )
    },
    overrides={"stop_gradient": False},
    weights={"invariance": 1.0, "contrast": "contrast_weight"},
    permuted=("batch", "dim"),
    scaled={
        ("z",): {"invariance": 0, "contrast": 0},
        ("target",): {"invariance": 0},
        ("covariance",): {"contrast": 1},
    },
    by={"assert_gradients": ("z", "target")},  # C has none
    shards=GROUPS,
    second=("right",),
)
COVARIANCE = Declaration(
    function=updated_covariance,
    formula=updated,
    overrides={"momentum": 0.75},
    permuted=("batch", "dim"),
    scaled={("z",): {"result": 0}},
    shards=GROUPS,
    not_held=dict.fromkeys(
        ("assert_gradients", "assert_double_backward"),
        "no part of what .* returns has a gradient",
    ),
)
