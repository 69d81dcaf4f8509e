"""Next-token cross-entropy, whole or over shards of the vocabulary."""

from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .. import _groups
from .._autograd import Function
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._numbers import accumulator, blocks, lifted
from .._terms import Terms, terms
from ._chunk_streams import first_token, largest
from ._chunks import logit_chunks


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
    normalizer: Float[Tensor, ""] | float | None = None,
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
        mask (Bool[Tensor, "batch time"] | None): tokens that count, of those that are predicted.
            None: all. A position whose token does not count is never read, whatever it holds, and
            gets the gradient 0.
        normalizer (Float[Tensor, ""] | float | None): N. None: the number of tokens that count,
            over batch_group and sequence_group. Give one of a whole optimizer step and its
            micro-batches add up exactly.
        batch_group: ranks that hold other samples, in any numbers, 0 included. None, here and
            below: this rank alone, nothing is sent.
        vocab_group: ranks that hold other columns of the logits, in any numbers, in the order of
            ranks; tokens are numbered over all of them.
        sequence_group: ranks that hold other positions, in the order of ranks.
        grad_reduction: how the trainer combines the gradients over batch_group: "mean" or "sum".

    Returns:
        The terms of all tokens, the same on every rank. Gradient: combined over batch_group as
        `grad_reduction` says it is that of one process; over vocab_group and sequence_group each
        rank's is its part of the whole gradient, and nothing is to be averaged. Where no token
        counts, loss and gradient are 0. A token beyond the vocabulary gives NaN. Second
        derivatives are right without a group. Sent by each rank: over vocab_group 5 numbers for
        each position, over sequence_group one row of tokens, and a sum of 3 float64 elements over
        each group. Kept for the backward pass: the logits as given, and no probabilities. Nothing
        waits for the device.

    Raises:
        ContractError: shapes or dtypes do not fit.

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
    with torch.autocast(logits.device.type, enabled=False):
        counted = tokens if mask is None else tokens.where(mask, -1)
        targets = logit_chunks(counted.clamp_min(-1), sequence_group).reshape(-1)
        used = targets >= 0
        local, here = _local(targets, logits, vocab_group)
        rows = logits.flatten(0, 1)
        own, at_target, highest = cast(
            "tuple[Tensor, Tensor, Tensor]", _Rows.apply(rows, local, here, used)
        )
        # Of other ranks' columns: log-sum-exp and the target's logit, where what follows is alike.
        vocab_name = None if vocab_group is None else vocab_group.group_name
        top = largest(own.detach(), vocab_name)
        summed = _groups.terminal_sum((own - top).exp(), vocab_group, 1.0)
        target = _groups.terminal_sum(at_target, vocab_group, 1.0)
        found = _groups.terminal_sum(here.to(own.dtype), vocab_group, 1.0)
        nats = top + summed.log() - target + (found - 1).where(found == 1, torch.nan)
        right = target.detach() >= largest(highest, vocab_name)
        wide = accumulator(nats)
        sums = torch.stack(
            [
                nats.where(used, 0).sum(dtype=wide),
                used.sum().to(wide),
                (right & used).sum().to(wide),
            ]
        )
        sums = _groups.terminal_sum(sums, sequence_group, 1.0)
        scale = _groups.gradient_scale(batch_group, grad_reduction)
        total, count, hits = _groups.terminal_sum(sums, batch_group, scale).unbind()
        divisor = count.clamp_min(1) if normalizer is None else normalizer
        kind = lifted(logits.new_empty(())).dtype
        return NextTokenTerms(
            loss=(total / divisor).to(kind),
            num_tokens=count.detach().to(kind),
            accuracy=(hits / count.clamp_min(1)).detach().to(kind),
        )


