"""Teachers, and the loss that compares a student with each kind of teacher."""

import dataclasses
from typing import Any, Self, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._groups import GradReduction, ProcessGroup
from ._alignment import Alignment
from ._distillation import distillation_loss
from ._divergences import KLDivergence, TeacherMean
from ._partitioned import partitioned_loss
from ._projected_kl import projected_kl_loss
from ._universal_logit import universal_logit_loss
from ._vocab_partition import VocabPartition
from ._vocab_projection import VocabProjection


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Teacher:
    """A teacher's logits of a batch, and how its tokens relate to the student's.

    Its fields determine the loss:

    | fields | compared by |
    |---|---|
    | logits alone | [`distillation_loss`][termwise.lm.distillation_loss]: the student's tokenizer |
    | alignment and projection | [`projected_kl_loss`][termwise.lm.projected_kl_loss] |
    | alignment and partition | [`partitioned_loss`][termwise.lm.partitioned_loss] |
    | alignment | [`universal_logit_loss`][termwise.lm.universal_logit_loss] |

    Raises:
        ValueError: both a projection and a partition, or one of them without an alignment.
    """

    logits: Float[Tensor, "batch teacher_time teacher_vocab"]
    """Float[Tensor, "batch teacher_time teacher_vocab"]: unnormalized, a row for each position. No
    gradient."""
    alignment: Alignment | None = None
    """The chunk of each token. None: the teacher has the student's tokens."""
    projection: VocabProjection | None = None
    """From the student's vocabulary to the teacher's."""
    partition: VocabPartition | None = None
    """The tokens that are in both vocabularies, and the others."""
    tokens: Int[Tensor, "batch teacher_time"] | None = None
    """Int[Tensor, "batch teacher_time"] | None: the teacher's own tokens, negative if one does not
    count; for scores and selection, if the teacher has an alignment."""
    weight: float = 1.0
    """Factor of its divergence, or its weight in an average of logits. A teacher of weight 0 is
    left out, even if its divergence is infinite."""
    normalizer: Float[Tensor, ""] | Int[Tensor, ""] | float | None = None
    """Number of chunks to divide by, if it has an alignment; see
    [`count_valid_chunks`][termwise.lm.count_valid_chunks]. None: those of this batch."""

    def __post_init__(self) -> None:
        if self.projection is not None and self.partition is not None:
            raise ValueError("Teacher needs a projection or a partition, got both")
        for name in ("projection", "partition"):
            if getattr(self, name) is not None and self.alignment is None:
                raise ValueError(f"Teacher needs an alignment beside its {name}")

    def to(self, device: torch.device | str) -> Self:
        """Return the teacher on a device."""
        moved: dict[str, Any] = {
            field.name: value
            if value is None or isinstance(value, float | int)
            else value.to(device)
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }
        return dataclasses.replace(self, **moved)


torch.export.register_dataclass(Teacher, serialized_type_name="termwise.lm.Teacher")


class Groups(TypedDict):
    """The process groups of a loss, and how gradients are combined over them."""

    batch_group: ProcessGroup | None
    vocab_group: ProcessGroup | None
    sequence_group: ProcessGroup | None
    grad_reduction: GradReduction


class _OverChunks(TypedDict):
    """Arguments of every loss over chunks."""

    alignment: Alignment
    temperature: float
    mask: Tensor
    exact_only: bool
    normalizer: Tensor | float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Settings for the comparison with all teachers of a batch."""

    temperature: float
    divergence: KLDivergence
    teacher_top_k: int | None
    columns_top_k: int | None
    tail_top_k: int
    teacher_mean: TeacherMean
    exact_only: bool
    mask: Tensor
    """[batch, time], student tokens that count."""
    normalizer: Tensor | float | None
    """For teachers without an alignment; the others have their own."""
    student_vocab: int | None
    groups: Groups

    def loss(self, student_logits: Tensor, teacher: Teacher) -> Tensor:
        """Return the divergence from one teacher."""
        logits, alignment = teacher.logits, teacher.alignment
        if alignment is None:
            few = self.teacher_top_k
            return distillation_loss(
                student_logits,
                logits,
                divergence=self.divergence,
                temperature=self.temperature,
                teacher_top_k=None if few is None or few >= student_logits.shape[2] else few,
                mask=self.mask,
                normalizer=self.normalizer,
                **self.groups,
            ).loss
        shared: _OverChunks = {
            "alignment": alignment,
            "temperature": self.temperature,
            "mask": self.mask,
            "exact_only": self.exact_only,
            "normalizer": teacher.normalizer,
        }
        if teacher.projection is not None:
            return projected_kl_loss(
                student_logits,
                logits,
                projection=teacher.projection,
                divergence=self.divergence,
                columns_top_k=self.columns_top_k,
                teacher_mean=self.teacher_mean,
                **shared,
                **self.groups,
            ).loss
        if teacher.partition is not None:
            return partitioned_loss(
                student_logits,
                logits,
                partition=teacher.partition,
                tail_top_k=self.tail_top_k,
                divergence=self.divergence,
                **shared,
                **self.groups,
            ).loss
        return universal_logit_loss(
            student_logits, logits, student_vocab=self.student_vocab, **shared, **self.groups
        ).loss
