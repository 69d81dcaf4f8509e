"""VCReg."""

from hypothesis import strategies as st

from losses import GROUPS, Declaration, Variant
from losses._second_moments import view_terms
from termwise.joint_embedding import VarianceCovarianceLoss, variance_covariance_loss


def formula(z, *, gamma, eps, var_weight, cov_weight, **_):
    terms = view_terms(z, gamma, eps)
    return {"loss": var_weight * terms["var"] + cov_weight * terms["cov"], **terms}


SOME = {"var_weight": 5.0, "gamma": 2.0, "eps": 0.01}
VARIANCE_COVARIANCE = Declaration(
    function=variance_covariance_loss,
    formula=formula,
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
