"""SigLIP's sigmoid loss."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from losses import GROUPS, Declaration, Variant
from losses._bench import Case, pairs
from termwise.joint_embedding import SigmoidContrastiveLoss, sigmoid_contrastive_loss


def formula(a, b, *, scale, bias, normalize, **_):
    if normalize:
        a, b = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) for x in (a, b))
    n = len(a)
    logits = scale * (a @ b.T) + bias
    own = torch.eye(n, dtype=torch.bool)
    cost = -F.logsigmoid(logits.where(own, -logits))
    positive, negative = cost[own].sum() / n, cost[~own].sum() / n
    hardest = logits.masked_fill(own, -torch.inf).amax(1)
    accuracy = (logits.diagonal() >= hardest).to(logits.dtype).mean()
    return {
        "loss": positive + negative,
        "positive": positive,
        "negative": negative,
        "accuracy": accuracy.detach(),
    }


PAIR = ("rows columns", "rows columns")


# What the benches measure.


def plain_sigmoid(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    logits = scale * a @ b.mT + bias
    signs = 2 * torch.eye(len(a), device=a.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(a)


def our_sigmoid(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return sigmoid_contrastive_loss(a, b, scale=scale, bias=bias).loss


SIGMOID_CONTRASTIVE = Declaration(
    function=sigmoid_contrastive_loss,
    formula=formula,
    bench={
        "": Case(
            ((64, 128), (256, 128), (4096, 512)),
            pairs,
            plain_sigmoid,
            our_sigmoid,
            rows=16_384,
            size_of=lambda rows: (rows, 512),
        )
    },
    paths=({}, {"termwise.joint_embedding._sigmoid_contrastive._FEW_LOGITS": 0}),
    second=("right", "refused"),
    variants={
        "": Variant(module=SigmoidContrastiveLoss(), shapes=PAIR, named={"scale": "", "bias": ""}),
    },
    sizes={"batch": st.integers(1, 4)},
    weights={"positive": 1, "negative": 1},
    shards=GROUPS,
)
