"""Ranking noise-contrastive estimation: closed form, the whole population, refusals."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import termwise as tw
from termwise.energy import RankingNoiseContrastiveLoss, ranking_noise_contrastive_loss

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("noises", [1, 2, 7])
def test_noise_of_the_model_itself_gives_the_log_of_the_candidates(make_gaussian, noises):
    problem = make_gaussian(3, 1)
    x, noise = normal(4, 3), normal(noises, 4, 3, seed=1)
    with torch.no_grad():
        # A normaliser of the row's own is neither here nor there.
        log_q = [-problem.energy(rows) + normal(4, seed=2) for rows in (x, noise)]
    terms = ranking_noise_contrastive_loss(
        problem.energy, x, noise, log_noise_x=log_q[0], log_noise_noise=log_q[1]
    )
    assert terms.loss.item() == pytest.approx(math.log(noises + 1), rel=1e-12)
    assert terms.effective_candidates.item() == pytest.approx(noises + 1, rel=1e-12)


def test_the_true_gaussian_is_stationary(make_gaussian):
    problem = make_gaussian(3, 2, at_the_truth=True)
    noise = torch.stack([problem.x.roll(shift, 0) for shift in (1, 2, 4)])
    with torch.no_grad():
        log_q = [-problem.energy(rows) for rows in (problem.x, noise)]

    def slopes(log_noise_x, log_noise_noise):
        loss = ranking_noise_contrastive_loss(
            problem.energy,
            problem.x,
            noise,
            log_noise_x=log_noise_x,
            log_noise_noise=log_noise_noise,
        ).loss
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, problem.leaves)])

    assert slopes(*log_q).abs().max() < 1e-13
    tilted = [log_q[0] + 0.3 * problem.x[:, 0], log_q[1] + 0.3 * noise[..., 0]]
    assert slopes(*tilted).abs().max() > 1e-2


@pytest.mark.parametrize("noises", [1, 2])
def test_the_truth_is_stationary_for_any_noise(noises):
    """Four states, and every row that could be drawn, weighed by its probability."""
    states = 4
    p, q = (normal(states, seed=seed).softmax(0) for seed in (1, 2))
    rows = torch.tensor(list(itertools.product(range(states), repeat=noises + 1)))
    weights = p[rows[:, 0]] * q[rows[:, 1:]].prod(1)
    x, noise = rows[:, :1].double(), rows[:, 1:].T[..., None].double()
    table = (0.7 - p.log()).requires_grad_()

    def slope(at, log_q):
        loss = ranking_noise_contrastive_loss(
            lambda x: at[x[:, 0].long()],
            x,
            noise,
            log_noise_x=log_q[rows[:, 0]],
            log_noise_noise=log_q[rows[:, 1:].T],
            weights=weights,
        ).loss
        return torch.autograd.grad(loss, table)[0]

    assert slope(table, q.log()).abs().max() < 1e-15
    assert slope(-table, q.log()).abs().max() > 1e-2
    assert slope(table, 0 * q).abs().max() > 1e-2


def leaves(batch, noises, seed):
    shapes = [(batch,), (noises, batch), (batch,), (noises, batch)]
    drawn = [normal(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    drawn.append(normal(batch, seed=seed + 9).abs() + 0.1)
    return [tensor.requires_grad_() for tensor in drawn]


def called(table_x, table_noise, log_q_x, log_q_noise, weights):
    return ranking_noise_contrastive_loss(
        lambda x: x[:, 0],
        table_x[:, None],
        table_noise[..., None],
        log_noise_x=log_q_x,
        log_noise_noise=log_q_noise,
        weights=weights,
    )


def test_a_constant_of_each_row_changes_nothing():
    x, noise, log_q_x, log_q_noise, weights = leaves(5, 3, 1)
    shift = normal(5, seed=3)
    plain = called(x, noise, log_q_x, log_q_noise, weights)
    moved = called(x + shift, noise + shift, log_q_x, log_q_noise, weights)
    for name in ("loss", "accuracy", "effective_candidates"):
        torch.testing.assert_close(getattr(moved, name), getattr(plain, name), **EXACT)


def test_ties_and_extreme_scores():
    zeros = torch.zeros(3, dtype=torch.float64)
    tied = called(zeros, zeros.expand(2, 3), zeros, zeros.expand(2, 3), None)
    assert tied.accuracy.item() == 0.5
    far = called(zeros - 1e4, zeros.expand(2, 3) + 1e4, zeros, zeros.expand(2, 3), None)
    assert far.loss.item() == 0
    assert (far.accuracy.item(), far.effective_candidates.item()) == (1, 1)
    bad = called(zeros * math.nan, zeros.expand(2, 3), zeros, zeros.expand(2, 3), None)
    assert all(math.isnan(value) for value in bad.metrics().values())


def test_the_energy_sees_rows_that_line_up_with_x():
    x, noise = normal(5, 3), normal(4, 5, 3, seed=1)
    condition, seen = normal(5, 3, seed=2), []

    def energy(rows):
        seen.append(rows)
        return (rows * condition).sum(1)

    options = {"log_noise_x": normal(5), "log_noise_noise": normal(4, 5)}
    ranking_noise_contrastive_loss(energy, x, noise, **options)
    torch.testing.assert_close(torch.stack(seen), torch.cat([x[None], noise]), rtol=0, atol=0)


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


def test_module_is_the_function_in_every_dtype_and_mode():
    loss_fn = RankingNoiseContrastiveLoss(network())
    x, noise = normal(5, 2, 2).float(), normal(3, 5, 2, 2, seed=1).float()
    options = {"log_noise_x": normal(5).float(), "log_noise_noise": normal(3, 5).float()}
    terms = loss_fn(x, noise, **options)
    terms.loss.backward()
    assert all(p.grad is not None for p in loss_fn.parameters())
    function = ranking_noise_contrastive_loss(loss_fn.energy, x, noise, **options)
    assert terms.metrics() == function.metrics()
    assert copy.deepcopy(loss_fn)(x, noise, **options).metrics() == function.metrics()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_fn(x, noise, **options).metrics() == function.metrics()
    with torch.inference_mode():
        assert loss_fn(x, noise, **options).metrics() == function.metrics()
    half = loss_fn.bfloat16()(x.bfloat16(), noise.bfloat16(), **options)
    assert {value.dtype for _, value in half.items()} == {torch.float32}
    assert half.loss.item() == pytest.approx(function.loss.item(), rel=0.1)


def test_refusals():
    x, noise = normal(5, 3), normal(2, 5, 3)
    options = {"log_noise_x": normal(5), "log_noise_noise": normal(2, 5)}
    energy = normal(3).mv
    with pytest.raises(tw.ContractError, match=r"noise needs .* axis batch is 4, but it is 5 in x"):
        ranking_noise_contrastive_loss(lambda x: x @ normal(3), x, noise[:, :4], **options)
    with pytest.raises(tw.ContractError, match=r'energy\(noise\[k\]\) needs Float\[Tensor, " b'):
        ranking_noise_contrastive_loss(
            lambda rows: rows[:, 0] if rows is x else rows[:, :1], x, noise, **options
        )
    with pytest.raises(ValueError, match="needs at least 1 noise for each row"):
        ranking_noise_contrastive_loss(
            energy, x, noise[:0], log_noise_x=normal(5), log_noise_noise=normal(0, 5)
        )
