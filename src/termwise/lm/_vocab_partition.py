"""A partition of two vocabularies into shared tokens and the rest of each."""

import dataclasses
from typing import Literal, Self

import torch
from jaxtyping import Int
from torch import Tensor

from .._contract import contract
from ._vocab_projection import VocabProjection


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class VocabPartition:
    """Token ids of both vocabularies, each in exactly one tensor, int64."""

    common_student: Int[Tensor, " common"]
    """Int[Tensor, " common"]: student tokens that have a partner, ascending."""
    common_teacher: Int[Tensor, " common"]
    """Int[Tensor, " common"]: their partners, in the same order."""
    rest_student: Int[Tensor, " rest_student"]
    """Int[Tensor, " rest_student"]: all other student tokens, ascending."""
    rest_teacher: Int[Tensor, " rest_teacher"]
    """Int[Tensor, " rest_teacher"]: all other teacher tokens, ascending."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value: Tensor = getattr(self, field.name)
            if value.ndim != 1 or value.dtype != torch.int64:
                raise ValueError(
                    f"VocabPartition needs {field.name} of 1 axis in torch.int64, "
                    f"got {list(value.shape)} in {value.dtype}"
                )
        if self.common_student.shape != self.common_teacher.shape:
            raise ValueError(
                "VocabPartition needs common_student and common_teacher of one length, got "
                f"{len(self.common_student)} and {len(self.common_teacher)}"
            )

    def __repr__(self) -> str:
        """Show the sizes."""
        common, students, teachers = (
            len(ids) for ids in (self.common_student, self.rest_student, self.rest_teacher)
        )
        return f"VocabPartition(common={common}, rest_student={students}, rest_teacher={teachers})"

    def to(self, device: torch.device | str) -> Self:
        """Return the partition on a device."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **tensors)


torch.export.register_dataclass(VocabPartition, serialized_type_name="termwise.lm.VocabPartition")


@contract
def vocab_partition(
    projection: VocabProjection, *, rule: Literal["strict", "relaxed"]
) -> VocabPartition:
    """Pair the tokens that both vocabularies have, by a projection between them.

    - `"strict"`: a student token whose only entry has weight 1. If several map to one teacher
      token, the lowest student token is used.
    - `"relaxed"`: a student token whose largest weight (of equal ones, that of the lowest teacher
      token) is at least 0.6. If several map to one teacher token, the one with the largest weight
      is used, then the lowest student token.

    Time and memory are proportional to the entries and the vocabularies. Synchronizes with the
    device: call it once, not in the training step.

    Args:
        projection: the projection between the vocabularies.
        rule: which tokens to pair.

    Returns:
        A partition that contains every token of both vocabularies once.

    References:
        `build_exact_token_map` in NeMo-RL (https://github.com/NVIDIA-NeMo/RL,
        nemo_rl/algorithms/x_token/loss_utils.py). It needs a second column to read "no second
        mapping" from; ours takes a projection with one entry a row. It leaves open which of a
        row's equal weights is the largest.

    Examples:
        >>> from termwise.lm import VocabProjection, vocab_partition
        >>> pairs = {(0, 1): 1.0, (1, 0): 0.9, (1, 2): 0.1, (2, 1): 1.0}
        >>> projection = VocabProjection.from_pairs(pairs, student_vocab=3, teacher_vocab=3)
        >>> vocab_partition(projection, rule="strict").common_student
        tensor([0])
        >>> vocab_partition(projection, rule="relaxed").common_teacher
        tensor([1, 0])
    """
    students, teachers = projection.student_vocab, projection.teacher_vocab
    counts = projection.student_pointers.diff()
    student_ids = torch.arange(students, device=counts.device)
    rows, weights = student_ids.repeat_interleave(counts), projection.student_weights
    # The largest weight of each row, and the first entry that has it.
    top_weights = weights.new_full((students,), -torch.inf).scatter_reduce(0, rows, weights, "amax")
    entries = torch.arange(len(weights), device=weights.device)
    is_top = weights == top_weights[rows]
    top = entries.new_full((students,), len(weights)).scatter_reduce(
        0, rows[is_top], entries[is_top], "amin"
    )
    exact = (counts == 1) & (top_weights == 1) if rule == "strict" else top_weights >= 0.6

    asking = student_ids[exact]
    asked = projection.student_columns[top[exact]]
    if rule == "relaxed":
        best = weights.new_full((teachers,), -torch.inf)
        best = best.scatter_reduce(0, asked, top_weights[asking], "amax")
        is_best = top_weights[asking] == best[asked]
        asking, asked = asking[is_best], asked[is_best]
    winner = student_ids.new_full((teachers,), students).scatter_reduce(0, asked, asking, "amin")
    won = winner[asked] == asking
    common_student, common_teacher = asking[won], asked[won]
    return VocabPartition(
        common_student=common_student,
        common_teacher=common_teacher,
        rest_student=_others(common_student, students),
        rest_teacher=_others(common_teacher, teachers),
    )


def _others(ids: Tensor, count: int) -> Tensor:
    is_other = torch.ones(count, dtype=torch.bool, device=ids.device)
    is_other[ids] = False
    return is_other.nonzero()[:, 0]
