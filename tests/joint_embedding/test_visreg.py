"""VISReg: known values, collapse, its paths and precision, and refusals."""

import math

import pytest
import torch
from losses.visreg import VISREG

from termwise.joint_embedding import _slices as core
from termwise.joint_embedding import visreg_loss


def views(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


SLICES = torch.nn.functional.normalize(views(4, 150, seed=7), dim=0)


def test_collapse():
    # Standard deviation 0: scale 1, center |mean|^2 / d, and projections of 0 beside quantiles.
    z = torch.tensor([1.0, -2.0, 0.0, 3.0]).expand(2, 9, 4)
    terms = visreg_loss(z, num_slices=5)
    assert terms.scale == 1
    assert terms.center == (1 + 4 + 9) / 4
    assert terms.invariance == 0
    quantiles = torch.special.ndtri(torch.arange(1, 10, dtype=torch.float64) / 10)
    assert terms.shape.item() == pytest.approx(quantiles.square().mean().item(), rel=1e-6)


def test_the_gradient_at_collapse_is_finite_and_just_before_it_is_that_of_the_scale():
    z = torch.zeros(2, 9, 4, requires_grad=True)
    terms = visreg_loss(z, num_slices=5)
    assert torch.autograd.grad(terms.loss, z)[0].isfinite().all()
    z = (1e-6 * views(2, 9, 4)).requires_grad_()
    (gradient,) = torch.autograd.grad(visreg_loss(z, num_slices=5).scale, z)
    assert gradient.norm().item() == pytest.approx(2 / math.sqrt(2 * 9 * 4), rel=1e-4)


def test_two_rows_by_hand():
    # Columns 0 and 2: mean 1, standard deviation 1, standardised -1 and 1; quantiles of 1/3, 2/3.
    z = torch.tensor([[[0.0], [2.0]], [[0.0], [2.0]]])
    terms = visreg_loss(z, slices=torch.ones(1, 1), eps=0.0)
    q = 0.4307272992954576
    assert terms.metrics() == {
        "loss": pytest.approx(0.9 * (1 + (1 - q) ** 2)),
        "invariance": 0,
        "center": 1,
        "scale": 0,
        "shape": pytest.approx((1 - q) ** 2),
    }


def test_shape_and_scale_are_apart():
    z = views(2, 40, 4)
    plain = visreg_loss(z, slices=SLICES, eps=0.0)
    moved = visreg_loss(3 * z + 5, slices=SLICES, eps=0.0)
    torch.testing.assert_close(moved.shape, plain.shape)
    assert moved.scale > plain.scale + 1
    assert moved.center > plain.center + 10


def test_quantiles_of_a_normal_distribution_have_no_shape():
    quantiles = torch.special.ndtri(torch.arange(1, 101, dtype=torch.float64) / 101)
    z = (quantiles / quantiles.std(correction=0))[None, :, None].expand(2, -1, -1)
    terms = visreg_loss(z, slices=torch.ones(1, 1, dtype=torch.float64), eps=0.0)
    assert terms.center < 1e-30
    assert terms.scale < 1e-30
    assert terms.shape.item() == pytest.approx((1 - quantiles.std(correction=0).item()) ** 2)


@pytest.mark.parametrize("slices_of_a_block", [1, 7, 64, 1000])
def test_more_than_one_block_of_slices(slices_of_a_block, monkeypatch):
    z = views(3, 20, 4).requires_grad_()
    expected = VISREG.expected(z, slices=SLICES)
    monkeypatch.setattr(core, "FEW", 0)
    monkeypatch.setattr(core, "block_rows", lambda x, width: 1)
    monkeypatch.setattr(core, "_FEWEST_SLICES", slices_of_a_block)
    terms = visreg_loss(z, slices=SLICES)
    torch.testing.assert_close(dict(terms.items()), expected)
    ours, theirs = (torch.autograd.grad(loss, z) for loss in (terms.loss, expected["loss"]))
    torch.testing.assert_close(ours, theirs)


def test_second_derivatives_are_right_for_few_elements_and_refused_beyond(monkeypatch):
    z = views(2, 5, 4).requires_grad_()

    def twice(terms):
        (slope,) = torch.autograd.grad(terms["loss"], z, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), z)

    few = twice(visreg_loss(z, slices=SLICES[:, :3]))
    torch.testing.assert_close(few, twice(VISREG.expected(z, slices=SLICES[:, :3])))
    monkeypatch.setattr(core, "FEW", 0)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        twice(visreg_loss(z, slices=SLICES[:, :3]))


@pytest.mark.parametrize("few", [0, 2**40])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_lifted_before_any_arithmetic(dtype, few, monkeypatch):
    monkeypatch.setattr(core, "FEW", few)
    z = (30 + 200 * views(2, 1001, 4)).to(dtype).requires_grad_()  # squares overflow fp16
    wide = z.detach().double().requires_grad_()
    ours, theirs = (visreg_loss(x, slices=SLICES) for x in (z, wide))
    for (name, left), (_, right) in zip(ours.items(), theirs.items(), strict=True):
        assert left.dtype == torch.float32
        torch.testing.assert_close(left.double(), right, rtol=1e-5, atol=1e-6, msg=name)
    (left,), (right,) = (
        torch.autograd.grad(terms.scale, x) for terms, x in ((ours, z), (theirs, wide))
    )
    assert left.dtype == dtype
    torch.testing.assert_close(left.double(), right, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("few", [0, 2**40])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_nan_is_repaired(bad, few, monkeypatch):
    monkeypatch.setattr(core, "FEW", few)
    z = views(2, 6, 4)
    z[0, 2, 1] = bad
    for name, value in visreg_loss(z, num_slices=3).items():
        assert not value.isfinite(), name


def test_without_a_weight_the_gradient_is_0():
    z = views(2, 4, 3).requires_grad_()
    terms = visreg_loss(
        z, weight=1.0, scale_weight=0.0, shape_weight=0.0, center_weight=0.0, num_slices=2
    )
    assert terms.loss == 0
    terms.loss.backward()
    assert z.grad.count_nonzero() == 0


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 4, 3), {}, "visreg_loss needs z with at least 2 views along its first axis, got 1"),
        ((2, 4, 3), {"num_global": 0}, "visreg_loss needs num_global between 1 and the 2 views"),
        ((2, 0, 3), {}, "visreg_loss needs at least one row, got 0"),
        ((2, 4, 0), {}, "visreg_loss needs dim >= 1, got 0"),
        ((2, 4, 3), {"num_slices": 0}, "visreg_loss needs at least one slice, got 0"),
        ((2, 4, 3), {"eps": -1.0}, "visreg_loss needs eps >= 0, got -1.0"),
    ],
)
def test_values_that_make_no_sense_are_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        visreg_loss(torch.zeros(shape), **options)
