"""VICReg."""

import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from losses import GROUPS, Declaration, Variant
from losses._bench import Case, lightly, two_embeddings, view_products
from losses._second_moments import summed
from termwise.joint_embedding import VICRegLoss, vicreg_loss


def formula(z1, z2, *, gamma, eps, variance_views, covariance_views, **options):
    of_views = summed((z1, z2), gamma, eps)
    terms = {
        "sim": ((z1 - z2) ** 2).sum() / z1.numel(),
        "var": of_views["var"] / {"sum": 1, "mean": 2}[variance_views],
        "cov": of_views["cov"] / {"sum": 1, "mean": 2}[covariance_views],
    }
    loss = sum(options[f"{name}_weight"] * value for name, value in terms.items())
    return {"loss": loss, **terms, "std": of_views["std"] / 2, "rank": of_views["rank"] / 2}


PAIR = ("rows columns", "rows columns")
SOME = {"sim_weight": 5.0, "gamma": 2.0, "eps": 0.01}
GRAM = {"covariance_path": "gram", "variance_views": "mean"}


# What the benches measure.


def plain_vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    batch, dim = z1.shape
    loss = 25 * F.mse_loss(z1, z2)
    for z in (z1, z2):
        z = z - z.mean(0)
        variances = z.square().sum(0) / (batch - 1)
        products = z @ z.mT if dim > batch else z.mT @ z  # alike in the sum of their squares
        off_diagonal = products.square().sum() / (batch - 1) ** 2 - variances.square().sum()
        loss = loss + 25 * F.relu(1 - (variances + 1e-4).sqrt()).mean() + off_diagonal / dim
    return loss


VICREG = Declaration(
    function=vicreg_loss,
    formula=formula,
    bench={
        "": Case(
            ((32, 64), (256, 128), (2048, 2048)),
            two_embeddings,
            plain_vicreg,
            rows=4096,
            size_of=lambda rows: (rows, 2048),
            peer=("lightly", lightly),
            products=view_products,
        ),
        "wide": Case(
            ((32, 256), (64, 1024), (256, 8192)),
            two_embeddings,
            plain_vicreg,
            peer=("lightly", lightly),
            products=view_products,
        ),
    },
    formula_at=({}, {"covariance_path": "gram"}, {"covariance_path": "covariance"}),
    variants={
        "": Variant(module=VICRegLoss(**SOME), options=SOME, shapes=PAIR),
        "gram": Variant(module=VICRegLoss(**GRAM), options=GRAM, shapes=PAIR),
    },
    sizes={"batch": st.integers(2, 4)},
    weights={"sim": "sim_weight", "var": "var_weight", "cov": "cov_weight"},
    permuted=("batch", "dim"),
    symmetric=(("z1", "z2"),),
    shifted={"batch": ("z1", "z2")},
    scaled={("z1", "z2"): {"sim": 2, "cov": 4, "std": 1, "rank": 0}},
    shards=GROUPS,
    # The path that exchanges rows and columns; test_losses_over_ranks.py tries every path.
    more={"assert_sharding": {"covariance_path": "gram"}},
    second=("right",),
)
