"""Equilibrium matching: closed form of a Gaussian and its optimum, modes, refusals."""

import copy

import pytest
import torch
from torch import Tensor, nn

import termwise as tw
from termwise.energy import EquilibriumMatchingLoss, equilibrium_matching_loss, flow_matching_loss

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("time", [0.2, 0.9])
def test_gaussian_pairs_at_one_time(time):
    """Joint sigma points of independent normal noise and Gaussian data: moments are exact."""
    d, unit = 2, torch.eye(2, dtype=torch.float64)
    root = normal(d, d, seed=1)
    covariance = root @ root.T / d + 0.3 * unit
    data_mean = normal(d, seed=2)
    steps = (2 * d) ** 0.5 * torch.linalg.cholesky(torch.block_diag(unit, covariance)).T
    x0, x1 = torch.cat([steps, -steps]).split(d, 1)
    x1 = x1 + data_mean
    c = 4 * min(1, (1 - time) / 0.2)
    here = (1 - time) ** 2 * unit + time**2 * covariance
    shared = time * covariance - (1 - time) * unit

    def terms_of(mean, precision):
        def energy(x):
            return 0.5 * ((x - mean) @ precision * (x - mean)).sum(1)

        return equilibrium_matching_loss(energy, x0, x1, x0.new_full((4 * d,), time))

    mean, precision = normal(d, seed=3), unit + 0.3
    miss = precision @ (time * data_mean - mean) + c * data_mean
    square = precision @ here @ precision + 2 * c * precision @ shared + c**2 * (unit + covariance)
    terms = terms_of(mean, precision)
    torch.testing.assert_close(terms.loss, square.trace() + miss.square().sum(), **EXACT)

    best = -c * shared @ torch.linalg.inv(here)
    at = time * data_mean + torch.linalg.solve(best, c * data_mean)
    leaves = (at.requires_grad_(), best.requires_grad_())
    terms = terms_of(*leaves)
    for slope in torch.autograd.grad(terms.loss, leaves):
        slope = slope if slope.ndim == 1 else slope + slope.T
        assert slope.abs().max() < 1e-11
    assert terms.cross.item() == pytest.approx(-2 * terms.gradient_square.item(), rel=1e-12)


def test_one_row_of_data_is_the_lowest_point():
    """From normal noise to one point z, at unit c: the gradient (x - z) / (1 - t), least at z."""
    x0, time = normal(6, 3), torch.full((6,), 0.25, dtype=torch.float64)
    z = normal(3, seed=1)

    def energy(x):
        return 0.5 * (x - z).square().sum(1) / 0.75

    terms = equilibrium_matching_loss(energy, x0, z.expand(6, 3), time, multiplier=1)
    assert terms.loss.item() < 1e-28
    assert equilibrium_matching_loss(
        lambda x: -energy(x), x0, z.expand(6, 3), time, multiplier=1
    ).loss.item() == pytest.approx(4 * terms.target_square.item())


def test_before_the_cutoff_it_is_flow_matching():
    model = network().double()
    x0, x1, time = normal(5, 3), normal(5, 3, seed=1), torch.linspace(0, 0.7, 5).double()
    ours = equilibrium_matching_loss(model, x0, x1, time, multiplier=1, cutoff=0.7)
    flow = flow_matching_loss(model, x0, x1, time)
    torch.testing.assert_close(list(dict(ours.items()).values()), list(dict(flow.items()).values()))


def network(d: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(d, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


def test_at_the_data_the_gradient_is_asked_to_be_zero():
    x0, x1 = normal(4, 3), normal(4, 3, seed=1)
    terms = equilibrium_matching_loss(
        network().double(), x0, x1, torch.ones(4, dtype=torch.float64)
    )
    assert terms.target_square.item() == 0
    assert terms.loss.item() == pytest.approx(terms.gradient_square.item())


def test_module_is_the_function_in_every_dtype_and_mode():
    loss_fn = EquilibriumMatchingLoss(network(4), cutoff=0.5, multiplier=2.0)
    assert "cutoff=0.5, multiplier=2.0" in repr(loss_fn)
    tensors = normal(5, 2, 2).float(), normal(5, 2, 2, seed=1).float(), torch.linspace(0, 1, 5)
    terms = loss_fn(*tensors)
    terms.loss.backward()
    assert all(p.grad is not None for p in loss_fn.parameters())  # that of the last bias is 0
    options = {"cutoff": 0.5, "multiplier": 2.0}
    function = equilibrium_matching_loss(loss_fn.energy, *tensors, **options)
    assert terms.metrics() == function.metrics()
    assert copy.deepcopy(loss_fn)(*tensors).metrics() == function.metrics()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_fn(*tensors).metrics() == function.metrics()
    with torch.inference_mode():
        assert loss_fn(*tensors).metrics() == pytest.approx(function.metrics(), rel=1e-6)
    half = loss_fn.bfloat16()(*[tensor.bfloat16() for tensor in tensors])
    assert {value.dtype for _, value in half.items()} == {torch.float32}
    assert half.metrics() == pytest.approx(function.metrics(), rel=0.05, abs=0.05)


def test_refusals():
    x0, x1, time = normal(5, 3), normal(5, 3, seed=1), torch.rand(5)
    for cutoff in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"needs cutoff in \[0, 1\), got {cutoff}"):
            equilibrium_matching_loss(lambda x: x.sum(1), x0, x1, time, cutoff=cutoff)
    with pytest.raises(tw.ContractError, match=r"x1 needs .* axis batch is 4, but it is 5 in x0"):
        equilibrium_matching_loss(lambda x: x.sum(1), x0, x1[:4], time)
    with pytest.raises(ValueError, match="needs energies of each row alone, got BatchNorm1d"):
        equilibrium_matching_loss(nn.Sequential(nn.BatchNorm1d(3)), x0, x1, time)
