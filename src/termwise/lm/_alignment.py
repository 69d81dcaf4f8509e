"""Alignment of two tokenizations of one text: which tokens of each side make up which chunk."""

import dataclasses
import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .. import _groups
from .._contract import contract
from .._groups import ProcessGroup

Spans: TypeAlias = Sequence[Sequence[tuple[int, int]]]
_Token: TypeAlias = tuple[int, int, int, int]  # start, stop, side, index


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """Chunks of a batch: spans of text that both tokenizers cut at the same two places.

    A chunk is a pair: the student's tokens of a span of text, and the teacher's. The ids name the
    chunk of each *token*. Logit t predicts token t + 1, so a loss on logits shifts them by one
    itself; a chunk that holds only token 0 becomes empty by that and does not count.

    Construction compares shapes, dtypes and devices, and never waits for the device; what the
    tensors hold is looked at by [`check`][termwise.lm.Alignment.check] alone.
    """

    student_chunk_id: Int[Tensor, "batch student_time"]
    """Int[Tensor, "batch student_time"]: the chunk of each token of the student, int64, -1 for
    none."""
    teacher_chunk_id: Int[Tensor, "batch teacher_time"]
    """Int[Tensor, "batch teacher_time"]: the chunk of each token of the teacher, int64, -1 for
    none."""
    pair_valid: Bool[Tensor, "batch chunks"]
    """Bool[Tensor, "batch chunks"]: whether the chunk is one. Samples with fewer are padded with
    False."""
    pair_exact: Bool[Tensor, "batch chunks"]
    """Bool[Tensor, "batch chunks"]: whether the texts of the two sides are equal, which a fuzzy
    aligner cannot promise."""

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            value: object = getattr(self, name)
            if not isinstance(value, Tensor) or value.ndim != 2 or value.dtype != dtype:
                raise ValueError(f"Alignment needs {name} of 2 axes in {dtype}, got {_show(value)}")
        shapes = {name: list(getattr(self, name).shape) for name in _DTYPES}
        if (
            self.pair_valid.shape != self.pair_exact.shape
            or len({s[0] for s in shapes.values()}) > 1
        ):
            raise ValueError(
                "Alignment needs one batch size, and pair_valid and pair_exact of one shape, got "
                + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            )
        if len({getattr(self, name).device for name in _DTYPES}) > 1:
            raise ValueError("Alignment needs its tensors on one device")

    @property
    def max_chunks(self) -> int:
        """Number of chunks that a sample has room for."""
        return self.pair_valid.shape[1]

    def to(self, device: torch.device | str) -> Self:
        """Give the same alignment on a device."""
        return dataclasses.replace(
            self, **{name: getattr(self, name).to(device) for name in _DTYPES}
        )

    def check(self) -> Self:
        """Refuse ids below -1 or from `max_chunks` up; give the alignment itself back.

        This waits for the device: call it where batches are made, not in the training step.

        Raises:
            ValueError: an id is out of range.
        """
        for name in ("student_chunk_id", "teacher_chunk_id"):
            ids: Tensor = getattr(self, name)
            if ids.numel() and (int(ids.min()) < -1 or int(ids.max()) >= self.max_chunks):
                raise ValueError(f"Alignment needs {out_of_range(name, ids, self.max_chunks)}")
        return self

    @contract
    def where(
        self,
        *,
        student_mask: Bool[Tensor, "batch student_time"] | None = None,
        teacher_mask: Bool[Tensor, "batch teacher_time"] | None = None,
        sequence_group: ProcessGroup | None = None,
    ) -> Self:
        """Keep the chunks of which every token counts: the others are no longer `pair_valid`.

        A chunk that straddles a completion's first token holds a token of the prompt, and goes.
        Nothing waits for the device.

        Args:
            student_mask (Bool[Tensor, "batch student_time"] | None): student tokens that count.
                None: all.
            teacher_mask (Bool[Tensor, "batch teacher_time"] | None): the same of the teacher.
            sequence_group: ranks that hold other positions. None: this rank alone, nothing is sent.

        Raises:
            ContractError: a dtype does not fit.
            ValueError: a mask is of another size, or an id is out of range.

        Examples:
            >>> import torch
            >>> from termwise.lm import align_spans
            >>> spans = [[(0, 0), (0, 1), (1, 2), (2, 3)]]
            >>> completion = torch.tensor([[False, False, True, True]])
            >>> align_spans(spans, spans).where(student_mask=completion).pair_valid
            tensor([[False,  True,  True]])
        """
        name = "Alignment.where"
        left_out = torch.zeros_like(self.pair_valid, dtype=torch.int64)
        for side, mask in (("student", student_mask), ("teacher", teacher_mask)):
            if mask is None:
                continue
            ids: Tensor = getattr(self, f"{side}_chunk_id")
            if mask.shape != ids.shape:
                raise ValueError(
                    f"{name} needs {side}_mask of {list(ids.shape)}, got {list(mask.shape)}"
                )
            ids = ids.masked_fill(mask, -1)
            left_out = left_out + chunk_sizes(name, f"{side}_chunk_id", ids, self.max_chunks)
        if sequence_group is not None:
            left_out = _groups.all_reduce(left_out, sequence_group.group_name)
        return dataclasses.replace(self, pair_valid=self.pair_valid & (left_out == 0))

    @classmethod
    def from_flat(cls, mapping: Mapping[str, object], prefix: str = "alignment_") -> Self:
        """Take an alignment out of a flat batch, such as NeMo-RL's collator makes.

        Args:
            mapping: a batch that holds, each under `prefix` and its name, the tensors
                `student_chunk_id`, `teacher_chunk_id`, `pair_valid` and `pair_is_correct`. Other
                keys are left alone.
            prefix: what the keys begin with.

        Raises:
            ValueError: a key is missing, or a tensor does not fit.
        """
        keys = {
            "student_chunk_id": f"{prefix}student_chunk_id",
            "teacher_chunk_id": f"{prefix}teacher_chunk_id",
            "pair_valid": f"{prefix}pair_valid",
            "pair_exact": f"{prefix}pair_is_correct",
        }
        missing = [key for key in keys.values() if key not in mapping]
        if missing:
            raise ValueError(f"Alignment.from_flat needs the keys {', '.join(missing)}")
        found: dict[str, Any] = {name: mapping[key] for name, key in keys.items()}
        return cls(**found)  # what they are is checked there


