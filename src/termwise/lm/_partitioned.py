"""Partitioned loss: a divergence on the tokens that both vocabularies have, and L1 on the rest."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import _groups
from .._autograd import wants_gradient
from .._contract import contract
from .._groups import GradReduction, ProcessGroup, first_column, name_of
from .._module import LossModule
from .._numbers import accumulator, alike, lifted
from .._operators import Operator, with_gradients
from .._terms import Terms, terms
from ._alignment import Alignment
from ._checks import check_groups
from ._chunk_blocks import Block, ChunkRows, sum_over_chunks
from ._chunk_softmax import all_columns, centred, exponentials, own_columns
from ._chunks import Chunks, check_times, chunks_of, normalized, padding
from ._divergences import KLDivergence
from ._vocab_partition import VocabPartition


@terms
class PartitionedTerms(Terms):
    """Terms of [`partitioned_loss`][termwise.lm.partitioned_loss]."""

    loss: Float[Tensor, ""]
    """temperature^2 * (common_weight * kl_common + tail_weight * l1_tail)."""
    kl_common: Float[Tensor, ""]
    """Divergence on the paired tokens of a chunk in nats, without normalization among them (so it
    may be negative), summed over the chunks that count, over the normalizer; detached."""
    l1_tail: Float[Tensor, ""]
    """L1 distance of a chunk's sorted probabilities of the other tokens, from 0 to 2, summed over
    the chunks that count, over the normalizer; detached."""
    num_chunks: Float[Tensor, ""]
    """Number of chunks that count, over batch_group; detached."""
    top1_agreement: Float[Tensor, ""]
    """Share of those chunks where both sides' likeliest paired token is the same pair; detached."""
    common_teacher_mass: Float[Tensor, ""]
    """The sum of a chunk's e^b over the paired tokens: what of the teacher kl_common sees; mean
    over those chunks; detached."""


