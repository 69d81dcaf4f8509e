"""SIGReg: known values, its precision, derivatives and refusals, and what peers get wrong."""

import math

import pytest
import torch
from losses.sigreg import SIGREG

from termwise.joint_embedding import SIGRegLoss, sigreg_loss, visreg_loss
from termwise.joint_embedding import _slices as core


def unit(dim, count, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(dim, count, generator=generator, dtype=torch.float64)
    return (a / a.norm(dim=0)).to(dtype)


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture(params=[0, 2**40], ids=["many", "few"])
def path(request, monkeypatch):
    monkeypatch.setattr(core, "FEW", request.param)


# --- known values ---------------------------------------------------------------------------


def trapezoid(integrand):
    """On [0, 3] by 17 knots, doubled, in Python's floats."""
    values = [integrand(k * 3 / 16) for k in range(17)]
    return 2 * 3 / 16 * (sum(values) - (values[0] + values[-1]) / 2)


def test_collapse_is_0_40205_for_each_row(path):
    # phi_n = 1: the integral of (1 - g)^2 g with g = exp(-t^2 / 2).
    value = trapezoid(lambda t: (1 - math.exp(-t * t / 2)) ** 2 * math.exp(-t * t / 2))
    assert value == pytest.approx(0.40205, abs=5e-6)
    for n in (1, 7, 100):
        terms = sigreg_loss(torch.zeros(n, 5, dtype=torch.float64), num_slices=3)
        assert terms.loss.item() == pytest.approx(n * value, rel=1e-14)
        assert terms.worst_slice.item() == pytest.approx(n * value, rel=1e-14)
        assert terms.std == terms.mean_square == 0
        each = sigreg_loss(torch.zeros(n, 5), num_slices=3, per_sample=True)
        assert each.loss.item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("n", [1, 8, 50])
def test_samples_of_a_normal_distribution_are_1_05246_on_average(n):
    # E |phi_n - g|^2 = (1 - g^2) / n: the integral of (1 - g^2) g, whatever n is.
    value = trapezoid(lambda t: (1 - math.exp(-t * t)) * math.exp(-t * t / 2))
    assert value == pytest.approx(1.05246, abs=5e-6)
    views = normal(40_000 // n, n, 3)  # each view is a sample of its own
    terms = sigreg_loss(views, slices=unit(3, 4))
    assert terms.loss.item() == pytest.approx(value, abs=0.03)
    assert terms.mean_square.item() == pytest.approx(1, abs=0.02)


def test_views_are_samples_of_their_own():
    z, a = normal(3, 6, 4), unit(4, 5)
    each = [sigreg_loss(view, slices=a) for view in z]
    terms = sigreg_loss(z, slices=a)
    for name in ("loss", "mean_square", "std"):
        torch.testing.assert_close(terms[name], sum(one[name] for one in each) / 3)
    assert terms.worst_slice == max(one.worst_slice for one in each)
    single = sigreg_loss(z[:1], slices=a)
    torch.testing.assert_close(dict(single.items()), dict(each[0].items()))


def test_rotating_embeddings_and_slices_together_changes_nothing():
    z, a = normal(9, 4), unit(4, 5)
    turn, _ = torch.linalg.qr(normal(4, 4, seed=3))
    torch.testing.assert_close(
        sigreg_loss(z @ turn, slices=turn.T @ a).loss, sigreg_loss(z, slices=a).loss
    )


def test_the_gradient_vanishes_at_collapse_where_that_of_a_scale_does_not():
    z = (1e-6 * normal(2, 256, 64)).requires_grad_()
    a = unit(64, 256)
    of_sigreg, of_scale = (
        torch.autograd.grad(term, z)[0].norm().item()
        for term in (sigreg_loss(z, slices=a).loss, visreg_loss(z, slices=a).scale)
    )
    assert of_sigreg == pytest.approx(5e-6, rel=0.1)
    assert of_scale == pytest.approx(2 / math.sqrt(2 * 256 * 64), rel=1e-3)


# --- slices ---------------------------------------------------------------------------------


def test_drawn_slices_are_unit_and_those_of_the_generator():
    z = normal(20, 6)
    drawn = core.slices_of("f", z, None, 50, torch.Generator().manual_seed(5))
    torch.testing.assert_close(drawn.norm(dim=0), torch.ones(50).double(), rtol=1e-6, atol=0)
    # The same directions in every dtype.
    single = core.slices_of("f", z.bfloat16(), None, 50, torch.Generator().manual_seed(5))
    assert torch.equal(single.double(), drawn)
    terms = SIGRegLoss(num_slices=50)(z, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(terms.loss, sigreg_loss(z, slices=drawn).loss)


def test_a_generator_leaves_the_global_one_alone():
    before = torch.random.get_rng_state()
    sigreg_loss(normal(4, 3), generator=torch.Generator())
    assert torch.equal(torch.random.get_rng_state(), before)
    sigreg_loss(normal(4, 3))
    assert not torch.equal(torch.random.get_rng_state(), before)


def test_slices_have_no_gradient():
    a = unit(3, 4).requires_grad_()
    assert not sigreg_loss(normal(5, 3), slices=a).loss.requires_grad


# --- derivatives and memory -----------------------------------------------------------------


def test_the_third_derivative_is_the_formulas(path):
    z, a = normal(3, 2), unit(2, 2)

    def third(loss):
        x = z.clone().requires_grad_()
        for _ in range(3):
            (slope,) = torch.autograd.grad(loss(x), x, create_graph=True)
            loss = lambda _, slope=slope: slope.square().sum()  # noqa: E731
        return slope

    ours = third(lambda x: sigreg_loss(x, slices=a, knots=5).loss)
    theirs = third(lambda x: SIGREG.expected(x, slices=a, knots=5)["loss"])
    torch.testing.assert_close(ours, theirs)


def test_nothing_of_rows_times_slices_times_knots_is_stored():
    z, a = normal(256, 8, dtype=torch.float32).requires_grad_(), unit(8, 64, dtype=torch.float32)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: sizes.append(x.numel()) or x, lambda x: x
    ):
        sigreg_loss(z, slices=a).loss.backward()
    assert max(sizes) == 256 * 64  # projections, once


# --- precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_halves_are_lifted_and_rows_are_counted_as_integers(dtype, path):
    # 1001 rows are 1000 in bfloat16.
    z, a = normal(1001, 4, dtype=dtype).requires_grad_(), unit(4, 8)
    wide = z.detach().double().requires_grad_()
    ours, theirs = sigreg_loss(z, slices=a), sigreg_loss(wide, slices=a)
    assert ours.loss.dtype == torch.float32
    for (name, left), (_, right) in zip(ours.items(), theirs.items(), strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-5, atol=1e-6, msg=name)
    (left,), (right,) = (
        torch.autograd.grad(terms.loss, x) for terms, x in ((ours, z), (theirs, wide))
    )
    assert left.dtype == dtype
    scale = right.abs().max().item()
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(left.double(), right, rtol=tolerance, atol=tolerance * scale)
    collapsed = sigreg_loss(torch.zeros(1001, 4, dtype=dtype), slices=a).loss
    assert collapsed.item() == pytest.approx(0.4020475797316646 * 1001, rel=1e-6)


def test_float64_is_float64_throughout(path):
    z, a = normal(40, 4), unit(4, 8)
    terms, expected = sigreg_loss(z, slices=a), SIGREG.expected(z, slices=a)
    for name, value in terms.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, expected[name], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("knots", [17, 129])
def test_powers_lose_no_digits_that_cosines_have(knots, monkeypatch):
    z, a = normal(64, 4, dtype=torch.float32).requires_grad_(), unit(4, 8, dtype=torch.float32)
    expected = sigreg_loss(z.detach().double(), slices=a.double(), knots=knots)
    monkeypatch.setattr(core, "FEW", 0)
    assert sigreg_loss(z, slices=a, knots=knots).loss.item() == pytest.approx(
        expected.loss.item(), rel=3e-6
    )


def test_std_shows_collapse_far_from_zero():
    z = (100 + 1e-3 * normal(500, 4)).float()
    assert sigreg_loss(z, num_slices=2).std.item() == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_nan_is_repaired(bad, path):
    z = normal(6, 4)
    z[2, 1] = bad
    for name, value in sigreg_loss(z, num_slices=3).items():
        assert not value.isfinite(), name


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((0, 4), {}, "sigreg_loss needs at least one row, got 0"),
        ((2, 0, 4), {}, "sigreg_loss needs at least one row, got 0"),
        ((0, 3, 4), {}, "sigreg_loss needs at least one view, got 0"),
        ((4, 0), {}, "sigreg_loss needs dim >= 1, got 0"),
        ((4, 2), {"num_slices": 0}, "sigreg_loss needs at least one slice, got 0"),
        ((4, 2), {"slices": torch.zeros(2, 0)}, "sigreg_loss needs at least one slice, got 0"),
        ((4, 2), {"knots": 1}, "sigreg_loss needs t_max > 0 and knots >= 2, got 3.0 and 1"),
        ((4, 2), {"t_max": 0}, "sigreg_loss needs t_max > 0 and knots >= 2, got 0 and 17"),
        ((4, 2), {"t_max": math.nan}, "sigreg_loss needs t_max > 0 .* got nan and 17"),
    ],
)
def test_values_that_make_no_sense_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        sigreg_loss(torch.zeros(shape), **options)
