"""Projected KL: a divergence of chunks, in the teacher's vocabulary."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._autograd import wants_gradient
from .._contract import contract
from .._groups import GradReduction, ProcessGroup, all_reduce, name_of
from .._module import LossModule
from .._numbers import accumulator, alike, lifted
from .._operators import Operator, with_gradients
from ._alignment import Alignment
from ._checks import check_groups
from ._chunk_blocks import Block, sum_over_chunks
from ._chunk_softmax import MeanSoftmax
from ._chunks import Chunks, check_times, chunks_of
from ._divergences import KLDivergence, TeacherMean
from ._projected_divergence import (
    Divergence,
    ProjectedKLTerms,
    divergence_setting,
    divergence_terms,
)
from ._vocab_projection import VocabProjection


@contract
def projected_kl_loss(
    student_logits: Float[Tensor, "batch student_time student_vocab"],
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
    r"""Teach a student the teacher's distribution of each chunk, in the teacher's vocabulary.

    With x and y the logits of student and teacher, T the temperature, c a chunk, t a position that
    predicts one of its tokens, M the projection and K the columns:

    $$P_{cs} = \frac{1}{n_c} \sum_{t \in c} \mathrm{softmax}(x_t / T)_s, \quad
    Q_{cj} = \sum_s P_{cs} M_{sj}, \quad
    q_{cj} = \frac{Q_{cj}}{\epsilon + \sum_{i \in K} Q_{ci}} + \epsilon, \quad j \in K$$

    $$\log\, p_{cj} = \begin{cases} a_{cj} & \text{log} \\
    a_{cj} - \log \sum_{i \in K} e^{a_{ci}} & \text{log\_normalized} \\
    \log\, b_{cj} & \text{prob} \end{cases}$$

    $$a_{cj} = \frac{1}{m_c} \sum_{t \in c} \log\, \mathrm{softmax}_K(y_t / T)_j, \qquad
    b_{cj} = \frac{1}{m_c} \sum_{t \in c} \mathrm{softmax}_K(y_t / T)_j$$

    $$\mathrm{loss} = T^2 \mathrm{kl}, \qquad \mathrm{kl} = \frac{1}{N} \sum_c
    \begin{cases} \sum_{j \in K} p_{cj} (\log\, p_{cj} - \log\, q_{cj}) & \text{forward} \\
    \sum_{j \in K} q_{cj} (\log\, q_{cj} - \log\, p_{cj}) & \text{reverse} \end{cases}$$

    Conventions:

    - Logit t predicts token t + 1: the loss shifts the ids of the alignment, which are for tokens.
    - A chunk counts if `pair_valid` is True, its sample is not masked, and it has positions in both
      models after the shift. Other positions are never read: infinities and NaN there affect
      neither value nor gradient, and their gradient is 0.
    - softmax_K is the softmax over the columns only.
    - $\epsilon$ keeps the divergence finite for columns to which nothing is projected. The
      teacher's mass on them adds a constant of about 23 nats times that mass, which has no
      gradient: see `uncovered_teacher_mass`. With eps = 0 such a column makes the forward
      divergence infinite, and equal models have a divergence of exactly 0.
    - 0 log 0 is 0.

    Probabilities and their projection are computed for one block of chunks at a time, together with
    the gradient. Half precision is converted to float32 within a block, regardless of autocast.

    Args:
        student_logits (Float[Tensor, "batch student_time student_vocab"]): unnormalized, a row for
            each position.
        teacher_logits (Float[Tensor, "batch teacher_time teacher_vocab"]): the same for the
            teacher. No gradient.
        alignment: the chunk of each token.
        projection: from the student's vocabulary, of the size of student_logits, to the teacher's.
            With vocab_group, the rows of this rank's tokens: `projection.rows(lo, hi)`.
        temperature: T, positive.
        divergence: "forward", KL(teacher || student), or "reverse", KL(student || teacher).
        columns_top_k: use as columns the k teacher tokens with the highest logit at any position of
            the chunks that count, over batch_group (all tokens if there are no more than k).
            Micro-batches add up exactly only with the same columns: pass teacher_columns, or
            neither of the two.
        teacher_columns (Int[Tensor, " columns"] | None): the columns, all distinct: a duplicate
            raises an error on the CPU, and makes the loss NaN on a device and compiled. None,
            without columns_top_k: the whole vocabulary.
        teacher_mean: "log": as in NeMo-RL; it does not sum to 1 if a chunk has several positions,
            so that equal models have a *negative* divergence. "log_normalized": the same,
            normalized again. "prob": the mean of probabilities, as for the student.
        mask (Bool[Tensor, "batch student_time"] | None): student tokens that count; the others
            affect no term and no gradient, even if they are NaN. None: all. A chunk counts if all
            its student tokens count.
        sample_mask (Bool[Tensor, " batch"] | None): samples that count. None: all.
        exact_only: whether to count only chunks of equal text (`pair_exact`).
        normalizer (Float[Tensor, ""] | Int[Tensor, ""] | float | None): N, not negative. None: the
            number of chunks that count, over batch_group. If you pass the count of
            [`count_valid_chunks`][termwise.lm.count_valid_chunks] over all micro-batches of a step,
            their losses add up to that of the whole batch.
        eps: epsilon, not negative; 1e-10 in NeMo-RL.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        vocab_group: process group whose ranks hold different student tokens, in any numbers, in the
            order of ranks, and all of the teacher's logits.
        sequence_group: process group whose ranks hold different positions of both models, in the
            order of ranks; a chunk may extend over several ranks. Each rank has the whole
            `pair_valid` and `pair_exact`.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. Gradient: combined over batch_group as
        `grad_reduction` says, it equals that of one process; over vocab_group and sequence_group
        each rank gets its part of the whole gradient, which is not to be averaged. If no chunk
        counts, loss and gradient are 0. Second derivatives raise NotImplementedError. Each rank
        sends, for each chunk, the columns once over vocab_group and sequence_group, and the
        teacher's vocabulary once over sequence_group; and 3 numbers for each position over
        vocab_group. Does not synchronize with the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: the size of alignment or projection does not match the logits, both
            columns_top_k and teacher_columns are passed, or a number, a chunk's id or a column is
            out of range. Or one group of several ranks is passed for two axes.

    References:
        NeMo-RL's projected KL (https://github.com/NVIDIA-NeMo/RL,
        nemo_rl/algorithms/loss/loss_functions.py, `_compute_p_kl`), which this is with
        `teacher_mean="log"`, `columns_top_k=8192` and the teacher's logits cut to the projection's
        width. It selects columns over all positions, padding included, and separately on each
        data-parallel rank, and counts top-1 agreement in masked samples too.

    Examples:
        >>> import torch
        >>> from termwise.lm import VocabProjection, align_spans, projected_kl_loss
        >>> student, teacher = [[(0, 0), (0, 2), (2, 3)]], [[(0, 0), (0, 1), (1, 2), (2, 3)]]
        >>> alignment = align_spans(student, teacher)
        >>> projection = VocabProjection.from_tokens(["ab", "c"], ["a", "b", "c"])
        >>> logits = torch.zeros(1, 3, 2), torch.zeros(1, 4, 3)
        >>> terms = projected_kl_loss(*logits, alignment=alignment, projection=projection)
        >>> terms.metrics()["num_chunks"], round(terms.loss.item(), 4)
        (2.0, 0.4256)
    """
    name = "projected_kl_loss"
    check_groups(name, batch_group, vocab_group, sequence_group)
    check_times(name, alignment, student_logits, teacher_logits)
    student_logits, teacher_logits = alike(student_logits, teacher_logits)
    setting = divergence_setting(
        name,
        teacher_logits,
        alignment,
        projection,
        student_vocab=student_logits.shape[2],
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
        student_logits,
        teacher_logits.detach(),
        setting.chunks,
        setting.divergence,
        setting.per_chunk,
        wants_gradient(student_logits),
    )
    loss, measured, _ = with_gradients(_projected_kl, inputs)
    loss = loss.to(lifted(student_logits.new_empty(())).dtype)
    return divergence_terms(setting, loss, measured, temperature, batch_group, grad_reduction)


@contract
def count_valid_chunks(
    alignment: Alignment,
    *,
    mask: Bool[Tensor, "batch student_time"] | None = None,
    sample_mask: Bool[Tensor, " batch"] | None = None,
    exact_only: bool = False,
    batch_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """Count the chunks that enter a loss, for the normalizer of a step of several micro-batches.

    Args:
        alignment: the chunk of each token.
        mask (Bool[Tensor, "batch student_time"] | None): student tokens that count; the others
            affect no term and no gradient, even if they are NaN. None: all. A chunk counts if all
            its student tokens count.
        sample_mask (Bool[Tensor, " batch"] | None): samples that count. None: all.
        exact_only: whether to count only chunks of equal text.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        sequence_group: process group whose ranks hold different positions of these samples, in the
            order of ranks.

    Returns:
        Float[Tensor, ""]: the count, the same on every rank, as a float that represents it exactly.
        Chunks that no position predicts (those with only token 0) do not count.

    Raises:
        ValueError: mask or sample_mask is of another size, or an id is out of range.

    Examples:
        >>> from termwise.lm import align_spans, count_valid_chunks
        >>> count_valid_chunks(align_spans([[(0, 1), (1, 2)]], [[(0, 1), (1, 2)]])).item()
        1.0
    """
    name = "count_valid_chunks"
    chunks = chunks_of(name, alignment, mask, sample_mask, exact_only, sequence_group)
    count = all_reduce(chunks.valid.sum(), name_of(batch_group))
    return count.to(accumulator(count))


class ProjectedKLLoss(LossModule):
    """[`projected_kl_loss`][termwise.lm.projected_kl_loss] as a module.

    The projection is neither a parameter nor a buffer: `module.to(device)` does not move it.

    Examples:
        >>> from termwise.lm import ProjectedKLLoss, VocabProjection
        >>> projection = VocabProjection.from_tokens(["ab", "c"], ["a", "b", "c"])
        >>> loss_fn = ProjectedKLLoss(projection, temperature=2.0, columns_top_k=8192)
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
        student_logits: Float[Tensor, "batch student_time student_vocab"],
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
        return projected_kl_loss(
            student_logits,
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
    student: Tensor
    teacher: Tensor
    chunks: Chunks
    divergence: Divergence
    per_chunk: Tensor
    with_gradient: bool


def _kernel(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of this rank's samples, measurements, and the gradient."""
    student, teacher, divergence = inputs.student.detach(), inputs.teacher, inputs.divergence
    scale = (inputs.per_chunk / divergence.temperature).to(lifted(student[:0]).dtype)

    def step(block: Block, x: Tensor, y: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        softmax = MeanSoftmax(block.student, x, divergence.temperature, divergence.vocab_name)
        sums, push = divergence(softmax.means(), block, y)
        return sums, lambda: softmax.gradient(push, scale)

    sums, gradient = sum_over_chunks(
        step,
        inputs.chunks,
        student,
        teacher,
        width=teacher.shape[2],
        sequence_name=divergence.sequence_name,
        sums=inputs.per_chunk.new_zeros(3),
        with_gradient=inputs.with_gradient,
    )
    return sums[0] * inputs.per_chunk, sums[1:].clone(), gradient


def _fake(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    student, per_chunk = inputs.student, inputs.per_chunk
    gradient = student.new_empty(student.shape if inputs.with_gradient else 0)
    return torch.empty_like(per_chunk), per_chunk.new_empty(2), gradient


_projected_kl = Operator("projected_kl", _Inputs, _kernel, _fake)
