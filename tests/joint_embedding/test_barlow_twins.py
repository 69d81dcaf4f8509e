"""Barlow Twins: optima by hand, its paths, three ways to standardise, precision and refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from losses.barlow_twins import BARLOW_TWINS, always, never

import termwise as tw
from termwise import _cross_moments
from termwise.joint_embedding import barlow_twins_loss


@pytest.fixture(params=["small", "gram", "covariance"])
def path(request, monkeypatch):
    if request.param != "small":
        monkeypatch.setattr(_cross_moments, "is_small", never)
        gram = always if request.param == "gram" else never
        monkeypatch.setattr(_cross_moments, "takes_gram", gram)
    return request.param


def views(n, dim, *, dtype=torch.float64, shift=0.3):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, n, dim, generator=generator, dtype=torch.float64)
    return [(base + 0.5 * one + shift).to(dtype).requires_grad_() for one in noise]


# Centred, mutually orthogonal columns of biased variance v.
SIGNS = torch.tensor(
    [[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64, requires_grad=True
)


@pytest.mark.parametrize("scale", [1.0, 0.5, 3.0])
def test_orthogonal_columns(path, scale):
    e = scale**2 / (scale**2 + 0.25)
    z = scale * SIGNS
    terms = barlow_twins_loss(z, z, eps=0.25)
    assert terms.loss.item() == pytest.approx(3 * (1 - e) ** 2)
    assert terms.off_diagonal.item() == pytest.approx(0, abs=1e-15)
    assert terms.alignment.item() == pytest.approx(e)
    assert terms.std.item() == pytest.approx(scale)
    assert terms.rank.item() == pytest.approx(3)
    assert barlow_twins_loss(z, -z, eps=0.25).loss.item() == pytest.approx(3 * (1 + e) ** 2)


def test_equal_columns(path):
    z = SIGNS[:, :1].expand(4, 5)
    e = 1 / 1.25
    terms = barlow_twins_loss(z, z, eps=0.25, off_weight=0.1)
    assert terms.loss.item() == pytest.approx(5 * (1 - e) ** 2 + 0.1 * 5 * 4 * e**2)
    assert terms.rank.item() == pytest.approx(1)


def test_at_the_optimum_there_is_no_gradient(path):
    (gradient,) = torch.autograd.grad(barlow_twins_loss(SIGNS, SIGNS, eps=1e-12).loss, SIGNS)
    assert gradient.abs().max() < 1e-10


def test_constant_columns(path):
    # A = 0: every C_jj is 0, and pushes nowhere.
    z = torch.zeros(6, 4, requires_grad=True)
    for added_to in ("variance", "deviation"):
        terms = barlow_twins_loss(z, z, eps_added_to=added_to)
        assert (terms.loss, terms.rank, terms.alignment) == (4, 0, 0)
        assert terms.std < 1e-5  # of few elements known from 1 / sqrt(variance + eps)
        assert torch.autograd.grad(terms.loss, z)[0].count_nonzero() == 0
    assert barlow_twins_loss(z, z, eps=0.0).loss.isnan()


def test_each_view_has_its_own_statistics_and_gradient(path):
    """A peer standardises the second view twice, and ignores the first."""
    z1, z2 = views(9, 4)
    loss = barlow_twins_loss(z1, z2).loss
    for gradient in torch.autograd.grad(loss, (z1, z2), retain_graph=True):
        assert gradient.norm() > 1e-3
    other = views(9, 4)[1].detach().flip(0)
    assert abs(barlow_twins_loss(other, z2).loss - loss) > 1e-2
    # Each view may be scaled and shifted by itself.
    torch.testing.assert_close(barlow_twins_loss(7 * z1 + 2, z2, eps=1e-14).loss,
                               barlow_twins_loss(z1, z2, eps=1e-14).loss)  # fmt: skip


def test_the_authors_way_is_batch_normalization(path):
    z = views(12, 5)
    correlation = (
        F.batch_norm(z[0], None, None, training=True).T
        @ F.batch_norm(z[1], None, None, training=True)
        / 12
    )
    identity = torch.eye(5, dtype=torch.float64)
    expected = ((correlation - identity) ** 2 * torch.where(identity > 0, 1.0, 5e-3)).sum()
    torch.testing.assert_close(barlow_twins_loss(*z).loss, expected)
    ours = barlow_twins_loss(*z, loss_scale=0.025).loss  # solo-learn's
    torch.testing.assert_close(ours, 0.025 * expected)


def test_an_unbiased_deviation_with_eps_outside(path):
    z = views(12, 5)
    a, b = ((one - one.mean(0)) / (one.std(0) + 1e-5) for one in z)
    correlation = a.T @ b / 12
    on = (correlation.diagonal() - 1).square().sum()
    off = correlation.square().sum() - correlation.diagonal().square().sum()
    ours = barlow_twins_loss(*z, correction=1, eps_added_to="deviation").loss
    torch.testing.assert_close(ours, on + 5e-3 * off)
    equal = barlow_twins_loss(z[0], z[0], correction=1, eps_added_to="deviation", eps=0.0)
    assert equal.alignment.item() == pytest.approx(11 / 12)


@pytest.mark.parametrize(("n", "dim"), [(300, 600), (300, 300), (600, 70)])
@pytest.mark.parametrize("options", [{}, {"correction": 1, "eps_added_to": "deviation"}], ids=str)
def test_more_than_one_strip(n, dim, options):
    z = views(n, dim)
    ours, expected = barlow_twins_loss(*z, **options), BARLOW_TWINS.expected(*z, **options)
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-13)
    for name in ("on_diagonal", "off_diagonal", "loss"):
        gradients = [
            torch.autograd.grad(terms[name], z, retain_graph=True) for terms in (ours, expected)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_the_gram_path_is_taken_for_few_rows():
    assert _cross_moments.takes_gram(256, 512)
    assert not _cross_moments.takes_gram(257, 512)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_lifted_before_any_arithmetic(path, dtype):
    z = [(400 * one).to(dtype).detach().requires_grad_() for one in views(64, 12)]
    wide = [one.detach().double().requires_grad_() for one in z]
    ours, theirs = barlow_twins_loss(*z), barlow_twins_loss(*wide)
    for (name, value), (_, expected) in zip(ours.items(), theirs.items(), strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6, msg=name)
    for left, right in zip(
        torch.autograd.grad(ours.loss, z), torch.autograd.grad(theirs.loss, wide), strict=True
    ):
        assert left.dtype == dtype
        size = right.abs().max().item()
        torch.testing.assert_close(left.double() / size, right / size, rtol=1e-2, atol=1e-2)


def test_float32_far_from_the_origin(path):
    z = [one.float() for one in views(50, 120, dtype=torch.float32, shift=1000.0)]
    expected = BARLOW_TWINS.expected(*(one.double() for one in z))["loss"]
    assert barlow_twins_loss(*z).loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_nan_is_repaired(path, bad):
    z1, z2 = (one.detach() for one in views(6, 4))
    z1[2, 1] = bad
    assert not barlow_twins_loss(z1, z2).loss.isfinite()


def test_off_weight_0_leaves_the_term_out(path):
    z = views(6, 4)
    terms = barlow_twins_loss(*z, off_weight=0.0)
    assert terms.loss == terms.on_diagonal
    assert terms.off_diagonal.requires_grad
    (gradient, _) = torch.autograd.grad(barlow_twins_loss(*z, loss_scale=0.0).loss, z)
    assert gradient.count_nonzero() == 0


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 4), {}, "barlow_twins_loss needs a batch of at least 2 rows, got 1"),
        ((4, 0), {}, "barlow_twins_loss needs dim >= 1, got 0"),
        ((4, 2), {"eps": -1e-5}, "barlow_twins_loss needs eps >= 0, got -1e-05"),
    ],
)
def test_values_that_make_no_sense_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        barlow_twins_loss(torch.zeros(shape), torch.zeros(shape), **options)


def test_wrong_words_are_refused():
    z = torch.zeros(4, 2)
    with pytest.raises(tw.ContractError, match=r"correction needs Literal\[0, 1\], got int 2"):
        barlow_twins_loss(z, z, correction=2)
    with pytest.raises(tw.ContractError, match="axis batch is 3, but it is 4 in z1"):
        barlow_twins_loss(z, z[:3])
