"""Energies of one network, learnt with each loss on densities that are known, and one of digits."""

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
_SEEN = 10_000  # samples to train on
_UNSEEN = 10_000  # samples to measure on
_RATE = 2e-2
_CHAINS = 512  # of persistent contrastive divergence
_FREQUENCIES = 32
_WIDTH = 64
_TAIL = 1.5  # deviation of the Gaussian whose energy is added to the network's
_LOG_Z = math.log(2 * math.pi * _TAIL**2)  # of that Gaussian
_SIGMA = 0.1  # of denoising
_DRAWN = 2_000  # of the samples
_SHOWN = 3.2  # half the width of what is drawn

_CONTROL = "NCE without log q"

_Step = Callable[[Tensor], Terms]


class _Given:
    """What a loss may use besides the energy and a batch: draws, and a density to draw noise from.

    The density q is a Gaussian with the data's mean and covariance.
    """

    def __init__(self, seen: Tensor, setting: Setting) -> None:
        self.generator = setting.generator()
        self.device = setting.device
        self.mean = seen.mean(0)
        self.factor = cast("Tensor", torch.linalg.cholesky(torch.cov(seen.T)))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def noise(self, *shape: int) -> Tensor:
        return self.mean + self.normal(*shape) @ self.factor.T

    def log_noise(self, x: Tensor) -> Tensor:
        centred = (x - self.mean).mT
        white = cast("Tensor", torch.linalg.solve_triangular(self.factor, centred, upper=False))
        log_volume = self.factor.diagonal().log().sum() + math.log(2 * math.pi)
        return -white.square().sum(-2) / 2 - log_volume


class _Energy(nn.Module):
    """A small network on waves of learnt frequencies, plus the energy of a wide Gaussian.

    With that Gaussian every density that the network can express has a finite normalizer.
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
        waves = torch.cat([phases.sin(), phases.cos()], dim=1)
        return cast("Tensor", self.net(waves) + x.square().sum(1) / (2 * _TAIL**2))


_Built = tuple[nn.Module, _Step]


def _maximum_likelihood(energy: nn.Module, given: _Given) -> _Built:
    """Draw negatives from the model itself, which can be done on a plane: by cells of a grid."""
    loss_fn = MaximumLikelihoodLoss(energy)
    axis = torch.linspace(-3.6, 3.6, 49)
    cells = torch.cartesian_prod(axis, axis).to(given.device)

    def step(x: Tensor) -> Terms:
        with torch.no_grad():
            mass = (-energy(cells)).softmax(0).cpu()
        drawn = mass.multinomial(len(x), replacement=True, generator=given.generator)
        place = torch.rand(len(x), 2, generator=given.generator) - 0.5
        width = float(axis[1] - axis[0])
        return loss_fn(x, cells[drawn.to(given.device)] + width * place.to(given.device))

    return loss_fn, step


def _noise_contrastive(energy: nn.Module, given: _Given, *, density: bool = True) -> _Built:
    """Use the noise's density, or leave it out: what is found is then p / q, up to a factor."""
    loss_fn = NoiseContrastiveLoss(energy, log_z=_LOG_Z)

    def step(x: Tensor) -> Terms:
        noise = given.noise(2 * len(x), 2)
        of_x, of_noise = (density * given.log_noise(rows) for rows in (x, noise))
        return loss_fn(x, noise, log_noise_x=of_x, log_noise_noise=of_noise)

    return loss_fn, step


def _ranking(energy: nn.Module, given: _Given) -> _Built:
    loss_fn = RankingNoiseContrastiveLoss(energy)

    def step(x: Tensor) -> Terms:
        noise = given.noise(4, len(x), 2)
        log_noise = torch.stack([given.log_noise(one) for one in noise])
        return loss_fn(x, noise, log_noise_x=given.log_noise(x), log_noise_noise=log_noise)

    return loss_fn, step


def _conditional(energy: nn.Module, given: _Given) -> _Built:
    loss_fn = ConditionalNoiseContrastiveLoss(energy)
    return loss_fn, lambda x: loss_fn(x, x + given.normal(2, len(x), 2))


def _discrepancy(energy: nn.Module, given: _Given) -> _Built:
    loss_fn = EnergyDiscrepancyLoss(energy, t=0.25, copies=8)
    return loss_fn, lambda x: loss_fn(x, generator=given.generator)


def _score_matching(energy: nn.Module, given: _Given) -> _Built:
    # What the default does pays off in more dimensions than two.
    loss_fn = ScoreMatchingLoss(energy, trace="reverse")
    return loss_fn, loss_fn


def _sliced(energy: nn.Module, given: _Given) -> _Built:
    loss_fn = SlicedScoreMatchingLoss(energy, differentiation="autograd")
    return loss_fn, lambda x: loss_fn(x, generator=given.generator)


def _finite_difference(energy: nn.Module, given: _Given) -> _Built:
    loss_fn = FiniteDifferenceScoreMatchingLoss(energy)
    return loss_fn, lambda x: loss_fn(x, generator=given.generator)


