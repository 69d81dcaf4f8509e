"""Langevin dynamics: each step by its formula, detailed balance, invariance, modes, refusals."""

import math
import re

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import termwise as tw
from termwise.energy import langevin
from termwise.energy._langevin import log_acceptance

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double_well(x: Tensor) -> Tensor:
    """An energy that is not quadratic and couples the elements of a row."""
    flat = x.flatten(1)
    return (flat.pow(4) / 4 - flat.square()).sum(1) + 0.3 * flat.prod(1)


def slope_of(energy, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(energy(x).sum(), x)[0]


def network(*, norm: nn.Module | None = None) -> nn.Module:
    layers = [nn.Linear(3, 5), norm or nn.Identity(), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)]
    return nn.Sequential(*layers).double()


@given(
    batch=st.integers(1, 4),
    steps=st.integers(1, 3),
    step_size=st.sampled_from([0.01, 0.2]),
    noise_scale=st.sampled_from([None, 0.0, 0.7]),
    seed=st.integers(0, 99),
)
def test_each_step_is_the_formula(batch, steps, step_size, noise_scale, seed):
    x, noise = normal(batch, 2, 2, seed=seed), normal(steps, batch, 2, 2, seed=seed + 1)
    ours = langevin(
        double_well, x, steps=steps, step_size=step_size, noise_scale=noise_scale, noise=noise
    )
    scale = math.sqrt(2 * step_size) if noise_scale is None else noise_scale
    for xi in noise:
        x = x - step_size * slope_of(double_well, x) + scale * xi
    torch.testing.assert_close(ours, x, **EXACT)


def log_proposal(energy, x: Tensor, y: Tensor, h: float) -> Tensor:
    """log q(y | x), written with torch.distributions."""
    mean = (x - h * slope_of(energy, x)).flatten(1)
    spread = 2 * h * torch.eye(mean.shape[1], dtype=torch.float64)
    return MultivariateNormal(mean, spread).log_prob(y.flatten(1))


@given(h=st.sampled_from([0.003, 0.1, 1.5]), seed=st.integers(0, 99))
def test_the_acceptance_keeps_detailed_balance(h, seed):
    x, y = normal(5, 2, 2, seed=seed), 1.5 * normal(5, 2, 2, seed=seed + 1)
    slopes = slope_of(double_well, x) + slope_of(double_well, y)

    def log_flow(x, y):
        """log of p(x) q(y | x) min(1, acceptance), less log Z."""
        xi = (y - x + h * slope_of(double_well, x)) / math.sqrt(2 * h)
        log_ratio = log_acceptance(double_well(x) - double_well(y), slopes, xi, h)
        return -double_well(x) + log_proposal(double_well, x, y, h) + log_ratio.clamp(max=0)

    torch.testing.assert_close(log_flow(x, y), log_flow(y, x), rtol=1e-10, atol=1e-10)


@given(h=st.sampled_from([0.05, 0.2]), seed=st.integers(0, 99))
def test_a_proposal_is_taken_where_its_probability_is_above_the_uniform(h, seed):
    x, noise = normal(1, 6, 3, seed=seed)[0], normal(1, 6, 3, seed=seed + 1)
    y = x - h * slope_of(double_well, x) + math.sqrt(2 * h) * noise[0]
    log_ratio = (
        double_well(x) - double_well(y)
        + log_proposal(double_well, y, x, h) - log_proposal(double_well, x, y, h)
    )  # fmt: skip
    probability = log_ratio.clamp(max=0).exp()
    assume(probability.min() > 1e-100)
    for uniform, taken in (
        (probability * (1 - 1e-9), torch.ones(6, dtype=torch.bool)),
        (probability * (1 + 1e-9), probability == 1),
    ):
        moved = langevin(
            double_well,
            x,
            steps=1,
            step_size=h,
            adjust="metropolis",
            noise=noise,
            uniform=uniform.clamp(max=1 - 1e-12)[None],
        )
        torch.testing.assert_close(moved, torch.where(taken[:, None], y, x), **EXACT)


