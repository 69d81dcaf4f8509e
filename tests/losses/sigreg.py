"""SIGReg."""

import torch
from hypothesis import strategies as st

from losses import GROUPS, Declaration, Variant
from losses._bench import Case, along_slices, plain_sigreg, projections
from losses._slices import DRAWN, SLICES, SMALL_AND_LARGE, distances
from termwise.joint_embedding import SIGRegLoss, sigreg_loss


def formula(z, *, slices, t_max, knots, per_sample, **_):
    views = z if z.ndim == 3 else z[None]
    factor = 1 if per_sample else views.shape[1]
    found = torch.stack([factor * distances(one, slices, t_max, knots) for one in views])
    flat = views.detach()
    deviations = ((flat - flat.mean(1, keepdim=True)) ** 2).mean(1).sqrt()
    return {
        "loss": found.mean(),
        "mean_square": (flat**2).mean(),
        "std": deviations.mean(),
        "worst_slice": found.detach().max(),
    }


SOME = {"t_max": 2.0, "knots": 5}
SIGREG = Declaration(
    function=sigreg_loss,
    formula=formula,
    bench={
        "": Case(
            ((64, 128, 64), (256, 128, 256), (1024, 512, 1024)),
            along_slices,
            plain_sigreg,
            lambda z, a: sigreg_loss(z, slices=a).loss,
            rows=2048,
            size_of=lambda rows: (rows, 512, 1024),
            products=projections,
        )
    },
    paths=SMALL_AND_LARGE,
    variants={"": Variant(module=SIGRegLoss(**SOME), options=SOME, named=SLICES)},
    sizes={"batch": st.integers(1, 4), "slices": st.integers(1, 3)},
    overrides=DRAWN,
    weights={},
    permuted=("batch", "dim", "slices"),
    shards=GROUPS,
    by={"assert_gradients": ("z",)},
    second=("right",),
)
