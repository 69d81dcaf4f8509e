"""What a type checker knows of `termwise.lm`. Never run: pyright and mypy read it."""

from collections.abc import Sequence
from typing import Any, assert_type

import torch
from torch import Tensor

from termwise import lm


def functions(
    alignment: lm.Alignment,
    partition: lm.VocabPartition,
    projection: lm.VocabProjection,
    student_offsets: Sequence[Sequence[tuple[int, int]]],
    teacher_offsets: Sequence[Sequence[tuple[int, int]]],
    teachers: lm.Teacher | Sequence[lm.Teacher],
    x: Tensor,
) -> None:
    assert_type(lm.align_spans(student_offsets, teacher_offsets), lm.Alignment)
    assert_type(lm.align_spans(x, x, documents=(x, [[0, None]])), lm.Alignment)
    assert_type(lm.paired_special_tokens(object(), object()), dict[int, int])
    assert_type(lm.chunk_average_log_probs(x, x, 2), tuple[Tensor, Tensor])
    assert_type(lm.valid_chunk_mask(x, x, x), Tensor)
    assert_type(lm.cross_tokenizer_loss(x, x, teachers), lm.CrossTokenizerTerms)
    assert_type(lm.distillation_loss(x, x), lm.DistillationTerms)
    assert_type(
        lm.linear_projected_kl_loss(x, x, x, alignment=alignment, projection=projection),
        lm.ProjectedKLTerms,
    )
    assert_type(lm.next_token_loss(x, x), lm.NextTokenTerms)
    assert_type(lm.vocab_partition(projection, rule="strict"), lm.VocabPartition)
    assert_type(
        lm.partitioned_loss(x, x, alignment=alignment, partition=partition), lm.PartitionedTerms
    )
    assert_type(lm.count_valid_chunks(alignment), Tensor)
    assert_type(
        lm.projected_kl_loss(x, x, alignment=alignment, projection=projection), lm.ProjectedKLTerms
    )
    assert_type(lm.targeted_variance_loss(x), lm.TargetedVarianceTerms)
    assert_type(lm.align_in_order(x, x), lm.Alignment)
    assert_type(lm.universal_logit_loss(x, x, alignment=alignment), lm.UniversalLogitTerms)


def modules(
    alignment: lm.Alignment,
    partition: lm.VocabPartition,
    projection: lm.VocabProjection,
    teachers: lm.Teacher | Sequence[lm.Teacher],
    x: Tensor,
) -> None:
    assert_type(lm.CrossTokenizerLoss()(x, x, teachers), lm.CrossTokenizerTerms)
    assert_type(lm.DistillationLoss()(x, x), lm.DistillationTerms)
    assert_type(
        lm.LinearProjectedKLLoss(projection)(x, x, x, alignment=alignment), lm.ProjectedKLTerms
    )
    assert_type(lm.NextTokenLoss()(x, x), lm.NextTokenTerms)
    assert_type(lm.PartitionedLoss(partition)(x, x, alignment=alignment), lm.PartitionedTerms)
    assert_type(lm.ProjectedKLLoss(projection)(x, x, alignment=alignment), lm.ProjectedKLTerms)
    assert_type(lm.TargetedVarianceLoss()(x), lm.TargetedVarianceTerms)
    assert_type(lm.UniversalLogitLoss()(x, x, alignment=alignment), lm.UniversalLogitTerms)


def fields_of_cross_tokenizer_terms(terms: lm.CrossTokenizerTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.kd, Tensor)
    assert_type(terms.cross_entropy, Tensor)
    assert_type(terms.kd_scale, Tensor)
    assert_type(terms.teacher_kd, Tensor)
    assert_type(terms.teacher_weight, Tensor)
    assert_type(terms.num_tokens, Tensor)
    assert_type(terms.accuracy, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), lm.CrossTokenizerTerms)


def fields_of_distillation_terms(terms: lm.DistillationTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.divergence, Tensor)
    assert_type(terms.num_tokens, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), lm.DistillationTerms)


def fields_of_next_token_terms(terms: lm.NextTokenTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.num_tokens, Tensor)
    assert_type(terms.accuracy, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), lm.NextTokenTerms)


def fields_of_partitioned_terms(terms: lm.PartitionedTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.kl_common, Tensor)
    assert_type(terms.l1_tail, Tensor)
    assert_type(terms.num_chunks, Tensor)
    assert_type(terms.top1_agreement, Tensor)
    assert_type(terms.common_teacher_mass, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), lm.PartitionedTerms)


