"""Train an energy-based model of handwritten digits with persistent contrastive divergence."""

import dataclasses
from typing import cast

import torch
from torch import Tensor, nn

from .._terms import Terms
from ..energy import ContrastiveDivergenceLoss, ReplayBuffer, langevin
from ._training import Curves, Setting, train
from ._vicreg import load_digits

_BATCH = 128
_HELD_OUT = 500  # of 1797 images, not used for training
_NOISE = 0.1  # standard deviation of noise on images: their discrete values have no density
_WIDTH = 256
_RATE = 7e-3
_CHAINS = 2048
_RESTARTED = 0.05  # share of the drawn chains
_STEP_SIZE = 0.0125  # of Langevin dynamics, in units of the variance of the data
_STEPS = 10  # per update
_SAMPLING_STEPS = 500  # for the samples in the figure
_PIXELS = 64
_SHOWN = 49  # images of each kind in the figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits:
    """The training of a model of digits, with samples and measurements."""

    terms: Curves
    images: dict[str, Tensor]
    """Images of each kind, for the figure."""
    energies: dict[str, Tensor]
    """Energies of held-out digits and of other images."""
    measured: dict[str, float]
    sentence: str


def learn_digits(setting: Setting) -> Digits:
    """Train on noisy digits, draw samples, and compare energies of held-out and other images."""
    generator = setting.generator()
    clean = load_digits()[0].flatten(1)
    order = torch.randperm(len(clean), generator=generator)
    held_out, seen = clean[order[:_HELD_OUT]], clean[order[_HELD_OUT:]]
    units = Units(seen)
    energy = _Energy(setting)
    terms = _train(energy, units, seen, generator, setting)

    samples = _sample(energy, units, generator, setting)
    shuffled = torch.stack([one[torch.randperm(_PIXELS, generator=generator)] for one in held_out])
    gaussian = units.gaussian(_HELD_OUT, generator)
    with torch.no_grad():
        noisy = {
            name: units.add_noise(images, generator)
            for name, images in (
                ("held-out digits", held_out),
                ("shuffled pixels", shuffled),
                ("Gaussian samples", gaussian),
            )
        }
        energies = {name: energy(z.to(setting.device)).cpu() for name, z in noisy.items()}
        scores = {
            "model": energies,
            "full_gaussian": {name: units.full_gaussian(z) for name, z in noisy.items()},
            "diagonal_gaussian": {name: units.diagonal_gaussian(z) for name, z in noisy.items()},
        }
        measured = {
            f"auroc_{name.replace(' ', '_').lower()}_{model}": auroc(
                score["held-out digits"], score[name]
            )
            for name in ("shuffled pixels", "Gaussian samples")
            for model, score in scores.items()
        }
        seen_energies = energy(units.add_noise(seen, generator).to(setting.device))
    measured["energy_seen_digits"] = float(seen_energies.mean())
    measured["energy_held_out_digits"] = float(energies["held-out digits"].mean())
    return Digits(
        terms=terms,
        images={
            "held-out digits": held_out[:_SHOWN],
            "model samples": samples,
            "Gaussian samples": gaussian[:_SHOWN],
            "shuffled pixels": shuffled[:_SHOWN],
        },
        energies=energies,
        measured=measured,
        sentence=(
            f"The energy separates {_HELD_OUT} held-out digits from the same digits with shuffled "
            f"pixels with an AUROC of {measured['auroc_shuffled_pixels_model']:.4f} "
            f"({measured['auroc_shuffled_pixels_full_gaussian']:.4f} for a Gaussian with the same "
            "covariance), and from samples of this Gaussian with an AUROC of "
            f"{measured['auroc_gaussian_samples_model']:.4f} "
            f"({measured['auroc_gaussian_samples_full_gaussian']:.4f})."
        ),
    )


