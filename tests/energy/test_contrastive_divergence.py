"""Contrastive divergence: a Gaussian's exact chains, samplers, what is left untouched."""

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn

import termwise as tw
from termwise.energy import (
    ContrastiveDivergenceLoss,
    ReplayBuffer,
    contrastive_divergence_loss,
    langevin,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def samples_of(problem) -> Tensor:
    """Rows whose mean and covariance are exactly the model's."""
    d = len(problem.mean)
    covariance = torch.linalg.inv(symmetric(problem.precision))
    steps = d**0.5 * torch.linalg.cholesky(covariance).T
    return torch.cat([problem.mean + steps, problem.mean - steps])


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("at_the_truth", [False, True])
def test_the_gap_of_a_gaussian(make_gaussian, d, at_the_truth):
    problem = make_gaussian(d, 3, at_the_truth=at_the_truth)
    terms = contrastive_divergence_loss(
        problem.energy, problem.x, sampler=lambda energy, x: samples_of(problem)
    )
    precision = symmetric(problem.precision)
    trace = (precision @ problem.moment).trace()
    torch.testing.assert_close(terms.gap, (trace.detach() - d) / 2, **EXACT)
    torch.testing.assert_close(terms.energy_model.item(), d / 2, **EXACT)
    slopes = torch.autograd.grad(terms.loss, problem.leaves)
    likelihood = (trace - torch.logdet(precision)) / 2
    torch.testing.assert_close(slopes, torch.autograd.grad(likelihood, problem.leaves), **EXACT)
    largest = max(slope.abs().max().item() for slope in slopes)
    assert largest < 1e-12 if at_the_truth else largest > 1e-2


def test_chains_that_keep_the_model_leave_the_truth_stationary(make_gaussian):
    # A turn of the whitened samples is a step, exact and far from the data, that leaves p alone.
    problem = make_gaussian(2, 3, at_the_truth=True)

    def turned(energy, x):
        root = torch.linalg.cholesky(torch.linalg.inv(symmetric(problem.precision)))
        white = torch.linalg.solve_triangular(root, (x - problem.mean).T, upper=False)
        turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
        return problem.mean + (root @ turn @ white).T

    terms = contrastive_divergence_loss(problem.energy, problem.x, sampler=turned)
    assert (terms.negatives - problem.x).abs().max() > 0.1
    for slope in torch.autograd.grad(terms.loss, problem.leaves):
        torch.testing.assert_close(slope, torch.zeros_like(slope), **EXACT)


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


def test_langevin_is_the_default_sampler():
    model, x, before = network(), normal(5, 2, 2).float(), torch.get_rng_state()
    options = {"steps": 4, "step_size": 0.2, "noise_scale": 0.3}
    terms = contrastive_divergence_loss(
        model, x, generator=torch.Generator().manual_seed(1), **options
    )
    expected = langevin(model, x, generator=torch.Generator().manual_seed(1), **options)
    assert torch.equal(terms.negatives, expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert not terms.negatives.requires_grad
    torch.manual_seed(1)
    drawn = contrastive_divergence_loss(model, x)
    torch.manual_seed(1)
    assert torch.equal(drawn.negatives, langevin(model, x, steps=10, step_size=0.01))


def test_a_sampler_runs_without_grad_mode_and_may_turn_it_on():
    model, x = network(), normal(5, 2, 2).float()
    seen = []

    def sampler(energy, x):
        seen.append((torch.is_grad_enabled(), x.requires_grad, torch.is_autocast_enabled("cpu")))
        with torch.enable_grad():
            point = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(energy(point).sum(), point)
        return x - 0.1 * slope

    expected = contrastive_divergence_loss(model, x, sampler=sampler).metrics()
    with torch.inference_mode():
        inside = x.clone()
    leaf = x.clone().requires_grad_()
    for mode, data in [
        (torch.enable_grad(), x),
        (torch.enable_grad(), leaf),
        (torch.no_grad(), leaf),
        (torch.no_grad(), inside),
        (torch.inference_mode(), x),
        (torch.inference_mode(), inside),
        (torch.autocast("cpu", torch.bfloat16), x),
    ]:
        with mode:
            assert contrastive_divergence_loss(model, data, sampler=sampler).metrics() == expected
    assert set(seen) == {(False, False, False)}
    assert not x.requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_persistent_chains():
    model, x = network(), normal(5, 2, 2).float()
    generator = torch.Generator().manual_seed(0)

    def fresh(n, generator):
        return torch.rand(n, 2, 2, generator=generator)

    buffer = ReplayBuffer.start(fresh, 8, generator)
    before = buffer.samples.clone()
    terms = contrastive_divergence_loss(
        model,
        x,
        sampler=lambda energy, x: buffer.write(
            langevin(
                energy,
                (drawn := buffer.draw(len(x), generator=generator))[0],
                steps=2,
                step_size=0.1,
                generator=generator,
            ),
            drawn[1],
        ),
    )
    changed = (buffer.samples != before).flatten(1).any(1)
    assert changed.sum() == 5
    rows = {tuple(row) for row in terms.negatives.flatten(1).tolist()}
    assert {tuple(row) for row in buffer.samples[changed].flatten(1).tolist()} == rows
    terms.loss.backward()


def test_squares_without_weight_are_reported_however_large():
    x = torch.full((2, 1), 1e30).requires_grad_()
    terms = contrastive_divergence_loss(lambda x: x.sum(1), x, torch.zeros(3, 1))
    assert terms.energy_squares.item() == math.inf
    assert terms.loss.item() == pytest.approx(1e30)
    terms.loss.backward()
    assert torch.equal(x.grad, torch.full((2, 1), 0.5))


def test_a_sampler_that_runs_off_is_seen():
    x = torch.ones(2, 1)
    terms = contrastive_divergence_loss(
        lambda x: x.square().sum(1), x, sampler=lambda energy, x: x * math.nan
    )
    assert terms.loss.isnan()
    assert terms.gap.isnan()


def test_module_is_the_function_in_every_dtype_and_mode():
    numbers = {"steps": 3, "step_size": 0.2, "noise_scale": 0.4, "negative_weight": 0.7}
    numbers |= {"energy_square_weight": 0.1, "regularization": "l2", "regularization_weight": 0.1}
    loss_fn = ContrastiveDivergenceLoss(network(), **numbers)
    assert all(f"{name}={value!r}" in repr(loss_fn) for name, value in numbers.items())
    sampler = torch.nn.Identity()  # a Module in a field whose default is None
    assert ContrastiveDivergenceLoss(network(), sampler=sampler).sampler is sampler
    x, weights = normal(5, 2, 2).float(), normal(5, seed=2).abs().float()

    def options():
        return {"weights": weights, "generator": torch.Generator().manual_seed(1)}

    terms = loss_fn(x, **options())
    terms.loss.backward()
    assert all(p.grad is not None for p in loss_fn.parameters())
    function = contrastive_divergence_loss(
        loss_fn.energy, x, parameters=list(loss_fn.parameters()), **numbers, **options()
    )
    assert terms.metrics() == function.metrics()
    assert loss_fn(x, function.negatives, weights=weights).metrics() == function.metrics()
    assert copy.deepcopy(loss_fn)(x, **options()).metrics() == function.metrics()
    for mode in (torch.autocast("cpu", torch.bfloat16), torch.no_grad(), torch.inference_mode()):
        with mode:
            assert loss_fn(x, **options()).metrics() == function.metrics()
    held = ContrastiveDivergenceLoss(loss_fn.energy, sampler=lambda energy, x: x + 1)
    assert torch.equal(held(x).negatives, x + 1)
    half = loss_fn.bfloat16()
    terms = half(x.bfloat16(), **options())
    assert terms.negatives.dtype == torch.bfloat16
    assert {value.dtype for value in (terms.loss, terms.gap)} == {torch.float32}
    assert terms.energy_model.item() == pytest.approx(function.energy_model.item(), abs=0.05)


def test_it_compiles_with_its_sampler():
    model, x = network(), normal(5, 4).float()

    def of(x):
        return contrastive_divergence_loss(model, x, steps=2, step_size=0.1, noise_scale=0)

    compiled = torch.compile(of, fullgraph=True, backend="aot_eager")(x)
    assert compiled.metrics() == pytest.approx(of(x).metrics())
    assert not compiled.negatives.requires_grad


def refused(error: type[Exception], text: str):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def test_refusals():
    x, negatives = torch.ones(5, 4), torch.ones(3, 4)

    def energy(x):
        return x.sum(1)

    with refused(ValueError, "contrastive_divergence_loss needs negatives or a sampler, got both"):
        contrastive_divergence_loss(energy, x, negatives, sampler=lambda energy, x: x)
    for given_back, shown in [
        (x[:, :2], "float32[5, 2]"),
        (x[0], "float32[4]"),
        (x.long(), "int64[5, 4]"),
        (None, "None"),
    ]:
        with refused(
            tw.ContractError,
            'contrastive_divergence_loss: sampler(energy, x) needs Float[Tensor, "negatives '
            f'*event"] with event [4], got {shown}',
        ):
            contrastive_divergence_loss(energy, x, sampler=lambda energy, x: given_back)  # noqa: B023
    with refused(
        tw.ContractError,
        'contrastive_divergence_loss: energy(x) needs Float[Tensor, " batch"] with batch 5, got '
        "float32[5, 1]: write energy(x).squeeze(-1)",
    ):
        contrastive_divergence_loss(lambda x: x.sum(1, keepdim=True), x, negatives)
    with refused(ValueError, "langevin needs at least 1 of steps, got 0"):
        contrastive_divergence_loss(energy, x, steps=0)
    with refused(
        ValueError,
        'contrastive_divergence_loss needs parameters for regularization="l1", got none',
    ):
        contrastive_divergence_loss(energy, x, negatives, regularization="l1")
    with refused(
        ValueError,
        "ContrastiveDivergenceLoss needs a module to regularize, got function: pass parameters "
        "to contrastive_divergence_loss",
    ):
        ContrastiveDivergenceLoss(energy, regularization="l1")
    with pytest.raises(tw.ContractError, match=r"axis event is \[2\], but it is \[4\] in x"):
        contrastive_divergence_loss(energy, x, negatives[:, :2])


def test_a_sampler_of_torchebm_fits_in_a_line():
    core, samplers = pytest.importorskip("torchebm.core"), pytest.importorskip("torchebm.samplers")
    model = core.GaussianModel(torch.zeros(2), torch.eye(2))
    x = normal(5, 2).float()

    def generator():
        return torch.Generator().manual_seed(3)

    terms = contrastive_divergence_loss(
        model,
        x,
        sampler=lambda energy, x: samplers.LangevinDynamics(
            energy, step_size=0.1, noise_scale=1.0
        ).sample(x, n_steps=3, generator=generator()),
    )
    ours = langevin(model, x, steps=3, step_size=0.1, generator=generator())
    torch.testing.assert_close(terms.negatives, ours)
    assert not terms.negatives.requires_grad
