"""Projected KL: a divergence of chunks, in the teacher's vocabulary."""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import _groups
from .._autograd import Function, apply
from .._contract import contract
from .._groups import GradReduction, ProcessGroup, largest, total
from .._module import LossModule
from .._numbers import accumulator, alike, lifted, looped, may_look_at
from .._terms import Terms, terms
from ._alignment import Alignment
from ._chunk_streams import (
    Block,
    Chunks,
    blocks,
    centred,
    chain,
    check_times,
    chunks_of,
    exponentials,
    gradient_of,
    highest_logits,
    link_to,
    normalized,
    padding,
    softmax_gradient,
    wants_gradient,
)
from ._projection import VocabProjection
from ._rows import row_products

KLDivergence: TypeAlias = Literal["forward", "reverse"]
TeacherMean: TypeAlias = Literal["log", "log_normalized", "prob"]


@terms
class ProjectedKLTerms(Terms):
    """Terms of [`projected_kl_loss`][termwise.lm.projected_kl_loss]."""

    loss: Float[Tensor, ""]
    """temperature^2 * kl."""
    kl: Float[Tensor, ""]
    """Divergence of a chunk in nats, summed over the chunks that count, over the normalizer."""
    num_chunks: Float[Tensor, ""]
    """How many chunks count, over batch_group; detached."""
    top1_agreement: Float[Tensor, ""]
    """Share of those chunks where the two sides' likeliest column is the same; detached."""
    uncovered_teacher_mass: Float[Tensor, ""]
    """Probability that the teacher's chunk has, over its whole vocabulary, on tokens that are not
    among the columns or that no student token is projected to; mean over those chunks; detached."""


