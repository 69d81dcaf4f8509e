"""VICReg of many views and VCReg: known values, what they share with VICReg, refusals."""

import itertools
import math

import pytest
import torch
from losses.multi_view_vicreg import MULTI_VIEW_VICREG
from losses.variance_covariance import VARIANCE_COVARIANCE

import termwise as tw
from termwise.joint_embedding import (
    MultiViewVICRegLoss,
    multi_view_vicreg_loss,
    variance_covariance_loss,
    vicreg_loss,
)


def views(count, n, dim, *, dtype=torch.float64, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, n, dim, generator=generator, dtype=torch.float64)
    return (scale * (base + 0.5 * noise)).to(dtype).requires_grad_()


# --- effective rank -------------------------------------------------------------------------


def ranks(z):
    pair = torch.stack((z, z))
    losses = (
        variance_covariance_loss(z),
        vicreg_loss(z, z),
        vicreg_loss(z, z, covariance_path="gram"),
        multi_view_vicreg_loss(pair),
    )
    assert not any(terms.rank.requires_grad for terms in losses)
    return [terms.rank.item() for terms in losses]


def test_rank_is_dim_where_no_direction_is_preferred():
    # All signs of 4 columns: variances alike, covariances 0.
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), requires_grad=True)
    assert ranks(signs) == pytest.approx([4] * 4)
    # Variances 4, 1: (4 + 1)^2 / (16 + 1).
    corners = torch.tensor([[2.0, 1.0], [2.0, -1.0], [-2.0, 1.0], [-2.0, -1.0]])
    assert ranks(corners) == pytest.approx([25 / 17] * 4)


def test_rank_is_1_on_a_line_however_large_std_is():
    line = torch.linspace(-9, 9, 12)[:, None] * torch.tensor([1.0, -2.0, 0.5])
    assert ranks(line) == pytest.approx([1] * 4, rel=1e-5)
    assert variance_covariance_loss(line).std > 5


def test_rank_is_0_where_nothing_varies_and_nan_of_a_nan():
    assert ranks(torch.full((8, 3), 2.5)) == [0] * 4
    assert all(map(math.isnan, ranks(torch.full((8, 3), math.nan))))


def test_rank_of_two_views_is_their_mean():
    line = torch.tensor([[1.0, 1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, -1.0]])
    square = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert vicreg_loss(line, square).rank == 1.5
    assert multi_view_vicreg_loss(torch.stack((line, line, square))).rank.item() == (
        pytest.approx(4 / 3)
    )


def test_rank_does_not_overflow_before_the_variance_does():
    z = views(1, 6, 4, dtype=torch.float32, scale=1e18)[0]
    expected = VARIANCE_COVARIANCE.expected(z.double())["rank"]
    assert variance_covariance_loss(z).rank.item() == pytest.approx(expected.item(), rel=1e-5)


# --- many views -----------------------------------------------------------------------------


def test_two_views_are_vicreg_with_means_over_views():
    z = views(2, 9, 5)
    ours = multi_view_vicreg_loss(z, gamma=2.0)
    pair = vicreg_loss(*z, gamma=2.0, variance_views="mean", covariance_views="mean")
    assert dict(ours.items()).keys() - {"invariance"} == dict(pair.items()).keys() - {"sim"}
    for name in ("loss", "var", "cov", "std", "rank"):
        torch.testing.assert_close(ours[name], pair[name], rtol=1e-14, atol=0)
    torch.testing.assert_close(ours.invariance, pair.sim)


def test_one_view_of_vicreg_is_vcreg():
    z1, z2 = views(2, 9, 5)
    one, other = variance_covariance_loss(z1), variance_covariance_loss(z2)
    both = vicreg_loss(z1, z2, sim_weight=0.0)
    torch.testing.assert_close(one.loss + other.loss, both.loss)


