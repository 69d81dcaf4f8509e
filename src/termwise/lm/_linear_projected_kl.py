"""Projected KL from hidden states and the head's weight: the student's logits are never whole."""

import dataclasses
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._autograd import Function, apply, chain, link_to, wants_gradient
from .._contract import contract
from .._groups import GradReduction, ProcessGroup, all_reduce
from .._module import LossModule
from .._numbers import alike, lifted, looped
from ._alignment import Alignment
from ._chunk_blocks import blocks
from ._chunk_softmax import centred, exponentials, softmax_gradient
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
    r"""Compute the projected KL of a linear head, whose logits are made a block at a time.

    It is [`projected_kl_loss`][termwise.lm.projected_kl_loss] of

    $$x_t = W h_t$$

    with the gradients of h and W in place of that of x. Neither x nor its gradient is ever held
    for more than a block of chunks. Half precision is lifted to float32, the weight as a whole,
    whatever autocast says; the gradients are summed in float32 and rounded once.

    Args:
        hidden (Float[Tensor, "batch student_time d_model"]): what the head is applied to, a row for
            each position.
        weight (Float[Tensor, "student_vocab d_model"]): of the head, a row for each student token.
            It has no bias.
        teacher_logits (Float[Tensor, "batch teacher_time teacher_vocab"]): unnormalised. No
            gradient flows to it.
        alignment: as in projected_kl_loss, and so all that follow.
        projection: from the student's vocabulary, the rows of weight, to the teacher's.
        temperature: T, positive.
        divergence: "forward" or "reverse".
        columns_top_k: how many teacher tokens are compared. None: all.
        teacher_columns (Int[Tensor, " columns"] | None): which teacher tokens are compared.
        teacher_mean: "log", "log_normalized" or "prob".
        mask (Bool[Tensor, "batch student_time"] | None): student tokens that count; the others
            enter no term and no gradient, whatever they hold. None: all. A chunk counts if all its
            student tokens do.
        sample_mask (Bool[Tensor, " batch"] | None): samples that count. None: all.
        exact_only: count chunks of equal text alone.
        normalizer (Float[Tensor, ""] | Int[Tensor, ""] | float | None): N. None: the number of
            chunks that count, over batch_group.
        eps: epsilon, not negative.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None, here and below: no communication.
        vocab_group: ranks that hold other rows of weight; each has the same hidden states.
        sequence_group: ranks that hold other positions; each has the same weight.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. Gradient: over batch_group as
        `grad_reduction` says. Over vocab_group that of weight is of this rank's rows, and that of
        hidden, which is summed over the group, is whole on every rank. Over sequence_group that of
        hidden is of this rank's positions, and that of weight is their share, to be *summed* over
        the group by the trainer. Second derivatives are refused (`NotImplementedError`). Nothing
        waits for the device.

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
    check_times(name, alignment, hidden, teacher_logits)
    hidden, weight, teacher_logits = alike(hidden, weight, teacher_logits)
    setting = divergence_setting(
        name,
        teacher_logits,
        alignment,
        projection,
        student_vocab=weight.shape[0],
        temperature=temperature,
        columns_top_k=columns_top_k,
        teacher_columns=teacher_columns,
        mask=mask,
        sample_mask=sample_mask,
        exact_only=exact_only,
        normalizer=normalizer,
        eps=eps,
        batch_group=batch_group,
        vocab_group=vocab_group,
        sequence_group=sequence_group,
    )
    loss, measured, _, _ = cast(
        "tuple[Tensor, Tensor, Tensor, Tensor]",
        apply(
            _LinearProjectedKL,
            hidden,
            weight,
            link_to(hidden),
            link_to(weight),
            teacher_logits.detach(),
            *setting.tensors(),
            temperature,
            divergence == "reverse",
            teacher_mean,
            eps,
            wants_gradient(hidden) or wants_gradient(weight),
            *setting.group_names,
        ),
    )
    loss = loss.to(lifted(hidden.new_empty(())).dtype)
    return divergence_terms(setting, loss, measured, temperature, batch_group, grad_reduction)


class LinearProjectedKLLoss(LossModule):
    """[`linear_projected_kl_loss`][termwise.lm.linear_projected_kl_loss] as a module.

    The projection is no parameter and no buffer: `module.to(device)` leaves it where it is.

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


