"""An energy of handwritten digits, by contrastive divergence from chains kept in a buffer."""

import dataclasses
from typing import cast

import torch
from torch import Tensor, nn

from .._terms import Terms
from ..energy import ContrastiveDivergenceLoss, ReplayBuffer, langevin
from ._training import Curves, Setting, train
from ._vicreg import load_digits

_BATCH = 128
_HELD_OUT = 500  # of 1797 images: nothing is trained on them
_NOISE = 0.1  # deviation of what is added to every image: whole 16ths have no density
_WIDTH = 256
_RATE = 7e-3
_CHAINS = 2048
_FRESH = 0.05  # of the chains drawn, begun anew
_STEP = 0.0125  # of Langevin dynamics, in units of the data's variance
_STEPS = 10  # for each update
_SAMPLING_STEPS = 500  # for the samples shown
_PIXELS = 64
_SHOWN = 49


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits:
    """A trained model of digits, its samples and what was measured."""

    terms: Curves
    images: dict[str, Tensor]
    """To be drawn: as many of each kind."""
    energies: dict[str, Tensor]
    """Of held-out digits, and of images that are none."""
    measured: dict[str, float]
    sentence: str


def learn_digits(setting: Setting) -> Digits:
    """Train on digits with noise, draw samples, and separate held-out digits from other images."""
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
        noised = {
            called: units.noised(images, generator)
            for called, images in (
                ("held-out digits", held_out),
                ("shuffled pixels", shuffled),
                ("Gaussian samples", gaussian),
            )
        }
        energies = {called: energy(z.to(setting.device)).cpu() for called, z in noised.items()}
        scores = {
            "model": energies,
            "full_gaussian": {called: units.full_gaussian(z) for called, z in noised.items()},
            "diagonal_gaussian": {
                called: units.diagonal_gaussian(z) for called, z in noised.items()
            },
        }
        measured = {
            f"auroc_{called.replace(' ', '_').lower()}_{by}": auroc(
                of["held-out digits"], of[called]
            )
            for called in ("shuffled pixels", "Gaussian samples")
            for by, of in scores.items()
        }
        of_seen = energy(units.noised(seen, generator).to(setting.device))
    measured["energy_seen_digits"] = float(of_seen.mean())
    measured["energy_held_out_digits"] = float(energies["held-out digits"].mean())
    return Digits(
        terms=terms,
        images={
            "held-out digits": held_out[:_SHOWN],
            "samples of the model": samples,
            "Gaussian samples": gaussian[:_SHOWN],
            "shuffled pixels": shuffled[:_SHOWN],
        },
        energies=energies,
        measured=measured,
        sentence=(
            f"On {_HELD_OUT} held-out digits, the energy's AUROC is "
            f"{measured['auroc_shuffled_pixels_model']:.4f} against the same digits with shuffled "
            f"pixels (a Gaussian with the data's covariance: "
            f"{measured['auroc_shuffled_pixels_full_gaussian']:.4f}) and "
            f"{measured['auroc_gaussian_samples_model']:.4f} against that Gaussian's samples "
            f"({measured['auroc_gaussian_samples_full_gaussian']:.4f})."
        ),
    )


class Units:
    """Images with noise on every pixel, as principal components, all in one unit.

    Components rather than pixels, because the optimizer scales a gradient in each coordinate.
    """

    def __init__(self, seen: Tensor) -> None:
        self.mean = seen.mean(0)
        covariance = torch.cov(seen.T)
        values, self.components = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(covariance))
        self.clean = values.clamp(min=0)  # a corner that is never inked has no variance
        self.pixels = covariance.diagonal() + _NOISE**2
        self.scale = float(self.pixels.mean().sqrt())

    def noised(self, images: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(images.shape, generator=generator)
        return (images + _NOISE * noise - self.mean) @ self.components / self.scale

    def denoised(self, z: Tensor, gradient: Tensor) -> Tensor:
        """Return the denoised image, by Tweedie's formula from the gradient of z's energy."""
        return self._images(z - (_NOISE / self.scale) ** 2 * gradient)

    def gaussian(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw images that have nothing but the mean and covariance of those seen."""
        normal = torch.randn(count, _PIXELS, generator=generator)
        return self._images(normal * self.clean.sqrt() / self.scale)

    def full_gaussian(self, z: Tensor) -> Tensor:
        """Return the energy of a Gaussian fitted to the noised images."""
        return ((self.scale * z).square() / (self.clean + _NOISE**2)).sum(1)

    def diagonal_gaussian(self, z: Tensor) -> Tensor:
        """Return the energy of a Gaussian whose pixels are independent."""
        return ((self._images(z) - self.mean).square() / self.pixels).sum(1)

    def _images(self, z: Tensor) -> Tensor:
        return self.mean + self.scale * z @ self.components.T


class _Energy(nn.Module):
    """A small network plus the energy of a standard normal, from which chains begin."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        torch.manual_seed(setting.seed)
        last = nn.Linear(_WIDTH, 1)
        nn.init.zeros_(last.weight)  # so that they begin as exact samples
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

    def fresh(n: int, generator: torch.Generator | None) -> Tensor:
        return torch.randn(n, _PIXELS, generator=generator).to(setting.device)

    buffer = ReplayBuffer.start(fresh, _CHAINS, generator)

    def step_terms() -> Terms:
        rows = torch.randint(len(seen), (_BATCH,), generator=generator)
        z = units.noised(seen[rows], generator).to(setting.device)
        begun, places = buffer.draw(_BATCH, init_fn=fresh, reinit=_FRESH, generator=generator)
        ended = langevin(energy, begun, steps=_STEPS, step_size=_STEP, generator=generator)
        return loss_fn(z, buffer.write(ended, places))

    return train("digits", setting, [(energy.parameters(), _RATE)], step_terms)


def _sample(
    energy: nn.Module, units: Units, generator: torch.Generator, setting: Setting
) -> Tensor:
    """Walk from noise alone, and take the noise off that the model has learnt with the digits."""
    begun = torch.randn(_SHOWN, _PIXELS, generator=generator).to(setting.device)
    z = langevin(energy, begun, steps=_SAMPLING_STEPS, step_size=_STEP, generator=generator)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(energy(z).sum(), z)
    return units.denoised(z.detach().cpu(), gradient.cpu())


def auroc(low: Tensor, high: Tensor) -> float:
    """Return the share of pairs whose first is lower than its second; a tie counts half."""
    difference = high[:, None].double() - low
    return float((1 + difference.sign()).mean() / 2)
