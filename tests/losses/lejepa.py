"""LeJEPA."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from losses import GROUPS, Declaration, Variant
from losses._bench import Case, plain_sigreg, projections, views_along_slices
from losses._slices import DRAWN, SLICES, SMALL_AND_LARGE, apart, distances
from termwise.joint_embedding import LeJEPALoss, lejepa_loss


def formula(z, *, num_global, sigreg_weight, convex, centre, slices, t_max, knots, **_):
    count = num_global if centre == "global" and num_global is not None else len(z)
    invariance = apart(z, count)
    each = [z.shape[1] * distances(view, slices, t_max, knots) for view in z]
    sigreg = torch.stack(each).mean()
    rest = 1 - sigreg_weight if convex else 1.0
    loss = rest * invariance + sigreg_weight * sigreg
    return {"loss": loss, "invariance": invariance, "sigreg": sigreg}


GLOBAL = {"num_global": 1, "centre": "global", "convex": False, "sigreg_weight": 0.3, "knots": 5}


# What the benches measure.


def plain_lejepa(z: Tensor, a: Tensor) -> Tensor:
    return 0.95 * (z - z.mean(0)).square().mean() + 0.05 * plain_sigreg(z, a)


LEJEPA = Declaration(
    function=lejepa_loss,
    formula=formula,
    bench={
        "": Case(
            ((64, 128, 64), (256, 128, 256), (512, 512, 1024)),
            views_along_slices,
            plain_lejepa,
            lambda z, a: lejepa_loss(z, slices=a).loss,
            rows=1024,
            size_of=lambda rows: (rows, 512, 1024),
            products=projections,
        )
    },
    formula_at=({}, {"centre": "global", "convex": False}, {"num_global": None}),
    paths=SMALL_AND_LARGE,
    variants={
        "": Variant(
            module=LeJEPALoss(**GLOBAL),
            options=GLOBAL,
            shapes=("layers rows columns",),
            named=SLICES,
        )
    },
    sizes={"views": st.integers(2, 3), "batch": st.integers(1, 3), "slices": st.integers(1, 3)},
    overrides={**DRAWN, "num_global": lambda sizes: sizes["views"] - 1},
    weights={
        "invariance": lambda call: 1 - call["sigreg_weight"] if call["convex"] else 1.0,
        "sigreg": "sigreg_weight",
    },
    permuted=("batch", "dim", "slices"),
    shards=GROUPS,
    by={"assert_gradients": ("z",)},
    second=("right",),
)