def _denoising(energy: nn.Module, given: _Given) -> _Built:
    loss_fn = DenoisingScoreMatchingLoss(energy, sigma=_SIGMA, antithetic=True)
    return loss_fn, lambda x: loss_fn(x, generator=given.generator)


def _contrastive_divergence(energy: nn.Module, given: _Given) -> _Built:
    """Walk from the data, by steps that leave the model as it is: then the truth is stationary."""
    loss_fn = ContrastiveDivergenceLoss(energy, sampler=_walk(given, step_size=0.02))
    return loss_fn, loss_fn


def _persistent(energy: nn.Module, given: _Given) -> _Built:
    """Walk on from where the last step's walks ended."""
    loss_fn = ContrastiveDivergenceLoss(energy)
    buffer = ReplayBuffer.start(lambda n, _: given.noise(n, 2), _CHAINS)
    walk = _walk(given, step_size=0.3)  # long strides, to change modes by

    def step(x: Tensor) -> Terms:
        begun, places = buffer.draw(len(x), generator=given.generator)
        return loss_fn(x, buffer.write(walk(energy, begun), places))

    return loss_fn, step


def _walk(given: _Given, step_size: float) -> Callable[[Energy, Tensor], Tensor]:
    def walk(energy: Energy, x: Tensor) -> Tensor:
        return langevin(
            energy,
            x,
            steps=5,
            step_size=step_size,
            adjust="metropolis",
            generator=given.generator,
        )

    return walk


LOSSES: dict[str, Callable[[nn.Module, _Given], _Built]] = {
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
    """Learn each density with each loss, then digits."""
    densities = {
        called: learn_density(called, truth, setting)
        for called, truth in (("eight Gaussians", eight_gaussians()), ("moons", moons()))
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
    for called, density in densities.items():
        truth = density.measured["log_likelihood"]
        below = {
            loss: truth - one.measured["log_likelihood"] for loss, one in density.learnt.items()
        }
        wrong = below.pop(_CONTROL)
        best, worst = min(below, key=below.__getitem__), max(below, key=below.__getitem__)
        parts.append(
            f"{called}: the truth {truth:.3f} nats, models lower by {below[best]:.3f} ({best}) to "
            f"{below[worst]:.3f} ({worst}), the wrong {_CONTROL} by {wrong:.3f}"
        )
    return (
        f"Log-likelihood of {_UNSEEN:,} held-out samples, Z by quadrature. {'; '.join(parts)}. "
        f"{digits.sentence}"
    )


RUN = Run(
    about="each loss of energies on known densities, by log-likelihood, and samples of digits",
    train=run,
    steps=150,
)


def learn_density(called: str, truth: Mixture, setting: Setting) -> Density:
    """Train the same network with each loss on the same samples."""
    generator = setting.generator()
    seen = truth.draw(_SEEN, generator).to(setting.device)
    unseen = truth.draw(_UNSEEN, generator).to(setting.device)
    plane = Plane(setting.device)
    log_p = plane.on_grid(truth.log_density)
    p = log_p.exp()
    learnt = {
        loss: _learn(f"{called}, {loss}", build, seen, unseen, plane, log_p, setting)
        for loss, build in LOSSES.items()
    }
    return Density(
        truth=plane.shown(p, _SHOWN).cpu(),
        samples=seen[:_DRAWN].cpu(),
        half_width=_SHOWN,
        learnt=learnt,
        measured={
            "log_likelihood": float(truth.log_density(unseen).double().mean()),
            "negative_entropy": plane.integral(p * log_p),
        },
    )


def _learn(
    label: str,
    build: Callable[[nn.Module, _Given], _Built],
    seen: Tensor,
    unseen: Tensor,
    plane: Plane,
    log_p: Tensor,
    setting: Setting,
) -> Learnt:
    energy = _Energy(setting)
    given = _Given(seen, setting)
    loss_fn, step = build(energy, given)

    def step_terms() -> Terms:
        rows = torch.randint(len(seen), (_BATCH,), generator=given.generator)
        return step(seen[rows.to(seen.device)])

    start = time.perf_counter()
    curves = train(label, setting, [(loss_fn.parameters(), _RATE)], step_terms)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        exponents = plane.on_grid(lambda x: -energy(x))
        log_z, error = plane.log_integral(exponents)
        log_q = exponents - log_z
        measured = {
            "log_likelihood": float(-energy(unseen).double().mean()) - log_z,
            "kl": plane.integral(log_p.exp() * (log_p - log_q)),
            "log_z": log_z,
            "log_z_error": error,
        }
        if isinstance(loss_fn, NoiseContrastiveLoss):
            measured["log_z_learnt"] = float(loss_fn.log_z)
    return Learnt(
        terms=curves,
        measured=measured,
        density=plane.shown(log_q.exp(), _SHOWN).cpu(),
        seconds=seconds,
    )
