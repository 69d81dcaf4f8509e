"""Alignment of two tokenizations of a text: the chunk of each token of both models."""

import dataclasses
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self, TypeAlias, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .. import _groups
from .._contract import contract
from .._groups import ProcessGroup

Spans: TypeAlias = Sequence[Sequence[Sequence[int]]]
Numbers: TypeAlias = Sequence[Sequence[int | None]]
StudentNumbers: TypeAlias = Int[Tensor, "batch student_time"] | Numbers
TeacherNumbers: TypeAlias = Int[Tensor, "batch teacher_time"] | Numbers
Text: TypeAlias = str | bytes
_Token: TypeAlias = tuple[int, int, int, int]  # start, stop, side, index
_Part: TypeAlias = tuple[int, int]  # document, sequence
_Chunk: TypeAlias = tuple[list[int], list[int], bool]  # tokens of both sides, whether exact


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """Chunks of a batch: spans of text at whose start and end both tokenizers have a boundary.

    A chunk pairs the student's tokens of a span of text with the teacher's. The ids give the chunk
    of each *token*. Logit t predicts token t + 1, so losses shift the ids by one; a chunk that
    contains only token 0 becomes empty by that and does not count.

    The constructor checks shapes, dtypes and devices, without synchronizing; only
    [`check`][termwise.lm.Alignment.check] checks values.
    """

    student_chunk_id: Int[Tensor, "batch student_time"]
    """Int[Tensor, "batch student_time"]: the chunk of each token of the student, int64, -1 for
    none."""
    teacher_chunk_id: Int[Tensor, "batch teacher_time"]
    """Int[Tensor, "batch teacher_time"]: the chunk of each token of the teacher, int64, -1 for
    none."""
    pair_valid: Bool[Tensor, "batch chunks"]
    """Bool[Tensor, "batch chunks"]: whether the chunk exists. Samples with fewer chunks are padded
    with False."""
    pair_exact: Bool[Tensor, "batch chunks"]
    """Bool[Tensor, "batch chunks"]: whether both texts are equal, which a fuzzy aligner cannot
    guarantee, or both are special tokens with the same role."""

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
        """Number of chunks that a sample can have."""
        return self.pair_valid.shape[1]

    def to(self, device: torch.device | str) -> Self:
        """Return the alignment on a device."""
        return dataclasses.replace(
            self, **{name: getattr(self, name).to(device) for name in _DTYPES}
        )

    def check(self) -> Self:
        """Return the alignment itself, or raise an error for ids out of range.

        Synchronizes with the device: call it where batches are made, not in the training step.

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
        """Return the alignment with `pair_valid` False for chunks with a token that does not count.

        A chunk with tokens of both a prompt and its completion is excluded. Does not synchronize
        with the device.

        Args:
            student_mask (Bool[Tensor, "batch student_time"] | None): student tokens that count.
                None: all.
            teacher_mask (Bool[Tensor, "batch teacher_time"] | None): the same for the teacher.
            sequence_group: process group whose ranks hold different positions. None: no
                communication.

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
        """Return the alignment in a flat batch, such as that of NeMo-RL's collator.

        Args:
            mapping: a batch with the tensors `student_chunk_id`, `teacher_chunk_id`, `pair_valid`
                and `pair_is_correct`, under these names after `prefix`. Other keys are ignored.
            prefix: prefix of the keys.

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
    """Count the tokens of each chunk, [batch, max_chunks]; raise an error for ids out of range.

    They are detected by the failure of the count on the CPU, so that no device has to be
    synchronized.
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
    """Return which ids were expected, and which were found."""
    found = f"{int(ids.min())} to {int(ids.max())}"
    return f"{which} from -1 to {max_chunks - 1}, got {found}"


