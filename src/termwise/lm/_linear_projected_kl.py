"""Projected KL from hidden states and the head's weight, without storing all logits."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._autograd import wants_gradient
from .._contract import contract
from .._groups import GradReduction, ProcessGroup, all_reduce
from .._module import LossModule
from .._numbers import alike, lifted
from .._operators import Operator, with_gradients
from ._alignment import Alignment
from ._checks import check_groups
from ._chunk_blocks import Block, sum_over_chunks
from ._chunk_softmax import MeanSoftmax
from ._chunks import Chunks, check_times
from ._divergences import KLDivergence, TeacherMean
from ._projected_divergence import (
    Divergence,
    ProjectedKLTerms,
    divergence_setting,
    divergence_terms,
)
from ._vocab_projection import VocabProjection


@contract
def linear_projected_kl_loss(
    hidden: Float[Tensor, "batch student_time d_model"],
    weight: Float[Tensor, "student_vocab d_model"],
    teacher_logits: Float[Tensor, "batch teacher_time teacher_vocab"],
    *,
    alignment: Alignment,
    projection: VocabProjection,
    temperature: float = 1.0,
    divergence: KLDivergence = "forward",
    columns_top_k: int | None = None,
    teacher_columns: Int[Tensor, " columns"] | None = None,
    teacher_mean: TeacherMean = "log_normalized",
    mask: Bool[Tensor, "batch student_time"] | None = None,
    sample_mask: Bool[Tensor, " batch"] | None = None,
    exact_only: bool = False,
    normalizer: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
    eps: float = 1e-10,
    batch_group: ProcessGroup | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> ProjectedKLTerms:
    r"""Compute the projected KL of a linear head, one block of logits at a time.

    It is [`projected_kl_loss`][termwise.lm.projected_kl_loss] of

    $$x_t = W h_t$$

    with gradients with respect to h and W. x and its gradient are computed for one block of chunks
    at a time. Half precision is converted to float32, the weight as a whole, regardless of
    autocast; the gradients are summed in float32 and rounded once.

    Args:
        hidden (Float[Tensor, "batch student_time d_model"]): input of the head, a row for each
            position.
        weight (Float[Tensor, "student_vocab d_model"]): weight of the head, a row for each student
            token. The head has no bias.
        teacher_logits (Float[Tensor, "batch teacher_time teacher_vocab"]): unnormalized. No
            gradient.
        alignment: as in projected_kl_loss, like the following arguments.
        projection: from the student's vocabulary, the rows of weight, to the teacher's.
        temperature: T, positive.
        divergence: "forward" or "reverse".
        columns_top_k: number of teacher tokens to compare. None: all.
        teacher_columns (Int[Tensor, " columns"] | None): teacher tokens to compare.
        teacher_mean: "log", "log_normalized" or "prob".
        mask (Bool[Tensor, "batch student_time"] | None): student tokens that count; the others
            affect no term and no gradient, even if they are NaN. None: all. A chunk counts if all
            its student tokens count.
        sample_mask (Bool[Tensor, " batch"] | None): samples that count. None: all.
        exact_only: whether to count only chunks of equal text.
        normalizer (Float[Tensor, ""] | Int[Tensor, ""] | float | None): N. None: the number of
            chunks that count, over batch_group.
        eps: epsilon, not negative.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        vocab_group: process group whose ranks hold different rows of weight, and the same hidden
            states.
        sequence_group: process group whose ranks hold different positions, and the same weight.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. Gradient: over batch_group as
        `grad_reduction` says. Over vocab_group, that of weight is for this rank's rows, and that of
        hidden, which is summed over the group, is complete on every rank. Over sequence_group, that
        of hidden is for this rank's positions, and that of weight is a partial sum, which the
        trainer has to *sum* over the group. Second derivatives raise NotImplementedError. Does not
        synchronize with the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: as in projected_kl_loss.

    References:
        As in [`projected_kl_loss`][termwise.lm.projected_kl_loss]; the head is fused with the loss
        as in Liger Kernel (https://arxiv.org/abs/2410.10989, section 3.2).

    Examples:
        >>> import torch
        >>> from termwise.lm import VocabProjection, align_spans, linear_projected_kl_loss
        >>> alignment = align_spans([[(0, 0), (0, 2)]], [[(0, 0), (0, 1), (1, 2)]])
        >>> projection = VocabProjection.from_tokens(["ab", "c"], ["a", "b", "c"])
        >>> hidden, weight, teacher = torch.zeros(1, 2, 4), torch.ones(2, 4), torch.zeros(1, 3, 3)
        >>> terms = linear_projected_kl_loss(
        ...     hidden, weight, teacher, alignment=alignment, projection=projection
        ... )
        >>> round(terms.loss.item(), 4)
        0.4256
    """
    name = "linear_projected_kl_loss"
    check_groups(name, batch_group, vocab_group, sequence_group)
    check_times(name, alignment, hidden, teacher_logits)
    hidden, weight, teacher_logits = alike(hidden, weight, teacher_logits)
    setting = divergence_setting(
        name,
        teacher_logits,
        alignment,
        projection,
        student_vocab=weight.shape[0],
        temperature=temperature,
        divergence=divergence,
        columns_top_k=columns_top_k,
        teacher_columns=teacher_columns,
        teacher_mean=teacher_mean,
        mask=mask,
        sample_mask=sample_mask,
        exact_only=exact_only,
        normalizer=normalizer,
        eps=eps,
        batch_group=batch_group,
        vocab_group=vocab_group,
        sequence_group=sequence_group,
    )
    inputs = _Inputs(
        hidden,
        weight,
        teacher_logits.detach(),
        setting.chunks,
        setting.divergence,
        setting.per_chunk,
        wants_gradient(hidden) or wants_gradient(weight),
    )
    loss, measured, _, _ = with_gradients(_linear_projected_kl, inputs, 2)
    loss = loss.to(lifted(hidden.new_empty(())).dtype)
    return divergence_terms(setting, loss, measured, temperature, batch_group, grad_reduction)


class LinearProjectedKLLoss(LossModule):
    """[`linear_projected_kl_loss`][termwise.lm.linear_projected_kl_loss] as a module.

    The projection is neither a parameter nor a buffer: `module.to(device)` does not move it.

    Examples:
        >>> from termwise.lm import LinearProjectedKLLoss, VocabProjection
        >>> projection = VocabProjection.from_tokens(["ab", "c"], ["a", "b", "c"])
        >>> loss_fn = LinearProjectedKLLoss(projection, temperature=2.0, columns_top_k=8192)
    """

    projection: VocabProjection = dataclasses.field(kw_only=False)
    temperature: float = 1.0
    divergence: KLDivergence = "forward"
    columns_top_k: int | None = None
    teacher_mean: TeacherMean = "log_normalized"
    exact_only: bool = False
    eps: float = 1e-10
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        hidden: Float[Tensor, "batch student_time d_model"],
        weight: Float[Tensor, "student_vocab d_model"],
        teacher_logits: Float[Tensor, "batch teacher_time teacher_vocab"],
        *,
        alignment: Alignment,
        teacher_columns: Int[Tensor, " columns"] | None = None,
        mask: Bool[Tensor, "batch student_time"] | None = None,
        sample_mask: Bool[Tensor, " batch"] | None = None,
        normalizer: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
        batch_group: ProcessGroup | None = None,
        vocab_group: ProcessGroup | None = None,
        sequence_group: ProcessGroup | None = None,
    ) -> ProjectedKLTerms:
        """Compute the terms of the loss."""
        return linear_projected_kl_loss(
            hidden,
            weight,
            teacher_logits,
            alignment=alignment,
            projection=self.projection,
            teacher_columns=teacher_columns,
            mask=mask,
            sample_mask=sample_mask,
            normalizer=normalizer,
            batch_group=batch_group,
            vocab_group=vocab_group,
            sequence_group=sequence_group,
            **self.hyperparameters(),
        )


class _Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    teacher: Tensor
    chunks: Chunks
    divergence: Divergence
    per_chunk: Tensor
    with_gradient: bool


def _kernel(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss of this rank's samples, measurements, and both gradients."""
    hidden, teacher, divergence = inputs.hidden.detach(), inputs.teacher, inputs.divergence
    head = lifted(inputs.weight.detach())
    head_gradient = torch.zeros_like(head) if inputs.with_gradient else head.new_empty(0)
    scale = (inputs.per_chunk / divergence.temperature).to(head.dtype)

    def step(block: Block, h: Tensor, y: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        x = h @ head.T
        softmax = MeanSoftmax(block.student, x, divergence.temperature, divergence.vocab_name)
        sums, push = divergence(softmax.means(), block, y)

        def compute_gradient() -> Tensor:
            rows = softmax.gradient(push, scale)
            head_gradient.addmm_(rows.T, h)
            return all_reduce(rows @ head, divergence.vocab_name)

        return sums, compute_gradient

    sums, hidden_gradient = sum_over_chunks(
        step,
        inputs.chunks,
        hidden,
        teacher,
        # Larger blocks than in other losses, since each block reads the whole weight and its
        # gradient.
        width=max(teacher.shape[2] // 4, 1),
        sequence_name=divergence.sequence_name,
        sums=inputs.per_chunk.new_zeros(3),
        with_gradient=inputs.with_gradient,
    )
    loss, measured = sums[0] * inputs.per_chunk, sums[1:].clone()
    return loss, measured, hidden_gradient, head_gradient.to(inputs.weight.dtype)


def _fake(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    per_chunk = inputs.per_chunk
    hidden, weight = (
        x.new_empty(x.shape if inputs.with_gradient else 0) for x in (inputs.hidden, inputs.weight)
    )
    return torch.empty_like(per_chunk), per_chunk.new_empty(2), hidden, weight


_linear_projected_kl = Operator("linear_projected_kl", _Inputs, _kernel, _fake)
