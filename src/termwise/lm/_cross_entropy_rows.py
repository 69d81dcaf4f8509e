"""Cross-entropy of rows of logits with a target each: by autograd, and with its own gradient."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .._groups import GradReduction, ProcessGroup, first_column
from .._terms import Terms, terms
from ._checks import divisor
from ._chunks import logit_chunks
from ._rows import PerRow, Sums, centred, highest, over_columns, over_ranks, read, write_gradient


@terms
class NextTokenTerms(Terms):
    """Terms of [`next_token_loss`][termwise.lm.next_token_loss]."""

    loss: Float[Tensor, ""]
    """Cross-entropy of the next token in nats: sum over the tokens that count, over normalizer."""
    num_tokens: Float[Tensor, ""]
    """Number of tokens that count, on all ranks; detached."""
    accuracy: Float[Tensor, ""]
    """Fraction of them whose logit is the highest (ties included); 0 if none counts; detached."""


def targets_of(
    tokens: Tensor,
    mask: Tensor | None,
    sample_mask: Tensor | None,
    sequence_group: ProcessGroup | None,
) -> Tensor:
    """Return the token that each of the batch * time logits predicts; negative for none."""
    if mask is not None:
        tokens = tokens.where(mask, -1)
    if sample_mask is not None:
        tokens = tokens.where(sample_mask[:, None], -1)
    if sequence_group is not None:
        tokens = tokens.clamp_min(-1)
    return logit_chunks(tokens, sequence_group).reshape(-1)


def local_targets(targets: Tensor, columns: Tensor, vocab_group: ProcessGroup | None) -> Tensor:
    """Return the targets relative to the first column of this rank, which has those of a tensor."""
    first = first_column(columns, vocab_group)
    return targets if first is None else targets - first


def next_token_terms(
    sums: Sums,
    kind: torch.dtype,
    normalizer: Tensor | float | None,
    batch_group: ProcessGroup | None,
    sequence_group: ProcessGroup | None,
    grad_reduction: GradReduction,
) -> NextTokenTerms:
    """Average the sums over the rows of all ranks."""
    nats, hits, count = over_ranks(sums, batch_group, sequence_group, grad_reduction)
    counted = divisor(None, count)
    by = counted if normalizer is None else divisor(normalizer, count)
    return NextTokenTerms(
        loss=(nats / by).to(kind), num_tokens=count.to(kind), accuracy=(hits / counted).to(kind)
    )


def terms_of_few(
    rows: Tensor, tokens: Tensor, normalizer: Tensor | float | None
) -> NextTokenTerms | None:
    """Return the terms of few rows of logits, by a fused kernel, if it supports all tokens.

    It does not support padding, or targets beyond the vocabulary, which `gather` refuses. The first
    tokens are not targets.
    """
    targets, found = tokens[:, 1:].flatten().long(), rows.detach()
    try:
        right = found.gather(1, targets.unsqueeze(1)).ge_(found.amax(1, keepdim=True))
    except RuntimeError:
        return None
    count = found.new_full((), targets.shape[0])
    loss = F.cross_entropy(rows, targets, reduction="mean" if normalizer is None else "sum")
    if normalizer is not None:
        loss = (loss / divisor(normalizer, count)).to(rows.dtype)
    return NextTokenTerms(loss=loss, num_tokens=count, accuracy=right.mean())


def cross_entropy(unused: Tensor | None, rows: Tensor, local: Tensor) -> PerRow:
    """Return -log softmax at each row's target, and whether no logit is higher than it."""
    x = read(rows, unused)
    place = local.clamp(0, x.shape[1] - 1)
    known = local == place
    # A target beyond the vocabulary makes its row's gradient NaN too.
    nats = x.log_softmax(1).gather(1, place[:, None])[:, 0] * torch.where(known, -1.0, torch.nan)
    right = x.detach().gather(1, place[:, None])[:, 0] >= highest(x, None)
    return nats, right & known


def cross_entropy_by_hand(
    out: Tensor | None,
    unused: Tensor | None,
    rows: Tensor,
    local: Tensor,
    *,
    vocab_group: ProcessGroup | None,
) -> PerRow:
    """Compute the same from e^(x - highest), which is turned into the gradient in place.

    All of a row without a target is NaN. If the row counts, it stays NaN: its target is beyond the
    vocabulary.
    """
    top, width = highest(rows, vocab_group), rows.shape[1]
    place = local.clamp(0, max(width - 1, 0))
    if vocab_group is None:
        top.masked_fill_(local != place, torch.nan)
    powers = centred(rows, top, 1.0, out)
    at_target = powers.gather(1, place[:, None])[:, 0] if width else torch.zeros_like(top)
    sum_exp, less = powers.exp_().sum(1), None
    if vocab_group is not None:
        is_local = (local == place) & bool(width)
        less = is_local.to(sum_exp.dtype).neg_()
        sum_exp, at_target, found = over_columns(
            torch.stack([sum_exp, at_target.where(is_local, 0), less]), vocab_group
        )
        sum_exp, at_target = (x.masked_fill(found == 0, torch.nan) for x in (sum_exp, at_target))
    if out is not None and width:
        powers.div_(sum_exp[:, None])
        if less is None:
            powers.scatter_(1, place[:, None], -1.0, reduce="add")
        else:
            powers.scatter_add_(1, place[:, None], less[:, None])
        write_gradient(out, powers, unused)
    return sum_exp.log() - at_target, at_target >= 0
