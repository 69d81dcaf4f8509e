"""Measurements of a reconstruction, by hand and against their definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from termwise.sae import (
    VarianceStatistics,
    cosine_similarity,
    explained_variance,
    fraction_of_variance_unexplained,
    loss_recovered,
    mean_squared_err,
    normalized_mse,
)

# By hand: latents [[1, 0, 1], [2, 0, 0]], rows [1, 0], [0, 1], [1, 1] and a bias of [0.5, 0].
X = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
X_HAT = torch.tensor([[2.5, 1.0], [2.5, 0.0]])


def draw(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=generator, dtype=torch.float64) + 1 for _ in range(2)]


def test_by_hand():
    # Errors: 2.25 + 1 and 0.25 + 1; the mean of x is [2, 0.5], each row 3.25 from it.
    assert fraction_of_variance_unexplained(X, X_HAT).item() == pytest.approx(4.5 / 6.5)
    by_row = fraction_of_variance_unexplained(X, X_HAT, reduction="mean_of_ratios")
    assert by_row.item() == pytest.approx((3.25 / 3.25 + 1.25 / 3.25) / 2)
    assert explained_variance(X, X_HAT).item() == pytest.approx(1 - 4.5 / 6.5)
    assert mean_squared_err(X_HAT, X).tolist() == [[2.25, 1], [0.25, 1]]
    torch.testing.assert_close(
        mean_squared_err(X_HAT, X, norm=True), torch.tensor([[0.45, 0.2], [0.025, 0.1]])
    )
    assert normalized_mse(X, X_HAT).item() == pytest.approx((3.25 / 5 + 1.25 / 10) / 2)
    cosines = (4.5 / math.sqrt(5 * 7.25), 7.5 / math.sqrt(10 * 6.25))
    assert cosine_similarity(X, X_HAT).item() == pytest.approx(sum(cosines) / 2)


@pytest.mark.parametrize("reduction", ["ratio_of_sums", "mean_of_ratios"])
def test_predicting_the_mean_leaves_all_variance_unexplained(reduction):
    x, _ = draw(9, 4)
    mean = x.mean(0).expand(9, 4)
    fvu = fraction_of_variance_unexplained(x, mean, reduction=reduction)
    assert fvu.item() == pytest.approx(1)


def test_an_offset_is_not_free():
    x, _ = draw(9, 4)
    # The variance of the error is 0; the error is 4 in each of 4 features.
    expected = 9 * 4 * 4 / ((x - x.mean(0)) ** 2).sum().item()
    assert fraction_of_variance_unexplained(x, x + 2).item() == pytest.approx(expected)


@given(scale=st.floats(1e-3, 1e3), n=st.integers(2, 6), seed=st.integers(0, 2**30))
def test_scale_changes_no_ratio(scale, n, seed):
    x, x_hat = draw(n, 3, seed)
    for measure in (
        fraction_of_variance_unexplained,
        normalized_mse,
        cosine_similarity,
        lambda a, b: mean_squared_err(b, a, True).sum(),
    ):
        torch.testing.assert_close(measure(scale * x, scale * x_hat), measure(x, x_hat))


def test_mean_squared_err_knows_no_other_row():
    x = torch.zeros(2, 3, dtype=torch.float16)
    x_hat = torch.tensor([[1e-3] * 3, [6e4] * 3], dtype=torch.float16)
    error = mean_squared_err(x_hat, x)
    assert error.isfinite().all()
    assert error[0, 0].item() == pytest.approx(1e-6, rel=1e-2)


def test_loss_recovered():
    losses = (torch.tensor(value) for value in (3.5, 3.0, 5.0))
    assert loss_recovered(*losses).item() == 0.75


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 2**30))
def test_statistics_of_a_stream_are_those_of_the_whole(sizes, seed):
    x, x_hat = draw(sum(sizes) + 2, 3, seed)
    sizes = [*sizes, 2]
    seen = errors = None
    for rows, hats in zip(x.split(sizes), x_hat.split(sizes), strict=True):
        part, lost = VarianceStatistics.of(rows), VarianceStatistics.of(rows - hats)
        seen = part if seen is None else seen + part
        errors = lost if errors is None else errors + lost
    assert seen.count.item() == len(x)
    torch.testing.assert_close(seen.variance, x.var(0, correction=0))
    expected = fraction_of_variance_unexplained(x, x_hat)
    torch.testing.assert_close(seen.fraction_unexplained(errors), expected)


def test_statistics_leave_masked_rows_out():
    x, _ = draw(6, 3)
    mask = torch.arange(6) != 2
    expected = VarianceStatistics.of(x[mask])
    x[2] = math.nan
    ours = VarianceStatistics.of(x, mask=mask)
    torch.testing.assert_close(ours.variance, expected.variance)
    assert ours.count == expected.count


RATIOS = {
    "normalized_mse": normalized_mse,
    "mean_squared_err": lambda x, x_hat: mean_squared_err(x_hat, x, norm=True).sum(-1).mean(),
    "fvu": fraction_of_variance_unexplained,
    "fvu, by rows": lambda x, x_hat: fraction_of_variance_unexplained(
        x, x_hat, reduction="mean_of_ratios"
    ),
    "explained_variance": explained_variance,
    "cosine_similarity": cosine_similarity,
}


@pytest.mark.parametrize("size", [3e28, 3e-25, 1e38, 1e-37])
@pytest.mark.parametrize("name", RATIOS)
def test_a_ratio_does_not_depend_on_the_size(name, size):
    """Neither its value nor, but for the factor, its gradient: squares of these leave float32."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    pairs = []
    for scale, dtype in ((1.0, torch.float64), (size, torch.float32)):
        rows = (0.5 * scale * x).to(dtype).requires_grad_()
        guess = (0.5 * scale * (x + 0.3 * noise)).to(dtype).requires_grad_()
        value = RATIOS[name](rows, guess)
        slopes = torch.autograd.grad(value, (rows, guess))
        pairs.append((value.double(), *(slope.double() * scale for slope in slopes)))
    torch.testing.assert_close(*pairs, rtol=2e-5, atol=2e-6)


def test_ratios_by_hand_at_any_size():
    for size in (3e28, 3e-25):
        x = torch.tensor([[size, 0.0]])
        assert normalized_mse(x, torch.zeros(1, 2)).item() == 1
        assert normalized_mse(x, 0.5 * x).item() == 0.25
        half = mean_squared_err(x - x, torch.tensor([[size, size]]), norm=True)
        assert half.tolist() == [[0.5, 0.5]]
