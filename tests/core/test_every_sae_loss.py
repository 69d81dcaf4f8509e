"""What holds for every loss, of the sparse-autoencoder family."""

import torch
from every_loss import *  # noqa: F403
from losses import PAIR, Case

import termwise as tw
from termwise.sae import (
    Crosscoder,
    CrosscoderObjective,
    EndToEnd,
    EndToEndObjective,
    Gated,
    GatedObjective,
    JumpReLU,
    JumpReLUObjective,
    Matryoshka,
    MatryoshkaObjective,
    TopK,
    TopKObjective,
    Vanilla,
    VanillaObjective,
    crosscoder_loss,
    end_to_end_loss,
    gated_loss,
    jumprelu_loss,
    matryoshka_loss,
    topk_loss,
    vanilla_loss,
)

FAMILY = tw.sae
VANILLA = {"sparsity_coeff": 0.3, "feature_reduction": "sum"}
CODED = ("rows columns", "rows latents", "rows columns")
CASES = {
    "vanilla": Case(vanilla_loss, VanillaObjective(Vanilla(**VANILLA)), VANILLA, CODED),
    "vanilla, masked": Case(
        vanilla_loss,
        VanillaObjective(Vanilla(**VANILLA)),
        VANILLA,
        CODED,
        named={"decoder_norm": "latents"},
        masks=("mask",),
    ),
    "topk": Case(
        topk_loss,
        TopKObjective(TopK(aux_coeff=0.5)),
        {"aux_coeff": 0.5},
        CODED,
        named={"aux": ""},
        masks=("mask",),
        fixed={"dead": torch.arange(5) < 2},
    ),
    "jumprelu": Case(
        jumprelu_loss,
        JumpReLUObjective(JumpReLU(sparsity_coeff=0.3, bandwidth=0.5)),
        {"sparsity_coeff": 0.3, "bandwidth": 0.5},
        ("rows columns", "rows latents", "latents columns", "columns"),
        named={"log_threshold": "latents"},
        masks=("mask",),
    ),
    "gated": Case(
        gated_loss,
        GatedObjective(Gated(sparsity_coeff=0.3)),
        {"sparsity_coeff": 0.3},
        (*CODED, "rows latents", "latents columns"),
        masks=("mask",),
    ),
    "matryoshka": Case(
        matryoshka_loss,
        MatryoshkaObjective(Matryoshka(sparsity_coeff=0.3)),
        {"sparsity_coeff": 0.3},
        ("rows columns", "rows latents", "latents columns", "columns"),
        masks=("mask",),
        fixed={"prefixes": (1, 3, 5)},
        of_the_module=("sparsity_coeff", "n_prefixes", "law"),
    ),
    "crosscoder": Case(
        crosscoder_loss,
        CrosscoderObjective(Crosscoder(sparsity_coeff=0.3)),
        {"sparsity_coeff": 0.3},
        (
            "rows layers columns",
            "rows latents",
            "rows layers columns",
            "latents layers columns",
        ),
        masks=("mask",),
    ),
    "end to end": Case(
        end_to_end_loss,
        EndToEndObjective(EndToEnd(kl_coeff=0.7, sparsity_coeff=0.3)),
        {"kl_coeff": 0.7, "sparsity_coeff": 0.3},
        PAIR,
        named={"f": "rows latents"},
        masks=("mask",),
        of_the_module=("sparsity_coeff",),
    ),
}