class Units:
    """Noisy images as principal components, divided by the mean standard deviation of pixels.

    Principal components, because the optimizer scales the gradient of each coordinate alone.
    """

    def __init__(self, seen: Tensor) -> None:
        self.mean = seen.mean(0)
        covariance = torch.cov(seen.T)
        values, self.components = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(covariance))
        self.clean = values.clamp(min=0)  # pixels that are always 0 have no variance
        self.pixels = covariance.diagonal() + _NOISE**2
        self.scale = float(self.pixels.mean().sqrt())

    def add_noise(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the principal components of images with noise."""
        noise = torch.randn(images.shape, generator=generator)
        return (images + _NOISE * noise - self.mean) @ self.components / self.scale

    def denoised(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Return the denoised images, by Tweedie's formula, from the gradient of the energy."""
        return self._images(z - (_NOISE / self.scale) ** 2 * gradient)

    def gaussian(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw images from a Gaussian with the mean and covariance of the training images."""
        normal = torch.randn(count, _PIXELS, generator=generator)
        return self._images(normal * self.clean.sqrt() / self.scale)

    def full_gaussian(self, z: Tensor) -> Tensor:
        """Return the energy under a Gaussian with the covariance of the noisy images."""
        return ((self.scale * z).square() / (self.clean + _NOISE**2)).sum(1)

    def diagonal_gaussian(self, z: Tensor) -> Tensor:
        """Return the energy under a Gaussian with independent pixels."""
        return ((self._images(z) - self.mean).square() / self.pixels).sum(1)

    def _images(self, z: Tensor) -> Tensor:
        return self.mean + self.scale * z @ self.components.T


class _Energy(nn.Module):
    """A small network plus the energy of a standard normal distribution, where chains start."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        torch.manual_seed(setting.seed)
        last = nn.Linear(_WIDTH, 1)
        nn.init.zeros_(last.weight)  # so that the first chains are exact samples
        self.net = nn.Sequential(
            nn.Linear(_PIXELS, _WIDTH),
            nn.SiLU(),
            nn.Linear(_WIDTH, _WIDTH),
            nn.SiLU(),
            last,
            nn.Flatten(0),
        )
        self.to(setting.device)

    def forward(self, z: Tensor) -> Tensor:
        return cast("Tensor", self.net(z) + z.square().sum(1) / 2)


def _train(
    energy: nn.Module, units: Units, seen: Tensor, generator: torch.Generator, setting: Setting
) -> Curves:
    loss_fn = ContrastiveDivergenceLoss(energy)

    def initial(n: int, generator: torch.Generator | None) -> Tensor:
        return torch.randn(n, _PIXELS, generator=generator).to(setting.device)

    buffer = ReplayBuffer.start(initial, _CHAINS, generator)

    def step_terms() -> Terms:
        rows = torch.randint(len(seen), (_BATCH,), generator=generator)
        z = units.add_noise(seen[rows], generator).to(setting.device)
        states, slots = buffer.draw(_BATCH, init_fn=initial, reinit=_RESTARTED, generator=generator)
        states = langevin(energy, states, steps=_STEPS, step_size=_STEP_SIZE, generator=generator)
        return loss_fn(z, buffer.write(states, slots))

    return train("digits", setting, [(energy.parameters(), _RATE)], step_terms)


def _sample(
    energy: nn.Module, units: Units, generator: torch.Generator, setting: Setting
) -> Tensor:
    """Run Langevin dynamics from noise, and denoise: the model has learnt noisy digits."""
    start = torch.randn(_SHOWN, _PIXELS, generator=generator).to(setting.device)
    z = langevin(energy, start, steps=_SAMPLING_STEPS, step_size=_STEP_SIZE, generator=generator)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(energy(z).sum(), z)
    return units.denoised(z.detach().cpu(), gradient.cpu())


def auroc(low: Tensor, high: Tensor) -> float:
    """Return the share of pairs in which `low` is lower than `high`; ties count half."""
    difference = high[:, None].double() - low
    return float((1 + difference.sign()).mean() / 2)