@contract
def partitioned_loss(
    student_logits: Float[Tensor, "batch student_time student_vocab"],
    teacher_logits: Float[Tensor, "batch teacher_time teacher_vocab"],
    *,
    alignment: Alignment,
    partition: VocabPartition,
    tail_top_k: int = 8192,
    common_weight: float = 1.0,
    tail_weight: float = 1.0,
    temperature: float = 1.0,
    divergence: KLDivergence = "forward",
    mask: Bool[Tensor, "batch student_time"] | None = None,
    sample_mask: Bool[Tensor, " batch"] | None = None,
    exact_only: bool = False,
    normalizer: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
    batch_group: ProcessGroup | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> PartitionedTerms:
    r"""Match shared tokens one by one, and the other tokens by their sorted probabilities.

    With x and y the logits of student and teacher, T the temperature, c a chunk, t a position that
    predicts one of its tokens, and averages over the chunk's positions of log-probabilities over
    the *whole* vocabulary of each model,

    $$a_c = \frac{1}{n_c} \sum_{t \in c} \log\, \mathrm{softmax}(x_t / T), \qquad
    b_c = \frac{1}{m_c} \sum_{t \in c} \log\, \mathrm{softmax}(y_t / T)$$

    $$\mathrm{loss} = T^2 (w_1 \, \mathrm{kl\_common} + w_2 \, \mathrm{l1\_tail})$$

    $$\mathrm{kl\_common} = \frac{1}{N} \sum_c \sum_{(s, t)}
    \begin{cases} e^{b_{ct}} (b_{ct} - a_{cs}) & \text{forward} \\
    e^{a_{cs}} (a_{cs} - b_{ct}) & \text{reverse} \end{cases}$$

    $$\mathrm{l1\_tail} = \frac{1}{N} \sum_c \sum_{i=1}^{k}
    \left| (\mathrm{sorted}\, e^{a_c})_i - (\mathrm{sorted}\, e^{b_c})_i \right|$$

    (s, t) are the paired tokens. The tails are the other tokens, sorted in descending order for
    each model; k is the minimum of tail_top_k and the sizes of both tails.

    The shift, the chunks that count and the positions that are never read are as in
    [`projected_kl_loss`][termwise.lm.projected_kl_loss]. Means of log-probabilities are not
    normalized again. So equal models have a loss of 0, and kl_common alone may be negative. 0 log 0
    is 0. The subgradient of |0| is 0; the order of equal probabilities is unspecified. Only the
    loss is in the graph: its gradient is computed in the same pass as its value, and one for each
    term would be as large as the logits. Use the arguments to weight the terms.

    Args:
        student_logits (Float[Tensor, "batch student_time student_vocab"]): unnormalized, a row for
            each position.
        teacher_logits (Float[Tensor, "batch teacher_time teacher_vocab"]): the same for the
            teacher. No gradient.
        alignment: the chunk of each token.
        partition: the paired tokens and the rest, for vocabularies of the size of the logits.
        tail_top_k: maximum number of tokens of each tail to compare, at least 1; 8192 in NeMo-RL.
        common_weight: w_1; 1 in NeMo-RL.
        tail_weight: w_2; 1 in NeMo-RL.
        temperature: T, positive.
        divergence: "forward", KL(teacher || student), or "reverse".
        mask (Bool[Tensor, "batch student_time"] | None): student tokens that count; the others
            affect no term and no gradient, even if they are NaN. None: all. A chunk counts if all
            its student tokens count.
        sample_mask (Bool[Tensor, " batch"] | None): samples that count. None: all.
        exact_only: whether to count only chunks of equal text (`pair_exact`).
        normalizer (Float[Tensor, ""] | Int[Tensor, ""] | float | None): N, not negative. None:
            the number of chunks that count, over batch_group. See
            [`count_valid_chunks`][termwise.lm.count_valid_chunks] for micro-batches.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        vocab_group: process group whose ranks hold different student tokens, in any numbers, in the
            order of ranks. Each rank has all of the teacher's logits and the partition of the whole
            vocabularies.
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
        sends, for each chunk, the student's vocabulary once over vocab_group and sequence_group,
        and the teacher's over sequence_group. Does not synchronize with the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: the size of alignment or partition does not match the logits, or a number is out
            of range. Or one group of several ranks is passed for two axes.

    References:
        NeMo-RL's gold loss (https://github.com/NVIDIA-NeMo/RL,
        nemo_rl/algorithms/loss/loss_functions.py, `_compute_gold`), which this is. Its top-1
        agreement is on the paired tokens too.

    Examples:
        >>> import torch
        >>> from termwise.lm import VocabProjection, align_spans, partitioned_loss, vocab_partition
        >>> alignment = align_spans([[(0, 0), (0, 1)]], [[(0, 0), (0, 1)]])
        >>> pairs = {(0, 0): 1.0, (1, 1): 0.5, (1, 2): 0.5}
        >>> projection = VocabProjection.from_pairs(pairs, student_vocab=2, teacher_vocab=3)
        >>> partition = vocab_partition(projection, rule="strict")
        >>> logits = torch.zeros(1, 2, 2), torch.zeros(1, 2, 3)
        >>> terms = partitioned_loss(*logits, alignment=alignment, partition=partition)
        >>> round(terms.kl_common.item(), 4), round(terms.l1_tail.item(), 4)
        (-0.1352, 0.1667)
    """
    name = "partitioned_loss"
    check_groups(name, batch_group, vocab_group, sequence_group)
    check_times(name, alignment, student_logits, teacher_logits)
    student_logits, teacher_logits = alike(student_logits, teacher_logits)
    _check_partition(name, partition, student_logits, teacher_logits, vocab_group)
    if tail_top_k < 1:
        raise ValueError(f"{name} needs tail_top_k >= 1, got {tail_top_k}")
    chunks = chunks_of(name, alignment, mask, sample_mask, exact_only, sequence_group)
    num_chunks, per_chunk = normalized(name, chunks, temperature, normalizer, batch_group)
    p = partition
    distance = _Distance(
        p.common_student,
        p.common_teacher,
        p.rest_student,
        p.rest_teacher,
        tail_top_k,
        common_weight,
        tail_weight,
        divergence == "reverse",
    )
    inputs = _Inputs(
        student_logits,
        teacher_logits.detach(),
        chunks,
        distance,
        first_column(student_logits, vocab_group),
        per_chunk,
        temperature,
        wants_gradient(student_logits),
        name_of(vocab_group),
        name_of(sequence_group),
    )
    loss, measured, _ = with_gradients(_partitioned, inputs)
    if batch_group is not None:
        scale = _groups.gradient_scale(batch_group, grad_reduction)
        sums = _groups.terminal_sum(torch.cat([loss[None], measured]), batch_group, scale)
        loss, measured = sums[0], sums[1:].detach()
    dtype = lifted(student_logits.new_empty(())).dtype
    parts = (measured[:2] * (per_chunk / temperature**2)).to(dtype)
    shares = (measured[2:] / num_chunks.where(num_chunks > 0, 1)).to(dtype)
    return PartitionedTerms(
        loss=loss.to(dtype),
        kl_common=parts[0],
        l1_tail=parts[1],
        num_chunks=num_chunks.to(dtype),
        top1_agreement=shares[0],
        common_teacher_mass=shares[1],
    )


class PartitionedLoss(LossModule):
    """[`partitioned_loss`][termwise.lm.partitioned_loss] as a module.

    The partition is neither a parameter nor a buffer: `module.to(device)` does not move it.

    Examples:
        >>> from termwise.lm import PartitionedLoss, VocabProjection, vocab_partition
        >>> projection = VocabProjection.from_tokens(["ab", "c"], ["a", "b", "c"])
        >>> loss_fn = PartitionedLoss(vocab_partition(projection, rule="relaxed"), temperature=2.0)
    """

    partition: VocabPartition = dataclasses.field(kw_only=False)
    tail_top_k: int = 8192
    common_weight: float = 1.0
    tail_weight: float = 1.0
    temperature: float = 1.0
    divergence: KLDivergence = "forward"
    exact_only: bool = False
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        student_logits: Float[Tensor, "batch student_time student_vocab"],
        teacher_logits: Float[Tensor, "batch teacher_time teacher_vocab"],
        *,
        alignment: Alignment,
        mask: Bool[Tensor, "batch student_time"] | None = None,
        sample_mask: Bool[Tensor, " batch"] | None = None,
        normalizer: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
        batch_group: ProcessGroup | None = None,
        vocab_group: ProcessGroup | None = None,
        sequence_group: ProcessGroup | None = None,
    ) -> PartitionedTerms:
        """Compute the terms of the loss."""
        return partitioned_loss(
            student_logits,
            teacher_logits,
            alignment=alignment,
            partition=self.partition,
            mask=mask,
            sample_mask=sample_mask,
            normalizer=normalizer,
            batch_group=batch_group,
            vocab_group=vocab_group,
            sequence_group=sequence_group,
            **self.hyperparameters(),
        )


