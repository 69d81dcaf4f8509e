"""Next-token cross-entropy, whole or over shards of the vocabulary."""

import functools

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._contract import contract
from .._groups import GradReduction, ProcessGroup, first_column
from .._module import LossModule
from .._numbers import accumulator, lifted
from .._terms import Terms, terms
from ._checks import check_normalizer
from ._chunks import logit_chunks
from ._rows import (
    Sums,
    centred,
    clear,
    highest,
    means_over_ranks,
    over_columns,
    over_rows,
    put,
    read,
)


@terms
class NextTokenTerms(Terms):
    """Terms of [`next_token_loss`][termwise.lm.next_token_loss]."""

    loss: Float[Tensor, ""]
    """Cross-entropy of the next token in nats: sum over the tokens that count, over normalizer."""
    num_tokens: Float[Tensor, ""]
    """Tokens that count, on all ranks; detached."""
    accuracy: Float[Tensor, ""]
    """Share of them whose logit is the highest, a tie among it; 0 where none counts; detached."""


@contract
def next_token_loss(
    logits: Float[Tensor, "batch time vocab"],
    tokens: Int[Tensor, "batch time"],
    *,
    mask: Bool[Tensor, "batch time"] | None = None,
    normalizer: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
    batch_group: ProcessGroup | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> NextTokenTerms:
    r"""Predict each token from those before it.

    $$\mathrm{loss} = \frac{1}{N} \sum_{b, t}
    \Big( \log \sum_v e^{x_{btv}} - x_{b t\, y_{b, t+1}} \Big)$$

    over the tokens y that count. Logit t predicts token t + 1: the shift is made here, so the
    tokens are those that went into the model. The first token is predicted by none.

    Args:
        logits (Float[Tensor, "batch time vocab"]): x, unnormalised, a row for each position.
        tokens (Int[Tensor, "batch time"]): y. A negative one (padding, -100) does not count.
        mask (Bool[Tensor, "batch time"] | None): tokens that count; the others enter no term
            and no gradient, whatever they hold. None: all. A position counts if the token that it
            predicts does.
        normalizer (Float[Tensor, ""] | Int[Tensor, ""] | float | None): N, not negative, such as
            Hugging Face's `num_items_in_batch`. None: the number of tokens that count, over
            batch_group and sequence_group. Give one of a whole optimizer step and its micro-batches
            add up exactly.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None, here and below: no communication.
        vocab_group: ranks that hold other columns of the logits, in any numbers, in the order of
            ranks; tokens are numbered over all of them.
        sequence_group: ranks that hold other positions, in the order of ranks.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all tokens, the same on every rank. Gradient: combined over batch_group as
        `grad_reduction` says it is that of one process; over vocab_group and sequence_group each
        rank's is its part of the whole gradient, and nothing is to be averaged. Where no token
        counts, loss and gradient are 0. A token beyond the vocabulary makes the loss NaN, and the
        gradient of the position that predicts it. Second derivatives are right without a group and
        refused with one (`NotImplementedError`). Sent by each rank: over vocab_group 4 numbers for
        each position, over sequence_group one row of tokens, and a sum of 3 float64 elements over
        the last two groups. Kept for the backward pass: the logits as given and their gradient,
        which is made with the value. Nothing waits for the device. The number of kernels grows by
        a block of about 2^26 logits; compiled, it does not grow.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: normalizer is a number that is negative or not finite.

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
    check_normalizer("next_token_loss", normalizer)
    counted = tokens if mask is None else tokens.where(mask, -1)
    if sequence_group is not None:
        counted = counted.clamp_min(-1)
    targets = logit_chunks(counted, sequence_group).reshape(-1)
    unused = targets < 0
    first = first_column(logits, vocab_group)
    local = targets if first is None else targets - first
    by_hand = functools.partial(_by_hand, vocab_group=vocab_group)
    sums = over_rows(_sums, by_hand, vocab_group, unused, logits.flatten(0, 1), local)
    loss, (hits,), count = means_over_ranks(
        sums, unused, normalizer, batch_group, sequence_group, grad_reduction
    )
    kind = lifted(logits.new_empty(())).dtype
    return NextTokenTerms(
        loss=loss.to(kind),
        num_tokens=count.to(kind),
        accuracy=(hits / count.clamp_min(1)).to(kind),
    )


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
            normalizer=normalizer,
            batch_group=batch_group,
            vocab_group=vocab_group,
            sequence_group=sequence_group,
            **self.hyperparameters(),
        )


def _sums(unused: Tensor | None, rows: Tensor, local: Tensor) -> Sums:
    """Sum -log softmax at each row's target over the rows that count, and the targets on top."""
    x = read(rows, unused)
    beyond = local >= x.shape[1]
    place = local.clamp(0, x.shape[1] - 1)[:, None]
    # A target beyond the vocabulary makes its row's gradient NaN too.
    nats = x.log_softmax(1).gather(1, place)[:, 0] * torch.where(beyond, torch.nan, -1.0)
    right = (x.detach().gather(1, place)[:, 0] >= highest(x, None)) & ~beyond
    return _both(nats, right, unused)


def _by_hand(
    out: Tensor | None,
    unused: Tensor | None,
    rows: Tensor,
    local: Tensor,
    *,
    vocab_group: ProcessGroup | None,
) -> Sums:
    """Compute the same with e^(x - highest) alone, which turns into the gradient in place."""
    powers = centred(rows, unused, 1.0, vocab_group, out)
    width = rows.shape[1]
    beyond = local >= width
    place = local.clamp(0, width - 1)[:, None]
    on_rank = torch.ones_like(powers[:, :1]) if width else powers.new_zeros(len(powers), 1)
    at_target = powers.gather(1, place)[:, 0] if width else on_rank[:, 0]
    if vocab_group is not None:
        here = (local >= 0) & ~beyond
        on_rank, at_target = here.to(powers.dtype)[:, None], at_target.where(here, 0)
    total = powers.exp_().sum(1)
    if vocab_group is not None:
        sums = torch.stack([total, at_target, on_rank[:, 0]])
        total, at_target, found = over_columns(sums, vocab_group)
        beyond = found == 0
    total = total.masked_fill_(beyond, torch.nan)  # a target beyond the vocabulary
    if out is not None and width:
        powers.div_(total[:, None]).scatter_add_(1, place, on_rank.neg_())
        put(out, powers if unused is None else powers.masked_fill_(unused[:, None], 0))
    return _both(total.log() - at_target, (at_target >= 0) & ~beyond, unused)


def _both(nats: Tensor, right: Tensor, unused: Tensor | None) -> Sums:
    wide = accumulator(nats)
    return clear(nats, unused).sum(dtype=wide), clear(right, unused).sum(dtype=wide)
