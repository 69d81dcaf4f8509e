"""What a type checker knows of the distillation losses. Never run: pyright and mypy read it."""

from typing import assert_type

from torch import Tensor
from torch.distributed import ProcessGroup

from termwise.lm import (
    Alignment,
    CrossTokenizerLoss,
    CrossTokenizerTerms,
    DistillationLoss,
    DistillationTerms,
    LinearProjectedKLLoss,
    NextTokenLoss,
    NextTokenTerms,
    PartitionedLoss,
    PartitionedTerms,
    ProjectedKLLoss,
    ProjectedKLTerms,
    Teacher,
    UniversalLogitLoss,
    UniversalLogitTerms,
    VocabPartition,
    VocabProjection,
    align_in_order,
    count_valid_chunks,
    cross_tokenizer_loss,
    distillation_loss,
    linear_projected_kl_loss,
    next_token_loss,
    partitioned_loss,
    projected_kl_loss,
    universal_logit_loss,
)


def over_positions(student: Tensor, teacher: Tensor, tokens: Tensor, group: ProcessGroup) -> None:
    terms = distillation_loss(
        student, teacher, divergence="reverse", teacher_top_k=8, mask=tokens >= 0
    )
    assert_type(terms, DistillationTerms)
    assert_type(terms.divergence, Tensor)
    loss_fn = DistillationLoss(divergence="jensen_shannon", beta=0.1)
    assert_type(loss_fn(student, teacher, vocab_group=group), DistillationTerms)
    assert_type(loss_fn.temperature, float)

    assert_type(next_token_loss(student, tokens, normalizer=8), NextTokenTerms)
    assert_type(next_token_loss(student, tokens, normalizer=tokens.sum()), NextTokenTerms)
    assert_type(NextTokenLoss(grad_reduction="sum")(student, tokens).accuracy, Tensor)


def over_chunks(student: Tensor, teacher: Tensor, mask: Tensor) -> None:
    alignment = align_in_order(mask, mask)
    assert_type(alignment, Alignment)
    terms = universal_logit_loss(student, teacher, alignment=alignment, temperature=2)
    assert_type(terms, UniversalLogitTerms)
    loss_fn = UniversalLogitLoss(exact_only=True)
    assert_type(loss_fn(student, teacher, alignment=alignment).num_chunks, Tensor)


def beside_the_text(
    student: Tensor, teacher: Tensor, tokens: Tensor, alignment: Alignment, pairs: VocabProjection
) -> None:
    one, other = Teacher(student), Teacher(teacher, alignment, pairs, weight=2)
    terms = cross_tokenizer_loss(student, tokens, [one, other], scale="match", log_vocab=True)
    assert_type(terms, CrossTokenizerTerms)
    assert_type(terms.teacher_weight, Tensor)
    assert_type(CrossTokenizerLoss(combine="select")(student, tokens, one), CrossTokenizerTerms)


def through_a_projection(
    student: Tensor, teacher: Tensor, alignment: Alignment, pairs: VocabProjection, x: Tensor
) -> None:
    count = count_valid_chunks(alignment, exact_only=True)
    assert_type(count, Tensor)
    terms = projected_kl_loss(
        student, teacher, alignment=alignment, projection=pairs, columns_top_k=8, normalizer=count
    )
    assert_type(terms, ProjectedKLTerms)
    assert_type(terms.uncovered_teacher_mass, Tensor)
    loss_fn = ProjectedKLLoss(pairs, teacher_mean="log", temperature=2)
    assert_type(loss_fn(student, teacher, alignment=alignment, normalizer=8), ProjectedKLTerms)
    assert_type(loss_fn.projection, VocabProjection)

    terms = linear_projected_kl_loss(x, x, teacher, alignment=alignment, projection=pairs)
    assert_type(terms, ProjectedKLTerms)
    linear_fn = LinearProjectedKLLoss(pairs, divergence="reverse")
    assert_type(linear_fn(x, x, teacher, alignment=alignment), ProjectedKLTerms)


def through_a_partition(
    student: Tensor, teacher: Tensor, alignment: Alignment, pairs: VocabPartition
) -> None:
    terms = partitioned_loss(student, teacher, alignment=alignment, partition=pairs)
    assert_type(terms, PartitionedTerms)
    assert_type(terms.l1_tail, Tensor)
    loss_fn = PartitionedLoss(pairs, tail_top_k=64)
    assert_type(loss_fn(student, teacher, alignment=alignment), PartitionedTerms)
    assert_type(loss_fn.tail_weight, float)
