"""Targeted variance for the embedding of a next-character model of Python's documentation."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .. import lm
from .._terms import Terms, terms
from ._comparison import Comparison
from ._training import Run, Setting, help_paragraphs, train

_BATCH = 1024
_CONTEXT = 16  # characters
_DIM = 32
_TARGET = 1.0
_COEFFICIENT = 1.0
_EMBEDDING_RATE = 4e-2
_BODY_RATE = 4e-3
_CONTROL = "without the term"


@terms
class NextCharacterTerms(Terms):
    """A custom loss: a cross-entropy plus a loss of this library."""

    loss: Float[Tensor, ""]
    """cross_entropy + coefficient * squared_error."""
    cross_entropy: Float[Tensor, ""]
    """Of the next character, in nats, mean over the batch."""
    squared_error: Float[Tensor, ""]
    """(variance - target)^2."""
    variance: Float[Tensor, ""]
    """Variance of a row of the embedding, mean over rows."""


def run(setting: Setting) -> Comparison:
    """Train with and without the targeted variance, and evaluate both on held-out text."""
    text = _Text(setting)
    with_term = _Training("targeted-variance", text, _COEFFICIENT, setting)
    without = _Training(_CONTROL, text, 0.0, setting)
    unigram = text.unigram_cross_entropy()
    measured = {
        "variance_before": with_term.variance_before,
        "variance_after": with_term.variance_after,
        "variance_target": _TARGET,
        "variance_after_without_the_term": without.variance_after,
        "cross_entropy_trained": with_term.cross_entropy,
        "cross_entropy_without_the_term": without.cross_entropy,
        "cross_entropy_unigram": unigram,
        "cross_entropy_uniform": math.log(text.alphabet),
    }
    return Comparison(
        terms=with_term.curves,
        control=without.curves,
        control_name=_CONTROL,
        about={
            "loss": "cross_entropy + squared_error",
            "cross_entropy": "nats per character",
            "squared_error": "squared difference from the target",
            "variance": "mean variance of the embedding's rows",
        },
        levels={"variance": ("target", _TARGET)},
        measured=measured,
        sentence=(
            f"The mean variance of the embedding's rows goes from {with_term.variance_before:.4f} "
            f"to {with_term.variance_after:.4f} (target {_TARGET:g}), and to "
            f"{without.variance_after:.4f} {_CONTROL}. The cross-entropy of "
            f"{len(text.held_out):,} held-out characters is {with_term.cross_entropy:.2f} nats per "
            f"character; {without.cross_entropy:.2f} {_CONTROL}, {unigram:.2f} for character "
            f"frequencies and {math.log(text.alphabet):.2f} for a uniform guess."
        ),
        bars={
            "uniform guess": math.log(text.alphabet),
            "character frequencies": unigram,
            _CONTROL: without.cross_entropy,
            "trained": with_term.cross_entropy,
        },
        bars_about="held-out cross-entropy, nats per character (lower is better)",
        bars_format="{:.2f}",
    )


RUN = Run(
    about="a next-character model whose embedding is kept at a target variance",
    train=run,
    steps=200,
)


class _Text:
    """The text of Python's `help()` as character indices, a tenth of it held out."""

    def __init__(self, setting: Setting) -> None:
        kept, held_out = help_paragraphs(setting)
        index = {character: i for i, character in enumerate(sorted({*"\n".join(kept + held_out)}))}

        def indices(chosen: list[str]) -> Tensor:
            return torch.tensor([index[character] for character in "\n\n".join(chosen)])

        self.alphabet = len(index)
        self.held_out = indices(held_out)
        self.kept = indices(kept)

    def unigram_cross_entropy(self) -> float:
        """Return the held-out cross-entropy of the character frequencies in the training text."""
        counts = torch.bincount(self.kept, minlength=self.alphabet).double() + 1
        return float(-(counts / counts.sum()).log()[self.held_out].mean())


class _Model(nn.Module):
    """A network that predicts the next character from the embeddings of a context."""

    def __init__(self, alphabet: int, setting: Setting) -> None:
        super().__init__()
        torch.manual_seed(setting.seed)  # the same weights in both trainings
        self.embedding = nn.Embedding(alphabet, _DIM)
        nn.init.normal_(self.embedding.weight, std=0.02)  # usual for language models
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(_CONTEXT * _DIM, 256),
            nn.LayerNorm(256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.LayerNorm(256),
            nn.ReLU(),
            nn.Linear(256, alphabet),
        )
        self.to(setting.device)

    def cross_entropy(self, windows: Tensor) -> Tensor:
        """Return the mean cross-entropy of the last character of each window."""
        return F.cross_entropy(self.body(self.embedding(windows[:, :-1])), windows[:, -1])


class _Training:
    """One training and its measurements."""

    def __init__(self, label: str, text: _Text, coefficient: float, setting: Setting) -> None:
        model = _Model(text.alphabet, setting)
        loss_fn = lm.TargetedVarianceLoss(coefficient=coefficient, target=_TARGET)
        generator = setting.generator()

        def step_terms() -> NextCharacterTerms:
            starts = torch.randint(len(text.kept) - _CONTEXT, (_BATCH,), generator=generator)
            cross_entropy = model.cross_entropy(_windows(text.kept, starts).to(setting.device))
            regularizer = loss_fn(model.embedding.weight)
            return NextCharacterTerms(
                loss=cross_entropy + regularizer.loss,
                cross_entropy=cross_entropy,
                squared_error=regularizer.squared_error,
                variance=regularizer.variance,
            )

        def variance() -> float:
            return loss_fn(model.embedding.weight).metrics()["variance"]

        groups = [
            (model.embedding.parameters(), _EMBEDDING_RATE),
            (model.body.parameters(), _BODY_RATE),
        ]
        self.variance_before = variance()
        self.curves = train(label, setting, groups, step_terms)
        self.variance_after = variance()
        self.cross_entropy = _held_out_cross_entropy(model, text, setting)


@torch.no_grad()
def _held_out_cross_entropy(model: _Model, text: _Text, setting: Setting) -> float:
    starts = torch.arange(len(text.held_out) - _CONTEXT)
    total = 0.0
    for first in range(0, len(starts), 8192):
        windows = _windows(text.held_out, starts[first : first + 8192]).to(setting.device)
        total += float(model.cross_entropy(windows)) * len(windows)
    return total / len(starts)


def _windows(characters: Tensor, starts: Tensor) -> Tensor:
    """Return a context and the character after it for each start."""
    return characters[starts[:, None] + torch.arange(_CONTEXT + 1)]
