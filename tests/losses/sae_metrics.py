"""Measurements of a reconstruction."""

import dataclasses
import math

from hypothesis import strategies as st

from losses import GROUPS, Declaration
from losses._contrast import ELEMENTS
from losses._latents import counted, some_rows
from termwise.sae import (
    cosine_similarity,
    explained_variance,
    fraction_of_variance_unexplained,
    loss_recovered,
    mean_squared_err,
    normalized_mse,
)


def unexplained(x, x_hat, *, reduction, mask, **_):
    x, x_hat = counted(mask, x, x_hat)
    error = ((x - x_hat) ** 2).sum(1)
    spread = ((x - x.mean(0)) ** 2).sum(1).detach()  # without a gradient
    return error.sum() / spread.sum() if reduction == "ratio_of_sums" else (error / spread).mean()


def squares(x_hat, x, norm):
    return (x - x_hat) ** 2 / ((x**2).sum(-1, keepdim=True) if norm else 1)


def by_norm(x, x_hat, *, mask, **_):
    x, x_hat = counted(mask, x, x_hat)
    return (((x - x_hat) ** 2).sum(1) / (x**2).sum(1)).mean()


def cosine(x, x_hat, *, mask, **_):
    x, x_hat = counted(mask, x, x_hat)
    return ((x * x_hat).sum(1) / (x.norm(dim=1) * x_hat.norm(dim=1)).clamp(min=1e-16)).mean()


# Rows without variance have none to explain: 0 / 0.
UNDEFINED = {"assert_finite": r"is \[?(nan|inf|-inf)"}
MEASURED = Declaration(
    function=normalized_mse,
    formula=by_norm,
    sizes={"batch": st.integers(2, 4)},
    overrides={"mask": None},  # one that leaves no row leaves nothing to measure
    more={"assert_formula": {"mask": some_rows}},
    shards=GROUPS,
    not_held=UNDEFINED,
    masked={"mask": {"nothing": math.nan}},
)
UNEXPLAINED = dataclasses.replace(
    MEASURED,
    function=fraction_of_variance_unexplained,
    formula=unexplained,
    by={"assert_gradients": ("x_hat",)},  # the variance of the data has no gradient
)
EXPLAINED = dataclasses.replace(
    UNEXPLAINED, function=explained_variance, formula=lambda *x, **more: 1 - unexplained(*x, **more)
)
COSINE = Declaration(
    function=cosine_similarity,
    formula=cosine,
    elements={"x": ELEMENTS, "x_hat": ELEMENTS},
    overrides={"mask": None},
    more=MEASURED.more,
    shards=GROUPS,
    masked=MEASURED.masked,
)
RECOVERED = Declaration(
    function=loss_recovered,
    formula=lambda loss, original_loss, ablated_loss: (
        (ablated_loss - loss) / (ablated_loss - original_loss)
    ),
    permuted=(),
    not_held=UNDEFINED,
)
SQUARES = Declaration(function=mean_squared_err, formula=squares, permuted=(), not_held=UNDEFINED)
