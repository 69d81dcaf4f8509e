"""The vanilla objective."""

import torch.nn.functional as F
from torch import Tensor

from losses import Variant
from losses._bench import COEFFICIENT, over_latents, x_f_x_hat
from losses._latents import (
    CODED,
    POWERS,
    SPLIT,
    counted,
    dense,
    mean_count,
    of_latents,
    size,
    squared_error,
)
from termwise.sae import Vanilla, VanillaObjective, vanilla_loss


def formula(x, f, x_hat, *, sparsity_coeff, decoder_norm, p, target, mask, **options):
    f = dense(f, decoder_norm)
    x, f, x_hat = counted(mask, x if target is None else target, f, x_hat)
    mse = squared_error(x, x_hat, options["feature_reduction"])
    costs = size(f) ** p * (1 if decoder_norm is None else decoder_norm)
    sparsity = sparsity_coeff * costs.sum(1).mean()
    l1 = size(f).sum(1).mean()
    return {
        "loss": mse + sparsity, "mse": mse, "sparsity": sparsity, "l0": mean_count(f), "l1": l1
    }  # fmt: skip


NUMBERS = {"sparsity_coeff": 0.3, "feature_reduction": "sum"}
MODULE = VanillaObjective(Vanilla(**NUMBERS))


# What the benches measure.


def plain_vanilla(x: Tensor, f: Tensor, x_hat: Tensor) -> Tensor:
    return F.mse_loss(x_hat, x) + COEFFICIENT * f.abs().sum(1).mean()


def our_vanilla(x: Tensor, f: Tensor, x_hat: Tensor) -> Tensor:
    return vanilla_loss(x, f, x_hat, sparsity_coeff=COEFFICIENT).loss


VANILLA = of_latents(
    function=vanilla_loss,
    formula=formula,
    bench={"": over_latents(x_f_x_hat, plain_vanilla, our_vanilla)},
    variants={
        "plain": Variant(module=MODULE, options=NUMBERS, shapes=CODED),
        "masked": Variant(
            module=MODULE,
            options=NUMBERS,
            shapes=CODED,
            named={"decoder_norm": "latents"},
            masks=("mask",),
        ),
    },
    overrides=POWERS,
    weights=SPLIT,
    also_in_graph=("l1",),
    scaled={("x", "x_hat", "target"): {"mse": 2, "sparsity": 0}},
    optimum=lambda call: {"x_hat": call["x"], "target": None, "sparsity_coeff": 0.0, "mask": None},
)
