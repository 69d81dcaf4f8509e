"""Cross-entropy of rows of logits with a target each: by autograd, and with its own gradient."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .._groups import GradReduction, ProcessGroup, first_column
from .._numbers import accumulator, lifted
from .._terms import Terms, terms
from ._checks import divisor
from ._chunks import logit_chunks
from ._rows import Sums, centred, clear, highest, means_over_ranks, over_columns, put, read


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
    unused: Tensor,
    kind: torch.dtype,
    normalizer: Tensor | float | None,
    batch_group: ProcessGroup | None,
    sequence_group: ProcessGroup | None,
    grad_reduction: GradReduction,
) -> NextTokenTerms:
    """Average the sums over the rows of all ranks."""
    loss, (hits,), count = means_over_ranks(
        sums, unused, normalizer, batch_group, sequence_group, grad_reduction
    )
    return NextTokenTerms(
        loss=loss.to(kind),
        num_tokens=count.to(kind),
        accuracy=(hits / count.clamp_min(1)).to(kind),
    )


def terms_of_few(
    logits: Tensor, tokens: Tensor, normalizer: Tensor | float | None
) -> NextTokenTerms | None:
    """Return the terms of few logits, by a fused kernel, if it supports all tokens.

    It does not support padding, and targets beyond the vocabulary.
    """
    targets = tokens[:, 1:].flatten().long()
    least, most = targets.aminmax()
    if int(least) < 0 or int(most) >= logits.shape[2]:
        return None
    x = lifted(logits[:, :-1].flatten(0, 1))
    found = x.detach()
    right = found.gather(1, targets[:, None]) >= found.amax(1, keepdim=True)
    hits, count = right.sum(dtype=x.dtype), found.new_full((), len(x))
    if normalizer is None:
        loss = F.cross_entropy(x, targets)
    else:
        loss = F.cross_entropy(x, targets, reduction="sum") / divisor(normalizer, count)
    return NextTokenTerms(loss=loss.to(x.dtype), num_tokens=count, accuracy=hits / len(x))


def cross_entropy(unused: Tensor | None, rows: Tensor, local: Tensor) -> Sums:
    """Sum -log softmax at the targets of the rows that count, and count the correct predictions."""
    x = read(rows, unused)
    beyond = local >= x.shape[1]
    place = local.clamp(0, x.shape[1] - 1)[:, None]
    # A target beyond the vocabulary makes its row's gradient NaN too.
    nats = x.log_softmax(1).gather(1, place)[:, 0] * torch.where(beyond, torch.nan, -1.0)
    right = (x.detach().gather(1, place)[:, 0] >= highest(x, None)) & ~beyond
    return _both(nats, right, unused)


def cross_entropy_by_hand(
    out: Tensor | None,
    unused: Tensor | None,
    rows: Tensor,
    local: Tensor,
    *,
    vocab_group: ProcessGroup | None,
) -> Sums:
    """Compute the same from e^(x - highest), which is turned into the gradient in place."""
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
    dtype = accumulator(nats)
    return clear(nats, unused).sum(dtype=dtype), clear(right, unused).sum(dtype=dtype)
