"""Distillation and cross-entropy, with one or several teachers with any tokenizers."""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._autograd import Function, link_to
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._numbers import blocks, lifted, lifted_dtype
from .._terms import Terms, terms
from ._checks import check_groups, divisor
from ._divergences import KLDivergence, TeacherMean
from ._next_token import next_token_loss
from ._rows import (
    PerRow,
    adds_ranks,
    highest,
    log_softmax,
    over_columns,
    over_ranks,
    over_rows,
    unused_positions,
    weighted_logs,
)
from ._teachers import Comparison, Groups, Teacher

Combination: TypeAlias = Literal["sum", "average_logits", "select"]
Score: TypeAlias = Literal["cross_entropy", "entropy", "max_prob"]
Scale: TypeAlias = Literal["fixed", "match"]


@terms
class CrossTokenizerTerms(Terms):
    """Terms of [`cross_tokenizer_loss`][termwise.lm.cross_tokenizer_loss]."""

    loss: Float[Tensor, ""]
    """kd_weight * kd_scale * kd + ce_weight * cross_entropy."""
    kd: Float[Tensor, ""]
    """The teachers' divergences, combined."""
    cross_entropy: Float[Tensor, ""]
    """Cross-entropy of the student's next token, in nats, mean over the tokens that count."""
    kd_scale: Float[Tensor, ""]
    """|cross_entropy| / |kd| with scale="match" (1 if kd is 0), else 1; detached."""
    teacher_kd: Float[Tensor, " divergences"]
    """Float[Tensor, " divergences"]: each teacher's divergence, including temperature^2 if its loss
    has it, before its weight. With combine="average_logits" there is one, from the average. With a
    score or combine="select", a teacher of weight 0 has the gradient 0."""
    teacher_weight: Float[Tensor, " teachers"]
    """Float[Tensor, " teachers"]: the factor of each divergence, or of each teacher's logits;
    detached."""
    num_tokens: Float[Tensor, ""]
    """Number of the student's tokens that count, on all ranks; detached."""
    accuracy: Float[Tensor, ""]
    """Fraction of them that the student predicts; detached."""


