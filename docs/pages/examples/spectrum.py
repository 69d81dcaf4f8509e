"""A loss of complex numbers: magnitudes and phases of a spectrum."""

import torch
from hypothesis import strategies as st
from jaxtyping import Complex, Float
from torch import Tensor

import termwise as tw
from termwise import testing


@tw.terms
class SpectrumTerms(tw.Terms):
    """Terms of `spectrum_loss`."""

    loss: Float[Tensor, ""]
    """magnitude + phase_weight * phase."""
    magnitude: Float[Tensor, ""]
    """Absolute difference of log magnitudes, mean over batch and bins, in nats."""
    phase: Float[Tensor, ""]
    """1 - cosine of the angle between the two, mean over batch and bins."""


@tw.contract
def spectrum_loss(
    predicted: Complex[Tensor, "batch bins"],
    target: Complex[Tensor, "batch bins"],
    *,
    phase_weight: float = 0.5,
    eps: float = 1e-6,
) -> SpectrumTerms:
    """Compare two spectra, in magnitude and in phase."""
    ours, theirs = (x.abs() + eps for x in (predicted, target))
    magnitude = (ours.log() - theirs.log()).abs().mean()
    cosine = (predicted * target.conj()).real / (ours * theirs)
    phase = (1 - cosine).mean()
    return SpectrumTerms(loss=magnitude + phase_weight * phase, magnitude=magnitude, phase=phase)


class SpectrumLoss(tw.LossModule):
    """`spectrum_loss` as a module."""

    phase_weight: float = 0.5
    eps: float = 1e-6

    def __call__(
        self, predicted: Complex[Tensor, "batch bins"], target: Complex[Tensor, "batch bins"]
    ) -> SpectrumTerms:
        """Compute the terms."""
        return spectrum_loss(predicted, target, **self.hyperparameters())


def formula(
    predicted: Tensor, target: Tensor, *, phase_weight: float, eps: float
) -> dict[str, Tensor]:
    """Return the terms by real and imaginary parts."""
    a, b = torch.view_as_real(predicted).unbind(-1)
    c, d = torch.view_as_real(target).unbind(-1)
    ours, theirs = (a**2 + b**2).sqrt() + eps, (c**2 + d**2).sqrt() + eps
    magnitude = (ours / theirs).log().abs().sum() / a.numel()
    phase = (1 - (a * c + b * d) / (ours * theirs)).sum() / a.numel()
    return {
        "loss": magnitude + phase_weight * phase,
        "magnitude": magnitude,
        "phase": phase,
    }


def check() -> None:
    """Hold the loss to what it promises."""

    def turned(sizes: dict[str, int]) -> Tensor:
        count = sizes["batch"] * sizes["bins"]
        angles = torch.linspace(0.3, 5.0, count, dtype=torch.float64)
        return torch.polar(angles + 1, angles).reshape(sizes["batch"], sizes["bins"])

    drawn = {
        "sizes": {"batch": st.integers(1, 3), "bins": st.integers(1, 3)},
        "dtypes": [torch.float64],
        "overrides": {"target": turned},
        "elements": st.floats(0.5, 2.0),  # of real and imaginary parts: away from 0
    }
    testing.assert_formula(spectrum_loss, formula, max_examples=6, **drawn)
    weights = {"magnitude": 1.0, "phase": "phase_weight"}
    testing.assert_terms_sum(spectrum_loss, weights, max_examples=4, **drawn)
    testing.assert_pure(spectrum_loss, max_examples=3, **drawn)