_DTYPES = {
    "student_chunk_id": torch.int64,
    "teacher_chunk_id": torch.int64,
    "pair_valid": torch.bool,
    "pair_exact": torch.bool,
}

torch.export.register_dataclass(Alignment, serialized_type_name="termwise.lm.Alignment")


def chunk_sizes(name: str, which: str, ids: Tensor, max_chunks: int) -> Tensor:
    """Count the tokens of each chunk, [batch, max_chunks]; name ids that are out of range.

    They are found by the failure of the count, which on the CPU is no crash, so that nothing waits
    for a device to learn of them.
    """
    counts = ids.new_zeros(ids.shape[0], max_chunks + 1)
    try:
        return counts.scatter_add(1, ids + 1, torch.ones_like(ids))[:, 1:]
    except (IndexError, RuntimeError) as error:
        raise ValueError(
            f"{name} needs an alignment with {out_of_range(which, ids, max_chunks)}; "
            "Alignment.check() finds this where batches are made"
        ) from error


def out_of_range(which: str, ids: Tensor, max_chunks: int) -> str:
    """Say which ids were needed, and which came."""
    found = f"{int(ids.min())} to {int(ids.max())}"
    return f"{which} from -1 to {max_chunks - 1}, got {found}"


@contract
def align_spans(
    student_offsets: Spans, teacher_offsets: Spans, *, max_chunks: int | None = None
) -> Alignment:
    """Align two tokenizations of each text by where their tokens lie in it.

    A chunk is the smallest span of text that no token of either side crosses the ends of. One
    pass over the tokens, in Python: O(student_time + teacher_time) for each sample.

    Args:
        student_offsets: for each sample, the (start, stop) of each token in the text, as fast
            tokenizers return them (`return_offsets_mapping=True`, `Encoding.offsets`). Bytes or
            characters, the same on both sides. A token with start = stop (special tokens,
            padding) belongs to no chunk. Tokens that share a character, as tokens of its bytes
            do in offsets of characters, are in one chunk. Samples may differ in length.
        teacher_offsets: the same of the teacher.
        max_chunks: how many chunks to make room for, so that every batch has one shape. None: as
            many as the sample with the most has.

    Returns:
        An alignment on the CPU, shorter samples padded with -1 and False. `pair_exact` is False
        where one side leaves out some of the text: a tokenizer that trims spaces from offsets, or
        drops characters. Text that one side alone has tokens for belongs to no chunk.

    Raises:
        ValueError: samples of the two sides differ in number, a stop lies before its start, tokens
            are not in the order of the text, or a sample has more than max_chunks.

    Examples:
        >>> from termwise.lm import align_spans
        >>> student, teacher = [[(0, 0), (0, 2), (2, 5)]], [[(0, 1), (1, 2), (2, 4), (4, 5)]]
        >>> alignment = align_spans(student, teacher)
        >>> alignment.student_chunk_id.tolist(), alignment.teacher_chunk_id.tolist()
        ([[-1, 0, 1]], [[0, 0, 1, 1]])
    """
    if len(student_offsets) != len(teacher_offsets):
        raise ValueError(
            "align_spans needs as many samples of the student as of the teacher, "
            f"got {len(student_offsets)} and {len(teacher_offsets)}"
        )
    pairs = zip(student_offsets, teacher_offsets, strict=True)
    aligned = [_align(*pair, sample) for sample, pair in enumerate(pairs)]
    most = max((len(exact) for _, _, exact in aligned), default=0)
    chunks = most if max_chunks is None else max_chunks
    if most > chunks:
        raise ValueError(f"align_spans needs max_chunks >= {most} for these texts, got {chunks}")
    students, teachers, exact = zip(*aligned, strict=True) if aligned else ((), (), ())
    return Alignment(
        student_chunk_id=_padded(students, max(map(len, students), default=0), -1, torch.int64),
        teacher_chunk_id=_padded(teachers, max(map(len, teachers), default=0), -1, torch.int64),
        pair_valid=_padded([[True] * len(one) for one in exact], chunks, False, torch.bool),
        pair_exact=_padded(exact, chunks, False, torch.bool),
    )


