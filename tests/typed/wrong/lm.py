"""Calls of `termwise.lm` that a type checker refuses. Never run."""

from collections.abc import Sequence

from torch import Tensor

from termwise import lm


def holder_alignment(one: lm.Alignment) -> None:
    print(one.student_chunk_di)  # error: reportAttributeAccessIssue: Cannot access attribute "student_chunk_di" for class "Alignment"
    lm.Alignment(student_chunk_di=1)  # error: reportCallIssue: Arguments missing for parameters "student_chunk_id", "teacher_chunk_id", "pair_valid", "pair_exact"


def calls_of_align_spans(student_offsets: Sequence[Sequence[tuple[int, int]]], teacher_offsets: Sequence[Sequence[tuple[int, int]]]) -> None:
    lm.align_spans(student_offsets)  # error: reportCallIssue: Argument missing for parameter "teacher_offsets"
    lm.align_spans(student_offsets, teacher_offsets, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    lm.align_spans(student_offsets, teacher_offsets, max_chunsk=None)  # error: reportCallIssue: No parameter named "max_chunsk"


def calls_of_paired_special_tokens() -> None:
    lm.paired_special_tokens(1)  # error: reportCallIssue: Argument missing for parameter "teacher"
    lm.paired_special_tokens(1, 1, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    lm.paired_special_tokens(1, techer=1)  # error: reportCallIssue: No parameter named "techer"


def calls_of_chunk_average_log_probs(x: Tensor) -> None:
    lm.chunk_average_log_probs(x, x)  # error: reportCallIssue: Argument missing for parameter "max_chunks"
    lm.chunk_average_log_probs(x, x, 2, 1.0)  # error: reportCallIssue: Expected 3 positional arguments
    lm.chunk_average_log_probs(x, x, 2, sequence_gropu=None)  # error: reportCallIssue: No parameter named "sequence_gropu"
    lm.chunk_average_log_probs(x, "x", 2)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "chunk_id" of type "Tensor"


def calls_of_valid_chunk_mask(x: Tensor) -> None:
    lm.valid_chunk_mask(x, x)  # error: reportCallIssue: Argument missing for parameter "pair_valid"
    lm.valid_chunk_mask(x, x, x, 1.0)  # error: reportCallIssue: Expected 3 positional arguments
    lm.valid_chunk_mask(x, x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "pair_valid" of type "Tensor"


def module_cross_tokenizer_loss(teachers: lm.Teacher | Sequence[lm.Teacher], x: Tensor) -> None:
    lm.CrossTokenizerLoss(1.0)  # error: reportCallIssue: Expected 0 positional arguments
    lm.CrossTokenizerLoss(grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    lm.CrossTokenizerLoss(grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    lm.CrossTokenizerLoss()(x, x)  # error: reportCallIssue: Argument missing for parameter "teachers"
    lm.CrossTokenizerLoss()(x, x, teachers, 1.0)  # error: reportCallIssue: Expected 3 positional arguments
    lm.CrossTokenizerLoss()(x, x, teachers, sequence_gropu=None)  # error: reportCallIssue: No parameter named "sequence_gropu"
    lm.CrossTokenizerLoss()(x, "x", teachers)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "tokens" of type "Tensor" in function "__call__"


def record_cross_tokenizer_terms(terms: lm.CrossTokenizerTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "CrossTokenizerTerms"
    terms.accuracy = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "accuracy" for class "CrossTokenizerTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "CrossTokenizerTerms"
    lm.CrossTokenizerTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "kd", "cross_entropy", "kd_scale", "teacher_kd", "teacher_weight", "num_tokens", "accuracy"
    lm.CrossTokenizerTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def holder_teacher(one: lm.Teacher) -> None:
    print(one.logist)  # error: reportAttributeAccessIssue: Cannot access attribute "logist" for class "Teacher"
    lm.Teacher(logist=1)  # error: reportCallIssue: Argument missing for parameter "logits"


def calls_of_cross_tokenizer_loss(teachers: lm.Teacher | Sequence[lm.Teacher], x: Tensor) -> None:
    lm.cross_tokenizer_loss(x, x)  # error: reportCallIssue: Argument missing for parameter "teachers"
    lm.cross_tokenizer_loss(x, x, teachers, 1.0)  # error: reportCallIssue: Expected 3 positional arguments
    lm.cross_tokenizer_loss(x, x, teachers, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    lm.cross_tokenizer_loss(x, x, teachers, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    lm.cross_tokenizer_loss(x, "x", teachers)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "tokens" of type "Tensor"


def module_distillation_loss(x: Tensor) -> None:
    lm.DistillationLoss(1.0)  # error: reportCallIssue: Expected 0 positional arguments
    lm.DistillationLoss(grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    lm.DistillationLoss(grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    lm.DistillationLoss()(x)  # error: reportCallIssue: Argument missing for parameter "teacher_logits"
    lm.DistillationLoss()(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    lm.DistillationLoss()(x, x, sequence_gropu=None)  # error: reportCallIssue: No parameter named "sequence_gropu"
    lm.DistillationLoss()(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "teacher_logits" of type "Tensor" in function "__call__"


def record_distillation_terms(terms: lm.DistillationTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "DistillationTerms"
    terms.num_tokens = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "num_tokens" for class "DistillationTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "DistillationTerms"
    lm.DistillationTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "divergence", "num_tokens"
    lm.DistillationTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_distillation_loss(x: Tensor) -> None:
    lm.distillation_loss(x)  # error: reportCallIssue: Argument missing for parameter "teacher_logits"
    lm.distillation_loss(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    lm.distillation_loss(x, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    lm.distillation_loss(x, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    lm.distillation_loss(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "teacher_logits" of type "Tensor"


def module_linear_projected_klloss(alignment: lm.Alignment, projection: lm.VocabProjection, x: Tensor) -> None:
    lm.LinearProjectedKLLoss()  # error: reportCallIssue: Argument missing for parameter "projection"
    lm.LinearProjectedKLLoss(projection, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    lm.LinearProjectedKLLoss(projection, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    lm.LinearProjectedKLLoss(projection, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    lm.LinearProjectedKLLoss(projection)(x, x, alignment=alignment)  # error: reportCallIssue: Argument missing for parameter "teacher_logits"
    lm.LinearProjectedKLLoss(projection)(x, x, x, 1.0, alignment=alignment)  # error: reportCallIssue: Expected 3 positional arguments
    lm.LinearProjectedKLLoss(projection)(x, x, x, alignment=alignment, sequence_gropu=None)  # error: reportCallIssue: No parameter named "sequence_gropu"
    lm.LinearProjectedKLLoss(projection)(x, x, "x", alignment=alignment)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "teacher_logits" of type "Tensor" in function "__call__"


def calls_of_linear_projected_kl_loss(alignment: lm.Alignment, projection: lm.VocabProjection, x: Tensor) -> None:
    lm.linear_projected_kl_loss(x, x, alignment=alignment, projection=projection)  # error: reportCallIssue: Argument missing for parameter "teacher_logits"
    lm.linear_projected_kl_loss(x, x, x, 1.0, alignment=alignment, projection=projection)  # error: reportCallIssue: Expected 3 positional arguments
    lm.linear_projected_kl_loss(x, x, x, alignment=alignment, projection=projection, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    lm.linear_projected_kl_loss(x, x, x, alignment=alignment, projection=projection, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    lm.linear_projected_kl_loss(x, x, "x", alignment=alignment, projection=projection)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "teacher_logits" of type "Tensor"


def module_next_token_loss(x: Tensor) -> None:
    lm.NextTokenLoss(1.0)  # error: reportCallIssue: Expected 0 positional arguments
    lm.NextTokenLoss(grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    lm.NextTokenLoss(grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    lm.NextTokenLoss()(x)  # error: reportCallIssue: Argument missing for parameter "tokens"
    lm.NextTokenLoss()(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    lm.NextTokenLoss()(x, x, sequence_gropu=None)  # error: reportCallIssue: No parameter named "sequence_gropu"
    lm.NextTokenLoss()(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "tokens" of type "Tensor" in function "__call__"


def record_next_token_terms(terms: lm.NextTokenTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "NextTokenTerms"
    terms.accuracy = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "accuracy" for class "NextTokenTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "NextTokenTerms"
    lm.NextTokenTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "num_tokens", "accuracy"
    lm.NextTokenTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_next_token_loss(x: Tensor) -> None:
    lm.next_token_loss(x)  # error: reportCallIssue: Argument missing for parameter "tokens"
    lm.next_token_loss(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    lm.next_token_loss(x, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    lm.next_token_loss(x, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    lm.next_token_loss(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "tokens" of type "Tensor"


def holder_vocab_partition(one: lm.VocabPartition) -> None:
    print(one.common_studetn)  # error: reportAttributeAccessIssue: Cannot access attribute "common_studetn" for class "VocabPartition"
    lm.VocabPartition(common_studetn=1)  # error: reportCallIssue: Arguments missing for parameters "common_student", "common_teacher", "rest_student", "rest_teacher"


def calls_of_vocab_partition(projection: lm.VocabProjection) -> None:
    lm.vocab_partition(rule='strict')  # error: reportCallIssue: Argument missing for parameter "projection"
    lm.vocab_partition(projection, 1.0, rule='strict')  # error: reportCallIssue: Expected 1 positional argument


def module_partitioned_loss(alignment: lm.Alignment, partition: lm.VocabPartition, x: Tensor) -> None:
    lm.PartitionedLoss()  # error: reportCallIssue: Argument missing for parameter "partition"
    lm.PartitionedLoss(partition, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    lm.PartitionedLoss(partition, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    lm.PartitionedLoss(partition, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    lm.PartitionedLoss(partition)(x, alignment=alignment)  # error: reportCallIssue: Argument missing for parameter "teacher_logits"
    lm.PartitionedLoss(partition)(x, x, 1.0, alignment=alignment)  # error: reportCallIssue: Expected 2 positional arguments
    lm.PartitionedLoss(partition)(x, x, alignment=alignment, sequence_gropu=None)  # error: reportCallIssue: No parameter named "sequence_gropu"
    lm.PartitionedLoss(partition)(x, "x", alignment=alignment)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "teacher_logits" of type "Tensor" in function "__call__"


def record_partitioned_terms(terms: lm.PartitionedTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "PartitionedTerms"
    terms.common_teacher_mass = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "common_teacher_mass" for class "PartitionedTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "PartitionedTerms"
    lm.PartitionedTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "kl_common", "l1_tail", "num_chunks", "top1_agreement", "common_teacher_mass"
    lm.PartitionedTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_partitioned_loss(alignment: lm.Alignment, partition: lm.VocabPartition, x: Tensor) -> None:
    lm.partitioned_loss(x, alignment=alignment, partition=partition)  # error: reportCallIssue: Argument missing for parameter "teacher_logits"
    lm.partitioned_loss(x, x, 1.0, alignment=alignment, partition=partition)  # error: reportCallIssue: Expected 2 positional arguments
    lm.partitioned_loss(x, x, alignment=alignment, partition=partition, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    lm.partitioned_loss(x, x, alignment=alignment, partition=partition, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    lm.partitioned_loss(x, "x", alignment=alignment, partition=partition)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "teacher_logits" of type "Tensor"


def module_projected_klloss(alignment: lm.Alignment, projection: lm.VocabProjection, x: Tensor) -> None:
    lm.ProjectedKLLoss()  # error: reportCallIssue: Argument missing for parameter "projection"
    lm.ProjectedKLLoss(projection, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    lm.ProjectedKLLoss(projection, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    lm.ProjectedKLLoss(projection, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    lm.ProjectedKLLoss(projection)(x, alignment=alignment)  # error: reportCallIssue: Argument missing for parameter "teacher_logits"
    lm.ProjectedKLLoss(projection)(x, x, 1.0, alignment=alignment)  # error: reportCallIssue: Expected 2 positional arguments
    lm.ProjectedKLLoss(projection)(x, x, alignment=alignment, sequence_gropu=None)  # error: reportCallIssue: No parameter named "sequence_gropu"
    lm.ProjectedKLLoss(projection)(x, "x", alignment=alignment)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "teacher_logits" of type "Tensor" in function "__call__"


def record_projected_klterms(terms: lm.ProjectedKLTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "ProjectedKLTerms"
    terms.uncovered_teacher_mass = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "uncovered_teacher_mass" for class "ProjectedKLTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "ProjectedKLTerms"
    lm.ProjectedKLTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "kl", "num_chunks", "top1_agreement", "uncovered_teacher_mass"
    lm.ProjectedKLTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_count_valid_chunks(alignment: lm.Alignment) -> None:
    lm.count_valid_chunks()  # error: reportCallIssue: Argument missing for parameter "alignment"
    lm.count_valid_chunks(alignment, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    lm.count_valid_chunks(alignment, sequence_gropu=None)  # error: reportCallIssue: No parameter named "sequence_gropu"


def calls_of_projected_kl_loss(alignment: lm.Alignment, projection: lm.VocabProjection, x: Tensor) -> None:
    lm.projected_kl_loss(x, alignment=alignment, projection=projection)  # error: reportCallIssue: Argument missing for parameter "teacher_logits"
    lm.projected_kl_loss(x, x, 1.0, alignment=alignment, projection=projection)  # error: reportCallIssue: Expected 2 positional arguments
    lm.projected_kl_loss(x, x, alignment=alignment, projection=projection, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    lm.projected_kl_loss(x, x, alignment=alignment, projection=projection, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    lm.projected_kl_loss(x, "x", alignment=alignment, projection=projection)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "teacher_logits" of type "Tensor"


def holder_vocab_projection(one: lm.VocabProjection) -> None:
    print(one.student_vocba)  # error: reportAttributeAccessIssue: Cannot access attribute "student_vocba" for class "VocabProjection"
    lm.VocabProjection(student_vocba=1)  # error: reportCallIssue: Arguments missing for parameters "student_vocab", "teacher_vocab", "student_pointers", "student_columns", "student_weights", "teacher_pointers", "teacher_rows", "teacher_weights"


def holder_shared_logits_handle(one: lm.SharedLogitsHandle) -> None:
    print(one.processs)  # error: reportAttributeAccessIssue: Cannot access attribute "processs" for class "SharedLogitsHandle"
    lm.SharedLogitsHandle(processs=1)  # error: reportCallIssue: Arguments missing for parameters "process", "descriptor", "token", "shape", "dtype", "cuda"


def module_targeted_variance_loss(x: Tensor) -> None:
    lm.TargetedVarianceLoss(1.0)  # error: reportCallIssue: Expected 0 positional arguments
    lm.TargetedVarianceLoss(targte=None)  # error: reportCallIssue: No parameter named "targte"
    lm.TargetedVarianceLoss()()  # error: reportCallIssue: Argument missing for parameter "weight"
    lm.TargetedVarianceLoss()(x, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    lm.TargetedVarianceLoss()(x, vocab_gropu=None)  # error: reportCallIssue: No parameter named "vocab_gropu"
    lm.TargetedVarianceLoss()("x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "weight" of type "Tensor" in function "__call__"


def record_targeted_variance_terms(terms: lm.TargetedVarianceTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "TargetedVarianceTerms"
    terms.variance = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "variance" for class "TargetedVarianceTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "TargetedVarianceTerms"
    lm.TargetedVarianceTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "squared_error", "variance"
    lm.TargetedVarianceTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_targeted_variance_loss(x: Tensor) -> None:
    lm.targeted_variance_loss()  # error: reportCallIssue: Argument missing for parameter "weight"
    lm.targeted_variance_loss(x, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    lm.targeted_variance_loss(x, vocab_gropu=None)  # error: reportCallIssue: No parameter named "vocab_gropu"
    lm.targeted_variance_loss("x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "weight" of type "Tensor"


def module_universal_logit_loss(alignment: lm.Alignment, x: Tensor) -> None:
    lm.UniversalLogitLoss(1.0)  # error: reportCallIssue: Expected 0 positional arguments
    lm.UniversalLogitLoss(grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    lm.UniversalLogitLoss(grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    lm.UniversalLogitLoss()(x, alignment=alignment)  # error: reportCallIssue: Argument missing for parameter "teacher_logits"
    lm.UniversalLogitLoss()(x, x, 1.0, alignment=alignment)  # error: reportCallIssue: Expected 2 positional arguments
    lm.UniversalLogitLoss()(x, x, alignment=alignment, sequence_gropu=None)  # error: reportCallIssue: No parameter named "sequence_gropu"
    lm.UniversalLogitLoss()(x, "x", alignment=alignment)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "teacher_logits" of type "Tensor" in function "__call__"


def record_universal_logit_terms(terms: lm.UniversalLogitTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "UniversalLogitTerms"
    terms.num_chunks = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "num_chunks" for class "UniversalLogitTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "UniversalLogitTerms"
    lm.UniversalLogitTerms(loss=x)  # error: reportCallIssue: Argument missing for parameter "num_chunks"
    lm.UniversalLogitTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_align_in_order(x: Tensor) -> None:
    lm.align_in_order(x)  # error: reportCallIssue: Argument missing for parameter "teacher_mask"
    lm.align_in_order(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    lm.align_in_order(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "teacher_mask" of type "Tensor"


def calls_of_universal_logit_loss(alignment: lm.Alignment, x: Tensor) -> None:
    lm.universal_logit_loss(x, alignment=alignment)  # error: reportCallIssue: Argument missing for parameter "teacher_logits"
    lm.universal_logit_loss(x, x, 1.0, alignment=alignment)  # error: reportCallIssue: Expected 2 positional arguments
    lm.universal_logit_loss(x, x, alignment=alignment, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    lm.universal_logit_loss(x, x, alignment=alignment, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    lm.universal_logit_loss(x, "x", alignment=alignment)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "teacher_logits" of type "Tensor"