def test_a_chain_goes_on_from_where_it_was_kept():
    x, noise = normal(7, 3), normal(6, 7, 3, seed=1)
    uniform = torch.rand(6, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    options = {"step_size": 0.6, "adjust": "metropolis"}
    whole = langevin(double_well, x, steps=6, noise=noise, uniform=uniform, **options)
    parts, kept = x, 0
    for step in range(6):
        here = slice(step, step + 1)
        moved = langevin(
            double_well, parts, steps=1, noise=noise[here], uniform=uniform[here], **options
        )
        kept += (moved == parts).all(1).sum().item()
        parts = moved
    torch.testing.assert_close(whole, parts, **EXACT)
    assert 5 < kept < 37


def test_the_adjusted_chain_leaves_a_gaussian_as_it_is():
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
    precision, mean = torch.linalg.inv(covariance), torch.tensor([0.5, -1.0], dtype=torch.float64)
    n, generator = 20000, torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(covariance)
    drawn = torch.randn(n, 2, generator=generator, dtype=torch.float64)

    def energy(x):
        return 0.5 * ((x - mean) @ precision * (x - mean)).sum(1)

    def moments(samples):
        """The departure of mean and covariance in units of their standard error."""
        white = torch.linalg.solve_triangular(root, (samples - mean).T, upper=False).T
        of_mean = white.mean(0) * n**0.5
        of_covariance = (white.T @ white / n - torch.eye(2)) * n**0.5
        return torch.cat([of_mean, of_covariance.flatten()]).abs().max().item()

    start = mean + drawn @ root.T
    # A step so large that the chain without the adjustment is far off.
    options = {"steps": 12, "step_size": 0.25}
    adjusted = langevin(energy, start, adjust="metropolis", generator=generator, **options)
    plain = langevin(energy, start, generator=generator, **options)
    assert moments(start) < 4
    assert moments(adjusted) < 4.5
    assert moments(plain) > 15
    moved = (adjusted != start).any(1).double().mean()
    assert moved > 0.9


def test_the_plain_chain_has_the_law_that_its_step_gives_it():
    # x' = (1 - h) x + sqrt(2 h) xi has the variance 2 h / (1 - (1 - h)^2) = 1 / (1 - h / 2).
    generator = torch.Generator().manual_seed(0)
    x = langevin(
        lambda x: 0.5 * x.square().sum(1),
        torch.zeros(40000, 1, dtype=torch.float64),
        steps=25,
        step_size=0.3,
        generator=generator,
    )
    assert x.var().item() == pytest.approx(1 / 0.85, abs=4.5 * (2 / 40000) ** 0.5 / 0.85)


def test_noise_of_scale_zero_is_not_drawn():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    langevin(double_well, normal(3, 2), steps=2, step_size=0.1, noise_scale=0, generator=generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("adjust", ["none", "metropolis"])
def test_the_generator_is_the_only_chance(adjust):
    x, options = normal(5, 3), {"steps": 3, "step_size": 0.2, "adjust": adjust}

    def of(seed):
        return langevin(double_well, x, generator=torch.Generator().manual_seed(seed), **options)

    before, kept = torch.get_rng_state(), x.clone()
    first = of(1)
    assert torch.equal(first, of(1))
    assert not torch.equal(first, of(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(x, kept)
    drawn, generator = [], torch.Generator().manual_seed(1)
    for _ in range(3):
        drawn.append([torch.randn(5, 3, generator=generator, dtype=torch.float64), None])
        if adjust == "metropolis":
            drawn[-1][1] = torch.rand(5, generator=generator, dtype=torch.float64)
    noise, uniform = zip(*drawn, strict=True)
    given = {"uniform": torch.stack(uniform)} if adjust == "metropolis" else {}
    assert torch.equal(
        first, langevin(double_well, x, noise=torch.stack(noise), **given, **options)
    )
    torch.manual_seed(1)
    first = langevin(double_well, x, **options)
    torch.manual_seed(1)
    assert torch.equal(langevin(double_well, x, **options), first)


@pytest.mark.parametrize("adjust", ["none", "metropolis"])
def test_nothing_of_the_models_is_touched_in_any_mode(adjust):
    model, x, noise = network(norm=nn.LayerNorm(5)), normal(4, 3), normal(3, 4, 3, seed=1)
    model[0].weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    uniform = torch.full((3, 4), 0.9).double() if adjust == "metropolis" else None
    options = {"adjust": adjust, "noise": noise, "uniform": uniform}

    def of(x):
        return langevin(model, x, steps=3, step_size=0.1, **options)

    expected = of(x)
    assert not expected.requires_grad
    assert not of(x.clone().requires_grad_()).requires_grad
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with mode:
            torch.testing.assert_close(of(x), expected, rtol=0, atol=0)
    with torch.inference_mode():
        inside = x.clone()
    torch.testing.assert_close(of(inside), expected, rtol=0, atol=0)
    compiled = torch.compile(of, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, expected, **EXACT)


def test_halves_move_by_steps_that_add_up():
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    seen = []

    def energy(x):
        seen.append(x.dtype)
        return x.float().sum(1)

    moved = langevin(energy, x, steps=50, step_size=1e-3, noise_scale=0)
    assert set(seen) == {torch.bfloat16}
    assert moved.dtype == torch.bfloat16
    torch.testing.assert_close(moved.float(), torch.full((2, 3), 0.95), rtol=0, atol=4e-3)


def test_the_last_steps_stay_in_the_graph():
    model, x, noise = network(), normal(4, 3), normal(3, 4, 3, seed=1)
    weights = list(model.parameters())

    def of(differentiable_steps):
        return langevin(
            model, x, steps=3, step_size=0.5, noise=noise, differentiable_steps=differentiable_steps
        )

    for last in (1, 2, 3):
        ours, theirs = of(last), x
        for step, xi in enumerate(noise):
            point = theirs if step > 3 - last else theirs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(model(point).sum(), point, create_graph=True)
            theirs = point - 0.5 * slope + xi
        torch.testing.assert_close(ours, theirs, **EXACT)
        torch.testing.assert_close(
            torch.autograd.grad(ours.square().sum(), weights),
            torch.autograd.grad(theirs.square().sum(), weights, materialize_grads=True),
            **EXACT,
        )
    assert all(p.grad is None for p in weights)
    with torch.no_grad():
        assert not of(2).requires_grad


@pytest.mark.parametrize("last", [0, 1, 3])
def test_forward_mode_goes_through_the_same_steps(last):
    """The derivative with respect to a parameter: no_grad alone does not stop forward mode."""
    x, direction = torch.randn(2, 3), torch.randn(3, 3)
    noise = torch.randn(3, 2, 3)

    def moved(weight: Tensor) -> Tensor:
        return langevin(
            lambda x: (x @ weight).tanh().square().sum(1),
            x,
            steps=3,
            step_size=0.1,
            noise=noise,
            differentiable_steps=last,
        ).sum()

    weight = torch.randn(3, 3, requires_grad=True)
    result = moved(weight)
    backward = torch.zeros(())
    if last:
        (gradient,) = torch.autograd.grad(result, weight)
        backward = (gradient * direction).sum()
    _, forward = torch.func.jvp(moved, (weight.detach(),), (direction,))
    torch.testing.assert_close(forward, backward)


def test_a_proposal_of_no_energy_is_never_taken():
    def energy(x):  # a box, outside of which there is nothing
        return torch.where((x < 1).all(1), x.sum(1), torch.nan)

    x = torch.zeros(50, 2)
    moved = langevin(
        energy, x, steps=20, step_size=0.3, adjust="metropolis",
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert (moved < 1).all()
    assert (moved != x).any(1).all()


def test_vmap_is_a_loop():
    model, x, noise = network(), normal(4, 3), normal(2, 3, 4, 3, seed=1)

    def of(noise):
        return langevin(model, x, steps=3, step_size=0.1, noise=noise)

    torch.testing.assert_close(torch.vmap(of)(noise), torch.stack([of(n) for n in noise]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "langevin needs at least 1 of steps, got 0"),
        ({"step_size": 0.0}, "langevin needs a finite step_size > 0, got 0.0"),
        ({"step_size": math.inf}, "langevin needs a finite step_size > 0, got inf"),
        ({"noise_scale": -1.0}, "langevin needs a finite noise_scale >= 0, got -1.0"),
        ({"noise_scale": math.nan}, "langevin needs a finite noise_scale >= 0, got nan"),
        ({"differentiable_steps": 3}, "langevin needs differentiable_steps in 0..2, got 3"),
        ({"noise": torch.ones(3, 4, 3)}, "langevin needs noise of 2 steps, got 3"),
        (
            {"uniform": torch.ones(3, 4), "adjust": "metropolis"},
            "langevin needs uniform of 2 steps, got 3",
        ),
        (
            {"uniform": torch.ones(2, 4)},
            'langevin needs uniform for adjust="metropolis" alone, got it for "none"',
        ),
        (
            {"adjust": "metropolis", "noise_scale": 0.1},
            'langevin needs noise_scale = sqrt(2 * step_size) = 1.0 for adjust="metropolis", '
            "got 0.1",
        ),
        (
            {"adjust": "metropolis", "differentiable_steps": 1},
            'langevin needs differentiable_steps = 0 for adjust="metropolis", whose acceptance has '
            "no derivative, got 1",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        langevin(double_well, torch.ones(4, 3), **{"steps": 2, "step_size": 0.5, **options})


def test_energies_are_refused():
    x, options = torch.ones(4, 3), {"steps": 2, "step_size": 0.5}
    with pytest.raises(
        tw.ContractError,
        match=r'^langevin: energy\(x\) needs Float\[Tensor, " batch"\] with batch 4, got '
        r"float32\[4, 1\]: write energy\(x\)\.squeeze\(-1\)$",
    ):
        langevin(lambda x: x.sum(1, keepdim=True), x, **options)
    with pytest.raises(ValueError, match=r"^langevin needs an energy that can be differentiated"):
        langevin(lambda x: x.detach().sum(1), x, **options)
    with pytest.raises(ValueError, match=r"^langevin needs energies of each row alone, got Batch"):
        langevin(network(norm=nn.BatchNorm1d(5)), x.double(), **options)
    with pytest.raises(tw.ContractError, match=r"axis batch is 3, but it is 4 in x"):
        langevin(double_well, x, noise=torch.ones(2, 3, 3), **options)
