"""Maximum likelihood from samples of the model."""

from hypothesis import strategies as st

from losses._bench import model, over_batches
from losses._energies import PAIR, PENALISED, bowl, mean, minus, of_energy, penalty, variant
from termwise.energy import MaximumLikelihoodLoss, maximum_likelihood_loss


def formula(energy, x, negatives, *, negative_weight, weights, regularization, **options):
    of_data, of_model = mean(energy(x), weights), energy(negatives.detach()).mean()
    penalised = penalty(regularization, options["parameters"], x)
    return {
        "loss": of_data - negative_weight * of_model + options["regularization_weight"] * penalised,
        "energy_data": of_data,
        "energy_model": of_model,
        "gap": of_data - of_model,
        "regularization": penalised,
    }


MAXIMUM_LIKELIHOOD = of_energy(
    function=maximum_likelihood_loss,
    formula=formula,
    bench={
        "": over_batches(
            lambda x, y, *_: model(x)(x).mean() - model(x)(y).mean(),
            lambda x, y, *_: maximum_likelihood_loss(model(x), x, y).loss,
        )
    },
    formula_at=({}, PENALISED),
    variants={
        "": variant(
            MaximumLikelihoodLoss(bowl, negative_weight=0.7),
            options={"negative_weight": 0.7},
            shapes=PAIR,
            named={"weights": "rows"},
        )
    },
    weights={
        "energy_data": 1.0,
        "energy_model": minus("negative_weight"),
        "regularization": "regularization_weight",
    },
    by={"assert_gradients": ("x",)},  # the negatives are samples, and have none
    sizes={"negatives": st.sampled_from([2, 1, 3])},
    permuted=("batch", "negatives"),
    second=("right",),
)
