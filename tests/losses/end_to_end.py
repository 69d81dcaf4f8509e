"""The end-to-end objective."""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses import Variant
from losses._bench import Case, normal
from losses._latents import counted, dense, of_latents, size, squared_error
from termwise.sae import EndToEnd, EndToEndObjective, end_to_end_loss


def formula(logits, original_logits, *, x, f, x_hat, mask, feature_reduction, **weights):
    logits, original = counted(mask, logits, original_logits.detach())
    log_p, log_q = (y - y.exp().sum(1, keepdim=True).log() for y in (original, logits))
    terms = {
        "kl": (log_p.exp() * (log_p - log_q)).sum(1).mean(),
        "reconstruction": logits.new_zeros(()),
        "sparsity": logits.new_zeros(()),
    }
    for true, guess in zip(x or (), x_hat or (), strict=True):
        error = squared_error(*counted(mask, true.detach(), guess), feature_reduction)
        terms["reconstruction"] = terms["reconstruction"] + error
    if f is not None:
        (latents,) = counted(mask, dense(f))
        terms["sparsity"] = weights["sparsity_coeff"] * size(latents).sum(1).mean()
    downstream = weights["kl_coeff"] * terms["kl"]
    upstream = weights["reconstruction_coeff"] * terms["reconstruction"]
    return {"loss": downstream + upstream + terms["sparsity"], **terms}


def waves(phase: float):
    """Make activations of two places in the model."""
    return lambda sizes: [
        torch.sin(torch.arange(sizes["batch"] * d) + phase).double().reshape(-1, d) for d in (2, 3)
    ]


KL_AND_F = {"kl_coeff": 0.7, "sparsity_coeff": 0.3}


# What the benches measure.


def patched_and_original(rows: int, vocab: int) -> list[Tensor]:
    return [normal(rows, vocab).requires_grad_(), normal(rows, vocab)]


def plain_end_to_end(patched: Tensor, original: Tensor) -> Tensor:
    q, p = (x.float().log_softmax(1) for x in (patched, original))
    return F.kl_div(q, p, log_target=True, reduction="batchmean")


END_TO_END = of_latents(
    function=end_to_end_loss,
    formula=formula,
    bench={
        "": Case(
            ((32, 100), (256, 1000), (64, 32_000)),
            patched_and_original,
            plain_end_to_end,
            rows=256,
            size_of=lambda rows: (rows, 128_256),
        )
    },
    formula_at=({}, {"x": waves(0.0), "x_hat": waves(1.0)}),
    variants={
        "": Variant(
            module=EndToEndObjective(EndToEnd(**KL_AND_F)),
            options=KL_AND_F,
            shapes=("rows columns", "rows columns"),
            named={"f": "rows latents"},
            masks=("mask",),
            of_the_module=("sparsity_coeff",),
        )
    },
    overrides={"x": None, "x_hat": None},
    weights={"kl": "kl_coeff", "reconstruction": "reconstruction_coeff", "sparsity": 1.0},
    by={"assert_gradients": ("logits", "f", "f.values")},  # the original model has none
    # A coefficient of 0 leaves its term out.
    more={"assert_finite": dict.fromkeys(("kl_coeff", "sparsity_coeff"), 0.5)},
    permuted=("batch", "vocab"),
    shifted={"vocab": ("logits", "original_logits")},
    optimum=lambda call: {"logits": call["original_logits"], "f": None, "mask": None},
    second=("right",),
)
