"""The end-to-end objective: preserve the model's output when activations are reconstructed."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .._autograd import Function, link_to
from .._coefficients import is_zero, weighted
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import means_over_rows
from .._module import LossModule, keyword_fields
from .._numbers import blocks, few, lifted, may_look_at, without_autocast
from .._terms import Terms, terms
from ._latents import SparseLatents, check_latents, counted
from ._penalties import penalty
from ._squared_errors import FeatureReduction, squared_errors


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EndToEnd:
    """Config of the end-to-end objective: the hyperparameters of its loss."""

    kl_coeff: float = 1.0
    """Weight of the divergence of the outputs."""
    reconstruction_coeff: float = 0.0
    """Weight of the squared error at each later layer."""
    sparsity_coeff: float = 2e-3
    """Weight of the L1 penalty; the authors use about 1.5 / 768 for GPT-2 small."""
    feature_reduction: FeatureReduction = "mean"
    """Reduction over the features of a later layer: "mean" or "sum"."""
    grad_reduction: GradReduction = "mean"
    """How the trainer combines the ranks' gradients."""


@terms
class EndToEndTerms(Terms):
    """Terms of [`end_to_end_loss`][termwise.sae.end_to_end_loss]."""

    loss: Float[Tensor, ""]
    """kl_coeff * kl + reconstruction_coeff * reconstruction + sparsity."""
    kl: Float[Tensor, ""]
    """KL(original || patched) of the next token, in nats, before its coefficient: sum over the
    vocabulary, mean over rows."""
    reconstruction: Float[Tensor, ""]
    """Squared error, before its coefficient: mean (or sum) over features, mean over rows, sum over
    later layers."""
    sparsity: Float[Tensor, ""]
    """The penalty with its coefficient: sparsity_coeff * mean sum_j |f_j|."""


