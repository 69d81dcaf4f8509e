"""MMCR: optima by hand, rank deficiency, second derivatives, refusals."""

import math

import pytest
import torch
from losses.mmcr import MMCR

import termwise as tw
from termwise.joint_embedding import MMCRLoss, mmcr_loss


def views(count, n, dim, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, n, dim, generator=generator, dtype=torch.float64)
    return (z + 0.5 * noise).to(dtype).requires_grad_()


@pytest.mark.parametrize(("n", "dim"), [(3, 3), (3, 7)])
@pytest.mark.parametrize("count", [2, 5])
def test_equal_views_of_orthogonal_samples_are_perfect(n, dim, count):
    # Lengths do not matter: rows are normalised.
    lengths = torch.arange(1.0, n + 1, dtype=torch.float64)[:, None]
    z = (torch.eye(n, dim, dtype=torch.float64) * lengths).expand(count, n, dim).clone()
    z.requires_grad_()
    terms = mmcr_loss(z, local_weight=0.3)
    assert terms.centroid_nuclear.item() == pytest.approx(n)
    assert terms.local_nuclear.item() == pytest.approx(math.sqrt(count))
    assert terms.loss.item() == pytest.approx(-n + 0.3 * math.sqrt(count))
    assert torch.autograd.grad(terms.loss, z)[0].abs().max() < 1e-7


def test_one_direction_for_all_is_collapse():
    # Rank 1: the only singular value is sqrt(n).
    z = torch.ones(2, 9, 4, dtype=torch.float64)
    assert mmcr_loss(z, local_weight=0.0).loss.item() == pytest.approx(-3)


def test_opposite_views_cancel_in_the_centroid():
    z = torch.eye(3, dtype=torch.float64)
    terms = mmcr_loss(torch.stack((z, -z)), local_weight=1.0)
    assert terms.centroid_nuclear == 0
    assert terms.local_nuclear.item() == pytest.approx(math.sqrt(2))


def test_orthogonal_views_are_no_longer_together():
    z = torch.eye(2, dtype=torch.float64)[:, None]  # two views of one sample
    assert mmcr_loss(z, local_weight=1.0).local_nuclear.item() == pytest.approx(2)


@pytest.mark.parametrize(("n", "dim"), [(5, 40), (40, 5), (12, 12)])
def test_both_gram_matrices(n, dim):
    z = views(3, n, dim)
    ours, expected = mmcr_loss(z, local_weight=0.7), MMCR.expected(z, local_weight=0.7)
    for name, value in ours.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=0)
    gradients = [torch.autograd.grad(terms["loss"], z) for terms in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)


def test_float32_of_no_full_rank_keeps_its_digits():
    # Roots of eigenvalues in float32 would be 3e-4 for each that is 0: here 60 of 64.
    z = views(2, 64, 4).detach() @ torch.randn(4, 64, dtype=torch.float64)
    narrow = z.float().requires_grad_()
    ours = mmcr_loss(narrow, local_weight=0.0)
    assert ours.loss.dtype == torch.float32
    expected = MMCR.expected(z, local_weight=0.0)["loss"].item()
    assert ours.loss.item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.grad(ours.loss, narrow)[0].isfinite().all()


def test_rounding_of_singular_values_that_are_0_is_not_counted():
    # 4 of 6 are 0: roots of rounded eigenvalues would be 1e-8 each, in another way for other rows.
    z = views(2, 40, 2).detach() @ torch.randn(2, 6, dtype=torch.float64)
    order = torch.randperm(40)
    ours, others = (mmcr_loss(x, local_weight=0.3) for x in (z, z[:, order]))
    torch.testing.assert_close(ours.loss, others.loss, rtol=1e-13, atol=0)
    expected = MMCR.expected(z, local_weight=0.3)["loss"]
    torch.testing.assert_close(ours.loss, expected, rtol=1e-13, atol=0)


def test_a_row_of_zeros_has_no_gradient():
    z = views(2, 4, 3).detach()
    z[:, 1] = 0
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(mmcr_loss(z, local_weight=1.0).loss, z)
    assert gradient[:, 0].norm() > 0
    # The centroid of zeros could become any direction: the push is as long as 1 / eps.
    assert gradient.isfinite().all()


def test_second_derivatives_where_singular_values_coincide():
    z = (torch.eye(3, dtype=torch.float64) + 0.0).expand(2, 3, 3).clone()

    def loss(z):
        return mmcr_loss(z, local_weight=0.0).loss

    hessian = torch.func.jacrev(torch.func.jacrev(loss))(z)
    step, row = 1e-5, torch.zeros_like(z)
    row[0, 1, 2] = step
    gradient = torch.func.grad(loss)
    expected = (gradient(z + row) - gradient(z - row)) / (2 * step)
    torch.testing.assert_close(hessian[..., 0, 1, 2], expected, rtol=1e-5, atol=1e-7)


def test_third_derivatives_are_refused():
    z = views(2, 3, 3).detach()
    third = torch.func.jacrev(
        torch.func.jacrev(torch.func.jacrev(lambda z: mmcr_loss(z, local_weight=0.0).loss))
    )
    with pytest.raises(NotImplementedError, match="no second derivative"):
        third(z)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_nan_is_repaired_and_none_raises(bad):
    z = views(2, 4, 3).detach()
    z[1, 2, 0] = bad
    terms = mmcr_loss(z, local_weight=0.1)
    assert terms.loss.isnan()
    assert terms.local_nuclear.isnan()


def test_it_compiles_with_symbols_for_sizes():
    z = views(2, 8, 5).requires_grad_()
    compiled = torch.compile(mmcr_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    ours, eager = (
        torch.autograd.grad(loss(z, local_weight=0.1).loss, z)[0] for loss in (compiled, mmcr_loss)
    )
    torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype):
    z = views(2, 8, 5, dtype)
    ours, wide = mmcr_loss(z, local_weight=0.1), mmcr_loss(z.double(), local_weight=0.1)
    assert ours.loss.dtype == torch.float32
    torch.testing.assert_close(ours.loss.double(), wide.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 2), "mmcr_loss needs z with at least 2 views along its first axis, got 1: .*"),
        ((2, 0, 2), "mmcr_loss needs a batch of at least 1 row, got 0"),
        ((2, 4, 0), "mmcr_loss needs dim >= 1, got 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(shape, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        mmcr_loss(torch.zeros(shape), local_weight=0.1)


def test_a_weight_is_needed():
    with pytest.raises(tw.ContractError, match="local_weight"):
        MMCRLoss(local_weight="much")
    with pytest.raises(TypeError, match="local_weight"):
        MMCRLoss()
