"""Distillation between models of one tokenizer."""

import math
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .. import _groups
from .._autograd import Function
from .._contract import contract
from .._groups import NO_SECOND_DERIVATIVE, GradReduction, ProcessGroup
from .._numbers import accumulator, blocks, lifted
from .._terms import Terms, terms
from ._chunk_streams import largest, total
from ._chunks import logit_chunks
from ._next_token import put

Divergence = Literal["forward", "reverse", "jensen_shannon"]


@terms
class DistillationTerms(Terms):
    """Terms of [`distillation_loss`][termwise.lm.distillation_loss]."""

    loss: Float[Tensor, ""]
    """temperature^2 * divergence."""
    divergence: Float[Tensor, ""]
    """In nats, at the temperature: sum over the positions that count, over normalizer."""
    num_tokens: Float[Tensor, ""]
    """Positions that count, on all ranks; detached."""


@contract
def distillation_loss(
    student_logits: Float[Tensor, "batch time vocab"],
    teacher_logits: Float[Tensor, "batch time vocab"],
    *,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    top_k: int | None = None,
    mask: Bool[Tensor, "batch time"] | None = None,
    normalizer: Float[Tensor, ""] | float | None = None,
    batch_group: ProcessGroup | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> DistillationTerms:
    r"""Teach a student the teacher's distribution of each next token.

    With p and q the softmax of the teacher's and the student's logits over the temperature T:

    $$\mathrm{loss} = \frac{T^2}{N} \sum_{b, t} D(p_{bt}, q_{bt}), \qquad D = \begin{cases}
    \mathrm{KL}(p \| q) & \text{forward} \\
    \mathrm{KL}(q \| p) & \text{reverse} \\
    \beta\, \mathrm{KL}(p \| m) + (1 - \beta)\, \mathrm{KL}(q \| m),
    \quad m = \beta p + (1 - \beta) q & \text{jensen\_shannon} \end{cases}$$

    over the positions whose next token counts: logit t predicts token t + 1, and the shift is made
    here, as [`next_token_loss`][termwise.lm.next_token_loss] makes it. T^2 keeps the gradient's
    size as T grows.

    Args:
        student_logits (Float[Tensor, "batch time vocab"]): unnormalised, a row for each position.
        teacher_logits (Float[Tensor, "batch time vocab"]): the same of the teacher. No gradient
            flows to it. A token that is -inf here and not in the student's makes the reverse
            divergence infinite, as one the other way round does the forward one.
        divergence: D.
        beta: of "jensen_shannon", in (0, 1). Over beta it tends to the forward divergence at 0,
            over 1 - beta to the reverse one at 1.
        temperature: T, positive.
        top_k: compare the k tokens of highest teacher logit at each position alone, with both
            distributions normalised among them. None: all tokens.
        mask (Bool[Tensor, "batch time"] | None): tokens that count, of those that are predicted.
            None: all. A position whose token does not count is never read, whatever it holds, and
            gets the gradient 0.
        normalizer (Float[Tensor, ""] | float | None): N. None: the number of positions that count,
            over batch_group and sequence_group. Give one of a whole optimizer step and
            micro-batches add up exactly.
        batch_group: ranks that hold other samples, in any numbers, 0 included. None, here and
            below: this rank alone, nothing is sent.
        vocab_group: ranks that hold other columns of both logits, in any numbers.
        sequence_group: ranks that hold other positions, in the order of ranks.
        grad_reduction: how the trainer combines the gradients over batch_group: "mean" or "sum".

    Returns:
        The terms of all positions, the same on every rank. Gradient: combined over batch_group as
        `grad_reduction` says it is that of one process; over vocab_group and sequence_group each
        rank's is its part of the whole gradient, and nothing is to be averaged. Where no position
        counts, loss and gradient are 0. Second derivatives are right without a group and refused
        with one (`NotImplementedError`). Sent by each rank: over vocab_group 6 numbers for each
        position, over sequence_group one row of marks, and a sum of 2 float64 elements over the
        last two groups. Kept for the backward pass: both logits as given, and no probabilities.
        Nothing waits for the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: temperature is not positive, beta not in (0, 1), top_k not in 1..vocab, or given
            with vocab_group.

    References:
        Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network (2015),
        https://arxiv.org/abs/1503.02531, from which T^2 is. Agarwal et al., On-Policy Distillation
        of Language Models (ICLR 2024), https://arxiv.org/abs/2306.13649, whose generalised
        Jensen-Shannon divergence this is. TRL's GKD trainer leaves T^2 out and reads beta = 0 and 1
        as the forward and the reverse divergence, which here have names of their own.

    Examples:
        >>> import torch
        >>> from termwise.lm import distillation_loss
        >>> student, teacher = torch.zeros(1, 2, 2), torch.tensor([[[0.0, -torch.inf]] * 2])
        >>> distillation_loss(student, teacher).metrics()
        {'loss': 0.693..., 'divergence': 0.693..., 'num_tokens': 1.0}
    """
    vocab = student_logits.shape[2]
    if not temperature > 0:
        raise ValueError(f"distillation_loss needs temperature > 0, got {temperature}")
    if not 0 < beta < 1:
        raise ValueError(f"distillation_loss needs beta in (0, 1), got {beta}")
    if top_k is not None and (vocab_group is not None or not 1 <= top_k <= vocab):
        raise ValueError(
            f"distillation_loss needs top_k in 1..{vocab} and no vocab_group, got top_k {top_k}"
            + (" with a vocab_group" if vocab_group is not None else "")
        )
    with torch.autocast(student_logits.device.type, enabled=False):
        used = used_positions(student_logits, mask, sequence_group)
        student, teacher = (
            logits.flatten(0, 1) for logits in (student_logits, teacher_logits.detach())
        )
        if top_k is not None:
            chosen = _highest(teacher, used, top_k)
            student, teacher = student.gather(1, chosen), teacher.gather(1, chosen)
        per_row, _ = cast(
            "tuple[Tensor, Tensor]",
            _Rows.apply(
                student,
                teacher,
                used,
                temperature,
                divergence,
                beta,
                None if vocab_group is None else vocab_group.group_name,
            ),
        )
        mean, count = mean_over_positions(
            per_row, used, normalizer, batch_group, sequence_group, grad_reduction
        )
        return DistillationTerms(loss=temperature**2 * mean, divergence=mean, num_tokens=count)


class DistillationLoss(nn.Module):
    """[`distillation_loss`][termwise.lm.distillation_loss] with its numbers held.

    Examples:
        >>> import torch
        >>> from termwise.lm import DistillationLoss
        >>> loss_fn = DistillationLoss(divergence="jensen_shannon", temperature=2.0)
        >>> logits = torch.randn(2, 5, 8)
        >>> loss_fn(logits, logits).loss.item() < 1e-6
        True
    """

    @contract
    def __init__(
        self,
        *,
        divergence: Divergence = "forward",
        beta: float = 0.5,
        temperature: float = 1.0,
        top_k: int | None = None,
        grad_reduction: GradReduction = "mean",
    ) -> None:
        super().__init__()
        self.divergence: Divergence = divergence
        self.beta = beta
        self.temperature = temperature
        self.top_k = top_k
        self.grad_reduction: GradReduction = grad_reduction

    def forward(
        self,
        student_logits: Float[Tensor, "batch time vocab"],
        teacher_logits: Float[Tensor, "batch time vocab"],
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        normalizer: Float[Tensor, ""] | float | None = None,
        batch_group: ProcessGroup | None = None,
        vocab_group: ProcessGroup | None = None,
        sequence_group: ProcessGroup | None = None,
    ) -> DistillationTerms:
        """Compute the terms of the loss of a batch."""
        return distillation_loss(
            student_logits,
            teacher_logits,
            divergence=self.divergence,
            beta=self.beta,
            temperature=self.temperature,
            top_k=self.top_k,
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
            student_logits: Float[Tensor, "batch time vocab"],
            teacher_logits: Float[Tensor, "batch time vocab"],
            *,
            mask: Bool[Tensor, "batch time"] | None = None,
            normalizer: Float[Tensor, ""] | float | None = None,
            batch_group: ProcessGroup | None = None,
            vocab_group: ProcessGroup | None = None,
            sequence_group: ProcessGroup | None = None,
        ) -> DistillationTerms:
            """Compute the terms of the loss of a batch."""
            ...

    def extra_repr(self) -> str:
        """Show the numbers in `print(module)`."""
        return (
            f"divergence={self.divergence!r}, beta={self.beta}, temperature={self.temperature}, "
            f"top_k={self.top_k}"
        )


def used_positions(
    logits: Tensor, mask: Tensor | None, sequence_group: ProcessGroup | None
) -> Tensor:
    """Tell which of the batch * time logits predict a token that counts."""
    marks = (
        torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)
        if mask is None
        else mask.long() - 1
    )
    return logit_chunks(marks, sequence_group).reshape(-1) >= 0


