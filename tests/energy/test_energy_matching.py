"""Energy matching: closed forms of both terms, the phase without negatives, refusals."""

import copy

import pytest
import torch
from torch import Tensor, nn

import termwise as tw
from termwise.energy import EnergyMatchingLoss, energy_matching_loss, flow_matching_loss

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigma_points(mean: Tensor, covariance: Tensor) -> Tensor:
    steps = len(mean) ** 0.5 * torch.linalg.cholesky(covariance).T
    return torch.cat([mean + steps, mean - steps])


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_contrast_follows_the_log_likelihood_at_a_temperature(make_gaussian, temperature):
    """exp(-E / epsilon) has covariance epsilon / P: the contrast is tr(PM) / 2 - epsilon d / 2."""
    problem = make_gaussian(3, 1)
    precision = (problem.precision + problem.precision.T) / 2
    negatives = sigma_points(problem.mean, temperature * torch.linalg.inv(precision))
    terms = energy_matching_loss(
        problem.energy,
        normal(6, 3),
        problem.x,
        torch.zeros(6).double(),
        negatives,
        contrastive_weight=1 / temperature,
    )
    likelihood = 0.5 * (precision @ problem.moment).trace() / temperature - 0.5 * torch.logdet(
        precision
    )
    exact = 0.5 * (precision @ problem.moment).trace() - 0.5 * temperature * 3
    torch.testing.assert_close(terms.contrast, exact, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad((terms.loss - terms.flow), problem.leaves, retain_graph=True),
        torch.autograd.grad(likelihood, problem.leaves),
        rtol=1e-11,
        atol=1e-11,
    )


def test_without_fading_the_flow_is_flow_matching():
    model = network().double()
    tensors = normal(5, 3), normal(5, 3, seed=1), torch.linspace(0, 1, 5).double()
    terms = energy_matching_loss(model, *tensors)
    torch.testing.assert_close(terms.flow, flow_matching_loss(model, *tensors).loss, **EXACT)
    assert terms.contrast.item() == 0
    torch.testing.assert_close(terms.loss, terms.flow, rtol=0, atol=0)


def test_straight_transport_by_a_linear_energy_is_exact():
    x0, shift = normal(5, 3), normal(3, seed=1)
    terms = energy_matching_loss(
        lambda x: -(x * shift).sum(1), x0, x0 + shift, torch.linspace(0, 1, 5).double()
    )
    assert terms.loss.item() < 1e-28


def test_noise_added_to_both_ends_is_noise_added_on_the_way():
    """What the docstring says of the authors' smoothing."""
    seen = []

    def energy(x):
        seen.append(x)
        return x.square().sum(1)

    x0, x1, noise = normal(5, 3), normal(5, 3, seed=1), normal(5, 3, seed=2)
    time = torch.linspace(0, 1, 5).double()
    energy_matching_loss(energy, x0 + noise, x1 + noise, time)
    path = (1 - time)[:, None] * x0 + time[:, None] * x1
    torch.testing.assert_close(seen[0], path + noise)


def network(d: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(d, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


def test_module_is_the_function_in_every_dtype_and_mode():
    loss_fn = EnergyMatchingLoss(network(4), cutoff=0.5, contrastive_weight=0.2)
    assert "contrastive_weight=0.2, cutoff=0.5" in repr(loss_fn)
    tensors = normal(5, 2, 2).float(), normal(5, 2, 2, seed=1).float(), torch.linspace(0, 1, 5)
    negatives = normal(3, 2, 2, seed=2).float()
    loss_fn(*tensors).loss.backward()
    assert all(p.grad is not None for p in loss_fn.parameters())  # that of the last bias is 0
    terms = loss_fn(*tensors, negatives)
    terms.loss.backward()
    options = {"cutoff": 0.5, "contrastive_weight": 0.2}
    function = energy_matching_loss(loss_fn.energy, *tensors, negatives, **options)
    assert terms.metrics() == function.metrics()
    assert copy.deepcopy(loss_fn)(*tensors, negatives).metrics() == function.metrics()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_fn(*tensors, negatives).metrics() == function.metrics()
    with torch.inference_mode():
        assert loss_fn(*tensors, negatives).metrics() == pytest.approx(function.metrics(), rel=1e-6)
    half = loss_fn.bfloat16()(*[tensor.bfloat16() for tensor in (*tensors, negatives)])
    assert {value.dtype for _, value in half.items()} == {torch.float32}
    assert half.metrics() == pytest.approx(function.metrics(), rel=0.05, abs=0.05)


def test_refusals():
    x0, x1, time = normal(5, 3), normal(5, 3, seed=1), torch.rand(5)
    for cutoff in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"needs cutoff in \[0, 1\], got {cutoff}"):
            energy_matching_loss(lambda x: x.sum(1), x0, x1, time, cutoff=cutoff)
    with pytest.raises(tw.ContractError, match="negatives needs"):
        energy_matching_loss(lambda x: x.sum(1), x0, x1, time, x1[:, :2])
    with pytest.raises(ValueError, match="needs energies of each row alone, got BatchNorm1d"):
        energy_matching_loss(nn.Sequential(nn.BatchNorm1d(3)), x0, x1, time)
