"""Learn known densities with each loss for energy-based models, and digits with one of them."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from .._terms import Terms
from ..energy import (
    ConditionalNoiseContrastiveLoss,
    ContrastiveDivergenceLoss,
    DenoisingScoreMatchingLoss,
    Energy,
    EnergyDiscrepancyLoss,
    FiniteDifferenceScoreMatchingLoss,
    MaximumLikelihoodLoss,
    NoiseContrastiveLoss,
    RankingNoiseContrastiveLoss,
    ReplayBuffer,
    ScoreMatchingLoss,
    SlicedScoreMatchingLoss,
    langevin,
)
from ._densities import Mixture, Plane, eight_gaussians, moons
from ._energies import Density, Energies, Learnt
from ._energy_digits import Digits, learn_digits
from ._training import Run, Setting, train

_BATCH = 256
_SEEN = 10_000  # training samples
_UNSEEN = 10_000  # held-out samples
_RATE = 2e-2
_CHAINS = 512  # of persistent contrastive divergence
_FREQUENCIES = 32
_WIDTH = 64
_TAIL = 1.5  # standard deviation of the Gaussian whose energy is added to the network's
_LOG_Z = math.log(2 * math.pi * _TAIL**2)  # of that Gaussian
_SIGMA = 0.1  # of denoising score matching
_SAMPLES_SHOWN = 2_000
_HALF_WIDTH_SHOWN = 3.2

_CONTROL = "NCE without log q"

_Step = Callable[[Tensor], Terms]


class _Noise:
    """Random draws for the losses, and noise with a known density q.

    q is a Gaussian with the mean and covariance of the data.
    """

    def __init__(self, seen: Tensor, setting: Setting) -> None:
        self.generator = setting.generator()
        self.device = setting.device
        self.mean = seen.mean(0)
        self.factor = cast("Tensor", torch.linalg.cholesky(torch.cov(seen.T)))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def draw(self, *shape: int) -> Tensor:
        """Draw samples of q."""
        return self.mean + self.normal(*shape) @ self.factor.T

    def log_density(self, x: Tensor) -> Tensor:
        """Return log q of each row."""
        centred = (x - self.mean).mT
        white = cast("Tensor", torch.linalg.solve_triangular(self.factor, centred, upper=False))
        log_volume = self.factor.diagonal().log().sum() + math.log(2 * math.pi)
        return -white.square().sum(-2) / 2 - log_volume


class _Energy(nn.Module):
    """A small network on learnt Fourier features, plus the energy of a wide Gaussian.

    The Gaussian makes the normalizer finite for all parameters.
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        torch.manual_seed(setting.seed)  # the same weights for each loss
        self.frequencies = nn.Parameter(torch.randn(2, _FREQUENCIES))
        self.net = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, 1), nn.Flatten(0)
        )
        self.to(setting.device)

    def forward(self, x: Tensor) -> Tensor:
        phases = x @ self.frequencies
        features = torch.cat([phases.sin(), phases.cos()], dim=1)
        return cast("Tensor", self.net(features) + x.square().sum(1) / (2 * _TAIL**2))


_Loss = tuple[nn.Module, _Step]


def _maximum_likelihood(energy: nn.Module, noise: _Noise) -> _Loss:
    """Draw negatives from the model itself, which is possible in two dimensions, on a grid."""
    loss_fn = MaximumLikelihoodLoss(energy)
    axis = torch.linspace(-3.6, 3.6, 49)
    cells = torch.cartesian_prod(axis, axis).to(noise.device)

    def step(x: Tensor) -> Terms:
        with torch.no_grad():
            mass = (-energy(cells)).softmax(0).cpu()
        drawn = mass.multinomial(len(x), replacement=True, generator=noise.generator)
        offset = torch.rand(len(x), 2, generator=noise.generator) - 0.5
        width = float(axis[1] - axis[0])
        return loss_fn(x, cells[drawn.to(noise.device)] + width * offset.to(noise.device))

    return loss_fn, step


