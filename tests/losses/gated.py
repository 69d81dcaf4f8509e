"""The gated objective."""

import torch.nn.functional as F
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor

from losses import Variant
from losses._bench import COEFFICIENT, decoder_products, over_latents, two_encoders
from losses._latents import (
    CODED,
    SPLIT,
    counted,
    dense,
    mean_count,
    of_latents,
    squared_error,
)
from termwise.sae import Gated, GatedObjective, gated_loss


def formula(x, f, x_hat, f_gate, W_dec, b_dec, *, sparsity_coeff, stop_decoder, **options):
    target = x if options["target"] is None else options["target"]
    x, f, x_hat, gate = counted(options["mask"], target, dense(f, W_dec), x_hat, f_gate)
    mse = squared_error(x, x_hat, options["feature_reduction"])
    gate = gate * (gate > 0)
    norm = 1 if options["decoder_norm"] is None else options["decoder_norm"]
    sparsity = sparsity_coeff * (gate * norm).sum(1).mean()
    W, b = (W_dec.detach(), b_dec.detach()) if stop_decoder else (W_dec, b_dec)
    aux = squared_error(x, gate @ W + b, options["feature_reduction"])
    terms = {"mse": mse, "sparsity": sparsity, "aux": aux}
    return {"loss": mse + sparsity + aux, **terms, "l0": mean_count(f)}


# What the benches measure.


def plain_gated(f_gate: Tensor, magnitude: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    gate, f = f_gate.relu(), magnitude.relu() * (f_gate > 0)
    aux = F.mse_loss(gate @ W_dec.detach(), x)
    return F.mse_loss(f @ W_dec, x) + COEFFICIENT * gate.sum(1).mean() + aux


def our_gated(f_gate: Tensor, magnitude: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    f = magnitude.relu() * (f_gate > 0)
    return gated_loss(x, f, f @ W_dec, f_gate, W_dec, sparsity_coeff=COEFFICIENT).loss


def gated_products(pre: Tensor, magnitude: Tensor, W_dec: Tensor, x: Tensor) -> None:
    decoder_products(magnitude, pre, W_dec, x)
    pre.detach() @ W_dec.detach()
    x @ W_dec.detach().mT


GATED = of_latents(
    function=gated_loss,
    formula=formula,
    bench={"": over_latents(two_encoders, plain_gated, our_gated, products=gated_products)},
    variants={
        "": Variant(
            module=GatedObjective(Gated(sparsity_coeff=0.3)),
            options={"sparsity_coeff": 0.3},
            shapes=(*CODED, "rows latents", "latents columns"),
            masks=("mask",),
        )
    },
    # Finite differences see through a decoder that is frozen.
    overrides={"stop_decoder": False, "b_dec": None},
    more={"assert_formula": {"stop_decoder": st.booleans(), "b_dec": Float[Tensor, " d_model"]}},
    weights={**SPLIT, "aux": 1.0},
    ignores=("f", "f.values"),  # only counted
    scaled={
        ("x", "x_hat", "target", "W_dec"): {"mse": 2, "sparsity": 0, "aux": 2},
        ("f_gate",): {"sparsity": 1, "mse": 0},
    },
    second=("right",),
)