@contract
def align_spans(
    student_offsets: Int[Tensor, "batch student_time 2"] | Spans,
    teacher_offsets: Int[Tensor, "batch teacher_time 2"] | Spans,
    *,
    max_chunks: int | None = None,
    student_texts: Sequence[Text | Sequence[Text]] | None = None,
    teacher_texts: Sequence[Text | Sequence[Text]] | None = None,
    special: Mapping[int, int] | None = None,
    student_tokens: Int[Tensor, "batch student_time"] | Numbers | None = None,
    teacher_tokens: Int[Tensor, "batch teacher_time"] | Numbers | None = None,
    documents: tuple[StudentNumbers, TeacherNumbers] | None = None,
    sequence_ids: tuple[StudentNumbers, TeacherNumbers] | None = None,
) -> Alignment:
    """Align two tokenizations of each text by the offsets of their tokens.

    A chunk is a smallest span of text whose ends no token of either model crosses. The algorithm is
    one pass over the tokens, in Python: O(student_time + teacher_time) for each sample. Tensors are
    read on the host: call it where batches are created, not in the training step.

    Args:
        student_offsets (Int[Tensor, "batch student_time 2"] | Spans): for each sample, the (start,
            stop) of each token in the text, as fast tokenizers return them
            (`return_offsets_mapping=True`, `Encoding.offsets`): a tensor, or lists of pairs. Bytes
            or characters, the same on both sides. A token with start = stop (special tokens,
            padding) belongs to no chunk. Tokens that share a character, such as tokens of its
            bytes, are in the same chunk. Samples may differ in length.
        teacher_offsets (Int[Tensor, "batch teacher_time 2"] | Spans): the same for the teacher.
        max_chunks: number of chunks to pad to, so that every batch has the same shape. None: the
            largest number of chunks of a sample.
        student_texts: the text of each sample, as str or bytes according to the offsets; for a
            sample of several documents or sequences, a list of texts. Pass them if the texts of the
            models may differ, as with two chat templates: equal spans may then contain different
            text.
        teacher_texts: the same for the teacher.
        special: {student token: teacher token} of special tokens with the same role, such as the
            end of a turn; see [`paired_special_tokens`][termwise.lm.paired_special_tokens]. If both
            are at the same place in the text they form a chunk, regardless of their offsets. Only
            the first of several equal tokens in a row counts: the others are padding. None: special
            tokens are in no chunk.
        student_tokens (Int[Tensor, "batch student_time"] | Numbers | None): the student's token
            ids; required with special.
        teacher_tokens (Int[Tensor, "batch teacher_time"] | Numbers | None): the same for the
            teacher.
        documents: for packed rows, the number of the document of each token, for student and
            teacher: ascending, -1 for none (padding). Offsets start from 0 in each document,
            documents with the same number are aligned, and the first token of a document is in no
            chunk, since it follows another document.
        sequence_ids: for pairs of texts (`tokenizer(text, pair)`), the index of the text of each
            token, for student and teacher, as `BatchEncoding.sequence_ids` returns it: None for
            special tokens. Offsets start from 0 in each text.

    Returns:
        An alignment on the CPU; shorter samples are padded with -1 and False. `pair_exact` is False
        if the tokens of one model do not cover the whole text of the chunk, because the tokenizer
        trims spaces from offsets or drops characters. With texts, it is whether both are equal. A
        chunk of special tokens is exact. Text that only one model has tokens for is in no chunk.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: arguments differ in the number of samples, or of a sample's tokens; a stop is
            before its start or after the end of its text; tokens are not in the order of the text;
            a sample has more than max_chunks; no chunk of a sample has equal text in two different
            texts; or one of two arguments that belong together is missing.

    Examples:
        >>> from termwise.lm import align_spans
        >>> student, teacher = [[(0, 0), (0, 2), (2, 5)]], [[(0, 1), (1, 2), (2, 4), (4, 5)]]
        >>> alignment = align_spans(student, teacher)
        >>> alignment.student_chunk_id.tolist(), alignment.teacher_chunk_id.tolist()
        ([[-1, 0, 1]], [[0, 0, 1, 1]])

        An end-of-turn token, 9 for the student and 7 for the teacher:

        >>> student, teacher = [[(0, 2), (0, 0)]], [[(0, 1), (1, 2), (0, 0)]]
        >>> tokens = {"student_tokens": [[4, 9]], "teacher_tokens": [[3, 5, 7]]}
        >>> alignment = align_spans(student, teacher, special={9: 7}, **tokens)
        >>> alignment.student_chunk_id.tolist(), alignment.teacher_chunk_id.tolist()
        ([[0, 1]], [[0, 0, 1]])
    """
    for one, other, what in (
        (student_texts, teacher_texts, "student_texts and teacher_texts"),
        (student_tokens, teacher_tokens, "student_tokens and teacher_tokens"),
        (special, student_tokens, "special and the tokens of both sides"),
    ):
        if (one is None) != (other is None):
            raise ValueError(f"align_spans needs {what} together, got one of them")
    sides = [
        _sides("student", student_offsets, student_tokens, documents, sequence_ids, student_texts),
        _sides("teacher", teacher_offsets, teacher_tokens, documents, sequence_ids, teacher_texts),
    ]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            "align_spans needs as many samples of the student as of the teacher, "
            f"got {len(sides[0])} and {len(sides[1])}"
        )
    aligned = [
        _align(pair, special or {}, sample) for sample, pair in enumerate(zip(*sides, strict=True))
    ]
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


