"""The check of losses: it passes right ones, and fails the ways in which they go wrong."""

import pytest
import torch
import torch.nn.functional as F

from termwise import energy as tw
from termwise.testing import (
    GaussianEnergy,
    check_recovers,
    exact_noise,
    exact_projections,
    sigma_points,
)

SIGMA = 0.6


def maximum_likelihood(energy, x, **options):
    return tw.maximum_likelihood_loss(energy, x, energy.samples(), **options)


def sliced(energy, x, **options):
    return tw.sliced_score_matching_loss(energy, x, projections=exact_projections(x), **options)


def finite_difference(energy, x):
    return tw.finite_difference_score_matching_loss(energy, x, projections=exact_projections(x))


def denoising(energy, x, **options):
    x, noise = exact_noise(x)
    return tw.denoising_score_matching_loss(energy, x, sigma=SIGMA, noise=noise, **options)


def denoising_levels(energy, x):
    x, noise = exact_noise(x)
    levels = torch.stack([noise, -noise])
    return tw.denoising_score_matching_loss(energy, x, sigma=[SIGMA, SIGMA], noise=levels)


def noise_contrastive(energy, x, copies=2):
    noise = x.repeat(copies, 1)  # noise of the data's own distribution
    return tw.noise_contrastive_loss(
        energy,
        x,
        noise,
        log_noise_x=energy.log_density(x),
        log_noise_noise=energy.log_density(noise),
        log_z=energy.log_z,
    )


def ranking(energy, x):
    noise = torch.stack([x.roll(shift, 0) for shift in (1, 3)])
    return tw.ranking_noise_contrastive_loss(
        energy,
        x,
        noise,
        log_noise_x=energy.log_density(x),
        log_noise_noise=torch.stack([energy.log_density(of_one) for of_one in noise]),
    )


def conditional(energy, x):
    """Pairs both ways round, weighted by the density where they start: the sum is antisymmetric."""
    there = x.roll(1, 0) + 0.3
    starts, ends = torch.cat([x, there]), torch.cat([there, x])
    return tw.conditional_noise_contrastive_loss(
        energy, starts, ends[None], weights=energy.log_density(starts).exp()
    )


