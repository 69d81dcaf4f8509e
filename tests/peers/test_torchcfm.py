"""torchcfm's paths and targets beside our flow matching, on the field of an energy."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from termwise import energy

torchcfm = pytest.importorskip("torchcfm.conditional_flow_matching")

SIZE = 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


X0, X1 = normal(7, SIZE), normal(7, SIZE, seed=1)
TIME = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(SIZE + 1, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)
    return nn.Sequential(*layers).double()


def at(model: nn.Module, time: Tensor):
    return lambda x: model(torch.cat([x, time[:, None]], 1))


def their_loss(model: nn.Module, time: Tensor, x_t: Tensor, target: Tensor) -> Tensor:
    """The line of their training loops, with the descent of an energy for the network."""
    x_t = x_t.detach().requires_grad_()
    velocity = -torch.autograd.grad(at(model, time)(x_t).sum(), x_t, create_graph=True)[0]
    return torch.mean((velocity - target) ** 2)


def assert_same(ours: Tensor, theirs: Tensor, model: nn.Module) -> None:
    assert_close(ours, theirs)
    gradients = [
        torch.autograd.grad(loss, [*model.parameters()], materialize_grads=True, allow_unused=True)
        for loss in (ours, theirs)
    ]
    assert_close(*gradients)


def test_conditional_flow_matching_is_ours_over_the_size_of_the_event(model):
    matcher = torchcfm.ConditionalFlowMatcher(sigma=0.0)
    theirs = their_loss(model, *matcher.sample_location_and_conditional_flow(X0, X1, TIME))
    ours = energy.flow_matching_loss(at(model, TIME), X0, X1, TIME).loss
    assert_same(ours / SIZE, theirs, model)


def test_their_sigma_is_noise_added_to_both_ends(model):
    matcher = torchcfm.ConditionalFlowMatcher(sigma=0.3)
    time, x_t, target, noise = matcher.sample_location_and_conditional_flow(
        X0, X1, TIME, return_noise=True
    )
    theirs = their_loss(model, time, x_t, target)
    moved = 0.3 * noise
    ours = energy.flow_matching_loss(at(model, TIME), X0 + moved, X1 + moved, TIME).loss
    assert_same(ours / SIZE, theirs, model)


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_the_target_matcher_is_our_sigma_min_and_draws_the_noise_itself(model, sigma):
    """Its x0 is not used: what it returns as noise is our x0."""
    matcher = torchcfm.TargetConditionalFlowMatcher(sigma=sigma)
    time, x_t, target, noise = matcher.sample_location_and_conditional_flow(
        X0, X1, TIME, return_noise=True
    )
    theirs = their_loss(model, time, x_t, target)
    ours = energy.flow_matching_loss(at(model, TIME), noise, X1, TIME, sigma_min=sigma).loss
    assert_same(ours / SIZE, theirs, model)


def test_pairs_of_their_optimal_transport_are_ours_as_they_are(model):
    """Theirs draws pairs from the plan with replacement: a row may come twice."""
    matcher = torchcfm.ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
    np.random.seed(0)
    x0, x1 = matcher.ot_sampler.sample_plan(X0, X1)
    assert len(x0.unique(dim=0)) < len(X0)
    np.random.seed(0)
    theirs = their_loss(model, *matcher.sample_location_and_conditional_flow(X0, X1, TIME))
    ours = energy.flow_matching_loss(at(model, TIME), x0, x1, TIME).loss
    assert_same(ours / SIZE, theirs, model)


@pytest.mark.parametrize("kind", ["VariancePreserving", "SchrodingerBridge"])
def test_the_other_matchers_are_other_paths(model, kind):
    matcher = getattr(torchcfm, f"{kind}ConditionalFlowMatcher")(sigma=0.5)
    x_t, target = matcher.sample_location_and_conditional_flow(X0, X1, TIME)[1:]
    straight = X1 - X0
    assert (target - straight).abs().max() > 0.1
    assert x_t.shape == target.shape