class NextTokenLoss(nn.Module):
    """[`next_token_loss`][termwise.lm.next_token_loss] as a module.

    Examples:
        >>> import torch
        >>> from termwise.lm import NextTokenLoss
        >>> loss_fn = NextTokenLoss()
        >>> loss_fn(torch.zeros(2, 5, 8), torch.ones(2, 5, dtype=torch.int64)).metrics()
        {'loss': 2.07..., 'num_tokens': 8.0, 'accuracy': 1.0}
    """

    @contract
    def __init__(self, *, grad_reduction: GradReduction = "mean") -> None:
        super().__init__()
        self.grad_reduction: GradReduction = grad_reduction

    def forward(
        self,
        logits: Float[Tensor, "batch time vocab"],
        tokens: Int[Tensor, "batch time"],
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        normalizer: Float[Tensor, ""] | float | None = None,
        batch_group: ProcessGroup | None = None,
        vocab_group: ProcessGroup | None = None,
        sequence_group: ProcessGroup | None = None,
    ) -> NextTokenTerms:
        """Compute the terms of the loss of a batch."""
        return next_token_loss(
            logits,
            tokens,
            mask=mask,
            normalizer=normalizer,
            batch_group=batch_group,
            vocab_group=vocab_group,
            sequence_group=sequence_group,
            grad_reduction=self.grad_reduction,
        )

    if TYPE_CHECKING:  # nn.Module's own says that a call gives Any

        def __call__(
            self,
            logits: Float[Tensor, "batch time vocab"],
            tokens: Int[Tensor, "batch time"],
            *,
            mask: Bool[Tensor, "batch time"] | None = None,
            normalizer: Float[Tensor, ""] | float | None = None,
            batch_group: ProcessGroup | None = None,
            vocab_group: ProcessGroup | None = None,
            sequence_group: ProcessGroup | None = None,
        ) -> NextTokenTerms:
            """Compute the terms of the loss of a batch."""
            ...

    def extra_repr(self) -> str:
        """Show the numbers in `print(module)`."""
        return f"grad_reduction={self.grad_reduction!r}"


def _local(
    targets: Tensor, logits: Tensor, vocab_group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Give the targets as columns of this rank, and whether they are."""
    first = first_token(logits, vocab_group)
    local = targets if first is None else targets - first
    here = (local >= 0) & (local < logits.shape[2])
    return local.where(here, 0), here & (targets >= 0)


class _Rows(Function):
    """Log-sum-exp of each row, its target's logit and its highest, a block of rows at a time.

    What is not used is read as 0. Backward writes one gradient, and remembers the logits alone.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor, local: Tensor, here: Tensor, used: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if rows.shape[1] == 0:
            nothing = lifted(rows[:, :0]).sum(1)
            low = torch.full_like(nothing, -torch.inf)
            return low, nothing, low.clone()
        own, at_target, highest = ([lifted(rows[:0, 0])] for _ in range(3))
        for part in blocks(rows):
            x = lifted(rows[part]).where(used[part, None], 0)
            own.append(x.logsumexp(1))
            at_target.append(x.gather(1, local[part, None])[:, 0].where(here[part], 0))
            highest.append(x.amax(1))
        return torch.cat(own), torch.cat(at_target), torch.cat(highest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, output[0])
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        rows, local, here, used, own = ctx.saved_tensors
        if rows.shape[1] == 0:
            return torch.zeros_like(rows), None, None, None
        whole = None
        for part in blocks(rows):
            x = lifted(rows[part]).where(used[part, None], 0)
            gradient = (x - own[part, None]).exp() * gradients[0][part, None]
            pulled = gradients[1][part].where(here[part], 0)[:, None]
            gradient = gradient.scatter_add(1, local[part, None], pulled)
            whole = put(whole, rows, part, gradient)
        return torch.zeros_like(rows) if whole is None else whole, None, None, None


def put(whole: Tensor | None, rows: Tensor, part: slice, block: Tensor) -> Tensor:
    """Write a block of the gradient of rows; the first makes the room, mapped where it is."""
    if whole is None:
        whole = block.new_empty(rows.shape, dtype=rows.dtype)
    whole[part] = block
    return whole