@dataclasses.dataclass(frozen=True, slots=True)
class _Side:
    """The tokens of one model for one sample."""

    name: str
    offsets: list[Sequence[int]]
    tokens: Sequence[int | None]
    """Token ids; None if they are unknown."""
    parts: list[_Part | None]
    """The document and sequence of each token, to which its offsets refer; None for none."""
    documents: list[int | None]
    packed: bool
    """Whether documents were passed."""
    texts: Sequence[Text] | None

    def span(self, index: int, sample: int) -> tuple[int, int]:
        """Return the span of a token, or raise an error."""
        span = self.offsets[index]
        if len(span) != 2 or not 0 <= span[0] <= span[1]:
            raise ValueError(
                f"align_spans needs spans (start, stop) from 0 up, in the order of the text, got "
                f"{tuple(span)} at token {index} of the {self.name}'s sample {sample}"
            )
        return span[0], span[1]


def _sides(
    name: str,
    offsets: Tensor | Spans,
    tokens: Tensor | Numbers | None,
    documents: tuple[Tensor | Numbers, Tensor | Numbers] | None,
    sequence_ids: tuple[Tensor | Numbers, Tensor | Numbers] | None,
    texts: Sequence[Text | Sequence[Text]] | None,
) -> list[_Side]:
    """Read one model's arguments, sample by sample."""
    spans = cast("Spans", offsets.tolist()) if isinstance(offsets, Tensor) else offsets
    which = ("student", "teacher").index(name)
    per_token = [
        _per_token(f"{name}_tokens", tokens, spans, None),
        _per_token(f"documents[{which}]", documents and documents[which], spans, 0),
        _per_token(f"sequence_ids[{which}]", sequence_ids and sequence_ids[which], spans, 0),
    ]
    if texts is not None and len(texts) != len(spans):
        raise ValueError(
            f"align_spans needs {name}_texts of {len(spans)} samples, got {len(texts)}"
        )
    found: list[_Side] = []
    for sample, own in enumerate(spans):
        ids, of_document, of_sequence = (one[sample] for one in per_token)
        known = [None if n is None or n < 0 else n for n in of_document]
        parts = [
            None if document is None or sequence is None or sequence < 0 else (document, sequence)
            for document, sequence in zip(known, of_sequence, strict=True)
        ]
        text = None if texts is None else texts[sample]
        text = [text] if isinstance(text, str | bytes) else text
        found.append(_Side(name, [*own], ids, parts, known, documents is not None, text))
    return found


def _per_token(
    name: str, given: Tensor | Numbers | None, spans: Spans, fill: int | None
) -> Sequence[Sequence[int | None]]:
    """Read a number for each token, if any were passed."""
    if given is None:
        return [[fill] * len(own) for own in spans]
    values = cast("Numbers", given.tolist()) if isinstance(given, Tensor) else given
    if [len(own) for own in values] != [len(own) for own in spans]:
        raise ValueError(
            f"align_spans needs {name} of {[len(own) for own in spans]} tokens, as many as there "
            f"are offsets, got {[len(own) for own in values]}"
        )
    return values


