"""Denoising score matching: Gaussian closed forms, the antithetic form and its variance."""

import math

import pytest
import torch
from torch import Tensor, nn

import termwise as tw
from termwise.energy import (
    DenoisingScoreMatchingLoss,
    denoising_score_matching_loss,
    sliced_score_matching_loss,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def crossed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row with each of the noises +-sqrt(d) e_i, of mean 0 and covariance I exactly."""
    d = x.shape[1]
    steps = d**0.5 * torch.eye(d, dtype=x.dtype)
    noises = torch.cat([steps, -steps])
    return x.repeat_interleave(2 * d, 0), noises.repeat(len(x), 1)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 1), nn.Flatten(0)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("differentiation", ["autograd", "func"])
def test_gaussian_closed_form(make_gaussian, antithetic, differentiation):
    problem, sigma, d = make_gaussian(3, 1), 0.7, 3
    x, noise = crossed(problem.x)
    precision = (problem.precision + problem.precision.T) / 2
    blurred = problem.moment + sigma**2 * torch.eye(d, dtype=torch.float64)
    expected = {
        "score_square": (precision @ blurred @ precision).trace(),
        "cross": precision.trace(),
        "noise_square": torch.tensor(0.0 if antithetic else d / sigma**2, dtype=torch.float64),
    }
    expected["loss"] = (
        0.5 * expected["score_square"] - expected["cross"] + 0.5 * expected["noise_square"]
    )
    terms = denoising_score_matching_loss(
        problem.energy,
        x,
        sigma=sigma,
        noise=noise,
        antithetic=antithetic,
        differentiation=differentiation,
    )
    for name, value in expected.items():
        ours = getattr(terms, name)
        torch.testing.assert_close(ours, value, **EXACT)
        if name != "noise_square":
            torch.testing.assert_close(
                torch.autograd.grad(
                    ours,
                    problem.leaves,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                ),
                torch.autograd.grad(
                    value,
                    problem.leaves,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                ),
                rtol=1e-11,
                atol=1e-11,
            )


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_optimum_is_the_blurred_density(make_gaussian, antithetic):
    problem, sigma = make_gaussian(3, 2, at_the_truth=True), 0.7
    x, noise = crossed(problem.x)
    with torch.no_grad():
        blurred = problem.covariance + sigma**2 * torch.eye(3, dtype=torch.float64)
        problem.precision.copy_(torch.linalg.inv(blurred))
    terms = denoising_score_matching_loss(
        problem.energy, x, sigma=sigma, noise=noise, antithetic=antithetic
    )
    for gradient in torch.autograd.grad(terms.loss, problem.leaves):
        assert gradient.abs().max() < 1e-12


def test_antithetic_is_the_plain_loss_of_both_signs_less_its_constant():
    model, x, noise, sigma = network(), normal(5, 4), normal(5, 4, seed=1), 0.3
    ours = denoising_score_matching_loss(model, x, sigma=sigma, noise=noise, antithetic=True)
    plain = [
        denoising_score_matching_loss(model, x, sigma=sigma, noise=sign * noise).loss
        for sign in (1, -1)
    ]
    constant = noise.square().sum(1).mean() / (2 * sigma**2)
    torch.testing.assert_close(ours.loss, sum(plain) / 2 - constant, rtol=1e-10, atol=1e-10)


def test_antithetic_tends_to_sliced_score_matching():
    model, x, noise = network(), normal(5, 4), normal(5, 4, seed=1)
    ours = denoising_score_matching_loss(model, x, sigma=1e-4, noise=noise, antithetic=True)
    sliced = sliced_score_matching_loss(model, x, projections=noise[None])
    torch.testing.assert_close(ours.loss, sliced.loss, rtol=1e-6, atol=1e-6)


def test_antithetic_gradients_vary_twenty_times_less_at_small_sigma(make_gaussian):
    """For as many gradients of the energy: two plain noises against one and its negative."""
    problem = make_gaussian(4, 3)
    generator = torch.Generator().manual_seed(0)

    def spread(antithetic):
        x = problem.x if antithetic else problem.x.repeat(2, 1)
        gradients = []
        for _ in range(60):
            terms = denoising_score_matching_loss(
                problem.energy, x, sigma=0.01, antithetic=antithetic, generator=generator
            )
            parts = torch.autograd.grad(terms.loss, problem.leaves)
            gradients.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(gradients).var(0).sum().sqrt()

    assert spread(antithetic=False) > 20 * spread(antithetic=True)


def test_each_call_lines_up_with_x_and_nothing_of_the_callers_is_touched():
    seen, model = [], network()

    def energy(x):
        seen.append(x)
        return model(x)

    x = normal(3, 4)
    before = torch.get_rng_state()
    terms = denoising_score_matching_loss(
        energy,
        x,
        sigma=(0.1, 0.2),
        antithetic=True,
        generator=torch.Generator().manual_seed(0),
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert [point.shape for point in seen] == [x.shape] * 4
    assert not x.requires_grad
    torch.testing.assert_close(seen[0] + seen[1], 2 * x)
    terms.loss.backward()
    assert model[-2].bias.grad.item() == 0  # it has no say, and a reducer waits for it
    with torch.inference_mode():
        again = denoising_score_matching_loss(
            energy,
            x,
            sigma=(0.1, 0.2),
            antithetic=True,
            generator=torch.Generator().manual_seed(0),
        )
        torch.testing.assert_close(dict(again.items()), dict(terms.detach().items()))


@pytest.mark.parametrize("antithetic", [False, True])
def test_in_halves_the_noise_is_what_was_added(antithetic):
    """x + sigma n is rounded: the target is the step that was made."""
    x = torch.linspace(0.5, 2, 400, dtype=torch.bfloat16)[:, None]
    noise = normal(400, 1).float()
    terms = denoising_score_matching_loss(
        lambda x: 0.5 * x.square().sum(1), x, sigma=0.02, noise=noise, antithetic=antithetic
    )
    assert terms.loss.dtype == torch.float32
    ahead, behind = (
        (x.float() + sign * 0.02 * noise).bfloat16().float() - x.float() for sign in (1, -1)
    )
    if antithetic:
        made = (ahead - behind) / 0.04
        cross = (made.square()).sum(1).mean()
    else:
        cross = ((x.float() + ahead) * ahead / 0.02**2).sum(1).mean()
    torch.testing.assert_close(terms.cross, cross, rtol=1e-4, atol=1e-4)


def test_an_energy_may_close_over_the_level_of_each_row():
    x, noise, sigma = normal(3, 4), normal(3, 4, seed=1), torch.tensor([0.1, 0.5, 2.0]).double()
    terms = denoising_score_matching_loss(
        lambda x: x.square().sum(1) / (2 * sigma**2),
        x * 0,
        sigma=sigma,
        noise=noise,
        weighting="sigma2",
    )
    assert terms.loss.item() < 1e-24  # the energy of pure noise of each level


def test_refusals():
    x, noise = torch.zeros(2, 3), torch.zeros(2, 3)

    def call(**options):
        return denoising_score_matching_loss(lambda x: x.square().sum(1), x, **options)

    for sigma in (0.0, -0.1, math.inf, math.nan, [0.1, 0]):
        with pytest.raises(ValueError, match="needs a positive finite sigma, got"):
            call(sigma=sigma)
    with pytest.raises(ValueError, match="needs a level of noise, got none"):
        call(sigma=[])
    said = r"needs noise of shape \[1, 2, 3\], got float32\[2, 3\]$"
    with pytest.raises(ValueError, match=said):
        call(sigma=[0.1], noise=noise)
    with pytest.raises(ValueError, match=r"needs noise of shape \[2, 3\], got float32\[2, 2, 3\]"):
        call(sigma=0.1, noise=torch.zeros(2, 2, 3))
    said = r"needs a weighting of shape \[2\], one of each level, got float32\[3\]"
    with pytest.raises(ValueError, match=said):
        call(sigma=[0.1, 0.2], weighting=torch.ones(3))
    said = r"needs a weighting of shape \[2\], one of each row, got float32\[1\]"
    with pytest.raises(ValueError, match=said):
        call(sigma=torch.ones(2), weighting=torch.ones(1))
    with pytest.raises(tw.ContractError, match="sigma needs .*batch is 3, but it is 2 in x|sigma"):
        call(sigma=torch.ones(3))
    with pytest.raises(tw.ContractError, match="weighting needs"):
        call(sigma=0.1, weighting="sigma")
    with pytest.raises(ValueError, match="got BatchNorm1d in training mode"):
        denoising_score_matching_loss(nn.Sequential(nn.BatchNorm1d(3), nn.Flatten(0)), x, sigma=0.1)
    with pytest.raises(tw.ContractError, match=r"energy\(x \+ sigma \* noise\) needs"):
        denoising_score_matching_loss(lambda x: x, x, sigma=0.1)


def test_the_module_is_the_function():
    model, x, noise = network(), normal(3, 4), normal(2, 3, 4)
    options = {"sigma": [0.1, 0.5], "weighting": "sigma2", "antithetic": True}
    loss_fn = DenoisingScoreMatchingLoss(model, **options)
    ours = loss_fn(x, noise=noise)
    theirs = denoising_score_matching_loss(model, x, noise=noise, **options)
    assert ours.metrics() == theirs.metrics()
    sigma = torch.tensor([0.1, 0.2, 0.3]).double()
    ours = loss_fn(x, noise=noise[0], sigma=sigma)
    theirs = denoising_score_matching_loss(model, x, noise=noise[0], **{**options, "sigma": sigma})
    assert ours.metrics() == theirs.metrics()
    assert "sigma=[0.1, 0.5], weighting='sigma2', antithetic=True" in repr(loss_fn)
