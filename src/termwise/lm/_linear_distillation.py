"""Distillation from hidden states and heads of both models, without storing all logits."""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._terms import Terms, terms
from ._checks import check_groups, check_normalizer, check_temperature, divisor
from ._cross_entropy_rows import local_targets, targets_of
from ._divergence_rows import Compared, Divergence, check_beta
from ._linear_rows import Weighted, check_softcap, head_of, lifted_heads, over_linear_rows
from ._rows import adds_ranks, over_ranks, unused_positions


@terms
class LinearDistillationTerms(Terms):
    """Terms of [`linear_distillation_loss`][termwise.lm.linear_distillation_loss]."""

    loss: Float[Tensor, ""]
    """kd_weight * temperature^2 * divergence + ce_weight * cross_entropy."""
    divergence: Float[Tensor, ""]
    """Divergence in nats, at the temperature: sum over the positions that count, divided by
    normalizer; detached."""
    cross_entropy: Float[Tensor, ""] | None
    """Cross-entropy of the next token in nats: sum over the positions that count, divided by
    normalizer; detached. None without tokens."""
    num_tokens: Float[Tensor, ""]
    """Number of positions that count, on all ranks; detached."""
    accuracy: Float[Tensor, ""] | None
    """Fraction of them whose token is the student's most likely one (ties included); 0 if none
    counts; detached. None without tokens."""