def _align(
    pair: tuple[_Side, _Side], special: Mapping[int, int], sample: int
) -> tuple[list[int], list[int], list[bool]]:
    """Return the chunk of each token of both models, and whether each chunk is exact."""
    starts = _starts(pair, sample)
    kinds = {*special}, {*special.values()}
    spans = [_placed(side, starts, kind, sample) for side, kind in zip(pair, kinds, strict=True)]
    chunks = _of_text(pair, spans, starts, sample)
    if special:
        gaps = [
            _gaps(side, own, starts, kind)
            for side, own, kind in zip(pair, spans, kinds, strict=True)
        ]
        pairs = _paired(pair, gaps[0], gaps[1], special)
        chunks += [([one], [other], True) for one, other in pairs]
    ids = [-1] * len(pair[0].offsets), [-1] * len(pair[1].offsets)
    leading = [_first_tokens(side) for side in pair]
    exact: list[bool] = []
    for *members, is_exact in sorted(chunks):
        held = [
            [index for index in indices if index not in first]
            for indices, first in zip(members, leading, strict=True)
        ]
        if all(held):
            for own, indices in zip(ids, held, strict=True):
                for index in indices:
                    own[index] = len(exact)
            exact.append(is_exact)
    return *ids, exact


def _starts(pair: tuple[_Side, _Side], sample: int) -> dict[_Part, tuple[int, int]]:
    """Concatenate the parts of a sample: return where each of them begins and ends."""
    ends: dict[_Part, int] = {}
    for side in pair:
        for index, part in enumerate(side.parts):
            document = side.documents[index]
            if part is None and document is not None:
                ends.setdefault((document, 0), 0)  # which may have only special tokens
            elif part is not None:
                ends[part] = max(ends.get(part, 0), side.span(index, sample)[1])
    place = 0
    starts: dict[_Part, tuple[int, int]] = {}
    for part in sorted(ends):
        starts[part] = place, place + ends[part]
        place += ends[part] + 1  # so that no two parts touch
    return starts


def _placed(
    side: _Side, starts: Mapping[_Part, tuple[int, int]], special: set[int], sample: int
) -> dict[int, tuple[int, int]]:
    """Return the spans of tokens that have text, over all parts; raise an error if out of order."""
    placed: dict[int, tuple[int, int]] = {}
    last = 0
    for index, part in enumerate(side.parts):
        start, stop = side.span(index, sample)
        if part is None or start == stop or side.tokens[index] in special:
            continue
        first = starts[part][0]
        if first + start < last:
            raise ValueError(
                "align_spans needs spans in the order of the text, got "
                f"({start}, {stop}) at token {index} of the {side.name}'s sample {sample}; offsets "
                "that start again need documents, in packed rows, or sequence_ids, in pairs"
            )
        last = first + start
        placed[index] = first + start, first + stop
    return placed


def _of_text(
    pair: tuple[_Side, _Side],
    spans: Sequence[Mapping[int, tuple[int, int]]],
    starts: Mapping[_Part, tuple[int, int]],
    sample: int,
) -> list[_Chunk]:
    """Find the chunks of text."""
    tokens = heapq.merge(
        *([(*span, side, index) for index, span in spans[side].items()] for side in (0, 1))
    )
    chunks: list[_Chunk] = []
    said: list[tuple[Text, Text]] = []
    readers = [_reader(side, starts, sample) for side in pair]
    for group in _overlapping(tokens):
        covered: tuple[list[list[int]], list[list[int]]] = ([], [])
        members: tuple[list[int], list[int]] = ([], [])
        for start, stop, side, index in group:
            _cover(covered[side], start, stop)
            members[side].append(index)
        if not all(covered):
            continue
        exact = covered[0] == covered[1]
        if readers[0] is not None and readers[1] is not None:
            said.append((readers[0](covered[0]), readers[1](covered[1])))
            exact = said[-1][0] == said[-1][1]
        chunks.append((*members, exact))
    differ = said and [*(pair[0].texts or ())] != [*(pair[1].texts or ())]
    if differ and not any(exact for _, _, exact in chunks):
        raise ValueError(
            f"align_spans needs texts that agree where the spans do, got none of {len(said)} "
            f"chunks of sample {sample} that says the same: the first is {_quoted(said[0][0])} for "
            f"the student and {_quoted(said[0][1])} for the teacher; of two chat templates align "
            "the answer alone, with offsets from its start"
        )
    return chunks


