"""Distillation between models with the same tokenizer."""

import functools
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import _numbers
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._numbers import alike, lifted_dtype
from .._terms import Terms, terms
from ._checks import check_groups, check_normalizer, check_temperature, divisor
from ._divergence_rows import (
    Compared,
    Divergence,
    check_beta,
    divergence_by_hand,
    divergence_of_logs,
    finite,
)
from ._rows import (
    PerRow,
    adds_ranks,
    few_that_count,
    log_softmax,
    mean_of_few,
    over_ranks,
    over_rows,
    unused_positions,
)

Tail = Literal["renormalize", "bucket", "zero"]


@terms
class DistillationTerms(Terms):
    """Terms of [`distillation_loss`][termwise.lm.distillation_loss]."""

    loss: Float[Tensor, ""]
    """temperature^2 * divergence."""
    divergence: Float[Tensor, ""]
    """Divergence in nats, at the temperature: sum over the positions that count / normalizer."""
    num_tokens: Float[Tensor, ""]
    """Number of positions that count, on all ranks; detached."""


@contract
def distillation_loss(
    student_logits: Float[Tensor, "batch time vocab"],
    teacher_logits: Float[Tensor, "batch time vocab"],
    *,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_top_k: int | None = None,
    tail: Tail = "renormalize",
    mask: Bool[Tensor, "batch time"] | None = None,
    sample_mask: Bool[Tensor, " batch"] | None = None,
    normalizer: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
    batch_group: ProcessGroup | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> DistillationTerms:
    r"""Teach a student the teacher's distribution of each next token.

    With p and q the softmax of the teacher's and the student's logits over the temperature T:

    $$\mathrm{loss} = \frac{T^2}{N} \sum_{b, t} D(p_{bt}, q_{bt}), \qquad
    m = \beta p + (1 - \beta) q$$

    $$D = \begin{cases} \mathrm{KL}(p \| q) & \text{forward} \\
    \mathrm{KL}(q \| p) & \text{reverse} \\
    \beta\, \mathrm{KL}(p \| m) + (1 - \beta)\, \mathrm{KL}(q \| m)
    & \text{jensen\_shannon} \end{cases}$$

    over the positions whose next token counts: logit t predicts token t + 1, and the loss makes the
    shift, as in [`next_token_loss`][termwise.lm.next_token_loss]. The factor T^2 compensates for
    the gradient, which decreases as 1 / T^2.

    Args:
        student_logits (Float[Tensor, "batch time vocab"]): unnormalized, a row for each position.
        teacher_logits (Float[Tensor, "batch time vocab"]): the same for the teacher. No gradient. A
            token that is -inf here but not in the student's logits makes the reverse divergence
            infinite; a token that is -inf only in the student's makes the forward one infinite.
        divergence: D.
        beta: weight in "jensen_shannon", in (0, 1). The divergence / beta tends to the forward
            divergence as beta tends to 0, and divergence / (1 - beta) to the reverse one as beta
            tends to 1.
        temperature: T, positive and finite.
        teacher_top_k: compare the k tokens S of highest teacher logit at each position. None: all
            tokens.
        tail: how the other tokens enter with teacher_top_k. "renormalize": they are left out, and
            both distributions are normalized over S. The loss then ignores the student's mass
            outside S, and may be 0 if almost all of it is there. "bucket": they form one additional
            token, whose probability is their sum, for teacher and student; the loss is never larger
            than that of all tokens. "zero": the teacher is normalized over S and is 0 elsewhere,
            the student keeps its probabilities, so the reverse divergence is infinite.
        mask (Bool[Tensor, "batch time"] | None): tokens that count; the others affect no term and
            no gradient, even if they are NaN. None: all. A position counts if the token that it
            predicts counts.
        sample_mask (Bool[Tensor, " batch"] | None): samples that count. None: all.
        normalizer (Float[Tensor, ""] | Int[Tensor, ""] | float | None): N, not negative, such as
            Hugging Face's `num_items_in_batch`. None: the number of positions that count, over
            batch_group and sequence_group. Pass that of a whole optimizer step, and micro-batches
            add up exactly.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        vocab_group: process group whose ranks hold different columns of both logits, in any
            numbers.
        sequence_group: process group whose ranks hold different positions, in the order of ranks.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all positions, the same on every rank. Gradient: combined over batch_group as
        `grad_reduction` says, it equals that of one process; over vocab_group and sequence_group
        each rank gets its part of the whole gradient, which is not to be averaged. If no position
        counts, loss and gradient are 0. Second derivatives are correct without a group and raise
        NotImplementedError with one. Each rank sends, over vocab_group, 5 numbers for each
        position, 6 for Jensen-Shannon, over sequence_group one row of a mask, and a sum of 2
        float64 elements over the last two groups. Saved for the backward pass: both logits as
        given, and the student's gradient, which is computed with the value. Does not synchronize
        with the device. On an accelerator the logits are read in 8 blocks at most, of at least 2^26
        logits; no GPU has run this yet.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: temperature is not positive and finite, normalizer a number that is negative or
            not finite, beta not in (0, 1), teacher_top_k not in 1..vocab or passed with
            vocab_group, or tail passed without teacher_top_k. Or one group of several ranks is
            passed for two axes.

    References:
        Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network (2015),
        https://arxiv.org/abs/1503.02531, from which T^2 is. Agarwal et al., On-Policy Distillation
        of Language Models (ICLR 2024), https://arxiv.org/abs/2306.13649, whose generalized
        Jensen-Shannon divergence this is. TRL's GKD trainer omits T^2, and uses beta = 0 and 1 for
        the forward and the reverse divergence, which have their own names here.

    Examples:
        >>> import torch
        >>> from termwise.lm import distillation_loss
        >>> student, teacher = torch.zeros(1, 2, 2), torch.tensor([[[0.0, -torch.inf]] * 2])
        >>> distillation_loss(student, teacher).metrics()
        {'loss': 0.693..., 'divergence': 0.693..., 'num_tokens': 1.0}
    """
    check_groups("distillation_loss", batch_group, vocab_group, sequence_group)
    name, vocab = "distillation_loss", student_logits.shape[2]
    check_temperature(name, temperature)
    student_logits, teacher_logits = alike(student_logits, teacher_logits)
    check_normalizer(name, normalizer)
    check_beta(name, beta)
    if teacher_top_k is not None and (vocab_group is not None or not 1 <= teacher_top_k <= vocab):
        raise ValueError(
            f"{name} needs teacher_top_k in 1..{vocab} and no vocab_group, got teacher_top_k "
            f"{teacher_top_k}" + (" with a vocab_group" if vocab_group is not None else "")
        )
    if teacher_top_k is None and tail != "renormalize":
        raise ValueError(
            f"{name} needs teacher_top_k with tail {tail!r}, got None: it compares all tokens"
        )
    logits = student_logits, teacher_logits.detach()
    compared = Compared(divergence, beta, temperature)
    formula = functools.partial(_per_row, compared=compared, teacher_top_k=teacher_top_k, tail=tail)
    limits = (mask, sample_mask, batch_group, vocab_group, sequence_group)
    if few_that_count(student_logits, _numbers.FEW, *limits):
        rows = [x[:, :-1].flatten(0, 1) for x in logits]
        (per_row,) = formula(None, *rows)
        mean, count = mean_of_few(per_row, normalizer)
    else:
        unused = unused_positions(student_logits, mask, sample_mask, sequence_group)
        sums = over_rows(
            formula,
            divergence_by_hand(compared, vocab_group) if teacher_top_k is None else None,
            vocab_group,
            unused,
            *[x.flatten(0, 1) for x in logits],
            wide_sums=adds_ranks(batch_group, sequence_group),
        )
        loss_sum, count = over_ranks(sums, batch_group, sequence_group, grad_reduction)
        mean = loss_sum / divisor(normalizer, count)
    kind = lifted_dtype(student_logits)
    mean = mean.to(kind)
    loss = mean if temperature == 1 else temperature**2 * mean
    return DistillationTerms(loss=loss, divergence=mean, num_tokens=count.to(kind))


class DistillationLoss(LossModule):
    """[`distillation_loss`][termwise.lm.distillation_loss] as a module.

    Examples:
        >>> import torch
        >>> from termwise.lm import DistillationLoss
        >>> loss_fn = DistillationLoss(divergence="jensen_shannon", temperature=2.0)
        >>> logits = torch.randn(2, 5, 8)
        >>> loss_fn(logits, logits).loss.item() < 1e-6
        True
    """

    divergence: Divergence = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    teacher_top_k: int | None = None
    tail: Tail = "renormalize"
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        student_logits: Float[Tensor, "batch time vocab"],
        teacher_logits: Float[Tensor, "batch time vocab"],
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        sample_mask: Bool[Tensor, " batch"] | None = None,
        normalizer: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
        batch_group: ProcessGroup | None = None,
        vocab_group: ProcessGroup | None = None,
        sequence_group: ProcessGroup | None = None,
    ) -> DistillationTerms:
        """Compute the terms of the loss."""
        return distillation_loss(
            student_logits,
            teacher_logits,
            mask=mask,
            sample_mask=sample_mask,
            normalizer=normalizer,
            batch_group=batch_group,
            vocab_group=vocab_group,
            sequence_group=sequence_group,
            **self.hyperparameters(),
        )