def fields_of_projected_klterms(terms: lm.ProjectedKLTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.kl, Tensor)
    assert_type(terms.num_chunks, Tensor)
    assert_type(terms.top1_agreement, Tensor)
    assert_type(terms.uncovered_teacher_mass, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), lm.ProjectedKLTerms)


def fields_of_targeted_variance_terms(terms: lm.TargetedVarianceTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.squared_error, Tensor)
    assert_type(terms.variance, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), lm.TargetedVarianceTerms)


def fields_of_universal_logit_terms(terms: lm.UniversalLogitTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.num_chunks, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), lm.UniversalLogitTerms)


def members_of_alignment(one: lm.Alignment) -> None:
    assert_type(one.student_chunk_id, Tensor)
    assert_type(one.teacher_chunk_id, Tensor)
    assert_type(one.pair_valid, Tensor)
    assert_type(one.pair_exact, Tensor)
    assert_type(one.max_chunks, int)
    assert_type(one.to("cpu"), lm.Alignment)
    assert_type(one.check(), lm.Alignment)
    assert_type(lm.Alignment.from_flat({}), lm.Alignment)
    assert_type(one.where(), lm.Alignment)


def members_of_teacher(one: lm.Teacher) -> None:
    assert_type(one.logits, Tensor)
    assert_type(one.alignment, lm.Alignment | None)
    assert_type(one.projection, lm.VocabProjection | None)
    assert_type(one.partition, lm.VocabPartition | None)
    assert_type(one.tokens, Tensor | None)
    assert_type(one.weight, float)
    assert_type(one.normalizer, Tensor | float | None)
    assert_type(one.to("cpu"), lm.Teacher)


def members_of_vocab_partition(one: lm.VocabPartition) -> None:
    assert_type(one.common_student, Tensor)
    assert_type(one.common_teacher, Tensor)
    assert_type(one.rest_student, Tensor)
    assert_type(one.rest_teacher, Tensor)
    assert_type(one.to("cpu"), lm.VocabPartition)


def members_of_vocab_projection(one: lm.VocabProjection, x: Tensor) -> None:
    assert_type(one.student_vocab, int)
    assert_type(one.teacher_vocab, int)
    assert_type(one.student_pointers, Tensor)
    assert_type(one.student_columns, Tensor)
    assert_type(one.student_weights, Tensor)
    assert_type(one.teacher_pointers, Tensor)
    assert_type(one.teacher_rows, Tensor)
    assert_type(one.teacher_weights, Tensor)
    assert_type(
        lm.VocabProjection.from_topk(x, x, student_vocab=2, teacher_vocab=2), lm.VocabProjection
    )
    assert_type(
        lm.VocabProjection.from_pairs({(0, 1): 1.0}, student_vocab=2, teacher_vocab=2),
        lm.VocabProjection,
    )
    assert_type(lm.VocabProjection.from_tokens(["a"], ["a", None]), lm.VocabProjection)
    assert_type(lm.VocabProjection.from_tokenizers(object(), object()), lm.VocabProjection)
    assert_type(lm.VocabProjection.load("file"), lm.VocabProjection)
    assert_type(
        lm.VocabProjection.load_nemo("file", student_vocab=2, teacher_vocab=2), lm.VocabProjection
    )
    assert_type(one.save("file"), None)
    assert_type(one.to("cpu"), lm.VocabProjection)
    assert_type(one.rows(0, 1), lm.VocabProjection)
    assert_type(one.columns(x), lm.VocabProjection)
    assert_type(one.to_topk(), tuple[Tensor, Tensor])
    assert_type(one.project(x), Tensor)


def members_of_shared_logits(one: lm.SharedLogits, x: Tensor) -> None:
    assert_type(one.writes, int)
    assert_type(lm.SharedLogits.create((2, 3, 5)), lm.SharedLogits)
    assert_type(lm.SharedLogits.open(one.handle), lm.SharedLogits)
    assert_type(one.handle, lm.SharedLogitsHandle)
    assert_type(one[0:1], Tensor)
    assert_type(one.write(x), None)
    assert_type(one.close(), None)


def members_of_shared_logits_handle(one: lm.SharedLogitsHandle) -> None:
    assert_type(one.process, int)
    assert_type(one.descriptor, int)
    assert_type(one.token, int)
    assert_type(one.shape, tuple[int, int, int])
    assert_type(one.dtype, torch.dtype)
    assert_type(one.cuda, tuple[Any, ...] | None)
