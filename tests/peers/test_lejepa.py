"""lejepa's SIGReg, and the loss of its minimal example, beside ours; and over ranks."""

import re
import textwrap
from types import SimpleNamespace

import checkouts
import pytest
import torch
from over_ranks import lejepa_over_ranks
from torch.testing import assert_close

from termwise.joint_embedding import lejepa_loss, sigreg_loss

lejepa = checkouts.load("lejepa")

# Their knots and weights are float32 also where they are converted to float64.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-7},
    torch.float64: {"rtol": 1e-6, "atol": 1e-9},
}


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request):
    """Make it the default too: they draw slices in the default dtype, and multiply by them."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator)


def columns(dim, count, generator=None):
    drawn = torch.randn(dim, count, generator=generator)
    return drawn / drawn.norm(dim=0)


def assert_same(ours, theirs, z):
    tolerance = TOLERANCE[z.dtype]
    assert_close(ours, theirs, **tolerance)
    found, wanted = (torch.autograd.grad(loss, z)[0] for loss in (ours, theirs))
    assert_close(found, wanted, rtol=tolerance["rtol"], atol=tolerance["rtol"] * wanted.abs().max())


@pytest.mark.parametrize(("t_max", "knots"), [(3, 17), (5.0, 9)])
@pytest.mark.parametrize("shape", [(2, 3), (12, 5), (300, 64), (3, 12, 5)])
def test_the_statistic_along_the_slices_of_two_calls(shape, t_max, knots, dtype):
    z = (normal(*shape) * 1.5 + 0.3).requires_grad_()
    statistic = lejepa.univariate.EppsPulley(t_max=t_max, n_points=knots)
    theirs = lejepa.multivariate.SlicingUnivariateTest(statistic, num_slices=70).to(dtype)
    for call in range(2):  # which seeds their generator
        slices = columns(shape[-1], 70, torch.Generator().manual_seed(call))
        ours = sigreg_loss(z, slices=slices, t_max=float(t_max), knots=knots).loss
        assert_same(ours, theirs(z), z)


def test_each_slice_and_the_worst_one(dtype):
    z = normal(12, 5)
    theirs = lejepa.multivariate.SlicingUnivariateTest(
        lejepa.univariate.EppsPulley(), num_slices=30, reduction=None
    ).to(dtype)(z)
    slices = columns(5, 30, torch.Generator().manual_seed(0))
    assert_close(sigreg_loss(z, slices=slices).worst_slice, theirs.max(), **TOLERANCE[dtype])
    single = torch.stack([sigreg_loss(z, slices=slices[:, [s]]).loss for s in range(30)])
    assert_close(single, theirs, **TOLERANCE[dtype])


# --- MINIMAL.md -----------------------------------------------------------------------------


def minimal(z, weight):
    """Run what their page says of the loss, on the device of z where it says "cuda"."""
    text = checkouts.read("lejepa", "MINIMAL.md")
    sigreg = re.search(r"^class SIGReg\(.*?(?=^class )", text, re.M | re.S)[0]
    lines = re.search(r"^ +inv_loss = .*?^ +lejepa_loss = .*?$", text, re.M | re.S)[0]
    assert sigreg.count('device="cuda"') == 1
    names = {"torch": torch}
    exec(sigreg.replace('device="cuda"', "device=proj.device"), names)
    names |= {"proj": z, "cfg": SimpleNamespace(lamb=weight)}
    names["sigreg"] = names["SIGReg"]().to(torch.get_default_dtype())
    torch.manual_seed(3)
    exec(textwrap.dedent(lines), names)
    torch.manual_seed(3)
    return names, columns(z.shape[-1], 256)


@pytest.mark.parametrize("weight", [0.02, 0.5])
@pytest.mark.parametrize("shape", [(2, 3, 4), (4, 12, 5), (4, 256, 16)])
def test_the_minimal_example(shape, weight, dtype):
    z = (normal(*shape) * 0.7 + 0.1).requires_grad_()
    theirs, slices = minimal(z, weight)
    ours = lejepa_loss(z, sigreg_weight=weight, slices=slices)
    assert_close(ours.invariance, theirs["inv_loss"], **TOLERANCE[dtype])
    assert_close(ours.sigreg, theirs["sigreg_loss"], **TOLERANCE[dtype])
    assert_same(ours.loss, theirs["lejepa_loss"], z)


def test_under_the_autocast_of_the_example_theirs_is_a_thousandth_off():
    z = normal(4, 256, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        theirs, slices = minimal(z, 0.02)
        ours = lejepa_loss(z, sigreg_weight=0.02, slices=slices).sigreg
    exact = sigreg_loss(z.double(), slices=slices.double()).loss
    assert abs(ours / exact - 1) < 1e-6
    assert abs(theirs["sigreg_loss"] / exact - 1) > 1e-3


def test_theirs_multiplies_slices_of_the_default_dtype():
    z = normal(12, 5).double()
    theirs = lejepa.multivariate.SlicingUnivariateTest(lejepa.univariate.EppsPulley(), 8)
    with pytest.raises(RuntimeError, match="same dtype"):
        theirs.double()(z)
    assert sigreg_loss(z, num_slices=8).loss.dtype == torch.float64


# --- over ranks -----------------------------------------------------------------------------


def of_ranks(ranks, z, sizes, slices):
    weight = normal(6, 5, seed=1)
    whole = weight.clone().requires_grad_()
    loss = sigreg_loss(z @ whole, slices=slices).loss
    (gradient,) = torch.autograd.grad(loss, whole)
    found = ranks(lejepa_over_ranks, z.split(sizes), [weight] * 3, [slices] * 3)
    for _, (value, combined) in found:
        assert_close(value, loss.detach())
        assert_close(combined, gradient, rtol=1e-5, atol=1e-6)
    return [theirs for theirs, _ in found], gradient, loss.detach()


def test_over_ranks_of_equal_numbers_of_rows_theirs_is_one_process(ranks):
    slices = columns(5, 64, torch.Generator().manual_seed(0))
    theirs, gradient, loss = of_ranks(ranks, normal(18, 6), [6, 6, 6], slices)
    for value, combined in theirs:
        assert_close(value, loss)
        assert_close(combined, gradient, rtol=1e-5, atol=1e-6)


def test_over_ranks_of_other_numbers_theirs_differs_between_ranks(ranks):
    slices = columns(5, 64, torch.Generator().manual_seed(0))
    z = normal(18, 6)
    theirs, gradient, loss = of_ranks(ranks, z, [2, 6, 10], slices)
    assert loss.item() == pytest.approx(9.8796, rel=1e-4)
    # The distance of the mean of the ranks' means, times 3 * 2, 3 * 6 and 3 * 10 rows.
    values = [value.item() for value, _ in theirs]
    assert values == pytest.approx([4.0908, 12.2723, 20.4538], rel=1e-4)
    apart = (theirs[0][1] - gradient).norm() / gradient.norm()
    assert apart > 0.5
