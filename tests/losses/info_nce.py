"""InfoNCE."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from losses import Declaration, Variant
from losses._bench import of_pairs, two_embeddings
from losses._contrast import ELEMENTS, PATHS, log_sum, nearest, unit
from termwise.joint_embedding import InfoNCELoss, info_nce_loss


def formula(queries, keys, *, scale, bias, positives, negatives, symmetric, normalize, **_):
    a, b, n = queries, keys, len(queries)
    positives = torch.arange(n) if positives is None else positives
    if normalize:
        a, b = unit(a), unit(b)
    L = scale * a @ b.T + bias
    positive = torch.zeros(L.shape, dtype=torch.bool).scatter(1, positives[:, None], True)
    if negatives is not None:
        queue = unit(negatives.detach()) if normalize else negatives.detach()
        L = torch.cat((L[positive][:, None], scale * a @ queue.T + bias), 1)
        positive = torch.zeros_like(L, dtype=torch.bool)
        positive[:, 0] = True
    everything = torch.ones_like(positive)
    forward = (log_sum(L, everything) - L[positive]).sum() / n
    backward = (log_sum(L.T, everything.T) - L[positive]).sum() / n if symmetric else forward
    cosines = (unit(queries) * unit(keys)[positives]).sum(1)
    return {
        "loss": (forward + backward) / 2,
        "forward": forward.detach(),
        "backward": backward.detach(),
        "accuracy": nearest(L, positive, ~everything).double().mean(),
        "alignment": cosines.mean().detach(),
    }


def some_keys(sizes):
    """Draw which of the candidates is that of each query."""
    drawn = st.lists(st.integers(0, sizes["candidates"] - 1), min_size=3, max_size=3)
    return drawn.map(lambda found: torch.tensor(found[: sizes["batch"]]))


def queue(sizes):
    return torch.sin(torch.arange(4.0 * sizes["dim"])).double().reshape(4, -1) + 0.1


SCALE = {"scale": ""}
HARD = {"positives": some_keys, "symmetric": False}


# What the benches measure.


def views_and_scale(batch: int, dim: int) -> list[Tensor]:
    return [*two_embeddings(batch, dim), torch.full((), 14.3).requires_grad_()]


def plain_clip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = scale * F.normalize(a, dim=1) @ F.normalize(b, dim=1).mT
    labels = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.mT, labels)) / 2


def our_clip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return info_nce_loss(a, b, scale=scale, symmetric=True).loss


def pair_products(a: Tensor, b: Tensor, *_: Tensor) -> None:
    """Of the value and of both gradients."""
    logits = a.detach() @ b.detach().mT
    logits @ b.detach()
    logits.mT @ a.detach()


INFO_NCE = Declaration(
    function=info_nce_loss,
    formula=formula,
    bench={"": of_pairs(views_and_scale, plain_clip, our_clip, products=pair_products, rows=8192)},
    formula_at=({"symmetric": True}, HARD, {"negatives": queue, "symmetric": False}),
    paths=PATHS,
    second=("right", "refused"),
    variants={
        "": Variant(
            module=InfoNCELoss(symmetric=True),
            options={"symmetric": True},
            shapes=("rows columns", "rows columns"),
            named=SCALE,
        ),
        "queue": Variant(
            module=InfoNCELoss(normalize=False),
            options={"normalize": False},
            shapes=("rows columns", "rows columns"),
            named={**SCALE, "negatives": "latents columns"},
        ),
    },
    # Each query has a key, and symmetric each key a query.
    sizes={"batch": 3, "candidates": 3},
    elements={"queries": ELEMENTS, "keys": ELEMENTS, "negatives": ELEMENTS},
    overrides={"positives": None, "negatives": None},
    weights={"forward": 0.5, "backward": 0.5},
    detached=True,
    permuted=("dim",),
    shards={
        "batch_group": (
            ("batch", "candidates"),
            {"sizes": {"batch": [(3, 1), (2, 0, 3)], "candidates": [(3, 1), (2, 0, 3)]}},
        )
    },
)
