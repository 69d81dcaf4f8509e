"""Finite-difference score matching: exact for quadratics, second order elsewhere, refusals."""

import math

import pytest
import torch
from torch import Tensor, nn

import termwise as tw
from termwise.energy import (
    FiniteDifferenceScoreMatchingLoss,
    finite_difference_score_matching_loss,
    sliced_score_matching_loss,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def axes(x: Tensor) -> Tensor:
    """sqrt(d) e_i for every row: the mean of v v^T over them is exactly I."""
    d = x.shape[1]
    return (d**0.5 * torch.eye(d, dtype=x.dtype))[:, None].expand(d, *x.shape)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 1), nn.Flatten(0)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("step", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("at_the_truth", [True, False])
def test_it_is_score_matching_of_a_gaussian_at_any_step(make_gaussian, step, at_the_truth):
    problem = make_gaussian(3, 1, at_the_truth=at_the_truth)
    precision = (problem.precision + problem.precision.T) / 2
    square = (precision @ problem.moment @ precision).trace()
    expected = {"score_square": square, "curvature": precision.trace()}
    expected["loss"] = 0.5 * square - precision.trace()
    terms = finite_difference_score_matching_loss(
        problem.energy, problem.x, step=step, projections=axes(problem.x)
    )
    tolerance = 1e-12 / min(step, 1) ** 2  # what cancels
    for name, value in expected.items():
        ours = getattr(terms, name)
        torch.testing.assert_close(ours, value, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            torch.autograd.grad(ours, problem.leaves, retain_graph=True),
            torch.autograd.grad(
                value, problem.leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            ),
            rtol=10 * tolerance,
            atol=10 * tolerance,
        )


def test_half_the_step_leaves_a_quarter_of_the_error():
    model, x, v = network(), normal(6, 4), normal(3, 6, 4, seed=1)
    exact = sliced_score_matching_loss(model, x, projections=v, variance_reduced=False)
    errors = [
        finite_difference_score_matching_loss(model, x, step=step, projections=v).loss - exact.loss
        for step in (0.1, 0.05)
    ]
    assert (errors[0] / errors[1]).item() == pytest.approx(4, rel=0.02)


def test_the_default_step_is_good_in_float32():
    model, x, v = network(), normal(64, 4), normal(4, 64, 4, seed=1)
    parameters = list(model.parameters())[:-1]

    def gradient(loss):
        parts = torch.autograd.grad(loss, parameters)
        return torch.cat([part.double().flatten() for part in parts])

    exact = gradient(
        sliced_score_matching_loss(model, x, projections=v, variance_reduced=False).loss
    )
    model.float()
    errors = {
        step: (
            gradient(
                finite_difference_score_matching_loss(
                    model, x.float(), step=step, projections=v.float()
                ).loss
            )
            - exact
        ).norm()
        / exact.norm()
        for step in (0.05, 5e-4)
    }
    assert errors[0.05] < 3e-3
    assert errors[5e-4] > 0.02  # cancellation


def test_no_derivative_by_x_is_taken_and_each_call_lines_up_with_x():
    seen = []
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def energy(x):
        seen.append(x)
        return weight * x.square().sum(1)

    x = normal(3, 4)
    before = torch.get_rng_state()
    terms = finite_difference_score_matching_loss(
        energy, x, projections=2, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert [point.shape for point in seen] == [x.shape] * 5
    assert not any(point.requires_grad for point in seen)
    torch.testing.assert_close(seen[1] + seen[2], 2 * x)
    terms.loss.backward()
    torch.testing.assert_close(terms.curvature.detach(), torch.tensor(8.0).double())
    with torch.inference_mode():
        again = finite_difference_score_matching_loss(
            energy, x, projections=2, generator=torch.Generator().manual_seed(0)
        )
        assert again.metrics() == terms.metrics()


def test_a_compiled_energy_stays_compiled():
    model, x, v = network(), normal(3, 4), normal(2, 3, 4, seed=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ours = finite_difference_score_matching_loss(compiled, x, projections=v)
    theirs = finite_difference_score_matching_loss(model, x, projections=v)
    torch.testing.assert_close(dict(ours.items()), dict(theirs.items()))


def test_refusals():
    x = torch.zeros(2, 3)

    def energy(x):
        return x.square().sum(1)

    for step in (0.0, -0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"needs a positive finite step, got {step}$"):
            finite_difference_score_matching_loss(energy, x, step=step)
    with pytest.raises(ValueError, match="needs x in float32 or float64, got torch.bfloat16"):
        finite_difference_score_matching_loss(energy, x.bfloat16())
    with pytest.raises(ValueError, match="needs at least one projection, got 0"):
        finite_difference_score_matching_loss(energy, x, projections=0)
    with pytest.raises(ValueError, match="got BatchNorm1d in training mode"):
        finite_difference_score_matching_loss(nn.Sequential(nn.BatchNorm1d(3), nn.Flatten(0)), x)
    with pytest.raises(tw.ContractError, match=r"energy\(x\) needs .* got float32\[2, 1\]"):
        finite_difference_score_matching_loss(lambda x: x.sum(1, keepdim=True), x)


def test_the_module_is_the_function():
    model, x, v = network(), normal(3, 4), normal(2, 3, 4)
    loss_fn = FiniteDifferenceScoreMatchingLoss(model, step=0.3, projections=4)
    ours = loss_fn(x, projections=v)
    theirs = finite_difference_score_matching_loss(model, x, step=0.3, projections=v)
    assert ours.metrics() == theirs.metrics()
    drawn = loss_fn(x, generator=torch.Generator().manual_seed(3))
    theirs = finite_difference_score_matching_loss(
        model, x, step=0.3, projections=4, generator=torch.Generator().manual_seed(3)
    )
    assert drawn.metrics() == theirs.metrics()
    assert "step=0.3, projections=4, distribution='rademacher'" in repr(loss_fn)
