"""The TopK objective."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from losses import Variant
from losses._bench import over_latents, x_f_x_hat
from losses._latents import CODED, counted, dense, mean_count, of_latents, squared_error
from termwise.sae import TopK, TopKObjective, topk_loss


def formula(x, f, x_hat, *, aux, aux_coeff, dead, target, mask, **options):
    x, f, x_hat = counted(mask, x if target is None else target, dense(f, dead), x_hat)
    mse = squared_error(x, x_hat, options["feature_reduction"])
    aux = x.new_zeros(()) if aux is None else aux
    n_dead = dead.sum().to(x.dtype)
    return {
        "loss": mse + aux_coeff * aux, "mse": mse, "aux": aux, "l0": mean_count(f), "n_dead": n_dead
    }  # fmt: skip


# What the benches measure.


def plain_topk(x: Tensor, f: Tensor, x_hat: Tensor) -> Tensor:
    return F.mse_loss(x_hat, x)


def x_latents_x_hat(rows: int, d_sae: int, d_model: int) -> list[Tensor]:
    x, f, x_hat = x_f_x_hat(rows, d_sae, d_model)
    return [x, f.detach(), x_hat]


TOPK = of_latents(
    function=topk_loss,
    formula=formula,
    bench={"": over_latents(x_latents_x_hat, plain_topk)},
    variants={
        "": Variant(
            module=TopKObjective(TopK(aux_coeff=0.5)),
            options={"aux_coeff": 0.5},
            shapes=CODED,
            named={"aux": ""},
            masks=("mask",),
            fixed={"dead": torch.arange(5) < 2},
        )
    },
    overrides={"dead": Bool[Tensor, " d_sae"]},
    weights={"mse": 1.0, "aux": "aux_coeff"},
    aliases=("aux",),
    ignores=("f", "f.values"),  # only counted
    scaled={("x", "x_hat", "target"): {"mse": 2}},
    optimum=lambda call: {"x_hat": call["x"], "target": None, "aux": None, "mask": None},
)