def _reader(
    side: _Side, starts: Mapping[_Part, tuple[int, int]], sample: int
) -> Callable[[list[list[int]]], Text] | None:
    """Return a function that reads spans from the texts; raise an error if offsets do not fit."""
    if side.texts is None:
        return None
    parts = [part for part in sorted(starts) if starts[part][1] > starts[part][0]]
    if len(side.texts) < len(parts):
        raise ValueError(
            f"align_spans needs a text for each of the {len(parts)} documents and sequences of the "
            f"{side.name}'s sample {sample}, got {len(side.texts)}"
        )
    texts = dict(zip(parts, side.texts, strict=False))
    for index, part in enumerate(side.parts):
        stop = side.span(index, sample)[1]
        if part in texts and stop > len(texts[part]):
            raise ValueError(
                f"align_spans needs offsets within {side.name}_texts, got {stop} at token {index} "
                f"of sample {sample}, whose text has {len(texts[part])}"
            )

    def read(spans: list[list[int]]) -> Text:
        part = max(part for part in parts if starts[part][0] <= spans[0][0])
        first = starts[part][0]
        pieces: list[Any] = [texts[part][start - first : stop - first] for start, stop in spans]
        return texts[part][:0].join(pieces)

    return read


def _gaps(
    side: _Side,
    spans: Mapping[int, tuple[int, int]],
    starts: Mapping[_Part, tuple[int, int]],
    special: set[int],
) -> list[tuple[int, int, int]]:
    """Return each special token with the gap in the text where it is: index, from, to.

    After a document's last token the gap has width 0, since one model may truncate the text.
    """
    first: dict[int, int] = {}
    for (started, _), (start, _) in starts.items():
        first.setdefault(started, start)
    gaps: list[tuple[int, int, int]] = []
    later = sorted(spans, reverse=True)
    before = 0
    for index, token in enumerate(side.tokens):
        if later and index == later[-1]:
            before = max(before, spans[later.pop()][1])
            continue
        document = side.documents[index]
        again = index > 0 and token == side.tokens[index - 1]
        if token not in special or document is None or again:
            continue
        low = max(first[document], before)
        followed = later and side.documents[later[-1]] == document
        gaps.append((index, low, spans[later[-1]][0] if followed else low))
    return gaps


def _paired(
    pair: tuple[_Side, _Side],
    students: list[tuple[int, int, int]],
    teachers: list[tuple[int, int, int]],
    special: Mapping[int, int],
) -> Iterator[tuple[int, int]]:
    """Yield pairs of special tokens with the same role in the same gap of the text, in order."""
    start = 0
    for index, low, high in students:
        wanted = special[cast("int", pair[0].tokens[index])]
        for place in range(start, len(teachers)):
            other, other_low, other_high = teachers[place]
            if other_low > high:
                break
            if pair[1].tokens[other] == wanted and other_high >= low:
                yield index, other
                start = place + 1
                break


def _first_tokens(side: _Side) -> set[int]:
    """Return the tokens that begin a document, which follow another document or nothing."""
    if not side.packed:
        return set()
    before = [None, *side.documents]
    return {index for index, number in enumerate(side.documents) if number != before[index]}


def _quoted(text: Text) -> str:
    return f"{text!r}" if len(text) <= 40 else f"{text[:40]!r}..."


def _overlapping(tokens: Iterable[_Token]) -> Iterator[list[_Token]]:
    """Group tokens, which are sorted by start, into runs that no token crosses."""
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
    """Add a span to disjoint spans, none of which begins later."""
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
