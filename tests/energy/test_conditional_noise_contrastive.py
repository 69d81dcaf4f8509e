"""Conditional noise-contrastive estimation: closed form, the whole population, limit."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import termwise as tw
from termwise.energy import ConditionalNoiseContrastiveLoss, conditional_noise_contrastive_loss


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_noise_that_is_x_gives_two_log_two(make_gaussian):
    problem = make_gaussian(3, 1)
    x = normal(4, 3)
    terms = conditional_noise_contrastive_loss(problem.energy, x, x.expand(5, 4, 3))
    expected = {"loss": 2 * math.log(2), "classification": math.log(2)}
    assert terms.metrics() == pytest.approx({**expected, "accuracy": 0.5, "log_odds": 0})


@pytest.mark.parametrize("noises", [1, 2])
def test_the_truth_is_stationary_for_any_conditional_noise(noises):
    """Three states, and every row that could be drawn, weighed by its probability."""
    states = 3
    p = normal(states, seed=1).softmax(0)
    to = normal(states, states, seed=2).softmax(1)  # p(y | x), not symmetric
    rows = torch.tensor(list(itertools.product(range(states), repeat=noises + 1)))
    start, ends = rows[:, :1], rows[:, 1:]
    weights = p[start[:, 0]] * to[start, ends].prod(1)
    options = {"log_forward": to[start, ends].T.log(), "log_backward": to[ends, start].T.log()}
    table = (0.7 - p.log()).requires_grad_()

    def slope(**changes):
        loss = conditional_noise_contrastive_loss(
            lambda x: table[x[:, 0].long()],
            start.double(),
            ends.T[..., None].double(),
            weights=weights,
            **{**options, **changes},
        ).loss
        return torch.autograd.grad(loss, table)[0]

    assert slope().abs().max() < 1e-15
    assert slope(log_forward=None, log_backward=None).abs().max() > 1e-2
    swapped = {"log_forward": options["log_backward"], "log_backward": options["log_forward"]}
    assert slope(**swapped).abs().max() > 1e-2


def test_small_symmetric_noise_is_score_matching(make_gaussian):
    """2 log 2 + eps^2 / 2 * (tr(PMP) / 2 - tr P), Ceylan and Gutmann's limit, with gradients."""
    d, eps = 3, 1e-3
    problem = make_gaussian(d, 3)
    steps = eps * d**0.5 * torch.eye(d, dtype=torch.float64)
    noise = torch.cat([problem.x + step for step in (*steps, *-steps)]).view(2 * d, 2 * d, d)
    loss = conditional_noise_contrastive_loss(problem.energy, problem.x, noise).loss
    precision = (problem.precision + problem.precision.T) / 2
    matching = 0.5 * (precision @ problem.moment @ precision).trace() - precision.trace()
    ours = (loss - 2 * math.log(2)) / (eps**2 / 2)
    near = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ours, matching, **near)
    torch.testing.assert_close(
        torch.autograd.grad(ours, problem.leaves),
        torch.autograd.grad(matching, problem.leaves),
        **near,
    )


def leaves(batch, noises, seed):
    shapes = [(batch,), *[(noises, batch)] * 3]
    drawn = [normal(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    drawn.append(normal(batch, seed=seed + 9).abs() + 0.1)
    return [tensor.requires_grad_() for tensor in drawn]


def called(table_x, table_noise, log_forward, log_backward, weights):
    return conditional_noise_contrastive_loss(
        lambda x: x[:, 0],
        table_x[:, None],
        table_noise[..., None],
        log_forward=log_forward,
        log_backward=log_backward,
        weights=weights,
    )


def test_extreme_odds_and_nan():
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    far = called(zeros[0] - 1e4, zeros + 1e4, zeros, zeros, None)
    assert far.metrics() == {"loss": 0, "classification": 0, "accuracy": 1, "log_odds": 2e4}
    bad = called(zeros[0] * math.nan, zeros, zeros, zeros, None)
    assert all(math.isnan(value) for value in bad.metrics().values())


def test_the_energy_sees_rows_that_line_up_with_x():
    x, noise = normal(5, 3), normal(4, 5, 3, seed=1)
    condition, seen = normal(5, 3, seed=2), []

    def energy(rows):
        seen.append(rows)
        return (rows * condition).sum(1)

    conditional_noise_contrastive_loss(energy, x, noise)
    torch.testing.assert_close(torch.stack(seen), torch.cat([x[None], noise]), rtol=0, atol=0)


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


class Energy(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, x):
        return self.network(x)[:, 0]


def test_module_is_the_function_in_every_dtype_and_mode():
    loss_fn = ConditionalNoiseContrastiveLoss(Energy())
    x, noise = normal(5, 2, 2).float(), normal(3, 5, 2, 2, seed=1).float()
    terms = loss_fn(x, noise)
    terms.loss.backward()
    # Energies are compared with each other: the last bias has the gradient 0, not none.
    assert loss_fn.energy.network[-1].bias.grad.abs().item() < 1e-6
    function = conditional_noise_contrastive_loss(loss_fn.energy, x, noise)
    assert terms.metrics() == function.metrics()
    assert copy.deepcopy(loss_fn)(x, noise).metrics() == function.metrics()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_fn(x, noise).metrics() == function.metrics()
    with torch.inference_mode():
        assert loss_fn(x, noise).metrics() == function.metrics()
    half = loss_fn.bfloat16()(x.bfloat16(), noise.bfloat16())
    assert {value.dtype for _, value in half.items()} == {torch.float32}
    assert half.loss.item() == pytest.approx(function.loss.item(), rel=0.1)


def test_refusals():
    x, noise = normal(5, 3), normal(2, 5, 3)
    model = Energy().double()
    with pytest.raises(tw.ContractError, match=r"noise needs .* axis batch is 4, but it is 5 in x"):
        conditional_noise_contrastive_loss(model, x, noise[:, :4])
    with pytest.raises(ValueError, match="needs at least 1 noise for each row"):
        conditional_noise_contrastive_loss(model, x, noise[:0])
    with pytest.raises(ValueError, match="or neither .* got log_forward alone"):
        conditional_noise_contrastive_loss(model, x, noise, log_forward=normal(2, 5))
    with pytest.raises(ValueError, match="or neither .* got log_backward alone"):
        conditional_noise_contrastive_loss(model, x, noise, log_backward=normal(2, 5))
