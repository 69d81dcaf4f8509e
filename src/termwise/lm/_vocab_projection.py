"""A sparse matrix from the student's vocabulary to the teacher's."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeAlias, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._autograd import Function, apply
from .._contract import contract
from .._numbers import lifted, looped
from . import _vocab_projection_files
from ._sparse_rows import SparseRows
from ._token_texts import encoder, paired_special_tokens, spelling, token_texts

Token: TypeAlias = str | bytes


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class VocabProjection:
    r"""Sparse weights M of [student_vocab, teacher_vocab], stored by rows and by columns.

    The row of a student token has the teacher tokens that correspond to it, and how much of its
    probability goes to each: a distribution p over the student's vocabulary becomes

    $$q_t = \sum_s p_s M_{st}$$

    over the teacher's. Rows need not sum to 1; the losses normalize q.

    Create one with `from_tokenizers`, `from_tokens`, `from_topk`, `from_pairs`, `load` or
    `load_nemo`, which check every value; the constructor checks only shapes and dtypes.
    """

    student_vocab: int
    """Number of tokens of the student's vocabulary: rows of M."""
    teacher_vocab: int
    """Number of tokens of the teacher's vocabulary: columns of M."""
    # Not the axes of logits, of which a rank may hold a part; the losses check those.
    student_pointers: Int[Tensor, " student_tokens+1"]
    """Int[Tensor, " student_tokens+1"]: start of each student token's entries, and the end of the
    last ones, int64."""
    student_columns: Int[Tensor, " entries"]
    """Int[Tensor, " entries"]: teacher token of each entry, int64, ascending within a row."""
    student_weights: Float[Tensor, " entries"]
    """Float[Tensor, " entries"]: weight of each entry, float32."""
    teacher_pointers: Int[Tensor, " teacher_tokens+1"]
    """Int[Tensor, " teacher_tokens+1"]: start of each teacher token's entries, and the end of the
    last ones, int64."""
    teacher_rows: Int[Tensor, " entries"]
    """Int[Tensor, " entries"]: student token of each entry in the order of teacher tokens, int64,
    ascending within one."""
    teacher_weights: Float[Tensor, " entries"]
    """Float[Tensor, " entries"]: weight of each entry in that order, float32."""

    def __post_init__(self) -> None:
        entries = self.student_columns.numel()
        for name, dtype, size in (
            ("student_pointers", torch.int64, self.student_vocab + 1),
            ("student_columns", torch.int64, entries),
            ("student_weights", torch.float32, entries),
            ("teacher_pointers", torch.int64, self.teacher_vocab + 1),
            ("teacher_rows", torch.int64, entries),
            ("teacher_weights", torch.float32, entries),
        ):
            value: Tensor = getattr(self, name)
            if value.dtype != dtype or value.shape != (size,):
                raise ValueError(
                    f"VocabProjection needs {name} of shape [{size}] in {dtype}, "
                    f"got {list(value.shape)} in {value.dtype}"
                )

    def __repr__(self) -> str:
        """Show the sizes."""
        return (
            f"VocabProjection(student_vocab={self.student_vocab}, "
            f"teacher_vocab={self.teacher_vocab}, entries={len(self.student_columns)})"
        )

    @classmethod
    @contract
    def from_topk(
        cls,
        indices: Int[Tensor, "rows k"],
        weights: Float[Tensor, "rows k"],
        *,
        student_vocab: int,
        teacher_vocab: int,
    ) -> Self:
        """Build from up to k teacher tokens for each student token.

        Args:
            indices (Int[Tensor, "rows k"]): teacher tokens, -1 for none. Row s is student token s.
            weights (Float[Tensor, "rows k"]): their weights, not negative, 0 for index -1. The
                weights of a token that occurs twice in a row are added.
            student_vocab: size of the student's vocabulary; rows beyond the last one are empty.
            teacher_vocab: size of the teacher's vocabulary.

        Raises:
            ContractError: shapes or dtypes do not fit.
            ValueError: an index out of range, a weight that is negative, not finite or on -1, more
                rows than student_vocab, or no entry at all.
        """
        if indices.shape[0] > student_vocab:
            raise ValueError(
                f"VocabProjection.from_topk needs at most student_vocab = {student_vocab} rows, "
                f"got {indices.shape[0]}"
            )
        if bool(((indices == -1) & (weights != 0)).any()):
            raise ValueError(
                "VocabProjection.from_topk needs weight 0 where the index is -1, got "
                f"{float(weights[(indices == -1) & (weights != 0)][0])}"
            )
        indices = indices.long()
        valid = indices != -1
        rows = torch.arange(indices.shape[0], device=indices.device)[:, None].expand_as(indices)
        fields = _from_entries(
            "from_topk", rows[valid], indices[valid], weights[valid], student_vocab, teacher_vocab
        )
        return cls(**fields)

    @classmethod
    @contract
    def from_pairs(
        cls, pairs: Mapping[tuple[int, int], float], *, student_vocab: int, teacher_vocab: int
    ) -> Self:
        """Build from (student token, teacher token): weight, such as a count.

        Args:
            pairs: weights, not negative.
            student_vocab: size of the student's vocabulary.
            teacher_vocab: size of the teacher's vocabulary.

        Raises:
            ValueError: a token out of range, a weight that is negative or not finite, or no pair.
        """
        entries = _vocab_projection_files.entries_of("VocabProjection.from_pairs", pairs)
        return cls(**_from_entries("from_pairs", *entries, student_vocab, teacher_vocab))

    @classmethod
    @contract
    def from_tokens(
        cls,
        student_tokens: Sequence[Token | None],
        teacher_tokens: Sequence[Token | None],
        *,
        encode: Callable[[Any], Sequence[int]] | None = None,
        special: Mapping[int, int] | None = None,
        student_vocab: int | None = None,
        teacher_vocab: int | None = None,
    ) -> Self:
        r"""Build from the texts of the tokens of both vocabularies.

        A student token whose text is also a teacher token maps to it with weight 1. Any other one
        is written as a sequence of teacher tokens, and the i-th of them, from 0, gets $0.9 \cdot
        0.1^i / \sum_j 0.9 \cdot 0.1^j$: where the student predicts the whole token, a teacher
        predicts the first of these. A token that cannot be written in this way has no entry.

        Args:
            student_tokens: the text of each token, in the order of ids; None for special tokens and
                unused ids, which have no entry. Bytes, or strings, which stand for their UTF-8.
                Both models must write spaces in the same way. `convert_ids_to_tokens` returns text
                whose form depends on the tokenizer, and two different forms raise an error: see
                [`from_tokenizers`][termwise.lm.VocabProjection.from_tokenizers].
            teacher_tokens: the same for the teacher. If texts are equal the lowest id is used.
            encode: returns the teacher tokens of a text from student_tokens: the teacher's
                tokenizer, without special tokens. None: greedily use the longest teacher token that
                fits.
            special: {student token: teacher token} of special tokens with the same role, such as
                the end of a turn. The student token has this as its only entry, with weight 1,
                regardless of its text. None: no token is special; tokens without a text have no
                entry, so they are never distilled.
            student_vocab: size of the student's vocabulary, if there are more logits than tokens in
                the list.
            teacher_vocab: the same for the teacher.

        Raises:
            ValueError: a vocabulary smaller than its list, spaces that are written differently, a
                token of special that is in no vocabulary, or no token has an entry.

        References:
            The weights are those of tools/x_token/minimal_projection_via_multitoken.py in NeMo-RL
            (https://github.com/NVIDIA-NeMo/RL), which re-encodes with the teacher's tokenizer,
            and tokens of equal text as well.

        Examples:
            >>> from termwise.lm import VocabProjection
            >>> projection = VocabProjection.from_tokens(["a", "ab"], ["b", "a"])
            >>> projection.student_columns.tolist(), projection.student_weights.tolist()
            ([1, 0, 1], [1.0, 0.0909..., 0.9090...])
        """
        name = "VocabProjection.from_tokens"
        students = len(student_tokens) if student_vocab is None else student_vocab
        teachers = len(teacher_tokens) if teacher_vocab is None else teacher_vocab
        if students < len(student_tokens) or teachers < len(teacher_tokens):
            raise ValueError(
                f"{name} needs vocabularies as large as the lists of tokens, "
                f"{len(student_tokens)} and {len(teacher_tokens)}, got {students} and {teachers}"
            )
        written_as = [spelling(tokens) for tokens in (student_tokens, teacher_tokens)]
        if None not in written_as and written_as[0] != written_as[1]:
            raise ValueError(
                f"{name} needs tokens that write a space in one way, got {written_as[0]!r} in most "
                f"of the student's and {written_as[1]!r} in most of the teacher's; pass both "
                "tokenizers to VocabProjection.from_tokenizers, or the bytes of the tokens"
            )
        known: dict[bytes, int] = {}
        for token, text in enumerate(teacher_tokens):
            if text:
                known.setdefault(_as_bytes(text), token)
        write = encode or _longest_first(known)
        pairs = dict.fromkeys((special or {}).items(), 1.0)
        for student, text in enumerate(student_tokens):
            if not text or (special and student in special):
                continue
            same = known.get(_as_bytes(text))
            written = write(text) if same is None else (same,)
            whole = sum(0.1**place for place in range(len(written)))
            for place, teacher in enumerate(written):
                pairs[student, teacher] = pairs.get((student, teacher), 0.0) + 0.1**place / whole
        return cls(
            **_from_entries(
                "from_tokens",
                *_vocab_projection_files.entries_of(name, pairs),
                students,
                teachers,
            )
        )

    @classmethod
    @contract
    def from_tokenizers(
        cls,
        student: object,
        teacher: object,
        *,
        special: Mapping[int, int] | None = None,
        student_vocab: int | None = None,
        teacher_vocab: int | None = None,
    ) -> Self:
        """Build from two tokenizers, by the bytes of their tokens, as `from_tokens` does.

        Bytes are read from byte-level tokens (GPT-2, Qwen, Llama 3: "\u0120the") and from those of
        SentencePiece (Llama 2, Gemma, T5: "\u2581the", "<0x0A>"), as they occur in a text, so that
        both are b" the". A student token whose bytes are not a teacher token is tokenized by the
        teacher's tokenizer, if the result has exactly these bytes; otherwise, as for parts of a
        character, the longest teacher tokens that fit are used.

        Args:
            student: a fast tokenizer of transformers, or a `tokenizers.Tokenizer`.
            teacher: the same for the teacher.
            special: {student token: teacher token} of special tokens. None: those that
                [`paired_special_tokens`][termwise.lm.paired_special_tokens] finds.
            student_vocab: number of the student's logits, if it exceeds the tokenizer's vocabulary.
            teacher_vocab: the same for the teacher.

        Raises:
            ValueError: an argument is not such a tokenizer or writes its tokens in another way, or
                a vocabulary is smaller than its tokenizer's.
        """
        name = "VocabProjection.from_tokenizers"
        students = token_texts(name, "student", student)
        teachers = token_texts(name, "teacher", teacher)
        known = {text: token for token, text in reversed([*enumerate(teachers)]) if text}
        others = {text for text in students if text and text not in known}
        written = encoder(name, "teacher", teacher, teachers)(sorted(others))
        longest_first = _longest_first(known)

        def encode(text: bytes) -> Sequence[int]:
            return written[text] if text in written else longest_first(text)

        return cls.from_tokens(
            students,
            teachers,
            encode=encode,
            special=paired_special_tokens(student, teacher) if special is None else special,
            student_vocab=student_vocab,
            teacher_vocab=teacher_vocab,
        )

    @classmethod
    @contract
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that [`save`][termwise.lm.VocabProjection.save] wrote; nothing is cached.

        Raises:
            ImportError: the package safetensors is missing; the extra `distill` installs it.
            FileNotFoundError: there is no such file.
            ValueError: it is another kind of file, or its entries are invalid.
        """
        entries, (student_vocab, teacher_vocab) = _vocab_projection_files.read(path)
        fields = _from_entries("load", *entries, student_vocab, teacher_vocab, f", in {path}")
        return cls(**fields)

    @classmethod
    @contract
    def load_nemo(
        cls, path: str | os.PathLike[str], *, student_vocab: int, teacher_vocab: int
    ) -> Self:
        """Read a projection file of NeMo-RL, in either format; nothing is cached.

        The formats are a dict of `indices` and `likelihoods`, both [student_vocab, k], and a dict
        {(student token, teacher token): weight}, saved by `torch.save`. Such a file is a pickle,
        which could run code when it is read; here only tensors and numbers are read
        (`weights_only=True`), and any other content raises an error.

        Args:
            path: the file.
            student_vocab: number of the student's logits. If the file has a higher token, the
                projection is larger.
            teacher_vocab: the same for the teacher.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file contains code or has another format, or its entries are invalid:
                see [`from_topk`][termwise.lm.VocabProjection.from_topk].

        References:
            `parse_projection_file` and `get_sparse_projection_matrix` in NeMo-RL
            (https://github.com/NVIDIA-NeMo/RL, nemo_rl/algorithms/x_token/loss_utils.py), which
            read with `weights_only=False`, cache the file by its path, and drop a negative index
            regardless of its weight.
        """
        rows, columns, weights = _vocab_projection_files.read_nemo(path)
        if rows.numel():
            student_vocab = max(student_vocab, int(rows.max()) + 1)
            teacher_vocab = max(teacher_vocab, int(columns.max()) + 1)
        fields = _from_entries(
            "load_nemo", rows, columns, weights, student_vocab, teacher_vocab, f", in {path}"
        )
        return cls(**fields)

    @contract
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file for [`load`][termwise.lm.VocabProjection.load], in safetensors.

        Raises:
            ImportError: the package safetensors is missing; the extra `distill` installs it.
        """
        entries = self._rows_of_entries(), self.student_columns, self.student_weights
        _vocab_projection_files.write(path, entries, (self.student_vocab, self.teacher_vocab))

    def to(self, device: torch.device | str) -> Self:
        """Return the projection on a device."""
        tensors = {
            field.name: getattr(self, field.name).to(device)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)

    def rows(self, lo: int, hi: int) -> Self:
        """Return the part for student tokens lo to hi - 1, renumbered from 0: a shard's.

        It may have no entries. Synchronizes with the device: call it once, not in the training
        step.
        """
        if not 0 <= lo <= hi <= self.student_vocab:
            raise ValueError(
                f"VocabProjection.rows needs 0 <= lo <= hi <= {self.student_vocab}, "
                f"got {lo} and {hi}"
            )
        pointers = self.student_pointers[lo : hi + 1]
        start, stop = int(pointers[0]), int(pointers[-1])
        counts = pointers.diff()
        rows = torch.arange(hi - lo, device=counts.device).repeat_interleave(counts)
        columns = self.student_columns[start:stop]
        weights = self.student_weights[start:stop]
        return type(self)(**_in_both_orders(rows, columns, weights, hi - lo, self.teacher_vocab))

    def columns(self, ids: Int[Tensor, " kept"]) -> Self:
        """Return the part for these teacher tokens, renumbered in the order of ids.

        It may have no entries. Synchronizes with the device.
        """
        ids = ids.long()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.teacher_vocab:
            raise ValueError(
                f"VocabProjection.columns needs ids from 0 to {self.teacher_vocab - 1}, "
                f"got {int(ids.min())} to {int(ids.max())}"
            )
        place = ids.new_full((self.teacher_vocab,), -1, dtype=torch.int64)
        place[ids] = torch.arange(len(ids), device=ids.device)
        if int((place >= 0).sum()) != len(ids):
            raise ValueError("VocabProjection.columns needs every id once")
        columns = place[self.student_columns]
        valid = columns >= 0
        rows, columns = self._rows_of_entries()[valid], columns[valid]
        weights = self.student_weights[valid]
        return type(self)(**_in_both_orders(rows, columns, weights, self.student_vocab, len(ids)))

    def to_topk(
        self, k: int | None = None
    ) -> tuple[Int[Tensor, "student_vocab k"], Float[Tensor, "student_vocab k"]]:
        """Return the arrays that [`from_topk`][termwise.lm.VocabProjection.from_topk] takes.

        The entries of each row are sorted by descending weight, then ascending teacher token, and
        padded with -1 of weight 0. Synchronizes with the device.

        Args:
            k: number of entries to keep of each row. None: the largest number in a row, so that
                `from_topk` of the arrays returns this projection again.

        Returns:
            tuple[Int[Tensor, "student_vocab k"], Float[Tensor, "student_vocab k"]]: teacher tokens
            and weights.

        Raises:
            ValueError: k is less than 1.

        Examples:
            >>> from termwise.lm import VocabProjection
            >>> pairs = {(0, 1): 0.1, (0, 2): 0.9, (1, 0): 1.0}
            >>> projection = VocabProjection.from_pairs(pairs, student_vocab=2, teacher_vocab=3)
            >>> projection.to_topk()
            (tensor([[ 2,  1],
                    [ 0, -1]]), tensor([[0.9000, 0.1000],
                    [1.0000, 0.0000]]))
        """
        if k is not None and k < 1:
            raise ValueError(f"VocabProjection.to_topk needs k >= 1, got {k}")
        counts = self.student_pointers.diff()
        most = int(counts.max()) if len(counts) else 0
        width = most if k is None else k
        rows = self._rows_of_entries()
        by_weight = self.student_weights.argsort(descending=True, stable=True)
        order = by_weight[rows[by_weight].argsort(stable=True)]
        place = torch.arange(len(rows), device=rows.device) - self.student_pointers[rows]
        valid = place < width
        where = rows[valid], place[valid]
        indices = rows.new_full((self.student_vocab, width), -1)
        weights = self.student_weights.new_zeros(self.student_vocab, width)
        indices[where] = self.student_columns[order][valid]
        weights[where] = self.student_weights[order][valid]
        return indices, weights

    @contract
    def project(
        self, probs: Float[Tensor, "*batch student_vocab"]
    ) -> Float[Tensor, "*batch teacher_vocab"]:
        """Project distributions over the student's vocabulary to the teacher's.

        Half precision is converted to float32, regardless of autocast. Linear in probs, with
        derivatives of any order.
        """
        if probs.shape[-1] != self.student_vocab:
            raise ValueError(
                f"VocabProjection.project needs probs over {self.student_vocab} student tokens, "
                f"got {probs.shape[-1]}"
            )
        upcast = lifted(probs)
        orders = (
            *(self.teacher_pointers, self.teacher_rows, self.teacher_weights),
            *(self.student_pointers, self.student_columns, self.student_weights),
        )
        rows = upcast.reshape(probs.shape[:-1].numel(), self.student_vocab)
        projected = cast("Tensor", apply(_Product, rows, *orders))
        return projected.view(*probs.shape[:-1], self.teacher_vocab)

    def _rows_of_entries(self) -> Tensor:
        student_ids = torch.arange(self.student_vocab, device=self.student_pointers.device)
        return student_ids.repeat_interleave(self.student_pointers.diff())


torch.export.register_dataclass(VocabProjection, serialized_type_name="termwise.lm.VocabProjection")


def _as_bytes(token: Token) -> bytes:
    return token.encode() if isinstance(token, str) else token


def _longest_first(known: Mapping[bytes, int]) -> Callable[[Token], Sequence[int]]:
    """Return a function that greedily writes a text in known tokens, or returns none."""
    lengths = sorted({len(token) for token in known}, reverse=True)

    def write(token: Token) -> Sequence[int]:
        text = _as_bytes(token)
        written: list[int] = []
        start = 0
        while start < len(text):
            fitting = (length for length in lengths if length <= len(text) - start)
            length = next((n for n in fitting if text[start : start + n] in known), 0)
            if not length:
                return ()
            written.append(known[text[start : start + length]])
            start += length
        return written

    return write


def _from_entries(
    name: str,
    rows: Tensor,
    columns: Tensor,
    weights: Tensor,
    student_vocab: int,
    teacher_vocab: int,
    source: str = "",
) -> dict[str, Any]:
    """Check entries, then sum those with equal indices."""
    name = f"VocabProjection.{name}"
    if rows.numel() == 0:
        raise ValueError(f"{name} needs at least 1 entry, got none{source}")
    if student_vocab * teacher_vocab >= 2**63:  # indices of entries are int64
        raise ValueError(
            f"{name} needs vocabularies of less than 2**63 pairs, got {student_vocab} and "
            f"{teacher_vocab}{source}"
        )
    for side, ids, vocab in (("student", rows, student_vocab), ("teacher", columns, teacher_vocab)):
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise ValueError(
                f"{name} needs {side} tokens from 0 to {vocab - 1}, "
                f"got {int(ids.min())} to {int(ids.max())}{source}"
            )
    wrong = ~(weights.isfinite() & (weights >= 0))
    if bool(wrong.any()):
        raise ValueError(
            f"{name} needs weights that are finite and not negative, got "
            f"{float(weights[wrong][0])}{source}"
        )
    place, where = cast(
        "tuple[Tensor, Tensor]",
        torch.unique(rows * teacher_vocab + columns, return_inverse=True),
    )
    summed = weights.new_zeros(len(place), dtype=torch.float64).index_add(
        0, where, weights.double()
    )
    return _in_both_orders(
        place // teacher_vocab, place % teacher_vocab, summed.float(), student_vocab, teacher_vocab
    )


def _in_both_orders(
    rows: Tensor, columns: Tensor, weights: Tensor, student_vocab: int, teacher_vocab: int
) -> dict[str, Any]:
    by_row = (rows * max(teacher_vocab, 1) + columns).argsort()
    by_column = (columns * max(student_vocab, 1) + rows).argsort()
    return {
        "student_vocab": student_vocab,
        "teacher_vocab": teacher_vocab,
        "student_pointers": _pointers(rows, student_vocab),
        "student_columns": columns[by_row],
        "student_weights": weights[by_row],
        "teacher_pointers": _pointers(columns, teacher_vocab),
        "teacher_rows": rows[by_column],
        "teacher_weights": weights[by_column],
    }


def _pointers(ids: Tensor, count: int) -> Tensor:
    pointers = ids.new_zeros(count + 1)
    pointers[1:] = ids.bincount(minlength=count).cumsum(0)
    return pointers


class _Product(Function):
    """Rows times a sparse matrix, which is given by its columns and, for gradients, by its rows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, *orders: Tensor) -> Tensor:
        return cast("Tensor", _csr_product(rows, *orders[:3]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        by_column, by_row = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        # A compiled graph has no second derivative, and Dynamo would trace this recursion without
        # end.
        if torch.compiler.is_compiling():
            gradient = _csr_product(gradients[0], *by_row)
        else:
            gradient = cast("Tensor", _Product.apply(gradients[0], *by_row, *by_column))
        return gradient, *(None,) * 6


@torch.library.custom_op("termwise::csr_product", mutates_args=())
def _csr_product(rows: Tensor, pointers: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """Return rows [n, m] times the transpose of a sparse matrix [r, m]: [n, r]."""
    return SparseRows(pointers, columns, weights).matmul(rows.T.contiguous()).T.contiguous()


@_csr_product.register_fake
def _(rows: Tensor, pointers: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], pointers.shape[0] - 1)


_csr_product.register_vmap(looped(_csr_product))
