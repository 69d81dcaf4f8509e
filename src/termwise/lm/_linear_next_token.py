"""Next-token cross-entropy from hidden states and the head's weight, without storing all logits."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from . import _linear_rows
from ._checks import check_groups, check_normalizer
from ._cross_entropy_rows import (
    NextTokenTerms,
    local_targets,
    next_token_terms,
    targets_of,
    terms_of_few,
)
from ._linear_rows import Weighted, check_softcap, head_of, lifted_heads, over_linear_rows
from ._rows import adds_ranks, few_that_count


@contract
def linear_next_token_loss(
    hidden: Float[Tensor, "batch time d_model"],
    weight: Float[Tensor, "vocab d_model"],
    tokens: Int[Tensor, "batch time"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
    mask: Bool[Tensor, "batch time"] | None = None,
    sample_mask: Bool[Tensor, " batch"] | None = None,
    normalizer: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
    batch_group: ProcessGroup | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> NextTokenTerms:
    r"""Predict each token from hidden states, computing one block of logits at a time.

    It is [`next_token_loss`][termwise.lm.next_token_loss] of

    $$x_t = W h_t + b, \qquad \text{or } c \tanh(x_t / c) \text{ of it with a softcap } c,$$

    with gradients with respect to h, W and b. x and its gradient are computed for one block of
    positions at a time. Half precision is converted to float32, the weight as a whole, regardless
    of autocast; the gradients are summed in float32 and rounded once.

    Args:
        hidden (Float[Tensor, "batch time d_model"]): h, input of the head, a row for each position.
        weight (Float[Tensor, "vocab d_model"]): W, weight of the head, a row for each token.
        tokens (Int[Tensor, "batch time"]): y. A negative one (padding, -100) does not count.
        bias (Float[Tensor, " vocab"] | None): b, bias of the head. None: 0.
        softcap: c, positive and finite: the bound of the logits of models that have one (Gemma 2's
            `final_logit_softcapping`). None: the logits are not bounded.
        mask (Bool[Tensor, "batch time"] | None): tokens that count; the others affect no term and
            no gradient, even if they are NaN. None: all. A position counts if the token that it
            predicts counts.
        sample_mask (Bool[Tensor, " batch"] | None): samples that count. None: all.
        normalizer (Float[Tensor, ""] | Int[Tensor, ""] | float | None): N, as in next_token_loss.
            None: the number of tokens that count, over batch_group and sequence_group.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        vocab_group: process group whose ranks hold different rows of weight and bias, in the order
            of ranks, and the same hidden states. Token ids refer to the whole vocabulary.
        sequence_group: process group whose ranks hold different positions, in the order of ranks,
            and the same weight.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all tokens, the same on every rank. Gradient: combined over batch_group as
        `grad_reduction` says, it equals that of one process. Over vocab_group, those of weight and
        bias are for this rank's rows, and that of hidden, which the backward pass sums over the
        group, is complete on every rank. Over sequence_group, that of hidden is for this rank's
        positions, and those of weight and bias are partial sums, which the trainer has to *sum*
        over the group. If no token counts, loss and gradient are 0. A token beyond the vocabulary
        makes the loss NaN. Second derivatives are correct up to 2^17 logits without a group, and
        raise NotImplementedError beyond, compiled and with one. Each rank sends the same as in
        next_token_loss, and over vocab_group the gradient of hidden. Saved for the backward pass:
        the gradients of hidden, weight and bias, in float32; up to 2^17 logits, the graph of the
        formula. Does not synchronize with the device. The number of kernels grows with the number
        of blocks of about 2^26 logits; compiled, the loss is one operator.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: softcap is not positive and finite, normalizer a number that is negative or not
            finite. Or one group of several ranks is passed for two axes.

    References:
        As in [`next_token_loss`][termwise.lm.next_token_loss]; the head is fused with the loss as
        in Liger Kernel (https://arxiv.org/abs/2410.10989, section 3.2). The softcap is that of
        Gemma Team, Gemma 2 (2024), https://arxiv.org/abs/2408.00118, section 2.

    Examples:
        >>> import torch
        >>> from termwise.lm import linear_next_token_loss
        >>> hidden, weight = torch.ones(1, 3, 1), torch.tensor([[0.0], [1.0]])
        >>> terms = linear_next_token_loss(hidden, weight, torch.tensor([[0, 0, 1]]))
        >>> terms.metrics()
        {'loss': 0.813..., 'num_tokens': 2.0, 'accuracy': 0.5}
    """
    name = "linear_next_token_loss"
    check_groups(name, batch_group, vocab_group, sequence_group)
    check_softcap(name, softcap=softcap)
    check_normalizer(name, normalizer)
    limits = (mask, sample_mask, batch_group, vocab_group, sequence_group)
    few = few_that_count(hidden, _linear_rows.FEW, *limits, columns=weight.shape[0])
    if few and not torch.compiler.is_compiling():
        (student,) = lifted_heads(head_of(hidden[:, :-1], weight, bias, softcap))
        found = terms_of_few(student.all_logits(None), tokens, normalizer)
        if found is not None:
            return found
    targets = targets_of(tokens, mask, sample_mask, sequence_group)
    (student,) = lifted_heads(head_of(hidden, weight, bias, softcap))
    loss, _, hits, count = over_linear_rows(
        student,
        None,
        local_targets(targets, weight.T, vocab_group),
        targets < 0,
        Weighted(cross_entropy_weight=1.0),
        vocab_group,
        wide_sums=adds_ranks(batch_group, sequence_group),
    )
    return next_token_terms(
        (loss, hits, count),
        student.weight.dtype,
        normalizer,
        batch_group,
        sequence_group,
        grad_reduction,
    )


class LinearNextTokenLoss(LossModule):
    """[`linear_next_token_loss`][termwise.lm.linear_next_token_loss] as a module.

    Weight and bias belong to the model: pass them with each call.

    Examples:
        >>> import torch
        >>> from termwise.lm import LinearNextTokenLoss
        >>> loss_fn = LinearNextTokenLoss(softcap=30.0)
        >>> hidden, weight = torch.zeros(2, 5, 3), torch.zeros(8, 3)
        >>> loss_fn(hidden, weight, torch.ones(2, 5, dtype=torch.int64)).metrics()
        {'loss': 2.07..., 'num_tokens': 8.0, 'accuracy': 1.0}
    """

    softcap: float | None = None
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        hidden: Float[Tensor, "batch time d_model"],
        weight: Float[Tensor, "vocab d_model"],
        tokens: Int[Tensor, "batch time"],
        *,
        bias: Float[Tensor, " vocab"] | None = None,
        mask: Bool[Tensor, "batch time"] | None = None,
        sample_mask: Bool[Tensor, " batch"] | None = None,
        normalizer: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
        batch_group: ProcessGroup | None = None,
        vocab_group: ProcessGroup | None = None,
        sequence_group: ProcessGroup | None = None,
    ) -> NextTokenTerms:
        """Compute the terms of the loss."""
        return linear_next_token_loss(
            hidden,
            weight,
            tokens,
            bias=bias,
            mask=mask,
            sample_mask=sample_mask,
            normalizer=normalizer,
            batch_group=batch_group,
            vocab_group=vocab_group,
            sequence_group=sequence_group,
            **self.hyperparameters(),
        )
