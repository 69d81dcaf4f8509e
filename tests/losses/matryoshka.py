"""The Matryoshka objective."""

import torch
from jaxtyping import Float
from torch import Tensor

from losses import Variant
from losses._latents import (
    DECODED,
    POWERS,
    SPLIT,
    counted,
    dense,
    mean_count,
    of_latents,
    size,
    squared_error,
)
from termwise.sae import Matryoshka, MatryoshkaObjective, matryoshka_loss


def formula(x, f, W_dec, b_dec, *, prefixes, weights, sparsity_coeff, decoder_norm, p, **options):
    target = x if options["target"] is None else options["target"]
    x, f = counted(options["mask"], target, dense(f, W_dec))
    b = 0 if b_dec is None else b_dec
    decoded = [f[:, :prefix] @ W_dec[:prefix] + b for prefix in prefixes]
    if options["x_hat"] is not None:  # of all latents
        (decoded[-1],) = counted(options["mask"], options["x_hat"])
    each = torch.stack([squared_error(x, y, options["feature_reduction"]) for y in decoded])
    shares = torch.tensor([1.0] * len(prefixes) if weights is None else weights, dtype=x.dtype)
    mse = (shares / shares.sum() * each).sum()
    costs = size(f) ** p * (1 if decoder_norm is None else decoder_norm)
    sparsity = sparsity_coeff * costs.sum(1).mean()
    aux = x.new_zeros(()) if options["aux"] is None else options["aux"]
    terms = {"mse": mse, "mse_per_prefix": each, "sparsity": sparsity, "aux": aux}
    loss = mse + sparsity + options["aux_coeff"] * aux
    return {"loss": loss, **terms, "l0": mean_count(f), "l1": size(f).sum(1).mean()}


def up_to_all(*first: int):
    return lambda sizes: (*first, sizes["d_sae"])


MATRYOSHKA = of_latents(
    function=matryoshka_loss,
    formula=formula,
    formula_at=(
        {},
        {"weights": [0.5, 2.0], "feature_reduction": "sum"},
        {"prefixes": up_to_all(0, 1), "b_dec": Float[Tensor, " d_model"], "weights": [3.0, 1, 2]},
        {"prefixes": (1, 2), "x_hat": None, "b_dec": None},
    ),
    variants={
        "": Variant(
            module=MatryoshkaObjective(Matryoshka(sparsity_coeff=0.3)),
            options={"sparsity_coeff": 0.3},
            shapes=DECODED,
            masks=("mask",),
            fixed={"prefixes": (1, 3, 5)},
            of_the_module=("sparsity_coeff", "n_prefixes", "law"),
        )
    },
    overrides={**POWERS, "prefixes": up_to_all(1), "weights": None},
    weights={**SPLIT, "aux": "aux_coeff"},
    aliases=("aux",),
    ignores=("W_dec",),  # beyond the last prefix
    also_in_graph=("mse_per_prefix", "l1"),
    scaled={("x", "x_hat", "target", "W_dec", "b_dec"): {"mse_per_prefix": 2, "sparsity": 0}},
    second=("right",),
)
