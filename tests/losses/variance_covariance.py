"""VCReg."""

import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from losses import GROUPS, Declaration, Variant
from losses._bench import Case, two_embeddings, view_products
from losses._second_moments import view_terms
from termwise.joint_embedding import VarianceCovarianceLoss, variance_covariance_loss


def formula(z, *, gamma, eps, var_weight, cov_weight, **_):
    terms = view_terms(z, gamma, eps)
    return {"loss": var_weight * terms["var"] + cov_weight * terms["cov"], **terms}


SOME = {"var_weight": 5.0, "gamma": 2.0, "eps": 0.01}


# What the benches measure.


def plain_variance_covariance(z: Tensor) -> Tensor:
    batch, dim = z.shape
    z = z - z.mean(0)
    variances = z.square().sum(0) / (batch - 1)
    products = z @ z.mT if dim > batch else z.mT @ z
    off_diagonal = products.square().sum() / (batch - 1) ** 2 - variances.square().sum()
    return 25 * F.relu(1 - (variances + 1e-4).sqrt()).mean() + off_diagonal / dim


VARIANCE_COVARIANCE = Declaration(
    function=variance_covariance_loss,
    formula=formula,
    bench={
        "": Case(
            ((64, 128), (256, 128), (2048, 2048)),
            lambda *size: two_embeddings(*size)[:1],
            plain_variance_covariance,
            rows=4096,
            size_of=lambda rows: (rows, 2048),
            products=view_products,
        )
    },
    formula_at=({}, {"covariance_path": "gram"}),
    variants={"": Variant(module=VarianceCovarianceLoss(**SOME), options=SOME)},
    sizes={"batch": st.integers(2, 4)},
    weights={"var": "var_weight", "cov": "cov_weight"},
    permuted=("batch", "dim"),
    shifted={"batch": ("z",)},
    scaled={("z",): {"cov": 4, "std": 1, "rank": 0}},
    shards=GROUPS,
    second=("right",),
)
