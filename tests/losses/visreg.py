"""VISReg."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from losses import GROUPS, Declaration, Variant
from losses._bench import Case, projections, views_along_slices
from losses._slices import DRAWN, SLICES, SMALL_AND_LARGE, apart, quantile_distance
from termwise.joint_embedding import VISRegLoss, visreg_loss


def formula(z, *, num_global, weight, slices, eps, **options):
    views, n, dim = z.shape
    means = [view.sum(0) / n for view in z]
    # At 0 its derivative is 0, where that of a root is infinite.
    deviations = [view.std(0, correction=0) for view in z]
    terms = {
        "invariance": apart(z, views if num_global is None else num_global),
        "center": sum((m**2).sum() for m in means) / (views * dim),
        "scale": sum(((1 - std) ** 2).sum() for std in deviations) / (views * dim),
        "shape": sum(quantile_distance(view, slices, eps) for view in z) / views,
    }
    loss = (1 - weight) * terms["invariance"]
    for name in ("center", "scale", "shape"):
        loss = loss + weight * options[f"{name}_weight"] * terms[name]
    return {"loss": loss, **terms}


def share(name):
    return lambda call: call["weight"] * call[name]


SOME = {"num_global": 1, "weight": 0.6, "shape_weight": 2.0, "eps": 0.01}


# What the benches measure.


def plain_visreg(z: Tensor, a: Tensor) -> Tensor:
    n, mean = z.shape[1], z.mean(1)
    centred = z - mean[:, None]
    std = centred.square().mean(1).sqrt()
    projected = (centred / (std.detach() + 1e-4)[:, None]) @ a
    places = torch.arange(1, n + 1, device=z.device, dtype=torch.float64) / (n + 1)
    quantiles = torch.special.ndtri(places).to(z.dtype)
    shape = (projected.mT.sort(2).values - quantiles).square().mean()
    spread = mean.square().mean() + (1 - std).square().mean() + shape
    return 0.1 * (z - z.mean(0)).square().mean() + 0.9 * spread


VISREG = Declaration(
    function=visreg_loss,
    formula=formula,
    bench={
        "": Case(
            ((64, 128, 64), (256, 128, 256), (512, 512, 4096)),
            views_along_slices,
            plain_visreg,
            lambda z, a: visreg_loss(z, slices=a).loss,
            rows=2048,
            size_of=lambda rows: (rows, 512, 4096),
            products=projections,
        )
    },
    formula_at=({}, {"num_global": None}),
    paths=SMALL_AND_LARGE,
    variants={
        "": Variant(
            module=VISRegLoss(**SOME),
            options=SOME,
            shapes=("layers rows columns",),
            named=SLICES,
        )
    },
    sizes={"views": st.integers(2, 3), "batch": st.integers(2, 4), "slices": st.integers(1, 3)},
    overrides={
        "slices": DRAWN["slices"],
        "generator": None,
        "num_global": lambda sizes: sizes["views"] - 1,
        "eps": 0.01,
    },
    weights={
        "invariance": lambda call: 1 - call["weight"],
        "center": share("center_weight"),
        "scale": share("scale_weight"),
        "shape": share("shape_weight"),
    },
    permuted=("batch", "dim", "slices"),
    shards=GROUPS,
    by={"assert_gradients": ("z",)},
    # The standard deviation that rows are divided by has no gradient, though it depends on z.
    not_held={
        "assert_gradients": "visreg_loss: the gradient of loss with respect to z is",
        "assert_double_backward": "second derivative of loss with respect to z",
    },
)