@contract
def linear_distillation_loss(
    hidden: Float[Tensor, "batch time d_model"],
    weight: Float[Tensor, "vocab d_model"],
    teacher_hidden: Float[Tensor, "batch time teacher_d_model"],
    teacher_weight: Float[Tensor, "vocab teacher_d_model"],
    *,
    tokens: Int[Tensor, "batch time"] | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 1.0,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
    teacher_bias: Float[Tensor, " vocab"] | None = None,
    teacher_softcap: float | None = None,
    mask: Bool[Tensor, "batch time"] | None = None,
    sample_mask: Bool[Tensor, " batch"] | None = None,
    normalizer: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
    batch_group: ProcessGroup | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> LinearDistillationTerms:
    r"""Teach a student the teacher's distributions, computing one block of logits at a time.

    $$\mathrm{loss} = w_{KD}\, T^2\, D + w_{CE}\, \mathrm{CE}$$

    D is the mean divergence of [`distillation_loss`][termwise.lm.distillation_loss] of the logits
    of student and teacher,

    $$x_t = W h_t + b, \qquad \text{or } c \tanh(x_t / c) \text{ of it with a softcap } c,$$

    and CE, with tokens, is the [`next_token_loss`][termwise.lm.next_token_loss] of the student's
    logits, at temperature 1. Logits and their gradients are computed for one block of positions at
    a time. Half precision is converted to float32, the weights as a whole, regardless of autocast;
    the gradients are summed in float32 and rounded once.

    Args:
        hidden (Float[Tensor, "batch time d_model"]): h, input of the student's head, a row for each
            position.
        weight (Float[Tensor, "vocab d_model"]): W, weight of the student's head, a row for each
            token.
        teacher_hidden (Float[Tensor, "batch time teacher_d_model"]): the same for the teacher. The
            teacher's tensors get no gradient.
        teacher_weight (Float[Tensor, "vocab teacher_d_model"]): weight of the teacher's head.
        tokens (Int[Tensor, "batch time"] | None): tokens of the text. A negative one (padding,
            -100) does not count, also for the divergence. None: no cross-entropy.
        kd_weight: w_KD. 0 removes the divergence, even if it is infinite.
        ce_weight: w_CE; 0 removes the cross-entropy. It has no effect without tokens.
        divergence: D: "forward", "reverse" or "jensen_shannon".
        beta: weight in "jensen_shannon", in (0, 1).
        temperature: T of the divergence, positive and finite.
        bias (Float[Tensor, " vocab"] | None): b, bias of the student's head. None: 0.
        softcap: c of the student, positive and finite. None: its logits are not bounded.
        teacher_bias (Float[Tensor, " vocab"] | None): bias of the teacher's head. None: 0.
        teacher_softcap: c of the teacher. None: its logits are not bounded.
        mask (Bool[Tensor, "batch time"] | None): tokens that count; the others affect no term and
            no gradient, even if they are NaN. None: all. A position counts if the token that it
            predicts counts.
        sample_mask (Bool[Tensor, " batch"] | None): samples that count. None: all.
        normalizer (Float[Tensor, ""] | Int[Tensor, ""] | float | None): N, for divergence and
            cross-entropy, as in distillation_loss. None: the number of positions that count, over
            batch_group and sequence_group.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        vocab_group: process group whose ranks hold different rows of both weights and biases, in
            the order of ranks, and the same hidden states. Token ids refer to the whole vocabulary.
        sequence_group: process group whose ranks hold different positions, in the order of ranks,
            and the same weights.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all positions, the same on every rank. Gradient: combined over batch_group as
        `grad_reduction` says, it equals that of one process. Over vocab_group, those of weight and
        bias are for this rank's rows, and that of hidden, which the backward pass sums over the
        group, is complete on every rank. Over sequence_group, that of hidden is for this rank's
        positions, and those of weight and bias are partial sums, which the trainer has to *sum*
        over the group. If no position counts, loss and gradient are 0. A token beyond the
        vocabulary makes the loss NaN. Second derivatives are correct up to 2^17 logits without a
        group, and raise NotImplementedError beyond, compiled and with one. Each rank sends the same
        as in distillation_loss and, with tokens, in next_token_loss, and over vocab_group the
        gradient of hidden. Saved for the backward pass: the gradients of hidden, weight and bias,
        in float32; up to 2^17 logits, the graph of the formula. Does not synchronize with the
        device. The number of kernels grows with the number of blocks of about 2^26 logits;
        compiled, the loss is one operator.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: temperature, softcap or teacher_softcap is not positive and finite, normalizer a
            number that is negative or not finite, or beta not in (0, 1). Or one group of several
            ranks is passed for two axes.

    References:
        As in [`distillation_loss`][termwise.lm.distillation_loss]; the heads are fused with the
        loss as in Liger Kernel (https://arxiv.org/abs/2410.10989, section 3.2), whose
        `LigerFusedLinearJSDLoss` leaves T^2 out, halves both weights by default and takes the
        cross-entropy of targets that the caller has shifted.

    Examples:
        >>> import math, torch
        >>> from termwise.lm import linear_distillation_loss
        >>> hidden, weight = torch.ones(1, 2, 1), torch.tensor([[0.0], [math.log(3)]])
        >>> terms = linear_distillation_loss(hidden, weight, torch.ones(1, 2, 1), torch.zeros(2, 1))
        >>> terms.metrics()
        {'loss': 0.143..., 'divergence': 0.143..., 'num_tokens': 1.0}
    """
    name = "linear_distillation_loss"
    check_groups(name, batch_group, vocab_group, sequence_group)
    check_temperature(name, temperature)
    check_normalizer(name, normalizer)
    check_beta(name, beta)
    check_softcap(name, softcap=softcap, teacher_softcap=teacher_softcap)
    if tokens is None:
        local, unused = None, unused_positions(hidden, mask, sample_mask, sequence_group)
    else:
        targets = targets_of(tokens, mask, sample_mask, sequence_group)
        local, unused = local_targets(targets, weight.T, vocab_group), targets < 0
    student, teacher = lifted_heads(
        head_of(hidden, weight, bias, softcap),
        head_of(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap),
    )
    sums = over_linear_rows(
        student,
        teacher,
        local,
        unused,
        Weighted(
            Compared(divergence, beta, temperature),
            divergence_weight=kd_weight * temperature**2,
            cross_entropy_weight=ce_weight,
        ),
        vocab_group,
        wide_sums=adds_ranks(batch_group, sequence_group),
    )
    loss, kd, *others, count = over_ranks(sums, batch_group, sequence_group, grad_reduction)
    by, kind = divisor(normalizer, count), student.weight.dtype
    return LinearDistillationTerms(
        loss=(loss / by).to(kind),
        divergence=(kd / by).to(kind),
        cross_entropy=(others[0] / by).to(kind) if others else None,
        num_tokens=count.to(kind),
        accuracy=(others[1] / divisor(None, count)).to(kind) if others else None,
    )


class LinearDistillationLoss(LossModule):
    """[`linear_distillation_loss`][termwise.lm.linear_distillation_loss] as a module.

    Weights and biases belong to the models: pass them with each call.

    Examples:
        >>> import torch
        >>> from termwise.lm import LinearDistillationLoss
        >>> loss_fn = LinearDistillationLoss(divergence="jensen_shannon", temperature=2.0)
        >>> hidden, weight = torch.randn(2, 5, 3), torch.randn(8, 3)
        >>> loss_fn(hidden, weight, hidden, weight).loss.item() < 1e-6
        True
    """

    kd_weight: float = 1.0
    ce_weight: float = 1.0
    divergence: Divergence = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    softcap: float | None = None
    teacher_softcap: float | None = None
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        hidden: Float[Tensor, "batch time d_model"],
        weight: Float[Tensor, "vocab d_model"],
        teacher_hidden: Float[Tensor, "batch time teacher_d_model"],
        teacher_weight: Float[Tensor, "vocab teacher_d_model"],
        *,
        tokens: Int[Tensor, "batch time"] | None = None,
        bias: Float[Tensor, " vocab"] | None = None,
        teacher_bias: Float[Tensor, " vocab"] | None = None,
        mask: Bool[Tensor, "batch time"] | None = None,
        sample_mask: Bool[Tensor, " batch"] | None = None,
        normalizer: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
        batch_group: ProcessGroup | None = None,
        vocab_group: ProcessGroup | None = None,
        sequence_group: ProcessGroup | None = None,
    ) -> LinearDistillationTerms:
        """Compute the terms of the loss."""
        return linear_distillation_loss(
            hidden,
            weight,
            teacher_hidden,
            teacher_weight,
            tokens=tokens,
            bias=bias,
            teacher_bias=teacher_bias,
            mask=mask,
            sample_mask=sample_mask,
            normalizer=normalizer,
            batch_group=batch_group,
            vocab_group=vocab_group,
            sequence_group=sequence_group,
            **self.hyperparameters(),
        )
