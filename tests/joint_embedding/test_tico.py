"""TiCo: values by hand, the covariance as a state, precision, refusals."""

import pytest
import torch
from losses.tico import TICO

import termwise as tw
from termwise.joint_embedding import tico_loss, updated_covariance


def rows(n, dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64).to(dtype)


def test_by_hand():
    z = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    target = torch.tensor([[5.0, 0.0], [0.0, -1.0]], dtype=torch.float64)  # cosines 3/5 and -1
    covariance = torch.tensor([[1.0, 2.0], [2.0, 3.0]], dtype=torch.float64)
    terms = tico_loss(z, target, covariance, contrast_weight=0.5)
    assert terms.invariance.item() == pytest.approx((0.4 + 2) / 2)
    contrast = ((9 + 2 * 24 + 3 * 16) / 25 + 3) / 2
    assert terms.contrast.item() == pytest.approx(contrast)
    assert terms.loss.item() == pytest.approx(1.2 + contrast / 2)


def test_the_covariance_by_hand():
    z = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    mean = torch.tensor([[0.18, 0.24], [0.24, 0.82]], dtype=torch.float64)
    first = updated_covariance(torch.zeros(2, 2, dtype=torch.float64), z, momentum=0.75)
    torch.testing.assert_close(first, mean / 4)
    second = updated_covariance(first, 7 * z, momentum=0.75)
    torch.testing.assert_close(second, mean * (1 - 0.75**2))
    assert updated_covariance(first, z[:0], momentum=0.75).equal(first)
    assert updated_covariance(first, z, momentum=1.0).equal(first)
    assert updated_covariance(first.bfloat16(), z).dtype == torch.bfloat16


def test_the_contrast_is_least_where_all_directions_are_used_equally():
    orthogonal = torch.eye(4, dtype=torch.float64)
    for z, expected in ((orthogonal, 1 / 4), (orthogonal[:1].expand(4, 4), 1.0)):
        covariance = updated_covariance(torch.zeros_like(orthogonal), z, momentum=0.0)
        terms = tico_loss(z, z, covariance)
        assert terms.invariance == 0
        assert terms.contrast.item() == pytest.approx(expected)


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_no_gradient_passes_the_covariance(stop_gradient):
    z, target, covariance = (rows(n, 3, n).requires_grad_() for n in (5, 5, 3))
    new = updated_covariance(covariance, z)
    assert not new.requires_grad
    loss = tico_loss(z, target, covariance, stop_gradient=stop_gradient).loss
    gradients = torch.autograd.grad(loss, (z, target, covariance), allow_unused=True)
    assert [x is None for x in gradients] == [False, stop_gradient, True]


def test_the_running_mean_is_of_the_second_moments_of_each_step():
    """With zeros at first, as in the paper: (1 - b) sum_k b^(t - k) of the mean of step k."""
    covariance = torch.zeros(3, 3, dtype=torch.float64)
    steps = [rows(4, 3, seed) for seed in range(3)]
    for z in steps:
        covariance = updated_covariance(covariance, z, momentum=0.9)
    unit = [z / z.norm(dim=1, keepdim=True) for z in steps]
    expected = sum(0.1 * 0.9 ** (2 - k) * z.T @ z / 4 for k, z in enumerate(unit))
    torch.testing.assert_close(covariance, expected)


def test_near_agreement_nothing_cancels():
    z = rows(8, 128, dtype=torch.float32)
    target = z + 1e-4 * rows(8, 128, 1, torch.float32)
    none = torch.zeros(128, 128)
    expected = TICO.expected(*(x.double() for x in (z, target, none)))["invariance"].item()
    ours = tico_loss(z, target, none).invariance.item()
    assert ours == pytest.approx(expected, rel=1e-3)  # 5e-9, where float32 has 1 - 1 = 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype):
    z, target = (300 * rows(8, 64, seed, dtype) for seed in range(2))  # squares overflow in fp16
    covariance = updated_covariance(torch.zeros(64, 64), z)
    wide = updated_covariance(torch.zeros(64, 64, dtype=torch.float64), z.double())
    torch.testing.assert_close(covariance.double(), wide, rtol=1e-5, atol=1e-9)
    ours, expected = tico_loss(z, target, covariance), tico_loss(z, target, wide)
    assert ours.loss.dtype == torch.float32
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=0)


def test_refusals():
    z = rows(4, 3)
    with pytest.raises(ValueError, match=r"^updated_covariance needs momentum in 0\.\.1, got 1\.5"):
        updated_covariance(torch.zeros(3, 3), z, momentum=1.5)
    with pytest.raises(tw.ContractError, match="axis dim is 2, but it is 3 in z"):
        tico_loss(z, z, torch.zeros(2, 2))
