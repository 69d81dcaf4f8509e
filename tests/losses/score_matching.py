"""Score matching, and the trace of a Hessian."""

from losses._energies import bowl, laplacian, mean, of_energy, per_row, slope, variant
from termwise.energy import ScoreMatchingLoss, hessian_trace, score_matching_loss


def formula(energy, x, *, weights, **_):
    score_square = mean(per_row(slope(energy, x) ** 2), weights)
    trace = mean(laplacian(energy, x), weights)
    loss = 0.5 * score_square - trace
    return {"loss": loss, "score_square": score_square, "laplacian": trace}


REVERSE = {"trace": "reverse", "chunk_size": 2}
SCORE_MATCHING = of_energy(
    function=score_matching_loss,
    formula=formula,
    variants={
        "": variant(ScoreMatchingLoss(bowl), named={"weights": "rows"}),
        "reverse": variant(ScoreMatchingLoss(bowl, **REVERSE), options=REVERSE),
    },
    weights={"score_square": 0.5, "laplacian": -1.0},
)
TRACE = of_energy(
    function=hessian_trace, formula=lambda energy, x, **_: laplacian(energy, x), shards={}
)
