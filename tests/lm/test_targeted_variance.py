"""Targeted variance: blocks, known values, its refusals and its precision."""

import math

import pytest
import torch
from losses.targeted_variance import TARGETED_VARIANCE

import termwise as tw
from termwise.lm import TargetedVarianceLoss, TargetedVarianceTerms, targeted_variance_loss


def embedding(vocab, dim, *, seed=0, dtype=torch.float64, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab, dim, generator=generator, dtype=torch.float64) * scale + shift
    return weight.to(dtype).requires_grad_()


def test_more_than_one_block():
    weight = embedding(300, 2000)  # blocks of 131 rows
    terms, expected = targeted_variance_loss(weight), TARGETED_VARIANCE.expected(weight)
    torch.testing.assert_close(terms.variance, expected["variance"], rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(terms.loss, weight),
        torch.autograd.grad(expected["loss"], weight),
        rtol=1e-10,
        atol=1e-18,
    )


def test_known_values():
    # Rows 1, 3 and 0, 4 have biased variances 1 and 4: V = 2.5, loss = 0.1 * 4, by hand.
    terms = targeted_variance_loss(torch.tensor([[1.0, 3.0], [0.0, 4.0]]), target=0.5)
    assert terms.metrics() == pytest.approx({"loss": 0.4, "squared_error": 4.0, "variance": 2.5})


def test_no_loss_and_no_gradient_at_the_target():
    weight = torch.tensor([[1.0, -1.0], [4.0, 2.0]], requires_grad=True)
    terms = targeted_variance_loss(weight)
    assert terms.loss.item() == 0
    assert not torch.autograd.grad(terms.loss, weight)[0].any()


def test_rows_that_do_not_count_may_hold_anything():
    weight = embedding(4, 3).detach()
    weight[1], weight[3] = math.nan, math.inf
    weight.requires_grad_()
    valid_rows = torch.tensor([True, False, True, False])
    terms = targeted_variance_loss(weight, valid_rows=valid_rows)
    expected = TARGETED_VARIANCE.expected(weight.detach(), valid_rows=valid_rows)
    torch.testing.assert_close(terms.loss, expected["loss"])
    for create_graph in (True, False):
        (gradient,) = torch.autograd.grad(
            terms.loss, weight, retain_graph=True, create_graph=create_graph
        )
        assert gradient.isfinite().all()
        assert not gradient[~valid_rows].any()
        assert gradient[valid_rows].any()


def test_a_row_that_counts_is_never_repaired():
    weight = embedding(4, 3).detach()
    weight[1, 1] = math.nan
    assert targeted_variance_loss(weight).loss.isnan()
    nothing = targeted_variance_loss(weight, valid_rows=torch.zeros(4, dtype=torch.bool))
    assert nothing.loss.isnan()


def test_width_zero_has_variance_zero():
    weight = torch.zeros(4, 0, requires_grad=True)
    terms = targeted_variance_loss(weight, coefficient=0.5, target=3.0)
    assert terms.metrics() == {"loss": 4.5, "squared_error": 9.0, "variance": 0.0}
    assert torch.autograd.grad(terms.loss, weight)[0].shape == (4, 0)


def test_bfloat16_sees_a_variance_of_1_002():
    # In bfloat16 itself 1.002 is 1: no loss, no gradient.
    rows = torch.randn(512, 256, dtype=torch.float64)
    rows = (rows - rows.mean(1, keepdim=True)) / rows.std(1, correction=0, keepdim=True)
    weight = (rows * math.sqrt(1.002)).to(torch.bfloat16).requires_grad_()
    terms = targeted_variance_loss(weight)
    exact = TARGETED_VARIANCE.expected(weight.detach().double())
    assert terms.variance.dtype == torch.float32
    assert terms.variance.item() == pytest.approx(exact["variance"].item(), rel=1e-6)
    assert terms.loss.item() == pytest.approx(exact["loss"].item(), rel=1e-3)
    (gradient,) = torch.autograd.grad(terms.loss, weight, retain_graph=True)
    assert gradient.dtype == torch.bfloat16
    wide = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(TARGETED_VARIANCE.expected(wide)["loss"], wide)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=1e-3 * 1e-6)
    (plain,) = torch.autograd.grad(terms.loss, weight, create_graph=True)
    torch.testing.assert_close(plain, gradient, rtol=1e-2, atol=1e-9)


def test_float32_far_from_the_origin():
    weight = embedding(40, 64, dtype=torch.float32, shift=300.0)
    exact = TARGETED_VARIANCE.expected(weight.detach().double())["variance"].item()
    assert targeted_variance_loss(weight).variance.item() == pytest.approx(exact, rel=1e-5)


def test_strided_weights():
    weight = embedding(6, 8)
    ours = targeted_variance_loss(weight.T[::2])
    expected = TARGETED_VARIANCE.expected(weight.T[::2])
    torch.testing.assert_close(ours.loss, expected["loss"])
    torch.testing.assert_close(
        torch.autograd.grad(ours.loss, weight), torch.autograd.grad(expected["loss"], weight)
    )


@pytest.mark.parametrize(
    ("shape", "target", "message"),
    [
        ((0, 4), 1.0, "targeted_variance_loss needs at least 1 row, got 0"),
        ((2, 4), -0.5, "targeted_variance_loss needs target >= 0, got -0.5"),
        ((2, 4), math.nan, "targeted_variance_loss needs target >= 0, got nan"),
    ],
)
def test_values_that_make_no_sense_are_refused(shape, target, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        targeted_variance_loss(torch.zeros(shape), target=target)


def test_wrong_shapes_are_refused():
    weight = torch.zeros(4, 3)
    with pytest.raises(
        tw.ContractError,
        match=r'^targeted_variance_loss: valid_rows needs Bool\[Tensor, " vocab"\] \| None, got '
        r"bool\[3\]: axis vocab is 3, but it is 4 in weight$",
    ):
        targeted_variance_loss(weight, valid_rows=torch.ones(3, dtype=torch.bool))
    with pytest.raises(tw.ContractError, match="weight needs .*: int64 is not a dtype of Float"):
        targeted_variance_loss(weight.long())


def test_the_module_is_the_function():
    weight = embedding(5, 4)
    loss_fn = TargetedVarianceLoss(coefficient=0.3, target=0.2)
    valid_rows = torch.arange(5) < 4
    terms = loss_fn(weight, valid_rows=valid_rows)
    assert isinstance(terms, TargetedVarianceTerms)
    expected = targeted_variance_loss(weight, coefficient=0.3, target=0.2, valid_rows=valid_rows)
    assert terms.metrics() == expected.metrics()
    assert repr(loss_fn) == "TargetedVarianceLoss(coefficient=0.3, target=0.2)"


def test_a_coefficient_of_0_leaves_out_what_overflows():
    weight = torch.tensor([[-1e30, 1e30]], requires_grad=True)
    terms = targeted_variance_loss(weight, coefficient=0.0)
    assert terms.squared_error.isinf()
    assert terms.loss == 0
    assert not torch.autograd.grad(terms.loss, weight)[0].any()
