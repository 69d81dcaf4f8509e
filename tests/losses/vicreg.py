"""VICReg."""

from hypothesis import strategies as st

from losses import GROUPS, Declaration, Variant
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
VICREG = Declaration(
    function=vicreg_loss,
    formula=formula,
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
