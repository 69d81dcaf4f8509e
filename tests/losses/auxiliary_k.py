"""Auxiliary losses that dead latents are revived by."""

import dataclasses

import torch
from hypothesis import strategies as st
from jaxtyping import Bool
from torch import Tensor

from losses._latents import counted, dense, of_latents
from termwise.sae import auxiliary_k_loss, matryoshka_auxiliary_k_loss

VALUES = {"relu": lambda v: v.clamp(min=0), "none": lambda v: v, "abs": lambda v: v}
RANKS = {"relu": lambda v: v, "none": lambda v: v, "abs": abs}


def formula(x, x_hat, pre, W_dec, *, dead, k_aux, activation, normalize, mask, **options):
    """Choose latents row by row; without dead ones nothing is explained."""
    goal = x if options["target"] is None else options["target"]
    goal, x_hat, pre = counted(mask, goal, x_hat, pre)
    left = goal - x_hat
    if options["detach_residual"]:
        goal, left = goal.detach(), left.detach()
    columns = [j for j in range(len(dead)) if dead[j]]
    if not columns:
        return (0 * pre).sum()
    explained = []
    for row in pre:
        chosen = sorted(columns, key=lambda j: -RANKS[activation](row[j].item()))[:k_aux]
        explained.append(sum(VALUES[activation](row[j]) * W_dec[j] for j in chosen))
    error = ((left - torch.stack(explained)) ** 2).sum()
    scale = min(len(columns) / k_aux, 1) if options["scale_by_count"] else 1
    if normalize == "none":
        mean = options["feature_reduction"] == "mean"
        return scale * error / len(left) / (max(left.shape[1], 1) if mean else 1)
    divided = left if normalize == "residual" else goal
    spread = ((divided - divided.mean(0)) ** 2).sum()
    return scale * error / spread if spread > 0 else 0 * error


def by_level(x, f, pre, W_dec, b_dec, *, prefixes, dead, **options):
    """The sum over levels, as SAELens 6.54 writes it: each decoded anew."""
    f, b, total, low = dense(f, W_dec), 0 if b_dec is None else b_dec, (0 * pre).sum(), 0
    for high in prefixes:
        x_hat, part = f[:, :high] @ W_dec[:high] + b, slice(low, high)
        if dead[part].any():
            total = total + formula(
                x, x_hat, pre[:, part], W_dec[part], dead=dead[part], detach_residual=True,
                **options,
            )  # fmt: skip
        low = high
    return total


def all_dead(sizes):
    return torch.ones(sizes["d_sae"]).bool()


def apart(sizes):
    """Make rows that differ: the residual's spread divides."""
    return torch.arange(sizes["batch"] * sizes["d_model"]).double().sin().reshape(
        sizes["batch"], -1
    )  # fmt: skip


def without_ties(sizes):
    """Draw latents of which no two have one size."""
    count = sizes["batch"] * sizes["d_sae"]
    order = st.permutations(range(count)).map(lambda drawn: torch.tensor(drawn).double())
    return order.map(lambda x: (x / 8 - 0.53).reshape(sizes["batch"], sizes["d_sae"]))


AUXILIARY = of_latents(
    function=auxiliary_k_loss,
    formula=formula,
    overrides={"k_aux": 1, "detach_residual": True},
    more={
        "assert_finite": {"dead": all_dead},
        "assert_masked": {"dead": all_dead},  # without dead latents the loss is 0
        "assert_formula": {"pre": without_ties, "detach_residual": st.booleans()},
    },
    formula_at=(
        {"normalize": "none", "dead": Bool[Tensor, " d_sae"], "k_aux": st.integers(1, 3)},
        {"x": apart, "mask": None, "dead": all_dead, "k_aux": st.integers(1, 3)},
    ),
    by={"assert_gradients": ("pre", "W_dec")},  # the residual is a target
    ignores=("pre", "W_dec"),  # of latents that are not dead
)
BY_LEVEL = dataclasses.replace(
    AUXILIARY,
    function=matryoshka_auxiliary_k_loss,
    formula=by_level,
    overrides={**AUXILIARY.overrides, "prefixes": lambda sizes: (1, sizes["d_sae"])},
    by={"assert_gradients": ("pre",)},  # W_dec is in the residual too, which is a target
    ignores=("pre",),
)