@pytest.mark.parametrize("num_global", [1, 2, None])
def test_every_local_view_counts(num_global):
    """A peer overwrites its sum within the loop over views: the last one alone counts there."""
    z = views(5, 6, 3)
    terms = multi_view_vicreg_loss(z, num_global=num_global, gamma=3.0)
    for name in ("invariance", "var", "cov"):
        (gradient,) = torch.autograd.grad(terms[name], z, retain_graph=True)
        assert (gradient.abs().sum((1, 2)) > 1e-6).all(), name
    order = [*range(num_global or 5), *reversed(range(num_global or 5, 5))]
    again = multi_view_vicreg_loss(z[order], num_global=num_global, gamma=3.0)
    torch.testing.assert_close(again.loss, terms.loss)


def test_local_views_are_not_compared_with_each_other():
    z = torch.tensor([[[0.0], [1.0]], [[2.0], [3.0]], [[-2.0], [-1.0]]])
    # One global view: both pairs differ by 2. Of all pairs the locals' differ by 4.
    assert multi_view_vicreg_loss(z, num_global=1).invariance == 4
    assert multi_view_vicreg_loss(z).invariance.item() == pytest.approx((4 + 4 + 16) / 3)


@pytest.mark.parametrize(("n", "dim"), [(40, 300), (600, 70), (150, 301)])
def test_beyond_small_sizes(n, dim):
    z = views(3, n, dim)
    ours = multi_view_vicreg_loss(z, num_global=2).loss
    expected = MULTI_VIEW_VICREG.expected(z, num_global=2)["loss"]
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(expected, z))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_lifted_before_any_arithmetic(dtype):
    z = views(3, 64, 12, dtype=dtype, scale=40.0)
    for ours, theirs in (
        (multi_view_vicreg_loss(z), multi_view_vicreg_loss(z.double())),
        (variance_covariance_loss(z[0]), variance_covariance_loss(z[0].double())),
    ):
        for (name, value), (_, wide) in zip(ours.items(), theirs.items(), strict=True):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), wide, rtol=2e-6, atol=1e-6, msg=name)


# --- weights of 0, and refusals -------------------------------------------------------------


def test_without_a_weight_the_gradient_is_0():
    z = torch.full((2, 3, 2), math.nan, requires_grad=True)
    none = {"invariance_weight": 0.0, "var_weight": 0.0, "cov_weight": 0.0}
    for loss in (
        multi_view_vicreg_loss(z, **none).loss,
        variance_covariance_loss(z[0], var_weight=0.0, cov_weight=0.0).loss,
    ):
        assert loss == 0
        (gradient,) = torch.autograd.grad(loss, z)
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 4, 2), {}, "needs z with at least 2 views along its first axis, got 1: .*"),
        ((2, 4, 2), {"num_global": 3}, "needs num_global between 1 and the 2 views of z, got 3"),
        ((2, 4, 2), {"num_global": 0}, "needs num_global between 1 and the 2 views of z, got 0"),
        ((2, 1, 4), {}, "needs a batch of at least 2 rows, got 1"),
        ((2, 4, 0), {}, "needs dim >= 1, got 0"),
        ((2, 4, 2), {"eps": -1.0}, "needs gamma >= 0 and eps >= 0, got 1.0 and -1.0"),
    ],
)
def test_values_that_make_no_sense_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=f"^multi_view_vicreg_loss {message}$"):
        multi_view_vicreg_loss(torch.zeros(shape), **options)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 4), {}, "needs a batch of at least 2 rows, got 1"),
        ((4, 0), {}, "needs dim >= 1, got 0"),
        ((4, 2), {"gamma": math.nan}, "needs gamma >= 0 and eps >= 0, got nan and 0.0001"),
    ],
)
def test_vcreg_refuses_alike(shape, options, message):
    with pytest.raises(ValueError, match=f"^variance_covariance_loss {message}$"):
        variance_covariance_loss(torch.zeros(shape), **options)


def test_two_views_side_by_side_are_refused():
    z = torch.zeros(4, 2)
    with pytest.raises(tw.ContractError, match=r'z needs Float\[Tensor, "views batch dim"\]'):
        multi_view_vicreg_loss(z)
    with pytest.raises(tw.ContractError, match="num_global needs"):
        MultiViewVICRegLoss(num_global=1.5)
