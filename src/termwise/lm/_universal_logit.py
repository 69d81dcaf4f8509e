"""Universal logit distillation: an L1 distance between sorted probabilities."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import _groups
from .._autograd import wants_gradient
from .._contract import contract
from .._groups import GradReduction, ProcessGroup, all_reduce, first_column, name_of
from .._module import LossModule
from .._numbers import accumulator, alike, lifted
from .._operators import Operator, with_gradients
from .._terms import Terms, terms
from ._alignment import Alignment
from ._checks import check_groups, check_temperature
from ._chunk_blocks import Block, sum_over_chunks
from ._chunk_softmax import MeanSoftmax, all_columns, own_columns
from ._chunks import Chunks, check_times, chunks_of, normalized


@terms
class UniversalLogitTerms(Terms):
    """Terms of [`universal_logit_loss`][termwise.lm.universal_logit_loss]."""

    loss: Float[Tensor, ""]
    """L1 distance of sorted probabilities, from 0 to 2, summed over the chunks that count, divided
    by the normalizer."""
    num_chunks: Float[Tensor, ""]
    """Number of chunks that count, over batch_group; detached."""


@contract
def universal_logit_loss(
    student_logits: Float[Tensor, "batch student_time student_vocab"],
    teacher_logits: Float[Tensor, "batch teacher_time teacher_vocab"],
    *,
    alignment: Alignment,
    temperature: float = 1.0,
    mask: Bool[Tensor, "batch student_time"] | None = None,
    sample_mask: Bool[Tensor, " batch"] | None = None,
    exact_only: bool = False,
    normalizer: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
    student_vocab: int | None = None,
    batch_group: ProcessGroup | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> UniversalLogitTerms:
    r"""Match the sorted probabilities of student and teacher, regardless of their tokens.

    With x and y the logits of student and teacher, T the temperature, c a chunk and t a position
    that predicts one of its tokens:

    $$P_c = \frac{1}{n_c} \sum_{t \in c} \mathrm{softmax}(x_t / T), \qquad
    Q_c = \frac{1}{m_c} \sum_{t \in c} \mathrm{softmax}(y_t / T)$$

    $$\mathrm{loss} = \frac{1}{N} \sum_c \sum_i
    \left| (\mathrm{sorted}\, P_c)_i - (\mathrm{sorted}\, Q_c)_i \right|$$

    Both are sorted in descending order, and the shorter vocabulary is padded with zeros. No pairing
    of tokens is needed or used: a student that predicts another word with the same probability as
    its teacher has loss 0. So combine it with [`next_token_loss`][termwise.lm.next_token_loss].

    The shift, the chunks that count and the positions that are never read are as in
    [`projected_kl_loss`][termwise.lm.projected_kl_loss]. There is no factor T^2. The subgradient of
    |0| is 0, and the order of equal probabilities is unspecified.

    Args:
        student_logits (Float[Tensor, "batch student_time student_vocab"]): unnormalized, a row for
            each position.
        teacher_logits (Float[Tensor, "batch teacher_time teacher_vocab"]): the same for the
            teacher. No gradient.
        alignment: the chunk of each token. That of the paper, which pairs the i-th tokens of both
            answers, is [`align_in_order`][termwise.lm.align_in_order].
        temperature: T, positive.
        mask (Bool[Tensor, "batch student_time"] | None): student tokens that count; the others
            affect no term and no gradient, even if they are NaN. None: all. A chunk counts if all
            its student tokens count.
        sample_mask (Bool[Tensor, " batch"] | None): samples that count. None: all.
        exact_only: whether to count only chunks of equal text (`pair_exact`).
        normalizer (Float[Tensor, ""] | Int[Tensor, ""] | float | None): N, not negative. None:
            the number of chunks that count, over batch_group. See
            [`count_valid_chunks`][termwise.lm.count_valid_chunks] for micro-batches.
        student_vocab: number of columns of the student's logits over all ranks of vocab_group;
            required with it, to avoid a synchronization.
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
        sends, for each chunk, the student's vocabulary once over vocab_group and sequence_group,
        and the teacher's over sequence_group. Does not synchronize with the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: the size of the alignment does not match the logits, student_vocab is missing
            with vocab_group or does not fit, or a number is out of range. Or one group of several
            ranks is passed for two axes.

    References:
        Boizard et al., Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss
        for LLMs (TMLR 2025), https://arxiv.org/abs/2402.12030. Where paper and code differ this is
        the paper's: the authors' code (https://github.com/Nicolas-BZRD/llm-recipes) and TRL's GOLD
        trainer by default (https://github.com/huggingface/trl) compare the positions that *contain*
        the answer's tokens, not those that predict them, and average over the positions of a sample
        before they average over samples. Both add the cross-entropy, here
        [`cross_tokenizer_loss`][termwise.lm.cross_tokenizer_loss]. For a chunk of several tokens
        GOLD multiplies probabilities instead, so they sum to less than 1.

    Examples:
        >>> import torch
        >>> from termwise.lm import align_in_order, universal_logit_loss
        >>> alignment = align_in_order(*[torch.ones(1, 2, dtype=torch.bool)] * 2)
        >>> logits = torch.zeros(1, 2, 2), torch.zeros(1, 2, 4)
        >>> universal_logit_loss(*logits, alignment=alignment).metrics()
        {'loss': 1.0, 'num_chunks': 1.0}
    """
    name = "universal_logit_loss"
    check_groups(name, batch_group, vocab_group, sequence_group)
    check_times(name, alignment, student_logits, teacher_logits)
    student_logits, teacher_logits = alike(student_logits, teacher_logits)
    check_temperature(name, temperature)
    width = student_logits.shape[2]
    if vocab_group is not None and (student_vocab is None or student_vocab < width):
        raise ValueError(
            f"{name} needs student_vocab, of all ranks of vocab_group and so at least {width}, "
            f"got {student_vocab}"
        )
    if vocab_group is None and student_vocab not in (None, width):
        raise ValueError(
            f"{name} needs student_vocab {width} without a vocab_group, got {student_vocab}"
        )
    chunks = chunks_of(name, alignment, mask, sample_mask, exact_only, sequence_group)
    num_chunks, per_chunk = normalized(name, chunks, 1.0, normalizer, batch_group)
    inputs = _Inputs(
        student_logits,
        teacher_logits.detach(),
        chunks,
        first_column(student_logits, vocab_group),
        per_chunk,
        width if student_vocab is None else student_vocab,
        temperature,
        wants_gradient(student_logits),
        name_of(vocab_group),
        name_of(sequence_group),
    )
    loss, _ = with_gradients(_universal_logit, inputs)
    scale = _groups.gradient_scale(batch_group, grad_reduction)
    loss = _groups.terminal_sum(loss, batch_group, scale)
    dtype = lifted(student_logits.new_empty(())).dtype
    return UniversalLogitTerms(loss=loss.to(dtype), num_chunks=num_chunks.to(dtype))


@contract
def align_in_order(
    student_mask: Bool[Tensor, "batch student_time"],
    teacher_mask: Bool[Tensor, "batch teacher_time"],
) -> Alignment:
    """Pair the i-th token of the student with the i-th of the teacher, regardless of text.

    Args:
        student_mask (Bool[Tensor, "batch student_time"]): tokens to pair in order, such as those of
            an answer.
        teacher_mask (Bool[Tensor, "batch teacher_time"]): the same for the teacher.

    Returns:
        An alignment whose chunks have one token of each model, as many as the model with fewer
        tokens has. `pair_exact` is False, since texts are not compared. Does not synchronize with
        the device.

    Raises:
        ContractError: shapes or dtypes do not fit.

    References:
        Boizard et al. (2024), https://arxiv.org/abs/2402.12030, compare answers so.

    Examples:
        >>> import torch
        >>> from termwise.lm import align_in_order
        >>> student = torch.tensor([[False, True, True]])
        >>> teacher = torch.tensor([[True, False, True, True]])
        >>> align_in_order(student, teacher).teacher_chunk_id
        tensor([[ 0, -1,  1, -1]])
    """
    masks = student_mask, teacher_mask
    fewer = torch.minimum(*[mask.sum(1, keepdim=True) for mask in masks])
    ids = [(mask.cumsum(1) - 1).where(mask & (mask.cumsum(1) <= fewer), -1) for mask in masks]
    most = min(mask.shape[1] for mask in masks)
    valid = torch.arange(most, device=fewer.device) < fewer
    return Alignment(ids[0], ids[1], valid, torch.zeros_like(valid))


class UniversalLogitLoss(LossModule):
    """[`universal_logit_loss`][termwise.lm.universal_logit_loss] as a module.

    Examples:
        >>> import torch
        >>> from termwise.lm import UniversalLogitLoss, align_in_order
        >>> loss_fn = UniversalLogitLoss(temperature=2.0)
        >>> alignment = align_in_order(*[torch.ones(1, 4, dtype=torch.bool)] * 2)
        >>> logits = torch.randn(1, 4, 8)
        >>> loss_fn(logits, logits.flip(2), alignment=alignment).loss.item() < 1e-6
        True
    """

    temperature: float = 1.0
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
        student_vocab: int | None = None,
        batch_group: ProcessGroup | None = None,
        vocab_group: ProcessGroup | None = None,
        sequence_group: ProcessGroup | None = None,
    ) -> UniversalLogitTerms:
        """Compute the terms of the loss."""
        return universal_logit_loss(
            student_logits,
            teacher_logits,
            alignment=alignment,
            mask=mask,
            sample_mask=sample_mask,
            normalizer=normalizer,
            student_vocab=student_vocab,
            batch_group=batch_group,
            vocab_group=vocab_group,
            sequence_group=sequence_group,
            **self.hyperparameters(),
        )


class _Inputs(NamedTuple):
    student: Tensor
    teacher: Tensor
    chunks: Chunks
    first: Tensor | None
    """Index of this rank's first column among those of all ranks."""
    per_chunk: Tensor
    student_vocab: int
    temperature: float
    with_gradient: bool
    vocab_name: str | None
    sequence_name: str | None


def _kernel(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    """Return the loss of this rank's samples, and its gradient."""
    student, teacher = inputs.student.detach(), inputs.teacher
    vocab, temperature, vocab_name = inputs.student_vocab, inputs.temperature, inputs.vocab_name
    own = own_columns(inputs.first, student)
    scale = (inputs.per_chunk / temperature).to(lifted(student[:0]).dtype)

    def step(block: Block, x: Tensor, y: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        softmax = MeanSoftmax(block.student, x, temperature, vocab_name)
        ours = all_columns(softmax.means(), own, vocab, vocab_name)
        ours = all_reduce(ours, inputs.sequence_name)
        theirs = MeanSoftmax(block.teacher, y, temperature, None).means()
        distance, push = _sorted_distance(ours, all_reduce(theirs, inputs.sequence_name))
        if block.counted is not None:
            distance = distance.where(block.counted, 0)
            push = push.where(block.counted[:, None], 0)
        push = push if own is None else push[:, own]
        return distance.sum(dtype=accumulator(distance)), lambda: softmax.gradient(push, scale)

    distance, gradient = sum_over_chunks(
        step,
        inputs.chunks,
        student,
        teacher,
        width=max(vocab, teacher.shape[2]),
        sequence_name=inputs.sequence_name,
        sums=inputs.per_chunk.new_zeros(()),
        with_gradient=inputs.with_gradient,
    )
    return distance * inputs.per_chunk, gradient


def _fake(inputs: _Inputs) -> tuple[Tensor, Tensor]:
    student = inputs.student
    gradient = student.new_empty(student.shape if inputs.with_gradient else 0)
    return torch.empty_like(inputs.per_chunk), gradient


_universal_logit = Operator("universal_logit", _Inputs, _kernel, _fake)


def _sorted_distance(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's L1 distance between sorted entries, and its gradient for the student's."""
    most = min(ours.shape[1], theirs.shape[1])
    difference, place = ours.sort(dim=1, descending=True)
    theirs = theirs.sort(dim=1, descending=True).values
    difference[:, :most] -= theirs[:, :most]
    distance = difference.abs().sum(1) + theirs[:, most:].sum(1)
    return distance, torch.empty_like(ours).scatter_(1, place, difference.sign_())