def _noise_contrastive(energy: nn.Module, noise: _Noise, *, density: bool = True) -> _Loss:
    """Use the density q of the noise, or omit it: the model then learns p / q, up to a factor."""
    loss_fn = NoiseContrastiveLoss(energy, log_z=_LOG_Z)

    def step(x: Tensor) -> Terms:
        drawn = noise.draw(2 * len(x), 2)
        log_q_x, log_q_noise = (density * noise.log_density(rows) for rows in (x, drawn))
        return loss_fn(x, drawn, log_noise_x=log_q_x, log_noise_noise=log_q_noise)

    return loss_fn, step


def _ranking(energy: nn.Module, noise: _Noise) -> _Loss:
    loss_fn = RankingNoiseContrastiveLoss(energy)

    def step(x: Tensor) -> Terms:
        drawn = noise.draw(4, len(x), 2)
        log_q = torch.stack([noise.log_density(one) for one in drawn])
        return loss_fn(x, drawn, log_noise_x=noise.log_density(x), log_noise_noise=log_q)

    return loss_fn, step


def _conditional(energy: nn.Module, noise: _Noise) -> _Loss:
    loss_fn = ConditionalNoiseContrastiveLoss(energy)
    return loss_fn, lambda x: loss_fn(x, x + noise.normal(2, len(x), 2))


def _discrepancy(energy: nn.Module, noise: _Noise) -> _Loss:
    loss_fn = EnergyDiscrepancyLoss(energy, t=0.25, copies=8)
    return loss_fn, lambda x: loss_fn(x, generator=noise.generator)


def _score_matching(energy: nn.Module, noise: _Noise) -> _Loss:
    # The default is faster only in more than two dimensions.
    loss_fn = ScoreMatchingLoss(energy, trace="reverse")
    return loss_fn, loss_fn


def _sliced(energy: nn.Module, noise: _Noise) -> _Loss:
    loss_fn = SlicedScoreMatchingLoss(energy, differentiation="autograd")
    return loss_fn, lambda x: loss_fn(x, generator=noise.generator)


def _finite_difference(energy: nn.Module, noise: _Noise) -> _Loss:
    loss_fn = FiniteDifferenceScoreMatchingLoss(energy)
    return loss_fn, lambda x: loss_fn(x, generator=noise.generator)


def _denoising(energy: nn.Module, noise: _Noise) -> _Loss:
    loss_fn = DenoisingScoreMatchingLoss(energy, sigma=_SIGMA, antithetic=True)
    return loss_fn, lambda x: loss_fn(x, generator=noise.generator)


def _contrastive_divergence(energy: nn.Module, noise: _Noise) -> _Loss:
    """Start chains at the data; their adjusted steps keep the model, so the truth is stationary."""
    loss_fn = ContrastiveDivergenceLoss(energy, sampler=_sampler(noise, step_size=0.02))
    return loss_fn, loss_fn


def _persistent(energy: nn.Module, noise: _Noise) -> _Loss:
    """Continue the chains of earlier steps."""
    loss_fn = ContrastiveDivergenceLoss(energy)
    buffer = ReplayBuffer.start(lambda n, _: noise.draw(n, 2), _CHAINS)
    sampler = _sampler(noise, step_size=0.3)  # large steps, to move between modes

    def step(x: Tensor) -> Terms:
        states, slots = buffer.draw(len(x), generator=noise.generator)
        return loss_fn(x, buffer.write(sampler(energy, states), slots))

    return loss_fn, step


def _sampler(noise: _Noise, step_size: float) -> Callable[[Energy, Tensor], Tensor]:
    def sample(energy: Energy, x: Tensor) -> Tensor:
        return langevin(
            energy,
            x,
            steps=5,
            step_size=step_size,
            adjust="metropolis",
            generator=noise.generator,
        )

    return sample


LOSSES: dict[str, Callable[[nn.Module, _Noise], _Loss]] = {
    "maximum likelihood": _maximum_likelihood,
    "contrastive divergence": _contrastive_divergence,
    "persistent CD": _persistent,
    "energy discrepancy": _discrepancy,
    "NCE": _noise_contrastive,
    "ranking NCE": _ranking,
    "conditional NCE": _conditional,
    "score matching": _score_matching,
    "sliced score matching": _sliced,
    "finite-difference SM": _finite_difference,
    "denoising SM": _denoising,
    _CONTROL: functools.partial(_noise_contrastive, density=False),
}


