"""VICReg: its paths and strips, known values, its refusals and its precision."""

import math

import pytest
import torch
from losses.vicreg import VICREG
from torch import Tensor

import termwise as tw
from termwise.joint_embedding import VICRegLoss, vicreg_loss

PATHS = ("gram", "covariance", "auto")


def views(n, dim, *, seed=0, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / math.sqrt(dim)
    base = torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mixing
    other = base + 0.5 * torch.randn(n, dim, generator=generator, dtype=torch.float64) + 0.3
    return [(scale * z).to(dtype).requires_grad_() for z in (base, other)]


@pytest.mark.parametrize(
    ("n", "dim", "path"),
    [(20, 600, "covariance"), (600, 9, "gram"), (300, 300, "auto"), (257, 512, "gram")],
)
def test_more_than_one_strip(n, dim, path):
    z1, z2 = views(n, dim)
    terms, expected = vicreg_loss(z1, z2, covariance_path=path), VICREG.expected(z1, z2)
    torch.testing.assert_close(terms.cov, expected["cov"], rtol=1e-11, atol=0)
    ours, theirs = (torch.autograd.grad(cov, (z1, z2)) for cov in (terms.cov, expected["cov"]))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_the_loss_is_the_weighted_sum_of_the_terms_in_the_graph():
    z1, z2 = views(6, 4)
    terms = vicreg_loss(z1, z2, sim_weight=2.0, var_weight=3.0, cov_weight=5.0)
    again = 2 * terms.sim + 3 * terms.var + 5 * terms.cov
    torch.testing.assert_close(terms.loss, again)
    torch.testing.assert_close(
        torch.autograd.grad(terms.loss, z1, retain_graph=True), torch.autograd.grad(again, z1)
    )
    assert not terms.std.requires_grad


def test_defaults_are_the_papers():
    z1, z2 = views(6, 4)
    terms = vicreg_loss(z1, z2)
    torch.testing.assert_close(terms.loss, 25 * terms.sim + 25 * terms.var + terms.cov)


# --- known values ---------------------------------------------------------------------------


def orthogonal_columns(n, dim):
    """Columns of a Hadamard matrix: centred, mutually orthogonal; scaled to unit variance n - 1."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < n:
        hadamard = torch.cat(
            [torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]
        )
    return hadamard[:, 1 : dim + 1] * math.sqrt((n - 1) / n)


@pytest.mark.parametrize("path", PATHS)
def test_whitened_views_have_no_loss(path):
    # By construction: variance 1 = gamma (the hinge is closed: sqrt(1 + eps) > 1), covariance 0.
    z = orthogonal_columns(16, 7).requires_grad_()
    terms = vicreg_loss(z, z.detach(), covariance_path=path)
    for value in (terms.loss, terms.sim, terms.var, terms.cov):
        assert abs(value.item()) < 1e-14
    assert terms.std.item() == pytest.approx(1)
    assert torch.autograd.grad(terms.loss, z)[0].abs().max() < 1e-14


def test_constant_views_pay_the_whole_hinge():
    # Variance 0 in every column: hinge = gamma - sqrt(eps) for each view, and nothing else.
    z = torch.full((8, 5), 3.25)
    terms = vicreg_loss(z, z, gamma=1.5, eps=0.04)
    assert terms.var.item() == pytest.approx(2 * (1.5 - 0.2))
    assert vicreg_loss(z, z, gamma=1.5, eps=0.04, variance_views="mean").var.item() == (
        pytest.approx(1.3)
    )
    assert terms.sim.item() == terms.cov.item() == terms.std.item() == 0


def test_two_rows_by_hand():
    # z1 = rows (0, 0), (2, 4): variances 2 and 8, covariance 4: cov = 2 * 16 / 2. z2 = 0.
    z1 = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    terms = vicreg_loss(z1, torch.zeros(2, 2), eps=0.0, gamma=2.0)
    assert terms.sim.item() == (4 + 16) / 4
    assert terms.var.item() == pytest.approx((2 - math.sqrt(2)) / 2 + 2)
    assert terms.cov.item() == pytest.approx(16)
    assert terms.std.item() == pytest.approx((math.sqrt(2) + math.sqrt(8)) / 4)


# --- derivatives ----------------------------------------------------------------------------


def test_the_hessian_is_the_formulas():
    z1, z2 = (z.detach() for z in views(4, 3))

    def formula(z):
        terms = VICREG.expected(z, z2, gamma=2.0)
        return 25 * terms["sim"] + 25 * terms["var"] + terms["cov"]

    ours = torch.func.hessian(lambda z, path: vicreg_loss(z, z2, gamma=2.0, **path).loss)
    reverse = torch.func.jacrev(torch.func.jacrev(lambda z: vicreg_loss(z, z2, gamma=2.0).loss))
    expected = torch.func.hessian(formula)(z1)
    torch.testing.assert_close(reverse(z1), expected)
    torch.testing.assert_close(ours(z1, {}), expected)
    with pytest.raises(RuntimeError, match="jvp"):
        ours(z1, {"covariance_path": "gram"})


def test_a_gradient_of_one_view_alone():
    z1, z2 = views(6, 4)
    gradient = torch.autograd.grad(vicreg_loss(z1, z2.detach()).loss, z1)
    torch.testing.assert_close(gradient, torch.autograd.grad(vicreg_loss(z1, z2).loss, z1))


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 4), {}, "vicreg_loss needs a batch of at least 2 rows, got 1"),
        ((0, 4), {}, "vicreg_loss needs a batch of at least 2 rows, got 0"),
        ((4, 0), {}, "vicreg_loss needs dim >= 1, got 0"),
        ((4, 2), {"eps": -1e-4}, "vicreg_loss needs gamma >= 0 and eps >= 0, got 1.0 and -0.0001"),
        ((4, 2), {"gamma": -1}, "vicreg_loss needs gamma >= 0 and eps >= 0, got -1 and 0.0001"),
        ((4, 2), {"eps": math.nan}, "vicreg_loss needs gamma >= 0 and eps >= 0, got 1.0 and nan"),
    ],
)
def test_values_that_make_no_sense_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        vicreg_loss(torch.zeros(shape), torch.zeros(shape), **options)


def test_wrong_words_are_refused():
    z = torch.zeros(4, 2)
    with pytest.raises(
        tw.ContractError,
        match=r'^vicreg_loss: covariance_path needs Literal\["auto", "gram", "covariance"\], got '
        'str "fast"$',
    ):
        vicreg_loss(z, z, covariance_path="fast")
    with pytest.raises(tw.ContractError, match="VICRegLoss.__init__: variance_views needs"):
        VICRegLoss(variance_views="avg")
    with pytest.raises(tw.ContractError, match="vicreg_loss: batch_group needs ProcessGroup"):
        vicreg_loss(z, z, batch_group=0)


# --- precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["gram", "covariance"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_lifted_before_any_arithmetic(dtype, path):
    # z.T @ z of these fp16 values overflows: 64 * 40^2 > 65504.
    z1, z2 = views(64, 12, dtype=dtype, scale=40.0)
    terms = vicreg_loss(z1, z2, covariance_path=path)
    wide = [z.detach().double().requires_grad_() for z in (z1, z2)]
    expected = vicreg_loss(*wide, covariance_path=path)
    for (name, ours), (_, theirs) in zip(terms.items(), expected.items(), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-6, msg=name)
    ours = torch.autograd.grad(terms.sim, (z1, z2))
    theirs = torch.autograd.grad(expected.sim, wide)
    for left, right in zip(ours, theirs, strict=True):
        assert left.dtype == dtype
        torch.testing.assert_close(left.double(), right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("path", ["gram", "covariance"])
def test_autocast_changes_nothing(path):
    z1, z2 = views(16, 8, dtype=torch.float32)
    plain = vicreg_loss(z1, z2, covariance_path=path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = vicreg_loss(z1, z2, covariance_path=path)
        second = torch.autograd.grad(cast.loss, z1, create_graph=True)[0].square().sum()
        curvature = torch.autograd.grad(second, z1)
    assert cast.metrics() == plain.metrics()
    assert cast.loss.dtype == torch.float32
    first = torch.autograd.grad(plain.loss, z1, create_graph=True)[0].square().sum()
    torch.testing.assert_close(curvature, torch.autograd.grad(first, z1))


@pytest.mark.parametrize("path", ["gram", "covariance"])
def test_float32_far_from_the_origin(path):
    z1, z2 = ((z.detach() + 1000).float() for z in views(50, 120))
    terms = vicreg_loss(z1, z2, covariance_path=path)
    expected = VICREG.expected(z1.double(), z2.double())
    assert terms.cov.item() == pytest.approx(expected["cov"].item(), rel=1e-5)
    assert terms.std.item() == pytest.approx(expected["std"].item(), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_gram_path_cancels_no_more_than_it_says(seed):
    # Independent columns: off / diagonal is its smallest, dim / (n - 1).
    generator = torch.Generator().manual_seed(seed)
    for n, dim in ((64, 128), (32, 1024), (200, 100)):
        z = torch.randn(n, dim, generator=generator)
        gram = vicreg_loss(z, z, covariance_path="gram").cov.item()
        expected = VICREG.expected(z.double(), z.double())["cov"].item()
        diagonal = 2 * z.double().var(0).square().mean().item()
        assert abs(gram - expected) <= 2e-7 * expected + 1e-8 * (expected + diagonal)


@pytest.mark.parametrize("path", ["gram", "covariance"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_nan_is_repaired(bad, path):
    z1, z2 = (z.detach() for z in views(6, 4))
    z1[2, 1] = bad
    terms = vicreg_loss(z1, z2, covariance_path=path)
    assert not terms.loss.isfinite()
    assert not terms.sim.isfinite()
    assert not terms.cov.isfinite()


def test_inputs_are_left_alone():
    z1, z2 = views(6, 4)
    copies = [z.detach().clone() for z in (z1, z2)]
    vicreg_loss(z1, z2).loss.backward()
    assert torch.equal(z1, copies[0])
    assert torch.equal(z2, copies[1])


def test_strided_views_are_welcome():
    z1, z2 = views(6, 8)
    left, right = z1[:, ::2], z2.T[::2].T
    ours = vicreg_loss(left, right)
    expected = vicreg_loss(left.contiguous(), right.contiguous())
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(
        torch.autograd.grad(ours.loss, z1), torch.autograd.grad(expected.loss, z1)
    )


# --- the module -----------------------------------------------------------------------------


def test_collapse_shows_in_std():
    z = torch.randn(32, 8)
    assert vicreg_loss(z, z).std.item() > 0.5
    constant: Tensor = z[:1].expand(32, 8)
    assert vicreg_loss(constant, constant).std.item() < 1e-6


@pytest.mark.parametrize("path", ["gram", "covariance"])
@pytest.mark.parametrize("scale", [1e9, 1e-12, 1e-15])
@pytest.mark.parametrize(("n", "dim"), [(12, 40), (300, 20)])
def test_the_covariance_is_finite_where_it_fits_float32(n, dim, scale, path):
    z1, z2 = views(n, dim, dtype=torch.float32, scale=scale)
    terms = vicreg_loss(z1, z2, covariance_path=path)
    wide = [z.detach().double().requires_grad_() for z in (z1, z2)]
    expected = VICREG.expected(*wide)["cov"]
    torch.testing.assert_close(terms.cov.double(), expected, rtol=1e-5, atol=1e-44)
    ours = torch.autograd.grad(terms.cov, (z1, z2))
    theirs = torch.autograd.grad(expected, wide)
    for gradient, wanted in zip(ours, theirs, strict=True):
        size = wanted.abs().max().item()
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-5 * size + 1e-44)


def test_a_covariance_beyond_float32_is_infinite_not_nan():
    z1, z2 = views(12, 40, dtype=torch.float32, scale=1e12)
    for path in PATHS:
        assert vicreg_loss(z1, z2, covariance_path=path).cov.item() == math.inf


WEIGHTS = ("sim_weight", "var_weight", "cov_weight")
# sim, var and cov are each infinite where the others are not.
FAR = {
    "sim_weight": ([[3e30, 0.0], [3e30, 1.0]], [[-3e30, 0.0], [-3e30, 1.0]]),
    "var_weight": ([[1.0, 0.0], [1.0, 2.0]], [[1.0, 0.0], [1.0, 3.0]]),
    "cov_weight": ([[1e11, 0.0], [0.0, 1e11]], [[1e11, 0.0], [0.0, 1e11]]),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("path", PATHS)
def test_what_has_weight_0_is_left_out(name, path):
    """Of the value and of the gradient, though 0 times infinity is NaN."""
    z1, z2 = (torch.tensor(z).requires_grad_() for z in FAR[name])
    weights = dict.fromkeys(WEIGHTS, 1.0)
    gamma = math.inf if name == "var_weight" else 1.0
    terms = vicreg_loss(z1, z2, **weights | {name: 0.0}, gamma=gamma, covariance_path=path)
    left = name.removesuffix("_weight")
    assert terms[left].isinf()
    assert terms[left].requires_grad  # to be weighed anew
    torch.testing.assert_close(
        terms.loss, sum(terms[key] for key in ("sim", "var", "cov") if key != left)
    )
    eager = torch.autograd.grad(terms.loss, (z1, z2))
    assert all(gradient.isfinite().all() for gradient in eager)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("path", PATHS)
def test_a_gradient_with_weight_0_is_that_of_the_other_terms(name, path):
    inputs = views(5, 4)
    weights = {"sim_weight": 2.0, "var_weight": 3.0, "cov_weight": 0.5, name: 0.0}
    ours = vicreg_loss(*inputs, **weights, covariance_path=path).loss
    theirs = VICREG.expected(*inputs)
    expected = sum(weights[key] * theirs[key.removesuffix("_weight")] for key in WEIGHTS)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(expected, inputs)
    )


def test_without_a_weight_the_gradient_is_0():
    z1, z2 = (torch.full((3, 2), math.nan, requires_grad=True) for _ in range(2))
    terms = vicreg_loss(z1, z2, sim_weight=0.0, var_weight=0.0, cov_weight=0.0)
    assert terms.loss == 0
    terms.loss.backward()
    assert z1.grad.count_nonzero() == z2.grad.count_nonzero() == 0
