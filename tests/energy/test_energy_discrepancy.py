"""Energy discrepancy: the exact one of a Gaussian, its limit, noise and its generator."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import termwise as tw
from termwise.energy import EnergyDiscrepancyLoss, energy_discrepancy_loss


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact_discrepancy(problem, t: float, nodes: int = 28) -> Tensor:
    """The loss at w = 0 with both disturbances integrated exactly.

    xi by sigma points, for the smoothed energy of a Gaussian is quadratic; xi' by Gauss-Hermite,
    whose weights the energy adds by itself: it is called on x, and then copy by copy.
    """
    d = problem.x.shape[1]
    points, masses = np.polynomial.hermite_e.hermegauss(nodes)
    line, mass = torch.tensor(points), torch.tensor(masses / masses.sum())
    grid = torch.cartesian_prod(*[line] * d).reshape(-1, d)
    mass = torch.cartesian_prod(*[mass] * d).reshape(-1, d).prod(1)
    there = d**0.5 * torch.eye(d, dtype=torch.float64)
    there = torch.cat([there, -there])
    x = problem.x.repeat_interleave(2 * d, 0)
    noise = torch.cat([there.repeat(2 * d, 1)[None], grid[:, None].expand(-1, len(x), d)])
    offsets = iter([torch.zeros(()), *-(len(mass) * mass).log()])
    return energy_discrepancy_loss(
        lambda rows: problem.energy(rows) + next(offsets),
        x,
        t=t,
        copies=len(grid),
        w_stable=0.0,
        noise=noise,
    ).loss


def closed_form(problem, t: float) -> Tensor:
    """E less its contrastive potential, log|I + tP| / 2 + (y-m)^T (P^-1 + tI)^-1 (y-m) / 2."""
    precision = (problem.precision + problem.precision.T) / 2
    unit = torch.eye(len(precision), dtype=torch.float64)
    smoothed = torch.linalg.inv(torch.linalg.inv(precision) + t * unit)
    potential = (
        0.5 * torch.logdet(unit + t * precision)
        + 0.5 * (smoothed @ (problem.moment + t * unit)).trace()
    )
    return 0.5 * (precision @ problem.moment).trace() - potential


@pytest.mark.parametrize(("d", "t"), [(1, 0.05), (1, 0.5), (2, 0.1)])
@pytest.mark.parametrize("at_the_truth", [False, True])
def test_the_discrepancy_of_a_gaussian(make_gaussian, d, t, at_the_truth):
    problem = make_gaussian(d, 3, at_the_truth=at_the_truth)
    ours, exact = exact_discrepancy(problem, t), closed_form(problem, t)
    near = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(ours, exact, **near)
    slopes = torch.autograd.grad(ours, problem.leaves)
    torch.testing.assert_close(slopes, torch.autograd.grad(exact, problem.leaves), **near)
    largest = max(slope.abs().max().item() for slope in slopes)
    assert largest < 1e-9 if at_the_truth else largest > 1e-2


def test_a_small_t_is_t_times_score_matching(make_gaussian):
    problem, t = make_gaussian(2, 3), 1e-4
    precision = (problem.precision + problem.precision.T) / 2
    matching = 0.5 * (precision @ problem.moment @ precision).trace() - precision.trace()
    torch.testing.assert_close(
        exact_discrepancy(problem, t, nodes=5) / t, matching, rtol=1e-3, atol=1e-3
    )


def test_energies_that_run_off_are_bounded_by_w_alone():
    x, noise = torch.zeros(2, 1), torch.ones(5, 2, 1)
    for w_stable, bound in ((1.0, -math.log(4)), (2.5, math.log(2.5 / 4)), (0.0, -2e4)):
        terms = energy_discrepancy_loss(
            lambda x: 1e4 * x[:, 0], x, t=1.0, copies=4, w_stable=w_stable, noise=noise
        )
        assert terms.loss.item() == pytest.approx(bound)
        assert terms.stabilization.item() == (w_stable > 0)
    assert terms.effective_copies.item() == 4


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


def test_the_generator_is_the_only_chance():
    model, x = network(), normal(5, 4).float()

    def of(**options):
        return energy_discrepancy_loss(model, x, t=0.2, copies=3, **options).metrics()

    before = torch.get_rng_state()
    first = of(generator=torch.Generator().manual_seed(1))
    assert first == of(generator=torch.Generator().manual_seed(1))
    assert first != of(generator=torch.Generator().manual_seed(2))
    drawn = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(1))
    assert first == of(noise=drawn)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    drawn = of()
    torch.manual_seed(1)
    assert of() == drawn
    assert not x.requires_grad


def test_module_is_the_function_in_every_dtype_and_mode():
    loss_fn = EnergyDiscrepancyLoss(network(), t=0.2, copies=3, w_stable=0.5)
    assert "t=0.2, copies=3, w_stable=0.5" in repr(loss_fn)
    x, noise = normal(5, 2, 2).float(), normal(4, 5, 2, 2, seed=1).float()
    terms = loss_fn(x, noise=noise)
    terms.loss.backward()
    assert all(p.grad is not None for p in loss_fn.parameters())
    function = energy_discrepancy_loss(
        loss_fn.energy, x, t=0.2, copies=3, w_stable=0.5, noise=noise
    )
    assert terms.metrics() == function.metrics()
    assert copy.deepcopy(loss_fn)(x, noise=noise).metrics() == function.metrics()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_fn(x, noise=noise).metrics() == function.metrics()
    with torch.inference_mode():
        assert loss_fn(x, noise=noise).metrics() == function.metrics()
    seen = []
    half = loss_fn.bfloat16()
    half.energy.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    terms = half(x.bfloat16(), noise=noise)
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for _, value in terms.items()} == {torch.float32}
    assert terms.loss.item() == pytest.approx(function.loss.item(), rel=0.1, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t": 0.0}, "needs t > 0, got 0.0"),
        ({"t": math.nan}, "needs t > 0, got nan"),
        ({"t": 1, "w_stable": -0.1}, "needs a finite w_stable >= 0, got -0.1"),
        ({"t": 1, "w_stable": math.inf}, "needs a finite w_stable >= 0, got inf"),
        ({"t": 1, "copies": 0}, "needs at least 1 of copies, got 0"),
        ({"t": 1, "copies": 3}, r"needs noise of copies \+ 1 = 4 draws, got 3"),
    ],
)
def test_refusals(options, message):
    x, noise = normal(5, 4), normal(3, 5, 4)
    with pytest.raises(ValueError, match=message):
        energy_discrepancy_loss(lambda x: x.sum(1), x, noise=noise, **options)


def test_shapes_are_refused():
    x, noise = normal(5, 4), normal(17, 4, 4)
    with pytest.raises(tw.ContractError, match=r"noise needs .* axis batch is 4, but it is 5 in x"):
        energy_discrepancy_loss(lambda x: x.sum(1), x, t=1, noise=noise)
    with pytest.raises(tw.ContractError, match=r"energy\(copy\) needs Float"):
        energy_discrepancy_loss(lambda rows: rows[:, 0] if rows is x else rows, x, t=1)