RIGHT = {
    "maximum likelihood": (maximum_likelihood, 0.0),
    "contrastive divergence": (
        lambda e, x: tw.contrastive_divergence_loss(e, x, e.samples()),
        0.0,
    ),
    "score matching": (tw.score_matching_loss, 0.0),
    "sliced": (sliced, 0.0),
    "sliced, all projected": (lambda e, x: sliced(e, x, variance_reduced=False), 0.0),
    "finite difference": (finite_difference, 0.0),
    "denoising": (denoising, SIGMA),
    "denoising, antithetic": (lambda e, x: denoising(e, x, antithetic=True), SIGMA),
    "denoising, weighted": (lambda e, x: denoising(e, x, weighting="sigma2"), SIGMA),
    "denoising, levels": (denoising_levels, SIGMA),
    "noise contrastive": (noise_contrastive, 0.0),
    "ranking": (ranking, 0.0),
    "conditional": (conditional, 0.0),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("dimensions", [1, 3])
def test_right_losses_pass(name, dimensions):
    loss_fn, smoothing = RIGHT[name]
    check_recovers(loss_fn, dimensions=dimensions, smoothing=smoothing)


@pytest.mark.parametrize("name", RIGHT)
def test_a_flipped_sign_fails(name):
    loss_fn, smoothing = RIGHT[name]
    with pytest.raises(AssertionError, match="gradient descent does not return.*is a sign wrong"):
        check_recovers(lambda energy, x: -loss_fn(energy, x).loss, smoothing=smoothing)


def score_of(energy, x):
    x = x.requires_grad_()
    return torch.autograd.grad(energy(x).sum(), x, create_graph=True)[0]


def score_matching_with_a_plus(energy, x):
    terms = tw.score_matching_loss(energy, x)
    return 0.5 * terms.score_square + terms.laplacian


def sliced_with_unit_vectors(energy, x):
    unit = exact_projections(x) / x.shape[1] ** 0.5
    return tw.sliced_score_matching_loss(energy, x, projections=unit)


def sliced_with_a_plus(energy, x):
    terms = sliced(energy, x)
    return 0.5 * terms.score_square + terms.curvature


def denoising_with_a_plus(energy, x):
    x, noise = exact_noise(x)
    score = score_of(energy, x + SIGMA * noise)
    return 0.5 * (score + noise / SIGMA).square().sum(1).mean()


def contrastive_without_the_noise(energy, x):
    data, noise = -energy(x) - energy.log_z, -energy(x.flip(0)) - energy.log_z
    return F.softplus(-data).mean() + F.softplus(noise).mean()


WRONG = {
    "score matching, + laplacian": score_matching_with_a_plus,
    "sliced, unit vectors": sliced_with_unit_vectors,
    "sliced, + curvature": sliced_with_a_plus,
    "contrastive without the noise": contrastive_without_the_noise,
    "alpha": lambda e, x: maximum_likelihood(e, x, negative_weight=0.8),
    "energies squared": lambda e, x: tw.contrastive_divergence_loss(
        e, x, e.samples(), energy_square_weight=0.1
    ),
    "l2": lambda e, x: maximum_likelihood(
        e, x, regularization="l2", regularization_weight=0.1, parameters=list(e.parameters())
    ),
    "denoising, of the data": denoising,
    "half the square": lambda e, x: 0.5 * sliced(e, x).score_square - 2 * sliced(e, x).curvature,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_loss_fails(name):
    with pytest.raises(
        AssertionError,
        match=r"not a stationary point: the gradient with respect to \w+ has norm [\d.e+-]+ there",
    ):
        check_recovers(WRONG[name])


def test_a_wrong_denoising_loss_fails():
    with pytest.raises(AssertionError, match="not a stationary point"):
        check_recovers(denoising_with_a_plus, smoothing=SIGMA)
    with pytest.raises(AssertionError, match="not a stationary point"):
        check_recovers(denoising)  # it learns the density of noisy data


def test_a_loss_that_says_nothing_fails():
    with pytest.raises(AssertionError, match="gradient descent does not return"):
        check_recovers(lambda energy, x: 0 * tw.score_matching_loss(energy, x).loss)
    with pytest.raises(AssertionError):  # the data for the model's samples: 0 but for rounding
        check_recovers(lambda energy, x: tw.maximum_likelihood_loss(energy, x, x.flip(0)))
    with pytest.raises(AssertionError, match="does not depend on the energy's mean"):
        check_recovers(lambda energy, x: energy.precision.square().sum())
    with pytest.raises(AssertionError, match="does not depend on the energy's mean"):
        check_recovers(lambda energy, x: torch.zeros(()))


def test_what_is_no_loss_is_refused():
    with pytest.raises(ValueError, match="needs a loss that is one finite number"):
        check_recovers(lambda energy, x: energy(x))
    with pytest.raises(ValueError, match="needs a loss that is one finite number, got nan"):
        check_recovers(lambda energy, x: energy(x).mean() * torch.nan)
    with pytest.raises(ValueError, match="needs at least one dimension, got 0"):
        check_recovers(tw.score_matching_loss, dimensions=0)


def test_the_parameters_are_moved_back():
    seen = []

    def loss_fn(energy, x):
        seen.append([p.detach().clone() for p in energy.parameters()])
        return tw.score_matching_loss(energy, x)

    check_recovers(loss_fn)
    truth = seen[0]
    for mean, precision, log_z in seen[1:5]:
        assert (mean - truth[0]).norm() / truth[0].norm() == pytest.approx(0.05)
        assert (precision - truth[1]).norm() / truth[1].norm() == pytest.approx(0.05)
        assert torch.equal(log_z, truth[2])


def test_sums_are_exact():
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    root = torch.randn(3, 3, dtype=torch.float64)
    covariance = root @ root.T + torch.eye(3, dtype=torch.float64)
    x = sigma_points(mean, covariance)
    torch.testing.assert_close(x.mean(0), mean)
    torch.testing.assert_close(x.T.cov(correction=0), covariance)
    crossed, noise = exact_noise(x)
    identity = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(noise.T.cov(correction=0), identity)
    torch.testing.assert_close((crossed - mean).T @ noise, 0 * identity)
    torch.testing.assert_close(
        (crossed + 0.5 * noise).T.cov(correction=0), covariance + identity / 4
    )


def test_the_energy_knows_its_truth():
    covariance = torch.tensor([[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
    mean = torch.tensor([1.0, 2.0], dtype=torch.float64)
    energy = GaussianEnergy(mean, covariance)
    x = torch.randn(4, 2, dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
    torch.testing.assert_close(energy.log_density(x), expected)
    torch.testing.assert_close((-energy(x) - energy.log_z).detach(), expected)
    with torch.no_grad():
        energy.mean += 1
        energy.precision *= 2
    torch.testing.assert_close(energy.log_density(x), expected)
    assert not energy.log_density(x).requires_grad
    torch.testing.assert_close(energy.samples(), sigma_points(mean + 1, covariance / 2))