@contract
def cross_tokenizer_loss(
    student_logits: Float[Tensor, "batch time vocab"],
    tokens: Int[Tensor, "batch time"],
    teachers: Teacher | Sequence[Teacher],
    *,
    kd_weight: float = 1.0,
    ce_weight: float = 1.0,
    scale: Scale = "fixed",
    combine: Combination = "sum",
    score: Score | None = None,
    score_scale: float = 1.0,
    log_vocab: bool = False,
    temperature: float = 1.0,
    divergence: KLDivergence = "forward",
    teacher_top_k: int | None = None,
    columns_top_k: int | None = None,
    tail_top_k: int = 8192,
    teacher_mean: TeacherMean = "log_normalized",
    exact_only: bool = False,
    mask: Bool[Tensor, "batch time"] | None = None,
    sample_mask: Bool[Tensor, " batch"] | None = None,
    normalizer: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
    student_vocab: int | None = None,
    batch_group: ProcessGroup | None = None,
    vocab_group: ProcessGroup | None = None,
    sequence_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> CrossTokenizerTerms:
    r"""Learn from the text and from one or several teachers.

    $$\mathrm{loss} = w_{KD}\, s\, \mathrm{KD} + w_{CE}\, \mathrm{CE}, \qquad
    s = \begin{cases} 1 & \text{fixed} \\
    \left|\mathrm{CE}\right| / \left|\mathrm{KD}\right| \text{, detached} & \text{match}
    \end{cases}$$

    CE is [`next_token_loss`][termwise.lm.next_token_loss]. With D_i the loss for
    [`Teacher`][termwise.lm.Teacher] i, y_i its logits and V_i its vocabulary:

    $$\mathrm{KD} = \begin{cases} \sum_i w_i v_i D_i & \text{sum} \\
    D\big(\sum_i w_i y_i / \sum_i w_i\big) & \text{average\_logits} \\
    D_k & \text{select} \end{cases}$$

    where teacher k has the lowest cross-entropy, and

    $$v_i = \begin{cases} \log\, V_i / \log \min_j V_j & \text{log\_vocab} \\
    1 & \text{else} \end{cases}, \qquad
    w_i = \begin{cases} \text{the teacher's weight} & \text{no score} \\
    \mathrm{softmax}_i(\alpha\, v_i\, \mathrm{score}_i) & \text{score} \end{cases}$$

    A score is a mean over the positions that predict a teacher's token that counts, at temperature
    1: -CE, -entropy or the highest probability. A larger score gives a larger weight; a teacher
    without tokens that count has weight 0, unless no teacher has any. Scores have no gradient.

    Args:
        student_logits (Float[Tensor, "batch time vocab"]): unnormalized, a row for each position.
        tokens (Int[Tensor, "batch time"]): the student's tokens; a negative one (padding, a label
            of -100) does not count, and neither does a chunk that contains one.
        teachers: one or several teachers.
        kd_weight: w_KD. 0 removes the divergences, even if they are infinite.
        ce_weight: w_CE; 0 removes the cross-entropy.
        scale: "fixed", or "match", which rescales KD to the magnitude of CE.
        combine: how to combine several teachers. "average_logits" needs teachers with the student's
            tokenizer.
        score: how to score teachers for their weights: by accuracy or confidence. None: use their
            own weights.
        score_scale: alpha, the sharpness of these weights.
        log_vocab: whether to multiply a teacher's divergence, and its score, by the logarithm of
            its vocabulary size.
        temperature: T of every divergence.
        divergence: "forward", KL(teacher || student), or "reverse", for every teacher.
        teacher_top_k: for `distillation_loss`, for teachers with the student's tokenizer: number of
            tokens to compare at each position. None, or more than there are: all.
        columns_top_k: for `projected_kl_loss`, for teachers with a projection: number of their
            tokens to compare, the same at all positions.
        tail_top_k: as in `partitioned_loss`.
        teacher_mean: as in `projected_kl_loss`.
        exact_only: as in the losses over chunks.
        mask (Bool[Tensor, "batch time"] | None): student tokens that count; the others affect no
            term and no gradient, even if they are NaN. None: all but the negative ones. It applies
            to the cross-entropy and to every teacher: a chunk counts if all its student tokens
            count.
        sample_mask (Bool[Tensor, " batch"] | None): samples that count, for the teachers too. None:
            all.
        normalizer (Float[Tensor, ""] | Int[Tensor, ""] | float | None): tokens to divide CE, and
            the divergence of teachers without an alignment, by. None: those of this batch, over
            batch_group and sequence_group. Given one, and the teachers theirs, micro-batches add up
            exactly, unless their scales, scores or choice differ.
        student_vocab: vocabulary size over all ranks of vocab_group; required by
            `universal_logit_loss` with a vocab_group.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        vocab_group: process group whose ranks hold different student tokens, in the order of ranks.
            The logits of a teacher without an alignment are sharded in the same way; those of one
            with an alignment are complete on each rank.
        sequence_group: process group whose ranks hold different positions of all models, in the
            order of ranks.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank; so are s, the weights and the
        selection, which are computed from sums over ranks. Gradient: combined over batch_group as
        `grad_reduction` says, it equals that of one process; over vocab_group and sequence_group
        each rank gets its part of the whole gradient, which is not to be averaged. If no token and
        no chunk counts, loss and gradient are 0. Every teacher is compared, even if one is
        selected, so that each rank sends the same without synchronizing with the device. Saved for
        the backward pass: the logits, and for each teacher with an alignment a gradient of the
        student's logits.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: no teacher; arguments without effect (a score, log_vocab or weights with a
            combination that does not use them); teachers to average have other tokenizers or
            shapes; a teacher lacks tokens that it needs; teacher_top_k or columns_top_k below 1;
            teacher_top_k with a vocab_group and a teacher of the student's tokenizer; or what the
            losses refuse.

    References:
        NeMo-RL's `CrossTokenizerDistillationLossFn` (https://github.com/NVIDIA-NeMo/RL,
        nemo_rl/algorithms/loss/loss_functions.py). Where this differs: it matches scales from each
        rank's own values, and then ignores the weights of the two terms; it silently sums where it
        cannot average; it computes entropies and probabilities at the positions that *contain*
        tokens that count, including the last one; its `vocab_topk` columns for a teacher with the
        student's tokenizer are the same at all positions. As there, log_vocab multiplies scores
        too, so a larger vocabulary with a negative score gets less weight.

    Examples:
        >>> import torch
        >>> from termwise.lm import Teacher, cross_tokenizer_loss
        >>> logits, tokens = torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])
        >>> sure = torch.tensor([0.0, 0.0, 0.0, torch.inf]).neg().expand(1, 3, 4)
        >>> terms = cross_tokenizer_loss(logits, tokens, [Teacher(sure), Teacher(logits)])
        >>> round(terms.kd.item(), 4), round(terms.cross_entropy.item(), 4)
        (0.2877, 1.3863)
    """
    name = "cross_tokenizer_loss"
    check_groups(name, batch_group, vocab_group, sequence_group)
    several = (teachers,) if isinstance(teachers, Teacher) else tuple(teachers)
    _check(name, several, combine, score, score_scale, log_vocab)
    for argument, number in (("teacher_top_k", teacher_top_k), ("columns_top_k", columns_top_k)):
        if number is not None and number < 1:
            raise ValueError(f"{name} needs {argument} >= 1, got {number}")
    if teacher_top_k is not None and vocab_group is not None and any(_same(t) for t in several):
        raise ValueError(
            f"{name} needs teacher_top_k None for a teacher of the student's tokenizer with a "
            f"vocab_group, got {teacher_top_k}"
        )
    tokens = tokens.long()
    counted = tokens if mask is None else tokens.where(mask, -1)
    if sample_mask is not None:
        counted = counted.where(sample_mask[:, None], -1)
    groups: Groups = {
        "batch_group": batch_group,
        "vocab_group": vocab_group,
        "sequence_group": sequence_group,
        "grad_reduction": grad_reduction,
    }
    student = next_token_loss(
        student_logits,
        counted,
        normalizer=normalizer,
        batch_group=batch_group,
        vocab_group=vocab_group,
        sequence_group=sequence_group,
        grad_reduction=grad_reduction,
    )
    if combine == "average_logits":
        shares = [teacher.weight / sum(t.weight for t in several) for teacher in several]
        weights = _constants(student.loss, shares)
        compared: tuple[Teacher, ...] = (Teacher(_averaged(several, shares, vocab_group)),)
    else:
        compared = several
        weights = _constants(student.loss, [teacher.weight for teacher in several])
    by_vocab = _constants(student.loss, _log_vocab_ratios(several, groups, log_vocab))
    seen = [student_logits] * len(compared)
    if combine == "select" or score is not None:
        scores = _scores(several, score or "cross_entropy", counted, sample_mask, groups)
        if combine == "select":
            chosen = torch.arange(len(several), device=scores.device) == scores.argmax()
            weights = chosen.to(by_vocab.dtype)
        else:
            scores = scores.to(by_vocab.dtype)
            sharp = (score_scale * by_vocab * scores).where(scores != -torch.inf, scores)
            weights = sharp.softmax(0)
        seen = [_Gated.apply(student_logits, weight) for weight in weights.unbind()]
    comparison = Comparison(
        temperature=temperature,
        divergence=divergence,
        teacher_top_k=teacher_top_k,
        columns_top_k=columns_top_k,
        tail_top_k=tail_top_k,
        teacher_mean=teacher_mean,
        exact_only=exact_only,
        mask=counted >= 0,
        normalizer=normalizer,
        student_vocab=student_vocab,
        groups=groups,
    )
    divergences = [
        comparison.loss(logits, teacher) for logits, teacher in zip(seen, compared, strict=True)
    ]

    if combine == "average_logits":
        kd = divergences[0]
    else:
        if combine == "sum":
            weights = weights * by_vocab
        parts = [
            one.where(weight != 0, 0)  # 0 * inf would not be 0
            for one, weight in zip(divergences, weights.unbind(), strict=True)
        ]
        held = [teacher.weight != 0 for teacher in compared]
        kd = _weighted_sum(student_logits, weights.unbind(), parts, held)

    size, target = kd.detach().abs(), student.loss.detach().abs()
    kd_scale = torch.ones_like(size)
    if scale == "match":
        kd_scale = (target / size.where(size != 0, 1)).where(size != 0, 1)
    return CrossTokenizerTerms(
        loss=_weighted_sum(
            student_logits,
            (kd_weight * kd_scale, ce_weight),
            (kd, student.loss),
            (kd_weight != 0, ce_weight != 0),
        ),
        kd=kd,
        cross_entropy=student.loss,
        kd_scale=kd_scale,
        teacher_kd=torch.stack(divergences),
        teacher_weight=weights,
        num_tokens=student.num_tokens,
        accuracy=student.accuracy,
    )


class CrossTokenizerLoss(LossModule):
    """[`cross_tokenizer_loss`][termwise.lm.cross_tokenizer_loss] as a module.

    Examples:
        >>> import torch
        >>> from termwise.lm import CrossTokenizerLoss, Teacher
        >>> loss_fn = CrossTokenizerLoss(scale="match", temperature=2.0)
        >>> logits, tokens = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.int64)
        >>> terms = loss_fn(logits, tokens, Teacher(torch.zeros(2, 5, 8)))
        >>> bool(torch.isclose(terms.loss, 2 * terms.cross_entropy))
        True
    """

    kd_weight: float = 1.0
    ce_weight: float = 1.0
    scale: Scale = "fixed"
    combine: Combination = "sum"
    score: Score | None = None
    score_scale: float = 1.0
    log_vocab: bool = False
    temperature: float = 1.0
    divergence: KLDivergence = "forward"
    teacher_top_k: int | None = None
    columns_top_k: int | None = None
    tail_top_k: int = 8192
    teacher_mean: TeacherMean = "log_normalized"
    exact_only: bool = False
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        student_logits: Float[Tensor, "batch time vocab"],
        tokens: Int[Tensor, "batch time"],
        teachers: Teacher | Sequence[Teacher],
        *,
        mask: Bool[Tensor, "batch time"] | None = None,
        sample_mask: Bool[Tensor, " batch"] | None = None,
        normalizer: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None,
        student_vocab: int | None = None,
        batch_group: ProcessGroup | None = None,
        vocab_group: ProcessGroup | None = None,
        sequence_group: ProcessGroup | None = None,
    ) -> CrossTokenizerTerms:
        """Compute the terms of the loss."""
        return cross_tokenizer_loss(
            student_logits,
            tokens,
            teachers,
            mask=mask,
            sample_mask=sample_mask,
            normalizer=normalizer,
            student_vocab=student_vocab,
            batch_group=batch_group,
            vocab_group=vocab_group,
            sequence_group=sequence_group,
            **self.hyperparameters(),
        )


