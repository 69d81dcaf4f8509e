"""VICReg of many views."""

import itertools

import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from losses import GROUPS, Declaration, Variant
from losses._bench import Case, four_views
from losses._second_moments import summed
from termwise.joint_embedding import MultiViewVICRegLoss, multi_view_vicreg_loss


def formula(z, *, num_global, gamma, eps, **options):
    count = len(z) if num_global is None else num_global
    pairs = [(g, v) for g, v in itertools.product(range(count), range(len(z))) if g != v]
    of_views = summed(z, gamma, eps)
    terms = {
        "invariance": sum(((z[g] - z[v]) ** 2).sum() for g, v in pairs)
        / (len(pairs) * z[0].numel()),
        "var": of_views["var"] / len(z),
        "cov": of_views["cov"] / len(z),
    }
    loss = sum(options[f"{name}_weight"] * value for name, value in terms.items())
    return {"loss": loss, **terms, **{name: of_views[name] / len(z) for name in ("std", "rank")}}


SOME = {"num_global": 1, "gamma": 2.0, "eps": 0.01}


# What the benches measure.


def plain_multi_view(z: Tensor) -> Tensor:
    views, batch, dim = z.shape
    pairs = 2 * views / (views - 1) * (z - z.mean(0)).square().mean()
    z = z - z.mean(1, keepdim=True)
    variances = z.square().sum(1) / (batch - 1)
    products = z @ z.mT if dim > batch else z.mT @ z
    off_diagonal = products.square().sum() / (batch - 1) ** 2 - variances.square().sum()
    hinge = F.relu(1 - (variances + 1e-4).sqrt()).mean()
    return 25 * pairs + 25 * hinge + off_diagonal / (dim * views)


MULTI_VIEW_VICREG = Declaration(
    function=multi_view_vicreg_loss,
    formula=formula,
    bench={
        "": Case(
            ((64, 128), (256, 128), (1024, 1024)),
            four_views,
            plain_multi_view,
            rows=4096,
            size_of=lambda rows: (rows, 2048),
        )
    },
    formula_at=({}, {"num_global": 1, "covariance_path": "gram"}),
    variants={
        "": Variant(
            module=MultiViewVICRegLoss(**SOME), options=SOME, shapes=("layers rows columns",)
        ),
    },
    sizes={"views": st.integers(2, 4), "batch": st.integers(2, 4)},
    overrides={"num_global": st.sampled_from([None, 1, 2])},
    weights={"invariance": "invariance_weight", "var": "var_weight", "cov": "cov_weight"},
    permuted=("batch", "dim"),
    scaled={("z",): {"invariance": 2, "cov": 4, "std": 1, "rank": 0}},
    shards=GROUPS,
    second=("right",),
)
