"""The divergence of chunks that are projected to the teacher's vocabulary, block by block."""

from typing import NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _groups
from .._groups import GradReduction, ProcessGroup, all_reduce, name_of
from .._numbers import accumulator, may_look_at
from .._terms import Terms, terms
from ._alignment import Alignment
from ._chunk_blocks import Block, highest_logits
from ._chunk_softmax import centred
from ._chunks import Chunks, chunks_of, normalized, padding
from ._divergences import KLDivergence, TeacherMean
from ._rows import row_products
from ._sparse_rows import SparseRows
from ._vocab_projection import VocabProjection


@terms
class ProjectedKLTerms(Terms):
    """Terms of [`projected_kl_loss`][termwise.lm.projected_kl_loss]."""

    loss: Float[Tensor, ""]
    """temperature^2 * kl."""
    kl: Float[Tensor, ""]
    """Divergence of chunks in nats: sum over the chunks that count, divided by the normalizer."""
    num_chunks: Float[Tensor, ""]
    """Number of chunks that count, over batch_group; detached."""
    top1_agreement: Float[Tensor, ""]
    """Fraction of these chunks where both models have the same most likely column; detached."""
    uncovered_teacher_mass: Float[Tensor, ""]
    """Probability of the teacher, over its whole vocabulary, on tokens that are not among the
    columns or that no student token is projected to; mean over these chunks; detached."""


class Divergence(NamedTuple):
    """The divergence of a block of chunks, and its gradient for the student's probabilities."""

    columns: Tensor | None
    """Teacher tokens to compare. None: all."""
    covered: Tensor
    """[teacher_vocab], whether the token is compared and a student token is projected to it."""
    by_teacher: SparseRows
    by_student: SparseRows
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
            wider dtype; and the gradient of the first in the probabilities, on this rank's tokens.
        """
        projected = self.by_teacher.matmul(means.T.contiguous())
        if self.columns is not None:
            projected = projected[self.columns]
        projected = projected.T.contiguous()
        projected = all_reduce(all_reduce(projected, self.vocab_name), self.sequence_name)
        log_p, uncovered = self._teacher(teacher, block)

        whole = projected.sum(1, keepdim=True) + self.eps
        share = projected / whole
        q = share + self.eps
        log_q = q.log()
        # If one factor is 0 so is the product, for any logarithm; but NaN is not 0.
        if self.reverse:
            ratio = log_q - log_p
            kl = (q * ratio).where(q != 0, 0).sum(1)
            push = (ratio + 1).where(q != 0, 0)
        else:
            p = log_p.exp()
            if self.eps > 0:  # then log q is finite, and 0 times any finite number is 0
                ratio = (log_p - log_q).clamp_(min=torch.finfo(log_p.dtype).min)
                kl = row_products(p, ratio)
                push = (p / q).neg_()
            else:
                kl = (p * (log_p - log_q)).where(p != 0, 0).sum(1)
                push = -(p / q).where(p != 0, 0)
        agree = projected.argmax(1) == log_p.argmax(1)
        push = push.sub_(row_products(push, share)[:, None]).div_(whole)
        if block.counted is not None:
            kl, agree = kl.where(block.counted, 0), agree & block.counted
            uncovered = uncovered.where(block.counted, 0)
            push = push.where(block.counted[:, None], 0)
        sums = torch.stack([x.sum(dtype=accumulator(means)) for x in (kl, agree, uncovered)])
        spread = push.T
        if self.columns is not None:
            spread = push.new_zeros(len(self.covered), block.chunks)
            spread.index_copy_(0, self.columns, push.T)
        return sums, self.by_student.matmul(spread.contiguous()).T.contiguous()

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


class Setting(NamedTuple):
    """Inputs of a projected divergence, besides the logits."""

    chunks: Chunks
    divergence: Divergence
    per_chunk: Tensor
    """temperature^2 / normalizer."""
    num_chunks: Tensor
    """Number of chunks that count, over batch_group."""


def divergence_setting(
    name: str,
    teacher_logits: Tensor,
    alignment: Alignment,
    projection: VocabProjection,
    *,
    student_vocab: int,
    temperature: float,
    divergence: KLDivergence,
    columns_top_k: int | None,
    teacher_columns: Tensor | None,
    teacher_mean: TeacherMean,
    mask: Tensor | None,
    sample_mask: Tensor | None,
    exact_only: bool,
    normalizer: Tensor | float | None,
    eps: float,
    batch_group: ProcessGroup | None,
    vocab_group: ProcessGroup | None,
    sequence_group: ProcessGroup | None,
) -> Setting:
    """Check sizes, and determine chunks, columns and the normalizer."""
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
    if columns_top_k is not None and teacher_columns is not None:
        raise ValueError(f"{name} needs columns_top_k or teacher_columns, got both")
    if columns_top_k is not None and columns_top_k < 1:
        raise ValueError(f"{name} needs columns_top_k >= 1, got {columns_top_k}")
    chunks = chunks_of(name, alignment, mask, sample_mask, exact_only, sequence_group)
    count, per_chunk = normalized(name, chunks, temperature, normalizer, batch_group)
    vocab_name, sequence_name = name_of(vocab_group), name_of(sequence_group)

    columns = chosen = None
    if teacher_columns is not None:
        columns = teacher_columns.long()
        chosen = _times_chosen(name, columns, teacher_logits.shape[2])
        # If the columns cannot be read, a column that occurs twice makes the loss NaN.
        per_chunk = per_chunk.where(~(chosen > 1).any(), torch.nan)
    if columns_top_k is not None and columns_top_k < teacher_logits.shape[2]:
        highest = highest_logits(teacher_logits, chunks.teacher_id, chunks.valid)
        highest = all_reduce(all_reduce(highest, name_of(batch_group), "max"), sequence_name, "max")
        columns = highest.topk(columns_top_k, sorted=False).indices.sort().values
    weights = projection.student_weights.new_zeros(projection.teacher_vocab)
    weights = weights.index_add(0, projection.student_columns, projection.student_weights)
    covered = all_reduce(weights, vocab_name) > 0
    if chosen is not None:
        covered = covered & (chosen > 0)
    elif columns is not None:
        covered = covered & torch.zeros_like(covered).index_fill(0, columns, True)
    p = projection
    compared = Divergence(
        columns,
        covered,
        SparseRows(p.teacher_pointers, p.teacher_rows, p.teacher_weights),
        SparseRows(p.student_pointers, p.student_columns, p.student_weights),
        temperature,
        divergence == "reverse",
        teacher_mean,
        eps,
        vocab_name,
        sequence_name,
    )
    return Setting(chunks, compared, per_chunk, count)


def _times_chosen(name: str, columns: Tensor, vocab: int) -> Tensor:
    """Count each token among the columns; check them if reading does not synchronize."""
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
    """Sum the terms over the ranks of batch_group."""
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