def _same(teacher: Teacher) -> bool:
    """Whether the teacher has the student's tokens."""
    return teacher.alignment is None


def _check(
    name: str,
    teachers: tuple[Teacher, ...],
    combine: Combination,
    score: Score | None,
    score_scale: float,
    log_vocab: bool,
) -> None:
    if not teachers:
        raise ValueError(f"{name} needs a teacher, got none")
    given = [teacher.weight for teacher in teachers]
    # By comparisons, since Dynamo cannot trace math.isfinite of a symbolic number.
    if not all(-math.inf < number < math.inf for number in [*given, score_scale]):
        raise ValueError(f"{name} needs finite weights, got {given} and score_scale {score_scale}")
    if combine != "sum" and (score is not None or log_vocab):
        raise ValueError(
            f"{name} needs combine='sum' with score or log_vocab, got {combine!r} with score "
            f"{score!r} and log_vocab {log_vocab}"
        )
    if (combine == "select" or score is not None) and any(weight != 1 for weight in given):
        raise ValueError(
            f"{name} needs weights of 1 where teachers are scored or selected, got {given}"
        )
    if combine == "select" or score is not None:
        for place, teacher in enumerate(teachers):
            if teacher.alignment is not None and teacher.tokens is None:
                raise ValueError(
                    f"{name} needs the tokens of a teacher that is scored or selected, got none of "
                    f"teacher {place}"
                )
    if combine != "average_logits":
        return
    for place, teacher in enumerate(teachers):
        if teacher.alignment is not None:
            raise ValueError(
                f"{name} needs teachers of the student's tokenizer to average their logits, got an "
                f"alignment of teacher {place}"
            )
        if teacher.logits.shape != teachers[0].logits.shape:
            raise ValueError(
                f"{name} needs logits of one shape to average them, got "
                f"{list(teachers[0].logits.shape)} and {list(teacher.logits.shape)}"
            )
    if min(given) < 0 or not sum(given) > 0:
        raise ValueError(
            f"{name} needs weights that are not negative, nor all 0, to average logits, got {given}"
        )


