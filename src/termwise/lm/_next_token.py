"""Next-token cross-entropy, of whole logits or shards of the vocabulary."""

import functools

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._numbers import lifted, lifted_dtype
from . import _rows
from ._checks import check_groups, check_normalizer
from ._cross_entropy_rows import (
    NextTokenTerms,
    cross_entropy,
    cross_entropy_by_hand,
    local_targets,
    next_token_terms,
    targets_of,
    terms_of_few,
)
from ._rows import adds_ranks, few_that_count, over_rows


@contract
def next_token_loss(
    logits: Float[Tensor, "batch time vocab"],
    tokens: Int[Tensor, "batch time"],
    *,
    mask: Bool[Tensor, "batch time"] | None = None,
    sample_mask: Bool[Tensor, " batch"] | None = None,
    normalizer: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
    batch_group: ProcessGroup | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> NextTokenTerms:
    r"""Predict each token from the previous ones.

    $$\mathrm{loss} = \frac{1}{N} \sum_{b, t}
    \Big( \log \sum_v e^{x_{btv}} - x_{b t\, y_{b, t+1}} \Big)$$

    over the tokens y that count. Logit t predicts token t + 1: the loss makes the shift, so pass
    the tokens that are the model's input. No logit predicts the first token.

    Args:
        logits (Float[Tensor, "batch time vocab"]): x, unnormalized, a row for each position.
        tokens (Int[Tensor, "batch time"]): y. A negative one (padding, -100) does not count.
        mask (Bool[Tensor, "batch time"] | None): tokens that count; the others affect no term and
            no gradient, even if they are NaN. None: all. A position counts if the token that it
            predicts counts.
        sample_mask (Bool[Tensor, " batch"] | None): samples that count. None: all.
        normalizer (Float[Tensor, ""] | Int[Tensor, ""] | float | None): N, not negative, such as
            Hugging Face's `num_items_in_batch`. None: the number of tokens that count, over
            batch_group and sequence_group. Pass that of a whole optimizer step, and its
            micro-batches add up exactly.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        vocab_group: process group whose ranks hold different columns of the logits, in any numbers,
            in the order of ranks; tokens are numbered over all of them.
        sequence_group: process group whose ranks hold different positions, in the order of ranks.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all tokens, the same on every rank. Gradient: combined over batch_group as
        `grad_reduction` says, it equals that of one process; over vocab_group and sequence_group
        each rank gets its part of the whole gradient, which is not to be averaged. If no token
        counts, loss and gradient are 0. A token beyond the vocabulary makes the loss NaN, and the
        gradient of the position that predicts it. Second derivatives are correct without a group
        and raise NotImplementedError with one. Each rank sends, over vocab_group, 4 numbers for
        each position, over sequence_group one row of tokens, and a sum of 3 float64 elements over
        the last two groups. Saved for the backward pass: the logits as given and their gradient,
        which is computed with the value. Does not synchronize with the device. On an accelerator
        the logits are read in 8 blocks at most, of at least 2^26 logits; no GPU has run this yet.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: normalizer is a number that is negative or not finite. Or one group of several
            ranks is passed for two axes.

    References:
        The usual cross-entropy, as `torch.nn.functional.cross_entropy` of shifted logits has it.
        Shards of the vocabulary: Shoeybi et al., Megatron-LM (2019),
        https://arxiv.org/abs/1909.08053.

    Examples:
        >>> import torch
        >>> from termwise.lm import next_token_loss
        >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
        >>> terms = next_token_loss(logits, torch.tensor([[0, 1, 1]]))
        >>> terms.metrics()
        {'loss': 0.503..., 'num_tokens': 2.0, 'accuracy': 1.0}
    """
    check_groups("next_token_loss", batch_group, vocab_group, sequence_group)
    check_normalizer("next_token_loss", normalizer)
    limits = (mask, sample_mask, batch_group, vocab_group, sequence_group)
    if not torch.compiler.is_compiling() and few_that_count(logits, _rows.FUSED, *limits):
        rows = lifted(logits)[:, :-1].flatten(0, 1)
        found = terms_of_few(rows, tokens, normalizer)
        if found is not None:
            return found
    targets = targets_of(tokens, mask, sample_mask, sequence_group)
    unused = targets < 0
    sums = over_rows(
        cross_entropy,
        functools.partial(cross_entropy_by_hand, vocab_group=vocab_group),
        vocab_group,
        unused,
        logits.flatten(0, 1),
        local_targets(targets, logits, vocab_group),
        wide_sums=adds_ranks(batch_group, sequence_group),
    )
    kind = lifted_dtype(logits)
    return next_token_terms(sums, kind, normalizer, batch_group, sequence_group, grad_reduction)


class NextTokenLoss(LossModule):
    """[`next_token_loss`][termwise.lm.next_token_loss] as a module.

    Examples:
        >>> import torch
        >>> from termwise.lm import NextTokenLoss
        >>> loss_fn = NextTokenLoss()
        >>> loss_fn(torch.zeros(2, 5, 8), torch.ones(2, 5, dtype=torch.int64)).metrics()
        {'loss': 2.07..., 'num_tokens': 8.0, 'accuracy': 1.0}
    """

    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        logits: Float[Tensor, "batch time vocab"],
        tokens: Int[Tensor, "batch time"],
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        sample_mask: Bool[Tensor, " batch"] | None = None,
        normalizer: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
        batch_group: ProcessGroup | None = None,
        vocab_group: ProcessGroup | None = None,
        sequence_group: ProcessGroup | None = None,
    ) -> NextTokenTerms:
        """Compute the terms of the loss."""
        return next_token_loss(
            logits,
            tokens,
            mask=mask,
            sample_mask=sample_mask,
            normalizer=normalizer,
            batch_group=batch_group,
            vocab_group=vocab_group,
            sequence_group=sequence_group,
            **self.hyperparameters(),
        )
