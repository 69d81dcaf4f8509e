"""Contrastive divergence."""

from jaxtyping import Float
from torch import Tensor

from losses._bench import model, over_batches
from losses._energies import PAIR, PENALISED, bowl, mean, minus, of_energy, penalty, variant
from termwise.energy import ContrastiveDivergenceLoss, contrastive_divergence_loss


def formula(energy, x, negatives, *, negative_weight, energy_square_weight, weights, **options):
    of_data, of_model = energy(x), energy(negatives.detach())
    data, model = mean(of_data, weights), of_model.mean()
    squares = mean(of_data**2, weights) + (of_model**2).mean()
    penalised = penalty(options["regularization"], options["parameters"], x)
    gap = data - negative_weight * model
    added = energy_square_weight * squares + options["regularization_weight"] * penalised
    return {
        "loss": gap + added,
        "energy_data": data,
        "energy_model": model,
        "gap": data - model,
        "energy_squares": squares,
        "regularization": penalised,
        "negatives": negatives.detach(),
    }


# What the benches measure.


def plain_contrastive(x: Tensor, other: Tensor, *_: Tensor) -> Tensor:
    return model(x)(x).mean() - model(x)(other).mean()


def our_contrastive(x: Tensor, other: Tensor, *_: Tensor) -> Tensor:
    return contrastive_divergence_loss(model(x), x, other).loss


CONTRASTIVE_DIVERGENCE = of_energy(
    function=contrastive_divergence_loss,
    formula=formula,
    bench={"": over_batches(plain_contrastive, our_contrastive)},
    formula_at=({}, PENALISED),
    variants={
        "": variant(
            ContrastiveDivergenceLoss(bowl, energy_square_weight=0.1),
            options={"energy_square_weight": 0.1},
            shapes=PAIR,
            named={"weights": "rows"},
        )
    },
    weights={
        "energy_data": 1.0,
        "energy_model": minus("negative_weight"),
        "energy_squares": "energy_square_weight",
        "regularization": "regularization_weight",
    },
    overrides={"negatives": Float[Tensor, "negatives *event"]},
    aliases=("negatives",),
    by={"assert_gradients": ("x",)},
)