def _check_partition(
    name: str,
    partition: VocabPartition,
    student: Tensor,
    teacher: Tensor,
    vocab_group: ProcessGroup | None,
) -> None:
    students = len(partition.common_student) + len(partition.rest_student)
    teachers = len(partition.common_teacher) + len(partition.rest_teacher)
    # The number of tokens of other ranks of vocab_group is unknown here without synchronizing.
    fits = student.shape[2] == students if vocab_group is None else student.shape[2] <= students
    if not fits or teacher.shape[2] != teachers:
        raise ValueError(
            f"{name} needs a partition of {student.shape[2]} student and {teacher.shape[2]} "
            f"teacher tokens, got one of {students} and {teachers}"
            + padding(
                student_logits=(student.shape[2], students),
                teacher_logits=(teacher.shape[2], teachers),
            )
        )


class _Distance(NamedTuple):
    """The two parts of the loss of a block of chunks, and the gradient of the student's means."""

    common_student: Tensor
    common_teacher: Tensor
    rest_student: Tensor
    rest_teacher: Tensor
    tail_top_k: int
    common_weight: float
    tail_weight: float
    reverse: bool

    @property
    def student_vocab(self) -> int:
        """Number of tokens over all ranks."""
        return len(self.common_student) + len(self.rest_student)

    def __call__(self, a: Tensor, b: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """Return sums of divergence, L1, agreement and teacher's mass; and the gradient in a."""
        push = torch.zeros_like(a)
        kl, agree, mass = self._common(a[:, self.common_student], b[:, self.common_teacher], push)
        l1 = self._tail(a[:, self.rest_student], b[:, self.rest_teacher], push)
        measured = [kl, l1, agree, mass]
        if block.counted is not None:
            measured = [x.where(block.counted, 0) for x in measured]
            push = push.where(block.counted[:, None], 0)
        return torch.stack([x.sum(dtype=accumulator(a)) for x in measured]), push

    def loss(self, sums: Tensor) -> Tensor:
        """Weight the two parts. One of weight 0 is left out, since it may be infinite."""
        weighted = zip((self.common_weight, self.tail_weight), sums[:2], strict=True)
        return sum((weight * x for weight, x in weighted if weight != 0), sums.new_zeros(()))

    def _common(self, a: Tensor, b: Tensor, push: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = b.exp()
        # If the probability is 0 so is the product, for any logarithm.
        if self.reverse:
            q = a.exp()
            each = (q * (a - b)).where(q != 0, 0)
            gradient = (q * (a - b + 1)).where(q != 0, 0)
        else:
            each = (p * (b - a)).where(p != 0, 0)
            gradient = -p
        if self.common_weight != 0:
            push.index_copy_(1, self.common_student, gradient.mul_(self.common_weight))
        agree = a.new_zeros(len(a))
        if a.shape[1]:
            agree = (a.argmax(1) == b.argmax(1)).to(a.dtype)
        return each.sum(1), agree, p.sum(1)

    def _tail(self, a: Tensor, b: Tensor, push: Tensor) -> Tensor:
        p, q = a.exp_(), b.exp_()
        most = min(p.shape[1], q.shape[1], self.tail_top_k)
        ours, place = p.topk(most, dim=1)
        difference = ours - q.topk(most, dim=1).values
        if self.tail_weight != 0:
            gradient = difference.sign().mul_(ours).mul_(self.tail_weight)
            push.scatter_(1, self.rest_student[place], gradient)
        return difference.abs_().sum(1)


class _Inputs(NamedTuple):
    student: Tensor
    teacher: Tensor
    chunks: Chunks
    distance: _Distance
    first: Tensor | None
    """Index of this rank's first column among those of all ranks."""
    per_chunk: Tensor
    temperature: float
    with_gradient: bool
    vocab_name: str | None
    sequence_name: str | None


def _kernel(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of this rank's samples, measurements, and the gradient."""
    student, teacher, distance = inputs.student.detach(), inputs.teacher, inputs.distance
    own = own_columns(inputs.first, student)
    scale = (inputs.per_chunk / inputs.temperature).to(lifted(student[:0]).dtype)

    def log_means(
        x: Tensor, rows: ChunkRows, vocab_name: str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Average log-probabilities over chunks: mean centered logits minus their mean log-sums."""
        x = centred(x, vocab_name)
        means = rows.mean(x, inputs.sequence_name).div_(inputs.temperature)
        powers, inverse = exponentials(x, inputs.temperature, vocab_name)
        means.add_(rows.mean(inverse.log()[:, None], inputs.sequence_name))
        return means, powers, inverse

    def step(block: Block, x: Tensor, y: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        a, powers, inverse = log_means(x, block.student, inputs.vocab_name)
        a = all_columns(a, own, distance.student_vocab, inputs.vocab_name)
        b, _, _ = log_means(y, block.teacher, None)
        sums, push = distance(a, b, block)

        def compute_gradient() -> Tensor:
            # Backward of log-softmax: the gradient minus the softmax times its sum.
            factor = block.student.share() * scale
            together = push.sum(1)[block.student.chunk] * factor * inverse
            pushed = block.student.spread(push if own is None else push[:, own], factor)
            return pushed.addcmul_(powers, together[:, None], value=-1)

        return sums, compute_gradient

    sums, gradient = sum_over_chunks(
        step,
        inputs.chunks,
        student,
        teacher,
        # Smaller blocks than in other losses, since more steps read each block.
        width=2 * teacher.shape[2],
        sequence_name=inputs.sequence_name,
        sums=inputs.per_chunk.new_zeros(4),
        with_gradient=inputs.with_gradient,
    )
    return distance.loss(sums) * inputs.per_chunk, sums, gradient


def _fake(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    student, per_chunk = inputs.student, inputs.per_chunk
    gradient = student.new_empty(student.shape if inputs.with_gradient else 0)
    return torch.empty_like(per_chunk), per_chunk.new_empty(4), gradient


_partitioned = Operator("partitioned", _Inputs, _kernel, _fake)
