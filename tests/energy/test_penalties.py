"""Penalties on energies and their slopes: a Gaussian's closed forms, refusals."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn

import termwise as tw
from termwise.energy import (
    EnergySquarePenalty,
    GradientPenalty,
    energy_square_penalty,
    gradient_penalty,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("d", [1, 3])
def test_the_slope_of_a_gaussian(make_gaussian, d):
    problem = make_gaussian(d, 3)
    ours = gradient_penalty(problem.energy, problem.x).loss
    precision = (problem.precision + problem.precision.T) / 2
    exact = (precision @ problem.moment @ precision).trace()
    torch.testing.assert_close(ours, exact, **EXACT)
    torch.testing.assert_close(
        torch.autograd.grad(ours, problem.leaves), torch.autograd.grad(exact, problem.leaves),
        **EXACT,
    )  # fmt: skip


@pytest.mark.parametrize("target", [0.0, 1.0, 2.5])
def test_a_linear_energy_is_judged_by_its_slope(target):
    slope = torch.tensor([1.2, -0.5], dtype=torch.float64, requires_grad=True)
    terms = gradient_penalty(lambda x: x @ slope + 3, normal(4, 2), target=target)
    torch.testing.assert_close(terms.loss.item(), (1.3 - target) ** 2, **EXACT)
    torch.testing.assert_close(terms.gradient_norm.item(), 1.3, **EXACT)
    (ours,) = torch.autograd.grad(terms.loss, slope)
    torch.testing.assert_close(ours, 2 * (1.3 - target) * slope.detach() / 1.3, **EXACT)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_a_flat_energy_has_a_gradient(target):
    scale = torch.tensor(1.5, requires_grad=True)
    terms = gradient_penalty(lambda x: scale * x.square().sum(1), torch.zeros(3, 2), target=target)
    assert terms.loss.item() == target**2
    terms.loss.backward()
    assert scale.grad.item() == 0


def network(*, norm: nn.Module | None = None) -> nn.Module:
    layers = [nn.Linear(4, 4), norm or nn.Identity(), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)]
    return nn.Sequential(nn.Flatten(), *layers)


@pytest.mark.parametrize(
    ("module", "function", "options"),
    [
        (EnergySquarePenalty, energy_square_penalty, {}),
        (GradientPenalty, gradient_penalty, {"target": 0.0}),
        (GradientPenalty, gradient_penalty, {"target": 0.7}),
    ],
)
def test_module_is_the_function_in_every_dtype_and_mode(module, function, options):
    loss_fn = module(network(norm=nn.LayerNorm(4)), **options)
    assert all(f"{name}={value}" in repr(loss_fn) for name, value in options.items())
    x, weights = normal(5, 2, 2).float(), normal(5, seed=1).abs().float()
    terms = loss_fn(x, weights=weights)
    terms.loss.backward()
    assert all(p.grad is not None for p in loss_fn.parameters())  # the last bias too
    assert not x.requires_grad
    expected = function(loss_fn.energy, x, weights=weights, **options).metrics()
    assert terms.metrics() == expected
    assert copy.deepcopy(loss_fn)(x, weights=weights).metrics() == expected
    for mode in (torch.autocast("cpu", torch.bfloat16), torch.no_grad(), torch.inference_mode()):
        with mode:
            assert loss_fn(x, weights=weights).metrics() == expected
    half = loss_fn.bfloat16()(x.bfloat16(), weights=weights)
    assert {value.dtype for _, value in half.items()} == {torch.float32}
    assert half.loss.item() == pytest.approx(terms.loss.item(), rel=0.1, abs=0.02)


def refused(error: type[Exception], text: str):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def test_refusals():
    x = torch.ones(5, 4)
    for function in (energy_square_penalty, gradient_penalty):
        with refused(
            tw.ContractError,
            f'{function.__name__}: energy(x) needs Float[Tensor, " batch"] with batch 5, got '
            "float32[5, 1]: write energy(x).squeeze(-1)",
        ):
            function(lambda x: x.sum(1, keepdim=True), x)
    for target in (-1.0, float("nan")):
        with refused(ValueError, f"gradient_penalty needs target >= 0, got {target}"):
            gradient_penalty(lambda x: x.sum(1), x, target=target)
    with pytest.raises(ValueError, match="^gradient_penalty needs an energy that can be differ"):
        gradient_penalty(lambda x: x.detach().sum(1), x)
    with pytest.raises(ValueError, match="^gradient_penalty needs energies of each row alone"):
        gradient_penalty(network(norm=nn.BatchNorm1d(4)), x)
