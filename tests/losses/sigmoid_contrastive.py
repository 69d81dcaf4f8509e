"""SigLIP's sigmoid loss."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from losses import GROUPS, Declaration, Variant
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
SIGMOID_CONTRASTIVE = Declaration(
    function=sigmoid_contrastive_loss,
    formula=formula,
    paths=({}, {"termwise.joint_embedding._sigmoid_contrastive._FEW_LOGITS": 0}),
    second=("right", "refused"),
    variants={
        "": Variant(module=SigmoidContrastiveLoss(), shapes=PAIR, named={"scale": "", "bias": ""}),
    },
    sizes={"batch": st.integers(1, 4)},
    weights={"positive": 1, "negative": 1},
    shards=GROUPS,
)