def mean_over_positions(
    per_row: Tensor,
    used: Tensor,
    normalizer: Tensor | float | None,
    batch_group: ProcessGroup | None,
    sequence_group: ProcessGroup | None,
    grad_reduction: GradReduction,
) -> tuple[Tensor, Tensor]:
    """Give the sum over positions that count on all ranks, over the normalizer, and their count."""
    wide = accumulator(per_row)
    sums = torch.stack([per_row.where(used, 0).sum(dtype=wide), used.sum().to(wide)])
    sums = _groups.terminal_sum(sums, sequence_group, 1.0)
    scale = _groups.gradient_scale(batch_group, grad_reduction)
    whole, count = _groups.terminal_sum(sums, batch_group, scale).unbind()
    divisor = count.clamp_min(1) if normalizer is None else normalizer
    return (whole / divisor).to(per_row.dtype), count.detach().to(per_row.dtype)


def _highest(logits: Tensor, used: Tensor, k: int) -> Tensor:
    parts = [used.new_empty(0, k, dtype=torch.int64)]
    for part in blocks(logits):
        rows = logits[part].where(used[part, None], 0)
        parts.append(rows.topk(k, dim=1).indices)
    return torch.cat(parts)


class _Rows(Function):
    """The divergence of each row, a block of rows at a time; remembers the logits alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        student: Tensor,
        teacher: Tensor,
        used: Tensor,
        temperature: float,
        divergence: Divergence,
        beta: float,
        vocab_name: str | None,
    ) -> tuple[Tensor, Tensor]:
        sums = [log_sums(logits, used, temperature, vocab_name) for logits in (student, teacher)]
        parts = [lifted(student[:0]).new_zeros(2, 0)]
        for part in blocks(student):
            q, p = (
                scaled_rows(logits[part], used[part], temperature) - log_sum[part, None]
                for logits, log_sum in zip((student, teacher), sums, strict=True)
            )
            found = _divergence(p, q, divergence, beta).sum(1)
            pulls = found.new_zeros(found.shape)  # the forward divergence's gradient needs none
            if divergence != "forward":
                pulls = times(q.exp(), _pulls(p, q, divergence, beta)).sum(1)
            parts.append(torch.stack([found, pulls]))
        both = total(torch.cat(parts, 1), vocab_name)
        return both[0], torch.stack([*sums, both[1]])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:3], output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.setting = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, used, kept = ctx.saved_tensors
        temperature, divergence, beta, vocab_name = ctx.setting
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if again and vocab_name is not None:
            raise NotImplementedError(NO_SECOND_DERIVATIVE)
        whole = None
        for part in blocks(student):
            x, y = (
                scaled_rows(logits[part], used[part], temperature) for logits in (student, teacher)
            )
            # For a second derivative what each row sums to is a function of the logits too.
            q = x.log_softmax(1) if again else x - kept[0, part, None]
            p = y - kept[1, part, None]
            mass = q.exp()
            if divergence == "forward":
                pulled = mass - p.exp()
            else:
                pulled = times(mass, _pulls(p, q, divergence, beta))
                pulled = pulled - mass * (pulled.sum(1) if again else kept[2, part])[:, None]
            gradient = pulled * (gradients[0][part, None] / temperature)
            whole = put(whole, student, part, gradient)
        return (
            torch.zeros_like(student) if whole is None else whole,
            None,
            None,
            None,
            None,
            None,
            None,
        )


def scaled_rows(logits: Tensor, used: Tensor, temperature: float) -> Tensor:
    """Lift rows and divide them by the temperature; what is not used is read as 0."""
    return lifted(logits).where(used[:, None], 0) / temperature


def log_sums(logits: Tensor, used: Tensor, temperature: float, vocab_name: str | None) -> Tensor:
    """Give each row's log-sum-exp over the columns of all ranks."""
    own = [lifted(logits[:0]).sum(1)]
    own += [
        scaled_rows(logits[part], used[part], temperature).logsumexp(1) for part in blocks(logits)
    ]
    local = torch.cat(own)
    if vocab_name is None:
        return local
    top = largest(local, vocab_name)
    return top + total((local - top).exp(), vocab_name).log()


def times(mass: Tensor, logs: Tensor) -> Tensor:
    """Multiply, with 0 log 0 = 0."""
    return mass * logs.masked_fill(mass == 0, 0)


def _divergence(p: Tensor, q: Tensor, divergence: Divergence, beta: float) -> Tensor:
    """Give each token's part, from log-probabilities of teacher and student."""
    if divergence == "forward":
        return times(p.exp(), p - q)
    if divergence == "reverse":
        return times(q.exp(), q - p)
    mixed = _mixed(p, q, beta)
    return beta * times(p.exp(), p - mixed) + (1 - beta) * times(q.exp(), q - mixed)


def _pulls(p: Tensor, q: Tensor, divergence: Divergence, beta: float) -> Tensor:
    """Give the derivative of the divergence by the student's probabilities, up to a constant."""
    if divergence == "jensen_shannon":
        return (1 - beta) * (q - _mixed(p, q, beta))
    return q - p


def _mixed(p: Tensor, q: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))