def _constants(like: Tensor, values: Sequence[float]) -> Tensor:
    """Return numbers as a vector, without a copy from the host, which would synchronize."""
    return torch.stack([like.new_full((), value) for value in values])


class _Gated(Function):
    """Return logits unchanged; in the backward pass, return 0 if the weight is 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, weight: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0].where(weight != 0, 0), None


def _weighted_sum(
    student_logits: Tensor,
    weights: Sequence[Tensor | float],
    parts: Sequence[Tensor],
    held: Sequence[bool],
) -> Tensor:
    """Sum the weighted parts without those of weight 0, since 0 times an infinite one is NaN."""
    added = [
        weight * part for weight, part, is_in in zip(weights, parts, held, strict=True) if is_in
    ]
    nothing = link_to(student_logits).to(parts[0].dtype)
    return functools.reduce(torch.add, added) if added else nothing


def _log_vocab_ratios(
    teachers: tuple[Teacher, ...], groups: Groups, log_vocab: bool
) -> list[float]:
    if not log_vocab:
        return [1.0] * len(teachers)
    if groups["vocab_group"] is not None and any(_same(teacher) for teacher in teachers):
        raise ValueError(
            "cross_tokenizer_loss needs whole vocabularies for log_vocab, got a teacher that is in "
            "parts over vocab_group"
        )
    sizes = [teacher.logits.shape[2] for teacher in teachers]
    if min(sizes) < 2:
        raise ValueError(f"cross_tokenizer_loss needs 2 tokens or more for log_vocab, got {sizes}")
    return [math.log(size) / math.log(min(sizes)) for size in sizes]


def _averaged(
    teachers: tuple[Teacher, ...], shares: list[float], vocab_group: ProcessGroup | None
) -> Tensor:
    """Average logits minus the highest of each row, in their own dtype."""
    # A teacher of weight 0 is not read, since its -inf would make NaN.
    pairs = [
        (share, teacher.logits.detach().flatten(0, 1))
        for share, teacher in zip(shares, teachers, strict=True)
        if share
    ]
    dtype = functools.reduce(torch.promote_types, [teacher.logits.dtype for teacher in teachers])
    tops = [highest(x, vocab_group)[:, None] for _, x in pairs]
    mean = torch.empty_like(pairs[0][1], dtype=dtype)
    for part in blocks(mean):
        mean[part] = functools.reduce(
            torch.add,
            [
                share * (lifted(x[part]) - lifted(top[part]))
                for (share, x), top in zip(pairs, tops, strict=True)
            ],
        )
    return mean.view(teachers[0].logits.shape)


def _scores(
    teachers: tuple[Teacher, ...],
    score: Score,
    counted: Tensor,
    sample_mask: Tensor | None,
    groups: Groups,
) -> Tensor:
    """Return each teacher's score; -inf without tokens that count, unless no teacher has any."""
    pairs = [_score(teacher, score, counted, sample_mask, groups) for teacher in teachers]
    dtype = functools.reduce(torch.promote_types, [pair[0].dtype for pair in pairs])
    scores, counts = (torch.stack([pair[i].to(dtype) for pair in pairs]) for i in (0, 1))
    known = counts > 0
    return scores.where(known | ~known.any(), -torch.inf)