class _LinearProjectedKL(Function):
    """Outputs the loss of this rank's samples, its measurements, and its gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, hidden_link: Tensor, weight_link: Tensor, *others: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return cast(
            "tuple[Tensor, Tensor, Tensor, Tensor]", _linear_projected_kl(hidden, weight, *others)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.inputs = len(inputs)
        ctx.save_for_backward(*output[2:], *inputs[2:4])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *own, hidden_link, weight_link = ctx.saved_tensors
        links = hidden_link, weight_link
        chained = [
            chain(gradient, gradients[0], link) if needed else None
            for gradient, link, needed in zip(own, links, ctx.needs_input_grad[:2], strict=True)
        ]
        return *chained, *(None,) * (ctx.inputs - 2)


@torch.library.custom_op("termwise::linear_projected_kl", mutates_args=())
def _linear_projected_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher: Tensor,
    student_id: Tensor,
    teacher_id: Tensor,
    student_size: Tensor,
    teacher_size: Tensor,
    valid: Tensor,
    columns: Tensor | None,
    covered: Tensor,
    teacher_pointers: Tensor,
    teacher_rows: Tensor,
    teacher_weights: Tensor,
    student_pointers: Tensor,
    student_columns: Tensor,
    student_weights: Tensor,
    per_chunk: Tensor,
    temperature: float,
    reverse: bool,
    teacher_mean: str,
    eps: float,
    with_gradient: bool,
    vocab_name: str | None,
    sequence_name: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, teacher = hidden.detach(), weight.detach(), teacher.detach()
    chunks = Chunks(student_id, teacher_id, student_size, teacher_size, valid)
    wide = torch.promote_types(lifted(hidden[:0]).dtype, lifted(weight[:0]).dtype)
    divergence = Divergence(
        columns,
        covered,
        (teacher_pointers, teacher_rows, teacher_weights.to(wide)),
        (student_pointers, student_columns, student_weights.to(wide)),
        temperature,
        reverse,
        teacher_mean,
        eps,
        vocab_name,
        sequence_name,
    )
    flat, flat_teacher = hidden.flatten(0, 1), teacher.flatten(0, 1)
    head = weight.to(wide)
    hidden_gradient = torch.zeros_like(flat, dtype=wide) if with_gradient else head.new_empty(0)
    weight_gradient = torch.zeros_like(head) if with_gradient else head.new_empty(0)
    sums = per_chunk.new_zeros(3)
    scale = (per_chunk / temperature).to(wide)
    with torch.autocast(hidden.device.type, enabled=False):
        # Larger blocks than others: each of them reads the whole weight, and its gradient, again.
        for block in blocks(chunks, max(teacher.shape[2] // 4, 1), wide):
            h = block.student.of(flat).to(wide)
            x = centred(h @ head.T, vocab_name)
            powers, inverse = exponentials(x, temperature, vocab_name)
            means = block.student.sharing(inverse) @ powers
            parts, push = divergence(means, block, block.teacher.of(flat_teacher).to(wide))
            sums += parts
            if not with_gradient:
                continue
            back = block.student.sharing(scale).T @ push
            rows = softmax_gradient(powers, inverse, back, vocab_name)
            block.student.put(hidden_gradient, rows @ head)
            weight_gradient.addmm_(rows.T, h)
    if with_gradient:
        hidden_gradient = all_reduce(hidden_gradient, vocab_name).view(hidden.shape)
    return (
        sums[0] * per_chunk,
        sums[1:].clone(),
        hidden_gradient.to(hidden.dtype),
        weight_gradient.to(weight.dtype),
    )


@_linear_projected_kl.register_fake
def _(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    per_chunk, with_gradient = others[14], others[19]
    gradients = [x.new_empty(x.shape if with_gradient else 0) for x in (hidden, weight)]
    return torch.empty_like(per_chunk), per_chunk.new_empty(2), gradients[0], gradients[1]


_linear_projected_kl.register_vmap(looped(_linear_projected_kl))
