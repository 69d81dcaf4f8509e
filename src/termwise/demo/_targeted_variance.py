"""Targeted variance on the embedding of a next-character model of Python's own documentation."""

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
    """A loss of our own, made of a cross-entropy and a loss of the library."""

    loss: Float[Tensor, ""]
    """cross_entropy + coefficient * squared_error."""
    cross_entropy: Float[Tensor, ""]
    """Of the next character, in nats, mean over the batch."""
    squared_error: Float[Tensor, ""]
    """(variance - target)^2."""
    variance: Float[Tensor, ""]
    """Variance of a row of the embedding, mean over rows."""


def run(setting: Setting) -> Comparison:
    """Train with the variance drawn to its target, and without, and measure both held out."""
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
            "cross_entropy": "nats for the next character",
            "squared_error": "squared distance from the target",
            "variance": "variance of an embedding's row, mean",
        },
        levels={"variance": ("target", _TARGET)},
        measured=measured,
        sentence=(
            f"The embedding's mean row variance went from {with_term.variance_before:.4f} to "
            f"{with_term.variance_after:.4f} (target {_TARGET:g}; {without.variance_after:.4f} "
            f"{_CONTROL}). On {len(text.held_out):,} held-out characters the cross-entropy is "
            f"{with_term.cross_entropy:.2f} nats; {_CONTROL} {without.cross_entropy:.2f}, "
            f"character frequencies {unigram:.2f}, guessing {math.log(text.alphabet):.2f}."
        ),
        bars={
            "guessing": math.log(text.alphabet),
            "frequencies": unigram,
            _CONTROL: without.cross_entropy,
            "trained": with_term.cross_entropy,
        },
        bars_about="held-out cross-entropy, nats",
        bars_format="{:.2f}",
    )


RUN = Run(
    about="a next-character model of Python's help, its embedding kept at a target variance",
    train=run,
    steps=200,
)


class _Text:
    """The paragraphs of `help()`, each once, a tenth of them held out, as character numbers."""

    def __init__(self, setting: Setting) -> None:
        kept, held_out = help_paragraphs(setting)
        number = {character: i for i, character in enumerate(sorted({*"\n".join(kept + held_out)}))}

        def numbers(chosen: list[str]) -> Tensor:
            return torch.tensor([number[character] for character in "\n\n".join(chosen)])

        self.alphabet = len(number)
        self.held_out = numbers(held_out)
        self.kept = numbers(kept)

    def unigram_cross_entropy(self) -> float:
        """Return the held-out cross-entropy of the kept text's character frequencies."""
        counts = torch.bincount(self.kept, minlength=self.alphabet).double() + 1
        return float(-(counts / counts.sum()).log()[self.held_out].mean())


class _Model(nn.Module):
    """Embeds the characters of a context and reads the next one off them."""

    def __init__(self, alphabet: int, setting: Setting) -> None:
        super().__init__()
        torch.manual_seed(setting.seed)  # the same weights in both trainings
        self.embedding = nn.Embedding(alphabet, _DIM)
        nn.init.normal_(self.embedding.weight, std=0.02)  # as language models start
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
        """Score the last character of each window."""
        return F.cross_entropy(self.body(self.embedding(windows[:, :-1])), windows[:, -1])


class _Training:
    """One training, and what it leaves behind."""

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
    """Cut a context and the character after it from each start."""
    return characters[starts[:, None] + torch.arange(_CONTEXT + 1)]