def _score(
    teacher: Teacher,
    score: Score,
    counted: Tensor,
    sample_mask: Tensor | None,
    groups: Groups,
) -> tuple[Tensor, Tensor]:
    """Return the mean score and its number of tokens, over all ranks."""
    logits, vocab_group = teacher.logits.detach(), groups["vocab_group"]
    if teacher.tokens is not None:
        counted = teacher.tokens.long()
        if sample_mask is not None:
            counted = counted.where(sample_mask[:, None], -1)
    if not _same(teacher):
        vocab_group = None
    if score == "cross_entropy":
        found = next_token_loss(
            logits,
            counted,
            batch_group=groups["batch_group"],
            vocab_group=vocab_group,
            sequence_group=groups["sequence_group"],
        )
        return -found.loss, found.num_tokens
    unused = unused_positions(logits, counted >= 0, None, groups["sequence_group"])
    sureness = functools.partial(_sureness, score=score, vocab_group=vocab_group)
    across = groups["batch_group"], groups["sequence_group"]
    sums = over_rows(
        functools.partial(sureness, None),
        sureness,
        vocab_group,
        unused,
        logits.flatten(0, 1),
        wide_sums=adds_ranks(*across),
    )
    score_sum, count = over_ranks(sums, *across, "sum")
    kind = lifted_dtype(logits)
    return (score_sum / divisor(None, count)).to(kind), count.to(kind)


def _sureness(
    out: Tensor | None,
    unused: Tensor | None,
    rows: Tensor,
    *,
    score: Score,
    vocab_group: ProcessGroup | None,
) -> PerRow:
    """Return -entropy or the highest probability of rows; out is None: no gradient."""
    x = log_softmax(rows, unused, 1.0, vocab_group)
    if score == "entropy":
        return (over_columns(weighted_logs(x.exp(), x).sum(1), vocab_group),)
    return (highest(x, vocab_group).exp(),)