def _align(
    student: Sequence[tuple[int, int]], teacher: Sequence[tuple[int, int]], sample: int
) -> tuple[list[int], list[int], list[bool]]:
    """Give the chunk of each token of either side, and whether each chunk is exact."""
    sides = ([-1] * len(student), [-1] * len(teacher))
    exact: list[bool] = []
    tokens = heapq.merge(_tokens(student, 0, sample), _tokens(teacher, 1, sample))
    for group in _overlapping(tokens):
        covered: tuple[list[list[int]], list[list[int]]] = ([], [])
        for start, stop, side, _ in group:
            _cover(covered[side], start, stop)
        if all(covered):
            for _, _, side, index in group:
                sides[side][index] = len(exact)
            exact.append(covered[0] == covered[1])
    return *sides, exact


def _tokens(offsets: Sequence[tuple[int, int]], side: int, sample: int) -> Iterator[_Token]:
    """Yield the tokens that have a span, and refuse those that are out of order."""
    last = 0
    for index, (start, stop) in enumerate(offsets):
        if start == stop:
            continue
        if not last <= start < stop:
            raise ValueError(
                "align_spans needs spans from 0 up, in the order of the text, got "
                f"({start}, {stop}) at token {index} of the {('student', 'teacher')[side]}'s "
                f"sample {sample}"
            )
        last = start
        yield start, stop, side, index


def _overlapping(tokens: Iterator[_Token]) -> Iterator[list[_Token]]:
    """Cut tokens, which come in the order of their starts, where no token reaches across."""
    group: list[_Token] = []
    end = 0
    for token in tokens:
        if group and token[0] >= end:
            yield group
            group = []
        group.append(token)
        end = max(end, token[1])
    if group:
        yield group


def _cover(spans: list[list[int]], start: int, stop: int) -> None:
    """Add a span to disjoint ones, of which none begins later."""
    if spans and start <= spans[-1][1]:
        spans[-1][1] = max(spans[-1][1], stop)
    else:
        spans.append([start, stop])


def _padded(rows: Sequence[Sequence[int]], width: int, fill: int, dtype: torch.dtype) -> Tensor:
    filled = [[*row, *[fill] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=dtype).view(len(rows), width)


def _show(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} in {value.dtype}"
    return type(value).__name__
