"""Score matching, and the trace of a Hessian."""

import torch
from torch import Tensor

from losses._bench import model, over_batches, slopes
from losses._energies import bowl, laplacian, mean, of_energy, per_row, slope, variant
from termwise.energy import ScoreMatchingLoss, hessian_trace, score_matching_loss


def formula(energy, x, *, weights, **_):
    score_square = mean(per_row(slope(energy, x) ** 2), weights)
    trace = mean(laplacian(energy, x), weights)
    loss = 0.5 * score_square - trace
    return {"loss": loss, "score_square": score_square, "laplacian": trace}


REVERSE = {"trace": "reverse", "chunk_size": 2}


# What the benches measure.


def plain_score_matching(x: Tensor, _: Tensor, *__: Tensor) -> Tensor:
    point, score = slopes(x)
    directions = torch.eye(x.shape[1], device=x.device)[:, None].expand(-1, *x.shape)
    (rows,) = torch.autograd.grad(
        score, point, directions, create_graph=True, is_grads_batched=True
    )
    return 0.5 * score.square().sum(1).mean() - rows.diagonal(dim1=0, dim2=2).sum(1).mean()


def our_score_matching(x: Tensor, _: Tensor, *__: Tensor) -> Tensor:
    return score_matching_loss(model(x), x).loss


SCORE_MATCHING = of_energy(
    function=score_matching_loss,
    formula=formula,
    bench={
        "": over_batches(
            plain_score_matching, our_score_matching, (32, 16), (128, 64), (128, 784), rows=2**11
        )
    },
    variants={
        "": variant(ScoreMatchingLoss(bowl), named={"weights": "rows"}),
        "reverse": variant(ScoreMatchingLoss(bowl, **REVERSE), options=REVERSE),
    },
    weights={"score_square": 0.5, "laplacian": -1.0},
)
TRACE = of_energy(
    function=hessian_trace, formula=lambda energy, x, **_: laplacian(energy, x), shards={}
)