def run(setting: Setting) -> Energies:
    """Learn each density with each loss, then the digits."""
    densities = {
        name: learn_density(name, truth, setting)
        for name, truth in (("eight Gaussians", eight_gaussians()), ("moons", moons()))
    }
    learnt = [one.measured for density in densities.values() for one in density.learnt.values()]
    digits = learn_digits(dataclasses.replace(setting, steps=math.ceil(1.25 * setting.steps)))
    return Energies(
        densities=densities,
        control_name=_CONTROL,
        energy=f"network(x) + |x|^2 / {2 * _TAIL**2:g}",
        digits=digits.terms,
        images=digits.images,
        energies=digits.energies,
        measured={"log_z_error": max(one["log_z_error"] for one in learnt), **digits.measured},
        sentence=_sentence(densities, digits),
    )


def _sentence(densities: dict[str, Density], digits: Digits) -> str:
    parts: list[str] = []
    for name, density in densities.items():
        truth = density.measured["log_likelihood"]
        below = {
            loss: truth - one.measured["log_likelihood"] for loss, one in density.learnt.items()
        }
        wrong = below.pop(_CONTROL)
        best, worst = min(below, key=below.__getitem__), max(below, key=below.__getitem__)
        parts.append(
            f"{name[0].upper()}{name[1:]}: {truth:.3f} nats for the true density; "
            f"{below[best]:.3f} ({best}) to {below[worst]:.3f} ({worst}) lower for learnt "
            f"densities, and {wrong:.3f} lower for {_CONTROL}, which is wrong on purpose."
        )
    return (
        f"Mean log-likelihood of {_UNSEEN:,} held-out samples, with Z by quadrature. "
        f"{' '.join(parts)} {digits.sentence}"
    )


RUN = Run(
    about="losses for energy-based models on known densities and on digits",
    train=run,
    steps=150,
)


def learn_density(name: str, truth: Mixture, setting: Setting) -> Density:
    """Train the same network with each loss on the same samples."""
    generator = setting.generator()
    seen = truth.draw(_SEEN, generator).to(setting.device)
    unseen = truth.draw(_UNSEEN, generator).to(setting.device)
    plane = Plane(setting.device)
    log_p = plane.on_grid(truth.log_density)
    p = log_p.exp()
    learnt = {
        loss: _learn(f"{name}, {loss}", build, seen, unseen, plane, log_p, setting)
        for loss, build in LOSSES.items()
    }
    return Density(
        truth=plane.shown(p, _HALF_WIDTH_SHOWN).cpu(),
        samples=seen[:_SAMPLES_SHOWN].cpu(),
        half_width=_HALF_WIDTH_SHOWN,
        learnt=learnt,
        measured={
            "log_likelihood": float(truth.log_density(unseen).double().mean()),
            "negative_entropy": plane.integral(p * log_p),
        },
    )


def _learn(
    label: str,
    build: Callable[[nn.Module, _Noise], _Loss],
    seen: Tensor,
    unseen: Tensor,
    plane: Plane,
    log_p: Tensor,
    setting: Setting,
) -> Learnt:
    energy = _Energy(setting)
    noise = _Noise(seen, setting)
    loss_fn, step = build(energy, noise)

    def step_terms() -> Terms:
        rows = torch.randint(len(seen), (_BATCH,), generator=noise.generator)
        return step(seen[rows.to(seen.device)])

    start = time.perf_counter()
    curves = train(label, setting, [(loss_fn.parameters(), _RATE)], step_terms)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        exponents = plane.on_grid(lambda x: -energy(x))
        log_z, error = plane.log_integral(exponents)
        log_model = exponents - log_z
        measured = {
            "log_likelihood": float(-energy(unseen).double().mean()) - log_z,
            "kl": plane.integral(log_p.exp() * (log_p - log_model)),
            "log_z": log_z,
            "log_z_error": error,
        }
        if isinstance(loss_fn, NoiseContrastiveLoss):
            measured["log_z_learnt"] = float(loss_fn.log_z)
    return Learnt(
        terms=curves,
        measured=measured,
        density=plane.shown(log_model.exp(), _HALF_WIDTH_SHOWN).cpu(),
        seconds=seconds,
    )