def _per_row(
    unused: Tensor | None,
    x: Tensor,
    y: Tensor,
    *,
    compared: Compared,
    teacher_top_k: int | None,
    tail: Tail,
) -> PerRow:
    """Return the divergence of each row."""
    q, p = (log_softmax(logits, unused, compared.temperature, None) for logits in (x, y))
    if teacher_top_k is not None:
        q, p = _cut(q, p, teacher_top_k, tail)
    return (divergence_of_logs(q, p, compared),)


def _cut(q: Tensor, p: Tensor, k: int, tail: Tail) -> tuple[Tensor, Tensor]:
    """Keep the teacher's k most likely tokens, and treat the others as `tail` says."""
    chosen = p.topk(k, dim=1).indices
    top_q, top_p = q.gather(1, chosen), p.gather(1, chosen)
    if tail == "renormalize":
        return top_q.log_softmax(1), top_p.log_softmax(1)
    q_rest = _log_sum_of_others(q, chosen)
    if tail == "zero":
        p_rest, top_p = torch.full_like(q_rest, -torch.inf), top_p.log_softmax(1)
    else:
        p_rest = _log_sum_of_others(p, chosen)
    return torch.cat([top_q, q_rest], 1), torch.cat([top_p, p_rest], 1)


def _log_sum_of_others(logs: Tensor, chosen: Tensor) -> Tensor:
    """Return the log-probability of all tokens that are not selected together."""
    # Computed from these tokens: 1 - the sum of the others would be imprecise if it is small.
    lowest = torch.finfo(logs.dtype).min
    rest = finite(logs).scatter(1, chosen, lowest).logsumexp(1, keepdim=True)
    return rest.masked_fill(rest <= lowest, -torch.inf)
