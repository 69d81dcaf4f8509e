"""The Matryoshka objective."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from losses import Variant
from losses._bench import Case, decoder_products, normal, over_latents, positive
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
from termwise import sae
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


# What the benches measure.


def with_prefixes(rows: int, d_sae: int, d_model: int) -> list[Tensor]:
    W_dec = normal(d_sae, d_model, scale=d_sae**-0.5).requires_grad_()
    return [positive(rows, d_sae).requires_grad_(), W_dec, normal(rows, d_model)]


def prefixes_of(d_sae: int) -> list[int]:
    return [d_sae >> level for level in reversed(range(4))]


def plain_matryoshka(f: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    x_hat, total, start = torch.zeros_like(x), 0.0, 0
    for end in prefixes_of(f.shape[1]):
        x_hat = x_hat + f[:, start:end] @ W_dec[start:end]
        total, start = total + F.mse_loss(x_hat, x), end
    return total / 4


def our_matryoshka(f: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    return matryoshka_loss(x, f, W_dec, None, prefixes=prefixes_of(f.shape[1])).loss


def kept(rows: int, d_sae: int, d_model: int) -> list[Tensor]:
    """64 latents of each row, and where they are."""
    values = positive(rows, 64).requires_grad_()
    W_dec = normal(d_sae, d_model, scale=d_sae**-0.5).requires_grad_()
    return [values, torch.randint(d_sae, (rows, 64)), W_dec, normal(rows, d_model)]


def plain_sparse_matryoshka(values: Tensor, indices: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    picked, total = W_dec[indices] * values[..., None], 0.0
    for end in prefixes_of(len(W_dec)):
        x_hat = (picked * (indices < end)[..., None]).sum(1)
        total = total + F.mse_loss(x_hat, x)
    return total / 4


def our_sparse_matryoshka(values: Tensor, indices: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    f = sae.SparseLatents(values, indices)
    return matryoshka_loss(x, f, W_dec, None, prefixes=prefixes_of(len(W_dec))).loss


MATRYOSHKA = of_latents(
    function=matryoshka_loss,
    formula=formula,
    bench={
        "": over_latents(
            with_prefixes,
            plain_matryoshka,
            our_matryoshka,
            products=lambda f, W_dec, x: decoder_products(f, f, W_dec, x),
        ),
        "sparse": Case(
            ((64, 2048, 64), (256, 16_384, 512)),
            kept,
            plain_sparse_matryoshka,
            our_sparse_matryoshka,
            rows=512,
            compiled=False,
        ),
    },
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
