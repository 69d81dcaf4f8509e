"""VICReg."""

import torch
from hypothesis import strategies as st

from losses import GROUPS, Declaration, Variant
from termwise.joint_embedding import VICRegLoss, vicreg_loss


def formula(z1, z2, *, gamma, eps, variance_views, covariance_views, **options):
    n, dim = z1.shape
    hinges, energies, deviations, ranks = [], [], [], []
    for z in (z1, z2):
        centred = z - z.sum(0) / n
        covariance = centred.T @ centred / (n - 1)
        variance = torch.diagonal(covariance)
        hinges.append(torch.clamp(gamma - (variance + eps).sqrt(), min=0).sum() / dim)
        energies.append((covariance**2 * (1 - torch.eye(dim, dtype=z.dtype))).sum() / dim)
        deviations.append(variance.detach().clamp(min=0).sqrt().sum() / dim)
        ranks.append(participation_ratio(covariance.detach()))
    terms = {
        "sim": ((z1 - z2) ** 2).sum() / (n * dim),
        "var": sum(hinges) / {"sum": 1, "mean": 2}[variance_views],
        "cov": sum(energies) / {"sum": 1, "mean": 2}[covariance_views],
    }
    loss = sum(options[f"{name}_weight"] * value for name, value in terms.items())
    return {"loss": loss, **terms, "std": sum(deviations) / 2, "rank": sum(ranks) / 2}


def participation_ratio(covariance):
    """Return (sum of eigenvalues)^2 / sum of their squares, 0 for a covariance of 0."""
    squares = (covariance**2).sum()
    return covariance.trace() ** 2 / squares if squares != 0 else squares


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
    second=True,
)
