"""The crosscoder objective."""

from torch import Tensor

from losses import Variant
from losses._bench import COEFFICIENT, normal, over_latents, positive
from losses._latents import (
    SPLIT,
    counted,
    dense,
    mean_count,
    of_latents,
    size,
    squared_error,
)
from termwise.sae import Crosscoder, CrosscoderObjective, crosscoder_loss


def formula(x, f, x_hat, W_dec, *, sparsity_coeff, aux, aux_coeff, decoder_norm, **options):
    target = x if options["target"] is None else options["target"]
    x, f, x_hat = counted(options["mask"], target, dense(f, W_dec), x_hat)
    each = squared_error(x, x_hat, options["feature_reduction"])
    norm = W_dec.norm(dim=2).sum(1) if decoder_norm == "l1" else W_dec.flatten(1).norm(dim=1)
    sparsity = sparsity_coeff * (size(f) * norm).sum(1).mean()
    aux = x.new_zeros(()) if aux is None else aux
    loss = each.sum() + sparsity + aux_coeff * aux
    terms = {"mse_per_layer": each, "mse": each.sum(), "sparsity": sparsity, "aux": aux}
    return {"loss": loss, **terms, "l0": mean_count(f)}


X, W = "rows layers columns", "latents layers columns"


# What the benches measure.


def of_layers(rows: int, d_sae: int, d_model: int) -> list[Tensor]:
    x_hat, W_dec = normal(rows, 4, d_model), normal(d_sae, 4, d_model, scale=d_sae**-0.5)
    leaves = [positive(rows, d_sae), x_hat, W_dec]
    return [*(leaf.requires_grad_() for leaf in leaves), normal(rows, 4, d_model)]


def plain_crosscoder(f: Tensor, x_hat: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    errors = (x - x_hat).square().mean(2).sum(1).mean()
    return errors + COEFFICIENT * (f.abs() * W_dec.norm(dim=2).sum(1)).sum(1).mean()


def our_crosscoder(f: Tensor, x_hat: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    return crosscoder_loss(x, f, x_hat, W_dec, sparsity_coeff=COEFFICIENT).loss


CROSSCODER = of_latents(
    function=crosscoder_loss,
    formula=formula,
    bench={"": over_latents(of_layers, plain_crosscoder, our_crosscoder)},
    variants={
        "": Variant(
            module=CrosscoderObjective(Crosscoder(sparsity_coeff=0.3)),
            options={"sparsity_coeff": 0.3},
            shapes=(X, "rows latents", X, W),
            masks=("mask",),
        )
    },
    weights={**SPLIT, "aux": "aux_coeff"},
    aliases=("aux",),
    also_in_graph=("mse_per_layer",),
    permuted=("batch", "layers"),
    scaled={
        ("x", "x_hat", "target"): {"mse_per_layer": 2, "sparsity": 0},
        ("W_dec",): {"sparsity": 1, "mse": 0},
    },
    second=("right",),
)