@contract
def projected_kl_loss(
    student_logits: Float[Tensor, "batch student_time student_vocab"],
    teacher_logits: Float[Tensor, "batch teacher_time teacher_vocab"],
    *,
    alignment: Alignment,
    projection: VocabProjection,
    temperature: float = 1.0,
    divergence: KLDivergence = "forward",
    top_k: int | None = None,
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

    $$\log\, p_{cj} = \begin{cases}
    \frac{1}{m_c} \sum_{t \in c} \log\, \mathrm{softmax}_K(y_t / T)_j & \text{log} \\
    \text{the same} - \log \sum_{i \in K} \exp(\text{the same}_i) & \text{log_normalized} \\
    \log \frac{1}{m_c} \sum_{t \in c} \mathrm{softmax}_K(y_t / T)_j & \text{prob}
    \end{cases}$$

    $$\mathrm{loss} = T^2 \mathrm{kl}, \qquad \mathrm{kl} = \frac{1}{N} \sum_c
    \begin{cases} \sum_{j \in K} p_{cj} (\log\, p_{cj} - \log\, q_{cj}) & \text{forward} \\
    \sum_{j \in K} q_{cj} (\log\, q_{cj} - \log\, p_{cj}) & \text{reverse} \end{cases}$$

    Conventions:

    - Logit t predicts token t + 1: the ids of the alignment, which are of tokens, are shifted here.
    - A chunk counts where `pair_valid` says so, its sample is not masked, and it holds a position
      on both sides after the shift. No other position is ever read; what it holds, infinities and
      NaN included, reaches neither value nor gradient, and its gradient is 0.
    - softmax_K is the softmax among the columns alone.
    - $\epsilon$ keeps a column to which nothing is projected finite. Its share of the teacher's
      mass adds a constant, of about 23 nats for each 1, which trains nothing: look at
      `uncovered_teacher_mass`. With eps = 0 such a column makes the forward divergence infinite,
      and equal models have a divergence of exactly 0.
    - 0 log 0 is 0.

    Neither the probabilities nor their projection are ever held for all positions: blocks of
    chunks are read, and their gradient written, one after another. Half precision is lifted to
    float32 within a block, whatever autocast says.

    Args:
        student_logits (Float[Tensor, "batch student_time student_vocab"]): unnormalised, a row for
            each position.
        teacher_logits (Float[Tensor, "batch teacher_time teacher_vocab"]): the same of the teacher.
            No gradient flows to it.
        alignment: which tokens make up which chunk.
        projection: from the student's vocabulary, as wide as student_logits, to the teacher's.
            With vocab_group, the rows of this rank's tokens: `projection.rows(lo, hi)`.
        temperature: T, positive.
        divergence: "forward", KL(teacher || student), or "reverse", KL(student || teacher).
        top_k: take as columns the k teacher tokens with the highest logit at any position of the
            chunks that count, over batch_group. All of them where there are no more. Micro-batches
            that are to add up exactly need the same columns: give teacher_columns or neither.
        teacher_columns (Int[Tensor, " columns"] | None): the columns, each once: one that is there
            twice is refused on the CPU, and makes the loss NaN on a device and compiled. None,
            without top_k: the whole vocabulary.
        teacher_mean: "log": NeMo-RL's, which does not sum to 1 where a chunk has several
            positions, so that equal models have a *negative* divergence. "log_normalized":
            the same, normalised again. "prob": the mean of probabilities, as the student's.
        mask (Bool[Tensor, "batch student_time"] | None): student tokens that count, those of a
            completion for instance. A chunk counts if all its student tokens do. None: all.
        sample_mask (Bool[Tensor, " batch"] | None): samples that count. None: all.
        exact_only: count chunks of equal text alone (`pair_exact`).
        normalizer (Float[Tensor, ""] | Int[Tensor, ""] | float | None): N, not negative. None:
            the number of chunks that count, over batch_group. Give one that
            [`count_valid_chunks`][termwise.lm.count_valid_chunks] counted in all micro-batches of a
            step, and their losses add up to that of the whole.
        eps: epsilon, not negative; 1e-10 in NeMo-RL.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None, here and below: no communication.
        vocab_group: ranks that hold other student tokens, in any numbers, in the order of ranks;
            each has all of the teacher's logits.
        sequence_group: ranks that hold other positions, of both models, in the order of ranks; a
            chunk may straddle them. Each has the whole `pair_valid` and `pair_exact`.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. Gradient: combined over batch_group as
        `grad_reduction` says it is that of one process; over vocab_group and sequence_group each
        rank's is its part of the whole gradient, and nothing is to be averaged. Where no chunk
        counts, loss and gradient are 0. Second derivatives are refused (`NotImplementedError`).
        Sent for each chunk: over vocab_group and sequence_group the columns once, and over
        sequence_group the teacher's vocabulary once; for each position over vocab_group 3 numbers.
        Nothing waits for the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: alignment or projection are of another size than the logits, both top_k and
            teacher_columns are given, or a number, a chunk's id or a column is out of its range.

    References:
        NeMo-RL's projected KL (https://github.com/NVIDIA-NeMo/RL,
        nemo_rl/algorithms/loss/loss_functions.py, `_compute_p_kl`), which this is with
        `teacher_mean="log"`, `top_k=8192` and the teacher's logits cut to the projection's
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
    check_times(name, alignment, student_logits, teacher_logits)
    student_logits, teacher_logits = alike(student_logits, teacher_logits)
    setting = divergence_setting(
        name,
        teacher_logits,
        alignment,
        projection,
        student_vocab=student_logits.shape[2],
        temperature=temperature,
        top_k=top_k,
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
    loss, measured, _ = cast(
        "tuple[Tensor, Tensor, Tensor]",
        apply(
            _ProjectedKL,
            student_logits,
            link_to(student_logits),
            teacher_logits.detach(),
            *setting.tensors(),
            temperature,
            divergence == "reverse",
            teacher_mean,
            eps,
            wants_gradient(student_logits),
            *setting.group_names,
        ),
    )
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
        alignment: which tokens make up which chunk.
        mask (Bool[Tensor, "batch student_time"] | None): student tokens that count, those of a
            completion for instance. A chunk counts if all its student tokens do. None: all.
        sample_mask (Bool[Tensor, " batch"] | None): samples that count. None: all.
        exact_only: count chunks of equal text alone.
        batch_group: ranks that hold other samples. None: this rank alone, nothing is sent.
        sequence_group: ranks that hold other positions of these samples, in the order of ranks.

    Returns:
        Float[Tensor, ""]: the count, the same on every rank, as a float that holds it exactly.
        Chunks that no position predicts (those of token 0 alone) do not count.

    Raises:
        ValueError: mask or sample_mask is of another size, or an id is out of range.

    Examples:
        >>> from termwise.lm import align_spans, count_valid_chunks
        >>> count_valid_chunks(align_spans([[(0, 1), (1, 2)]], [[(0, 1), (1, 2)]])).item()
        1.0
    """
    name = "count_valid_chunks"
    chunks = chunks_of(name, alignment, mask, sample_mask, exact_only, sequence_group)
    batch_name = None if batch_group is None else batch_group.group_name
    return total(chunks.valid.sum(), batch_name).to(accumulator(alignment.student_chunk_id))


class ProjectedKLLoss(LossModule):
    """[`projected_kl_loss`][termwise.lm.projected_kl_loss] as a module.

    The projection is no parameter and no buffer: `module.to(device)` leaves it where it is.

    Examples:
        >>> from termwise.lm import ProjectedKLLoss, VocabProjection
        >>> projection = VocabProjection.from_tokens(["ab", "c"], ["a", "b", "c"])
        >>> loss_fn = ProjectedKLLoss(projection, temperature=2.0, top_k=8192)
    """

    projection: VocabProjection = dataclasses.field(kw_only=False)
    temperature: float = 1.0
    divergence: KLDivergence = "forward"
    top_k: int | None = None
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


class Setting(NamedTuple):
    """What a projected divergence is computed from, besides logits and numbers."""

    chunks: Chunks
    columns: Tensor | None
    """Teacher tokens that are compared. None: all."""
    covered: Tensor
    """[teacher_vocab], whether the token is compared and something is projected to it."""
    projection: VocabProjection
    per_chunk: Tensor
    """temperature^2 / normalizer."""
    num_chunks: Tensor
    """Chunks that count, over batch_group."""
    group_names: tuple[str | None, str | None]
    """Of vocab_group and sequence_group."""

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return them in the order in which the operators take them."""
        p = self.projection
        by_column = p.teacher_pointers, p.teacher_rows, p.teacher_weights
        by_row = p.student_pointers, p.student_columns, p.student_weights
        return *self.chunks, self.columns, self.covered, *by_column, *by_row, self.per_chunk


def divergence_setting(
    name: str,
    teacher_logits: Tensor,
    alignment: Alignment,
    projection: VocabProjection,
    *,
    student_vocab: int,
    temperature: float,
    top_k: int | None,
    teacher_columns: Tensor | None,
    mask: Tensor | None,
    sample_mask: Tensor | None,
    exact_only: bool,
    normalizer: Tensor | float | None,
    eps: float,
    batch_group: ProcessGroup | None,
    vocab_group: ProcessGroup | None,
    sequence_group: ProcessGroup | None,
) -> Setting:
    """Refuse what does not fit, and find chunks, columns and the normalizer."""
    if (projection.student_vocab, projection.teacher_vocab) != (
        student_vocab,
        teacher_logits.shape[2],
    ):
        raise ValueError(
            f"{name} needs a projection from {student_vocab} student tokens to "
            f"{teacher_logits.shape[2]} teacher tokens, got one from {projection.student_vocab} to "
            f"{projection.teacher_vocab}"
            + padding(
                student_logits=(student_vocab, projection.student_vocab),
                teacher_logits=(teacher_logits.shape[2], projection.teacher_vocab),
            )
        )
    if not eps >= 0:
        raise ValueError(f"{name} needs eps >= 0, got {eps}")
    if top_k is not None and teacher_columns is not None:
        raise ValueError(f"{name} needs top_k or teacher_columns, got both")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{name} needs top_k >= 1, got {top_k}")
    chunks = chunks_of(name, alignment, mask, sample_mask, exact_only, sequence_group)
    count, per_chunk = normalized(name, chunks, temperature, normalizer, batch_group)
    names = [
        None if group is None else group.group_name
        for group in (batch_group, vocab_group, sequence_group)
    ]

    columns = chosen = None
    if teacher_columns is not None:
        columns = teacher_columns.long()
        chosen = _times_chosen(name, columns, teacher_logits.shape[2])
        # Where nobody may look at the columns, the loss of one that is given twice is NaN.
        per_chunk = per_chunk.where(~(chosen > 1).any(), torch.nan)
    if top_k is not None and top_k < teacher_logits.shape[2]:
        highest = highest_logits(teacher_logits, chunks.teacher_id, chunks.valid)
        highest = largest(largest(highest, names[0]), names[2])
        columns = highest.topk(top_k, sorted=False).indices.sort().values
    weights = projection.student_weights.new_zeros(projection.teacher_vocab)
    weights = weights.index_add(0, projection.student_columns, projection.student_weights)
    covered = total(weights, names[1]) > 0
    if chosen is not None:
        covered = covered & (chosen > 0)
    elif columns is not None:
        covered = covered & torch.zeros_like(covered).index_fill(0, columns, True)
    return Setting(chunks, columns, covered, projection, per_chunk, count, (names[1], names[2]))


def _times_chosen(name: str, columns: Tensor, vocab: int) -> Tensor:
    """Count how often each token is among the columns; refuse wrong ones where looking is free."""
    if not columns.numel():
        raise ValueError(f"{name} needs 1 teacher column or more, got none")
    counts = columns.new_zeros(vocab)
    try:
        counts = counts.index_add(0, columns, torch.ones_like(columns))
    except (IndexError, RuntimeError) as error:
        raise ValueError(
            f"{name} needs teacher_columns from 0 to {vocab - 1}, got {int(columns.min())} to "
            f"{int(columns.max())}"
        ) from error
    if may_look_at(columns) and int(counts.max()) > 1:
        twice = cast("list[int]", (counts > 1).nonzero()[:3, 0].tolist())
        raise ValueError(f"{name} needs every teacher column once, got some twice: {twice}")
    return counts


def divergence_terms(
    setting: Setting,
    loss: Tensor,
    measured: Tensor,
    temperature: float,
    batch_group: ProcessGroup | None,
    grad_reduction: GradReduction,
) -> ProjectedKLTerms:
    """Sum over the ranks that hold other samples."""
    if batch_group is not None:
        scale = _groups.gradient_scale(batch_group, grad_reduction)
        sums = torch.cat([loss[None].to(measured.dtype), measured])
        sums = _groups.terminal_sum(sums, batch_group, scale)
        loss, measured = sums[0].to(loss.dtype), sums[1:].detach()
    shares = (measured / setting.num_chunks.where(setting.num_chunks > 0, 1)).to(loss.dtype)
    return ProjectedKLTerms(
        loss=loss,
        kl=loss / temperature**2,
        num_chunks=setting.num_chunks.to(loss.dtype),
        top1_agreement=shares[0],
        uncovered_teacher_mass=shares[1],
    )


class _ProjectedKL(Function):
    """Outputs the loss of this rank's samples, its measurements, and its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(student: Tensor, link: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        return cast("tuple[Tensor, Tensor, Tensor]", _projected_kl(student, *others))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.inputs = len(inputs)
        ctx.save_for_backward(output[2], inputs[1])
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, link = ctx.saved_tensors
        return chain(gradient, gradients[0], link), *(None,) * (ctx.inputs - 1)


@torch.library.custom_op("termwise::projected_kl", mutates_args=())
def _projected_kl(
    student: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = student.detach(), teacher.detach()
    chunks = Chunks(student_id, teacher_id, student_size, teacher_size, valid)
    wide = lifted(student[:0]).dtype
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
    gradient = gradient_of(student, chunks) if with_gradient else student.new_empty(0)
    flat, flat_teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    flat_gradient = gradient.flatten(0, -2) if with_gradient else gradient
    sums = per_chunk.new_zeros(3)
    scale = (per_chunk / temperature).to(wide)
    with torch.autocast(student.device.type, enabled=False):
        for block in blocks(chunks, teacher.shape[2], wide):
            x = centred(block.student.of(flat), vocab_name)
            powers, inverse = exponentials(x, temperature, vocab_name)
            means = block.student.sharing(inverse) @ powers
            parts, push = divergence(means, block, block.teacher.of(flat_teacher))
            sums += parts
            if not with_gradient:
                continue
            back = block.student.sharing(scale).T @ push
            rows = softmax_gradient(powers, inverse, back, vocab_name)
            block.student.put(flat_gradient, rows)
    return sums[0] * per_chunk, sums[1:].clone(), gradient


@_projected_kl.register_fake
def _(student: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    per_chunk, with_gradient = others[14], others[19]
    gradient = student.new_empty(student.shape if with_gradient else 0)
    return torch.empty_like(per_chunk), per_chunk.new_empty(2), gradient


_projected_kl.register_vmap(looped(_projected_kl))


class Divergence(NamedTuple):
    """The divergence of a block of chunks, and its gradient in the student's probabilities."""

    columns: Tensor | None
    covered: Tensor
    by_column: tuple[Tensor, Tensor, Tensor]
    by_row: tuple[Tensor, Tensor, Tensor]
    temperature: float
    reverse: bool
    teacher_mean: str
    eps: float
    vocab_name: str | None
    sequence_name: str | None

    def __call__(self, means: Tensor, block: Block, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Take this rank's part of the student's mean probabilities, and the teacher's rows.

        Returns:
            The sums over the block's chunks of divergence, agreement and uncovered mass, in the
            wider type; and the gradient of the first in the probabilities, on this rank's tokens.
        """
        projected = _bag(self.by_column, means.T.contiguous())
        if self.columns is not None:
            projected = projected[self.columns]
        projected = projected.T.contiguous()
        projected = total(total(projected, self.vocab_name), self.sequence_name)
        log_p, uncovered = self._teacher(teacher, block)

        whole = projected.sum(1, keepdim=True) + self.eps
        share = projected / whole
        q = share + self.eps
        log_q = q.log()
        # Where one factor is 0 the product is, whatever the logarithm is. A NaN is not 0.
        if self.reverse:
            ratio = log_q - log_p
            kl = (q * ratio).where(q != 0, 0).sum(1)
            push = (ratio + 1).where(q != 0, 0)
        else:
            p = log_p.exp()
            if self.eps > 0:  # then log q is finite, and 0 times any finite number is 0
                ratio = (log_p - log_q).clamp_(min=torch.finfo(log_p.dtype).min)
                kl = row_products(p, ratio)
                push = -p / q
            else:
                kl = (p * (log_p - log_q)).where(p != 0, 0).sum(1)
                push = -(p / q).where(p != 0, 0)
        agree = projected.argmax(1) == log_p.argmax(1)
        push = (push - row_products(push, share)[:, None]) / whole
        if block.counted is not None:
            kl, agree = kl.where(block.counted, 0), agree & block.counted
            uncovered = uncovered.where(block.counted, 0)
            push = push.where(block.counted[:, None], 0)
        sums = torch.stack([x.sum(dtype=accumulator(means)) for x in (kl, agree, uncovered)])
        spread = push.T
        if self.columns is not None:
            spread = push.new_zeros(len(self.covered), block.chunks)
            spread.index_copy_(0, self.columns, push.T)
        return sums, _bag(self.by_row, spread.contiguous()).T

    def _teacher(self, logits: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """Return the log of the target in the columns, and the mass that is not covered."""
        rows, columns = block.teacher, self.columns
        logits = centred(logits, None)
        uncovered = (~self.covered).to(logits.dtype)
        if self.teacher_mean == "prob":
            logits = logits / self.temperature
            parts = [_pick(logits, columns).softmax(1), (logits.softmax(1) @ uncovered)[:, None]]
            mean = rows.mean(torch.cat(parts, 1), self.sequence_name)
            return mean[:, :-1].log(), mean[:, -1]
        mean = rows.mean(logits, self.sequence_name).div_(self.temperature)
        if self.teacher_mean == "log_normalized":
            target = _pick(mean, columns).log_softmax(1)
        else:
            log_sums = (_pick(logits, columns) / self.temperature).logsumexp(1, keepdim=True)
            target = _pick(mean, columns) - rows.mean(log_sums, self.sequence_name)
        return target, mean.softmax(1) @ uncovered


def _pick(x: Tensor, columns: Tensor | None) -> Tensor:
    return x if columns is None else x.index_select(1, columns)


def _bag(order: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    """Multiply a sparse matrix, given by its rows, with the dense x."""
    pointers, indices, weights = order
    return F.embedding_bag(
        indices,
        x,
        pointers,
        mode="sum",
        per_sample_weights=weights,
        include_last_offset=True,
    )