@contract
def end_to_end_loss(
    logits: Float[Tensor, "batch vocab"],
    original_logits: Float[Tensor, "batch vocab"],
    *,
    x: Sequence[Tensor] | None = None,
    f: Float[Tensor, "batch d_sae"] | SparseLatents | None = None,
    x_hat: Sequence[Tensor] | None = None,
    kl_coeff: float | Float[Tensor, ""] = 1.0,
    reconstruction_coeff: float | Float[Tensor, ""] = 0.0,
    sparsity_coeff: float | Float[Tensor, ""] = 0.0,
    mask: Bool[Tensor, " batch"] | None = None,
    feature_reduction: FeatureReduction = "mean",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> EndToEndTerms:
    r"""Match the output of the model that runs on a reconstruction to that of the original model.

    $$\begin{align*} \mathrm{loss} = \frac{1}{n} \sum_i \Big( &
    \alpha \sum_v p_{iv} (\log\, p_{iv} - \log\, q_{iv}) \\
    &+ \beta \sum_k \frac{1}{d_k} \| x^k_i - \hat{x}^k_i \|^2
    + \lambda \sum_j \left|f_{ij}\right| \Big) \end{align*}$$

    over the n rows that count, where p is the original model's distribution of the next token and q
    that of the patched one. Half precision is converted to float32 before any exponential or
    difference, with or without autocast.

    Args:
        logits (Float[Tensor, "batch vocab"]): logits of the patched model, whose activations at one
            layer are replaced by their reconstruction; a row for each token. -inf: a token of
            probability 0.
        original_logits (Float[Tensor, "batch vocab"]): logits of the original model, at the same
            tokens; detached. A token that is -inf in it adds 0, whatever its value in `logits`; one
            that is -inf only in `logits` makes the divergence infinite.
        x: activations of the original model at layers after the autoencoder, each "batch d_k";
            detached. None or empty: `reconstruction` is 0.
        f (Float[Tensor, "batch d_sae"] | SparseLatents | None): latents, dense or
            [`SparseLatents`][termwise.sae.SparseLatents]. None: `sparsity` is 0.
        x_hat: activations of the patched model at the same layers.
        kl_coeff (float | Float[Tensor, ""]): alpha, the weight of the divergence. Exactly 0.0
            removes it from the loss and the gradient, even if it is infinite. A tensor, on the
            device of logits, may change at each step without recompiling; its term is always
            multiplied and added, even if it is 0. The same holds for the other coefficients.
        reconstruction_coeff (float | Float[Tensor, ""]): beta, the weight of each later layer's
            squared error. The paper divides one coefficient by the number of these layers.
        sparsity_coeff (float | Float[Tensor, ""]): lambda, the weight of the penalty. The authors'
            code divides by the width of the autoencoder's input: their 1.5 on GPT-2 small is
            1.5 / 768 here.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others affect no term and no
            gradient, even if they are NaN. None: all.
        feature_reduction: over the features of a later layer, "mean" (the authors' code) or "sum"
            (the paper).
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank. If no row counts they are NaN. Gradients,
        combined over ranks as `grad_reduction` says, equal those of one process that holds all
        rows. Communication: one all-reduce of 4 float64 elements. Saved for the backward pass: the
        logits as given, and no probabilities, except those of at most 32,768 logits; compiled code
        may save other tensors. Does not synchronize with the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: x and x_hat do not have equally many floating tensors, of equal shapes with a
            row for each row of logits; or f has another number of rows.

    References:
        Braun et al., Identifying Functionally Important Features with End-to-End Sparse Dictionary
        Learning (2024), https://arxiv.org/abs/2405.12241: e2e is kl and sparsity, e2e+ds adds the
        later layers. Its text writes KL(patched, original), and so does the docstring in
        https://github.com/ApolloResearch/e2e_sae; that code computes KL(original || patched), the
        usual distillation, and we side with what it computes.

    Examples:
        >>> import torch
        >>> from termwise.sae import end_to_end_loss
        >>> original = torch.tensor([[0.0, 0.0, -torch.inf]])
        >>> patched = torch.tensor([[0.0, 1.0, -torch.inf]])
        >>> layer, patched_layer = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 3.0]])
        >>> end_to_end_loss(
        ...     patched, original, x=[layer], x_hat=[patched_layer], reconstruction_coeff=0.5
        ... ).metrics()
        {'loss': 1.12..., 'kl': 0.12..., 'reconstruction': 2.0, 'sparsity': 0.0}
    """
    pairs = _pairs(x, x_hat, logits.shape[0])
    if f is not None:
        check_latents("end_to_end_loss", f, logits.shape[0], mask=mask)
    with without_autocast(logits):
        divergence = _divergence(logits, original_logits.detach(), mask)
        each = mask is not None or batch_group is not None or not len(divergence)
        nothing = divergence.new_zeros(divergence.shape if each else ())
        errors = [
            squared_errors(true.detach(), guess, mask, feature_reduction, batch_group)
            for true, guess in pairs
        ]
        error = sum(errors[1:], errors[0]) if errors else nothing
        paid = nothing if f is None else penalty(counted(f, mask), None, 1.0)
        kl, reconstruction, price = means_over_rows(
            [
                divergence,
                error,
                paid,
            ],
            mask,
            batch_group,
            grad_reduction,
        )
        sparsity = weighted(sparsity_coeff, price)
        parts = [
            weighted(coeff, term)
            for coeff, term in ((kl_coeff, kl), (reconstruction_coeff, reconstruction))
            if not is_zero(coeff)
        ]
        if not is_zero(sparsity_coeff):
            parts.append(sparsity)
        # If nothing is added, 0 with a gradient of 0, so that a trainer can call backward.
        loss = functools.reduce(torch.add, parts) if parts else link_to(logits).to(kl.dtype)
        return EndToEndTerms(
            loss=loss,
            kl=kl,
            reconstruction=reconstruction,
            sparsity=sparsity,
        )


class EndToEndObjective(LossModule):
    """[`end_to_end_loss`][termwise.sae.end_to_end_loss] as a module, from a config.

    Examples:
        >>> import torch
        >>> from termwise.sae import EndToEnd, EndToEndObjective
        >>> objective = EndToEndObjective(EndToEnd(sparsity_coeff=0.5))
        >>> logits, f = torch.zeros(4, 10), torch.ones(4, 8)
        >>> objective(logits, logits, f=f).metrics()
        {'loss': 4.0, 'kl': 0.0, 'reconstruction': 0.0, 'sparsity': 4.0}
    """

    cfg: EndToEnd = dataclasses.field(kw_only=False)

    def __call__(
        self,
        logits: Float[Tensor, "batch vocab"],
        original_logits: Float[Tensor, "batch vocab"],
        *,
        x: Sequence[Tensor] | None = None,
        f: Float[Tensor, "batch d_sae"] | SparseLatents | None = None,
        x_hat: Sequence[Tensor] | None = None,
        mask: Bool[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> EndToEndTerms:
        """Compute the terms of the objective."""
        return end_to_end_loss(
            logits,
            original_logits,
            x=x,
            x_hat=x_hat,
            f=f,
            mask=mask,
            batch_group=batch_group,
            **keyword_fields(self.cfg),
        )


def _pairs(
    x: Sequence[Tensor] | None, x_hat: Sequence[Tensor] | None, batch: int
) -> list[tuple[Tensor, Tensor]]:
    """Pair the layers of both models, and check their shapes."""
    originals, guesses = list(x or ()), list(x_hat or ())
    if len(originals) != len(guesses):
        raise ValueError(
            "end_to_end_loss needs x and x_hat of the same layers, got "
            f"{len(originals)} and {len(guesses)} tensors"
        )
    for index, (true, guess) in enumerate(zip(originals, guesses, strict=True)):
        if true.ndim != 2 or true.shape[0] != batch or true.shape != guess.shape:
            raise ValueError(
                f"end_to_end_loss needs x[{index}] and x_hat[{index}] of one shape with {batch} "
                f"rows, got {list(true.shape)} and {list(guess.shape)}"
            )
        if not (true.is_floating_point() and guess.is_floating_point()):
            raise ValueError(
                f"end_to_end_loss needs floating x[{index}] and x_hat[{index}], got {true.dtype} "
                f"and {guess.dtype}"
            )
    return list(zip(originals, guesses, strict=True))


def _divergence(logits: Tensor, original: Tensor, mask: Tensor | None) -> Tensor:
    """Return KL(original || logits) of each row; 0 in rows that do not count."""
    if few(logits) or torch.compiler.is_compiling():  # a compiler fuses it
        return _block_divergence(logits, original, mask)
    return cast("Tensor", _RowsDivergence.apply(logits, original, mask))


def _block_divergence(logits: Tensor, original: Tensor, mask: Tensor | None) -> Tensor:
    ours = torch.log_softmax(_finite(logits, mask), 1)
    theirs = torch.log_softmax(_finite(original, mask), 1)
    weights, gap = theirs.exp(), theirs - ours
    found = (weights * gap).sum(1)
    if may_look_at(found) and not math.isnan(float(found.detach().sum())):
        return found
    # A token of probability 0 adds 0; the difference of its logs may be -inf - -inf.
    return (weights * gap.masked_fill(weights == 0, 0)).sum(1)


def _finite(rows: Tensor, mask: Tensor | None) -> Tensor:
    return lifted(rows if mask is None else rows.where(mask[:, None], 0))


class _RowsDivergence(Function):
    """Compute in blocks of rows; save no tensor as large as the logits except the logits."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, original: Tensor, mask: Tensor | None) -> Tensor:
        parts = [
            _block_divergence(logits[block], original[block], None if mask is None else mask[block])
            for block in blocks(logits)
        ]
        return torch.cat(parts) if parts else lifted(logits).sum(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, original, mask = ctx.saved_tensors
        parts: list[Tensor] = []
        for block in blocks(logits):
            counted = None if mask is None else mask[block]
            ours = torch.softmax(_finite(logits[block], counted), 1)
            theirs = torch.softmax(_finite(original[block], counted), 1)
            parts.append(((ours - theirs) * gradients[0][block, None]).to(logits.dtype))
        return torch.cat(parts) if parts else torch.zeros_like(logits), None, None
