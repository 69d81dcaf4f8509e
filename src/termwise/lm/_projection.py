"""A sparse matrix from the student's vocabulary to the teacher's."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .._contract import contract
from .._numbers import lifted, looped


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class VocabProjection:
    r"""Weights M of [student_vocab, teacher_vocab], sparse, kept by rows and by columns.

    The row of a student token holds the teacher tokens that stand for it, and how much of its
    probability goes to each: a distribution p over the student's vocabulary becomes

    $$q_t = \sum_s p_s M_{st}$$

    over the teacher's. Rows need not sum to 1; the losses normalise what comes out.

    Build one with `from_topk`, `from_pairs`, `from_tokens`, `load` or `load_nemo`, which look at
    every number; the constructor itself compares shapes and dtypes only.
    """

    student_vocab: int
    teacher_vocab: int
    student_pointers: Int[Tensor, " student_vocab+1"]
    """Where each student token's entries begin, and the last ones end, int64."""
    student_columns: Int[Tensor, " entries"]
    """Teacher token of each entry, int64, ascending within a row."""
    student_weights: Float[Tensor, " entries"]
    """Weight of each entry, float32."""
    teacher_pointers: Int[Tensor, " teacher_vocab+1"]
    """Where each teacher token's entries begin, and the last ones end, int64."""
    teacher_rows: Int[Tensor, " entries"]
    """Student token of each entry in the order of teacher tokens, int64, ascending within one."""
    teacher_weights: Float[Tensor, " entries"]
    """Weight of each entry in that order, float32."""

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
            indices: teacher tokens, -1 for none. Row s is student token s.
            weights: their weights, not negative, 0 where there is no token. A token that stands
                twice in a row has the sum.
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
        kept = indices != -1
        rows = torch.arange(indices.shape[0], device=indices.device)[:, None].expand_as(indices)
        fields = _from_entries(
            "from_topk", rows[kept], indices[kept], weights[kept], student_vocab, teacher_vocab
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
        ids = torch.tensor(list(pairs), dtype=torch.int64).reshape(-1, 2)
        weights = torch.tensor(list(pairs.values()), dtype=torch.float64)
        fields = _from_entries(
            "from_pairs", ids[:, 0], ids[:, 1], weights, student_vocab, teacher_vocab
        )
        return cls(**fields)

    def to(self, device: torch.device | str) -> Self:
        """Give the same projection on a device."""
        tensors = {
            field.name: getattr(self, field.name).to(device)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **tensors)

    def rows(self, lo: int, hi: int) -> Self:
        """Give the part for student tokens lo to hi - 1, renumbered from 0: a shard's.

        It may have no entries. This waits for the device: cut once, not in the training step.
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
        """Give the part for these teacher tokens, renumbered in the order of ids.

        It may have no entries. This waits for the device.
        """
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
        kept = columns >= 0
        rows, columns = self._rows_of_entries()[kept], columns[kept]
        weights = self.student_weights[kept]
        return type(self)(**_in_both_orders(rows, columns, weights, self.student_vocab, len(ids)))

    @contract
    def project(
        self, probs: Float[Tensor, "*batch student_vocab"]
    ) -> Float[Tensor, "*batch teacher_vocab"]:
        """Carry distributions over the student's vocabulary to the teacher's.

        Half precision is lifted to float32, whatever autocast says. Linear in probs, and
        differentiable in it as often as is wanted.
        """
        if probs.shape[-1] != self.student_vocab:
            raise ValueError(
                f"VocabProjection.project needs probs over {self.student_vocab} student tokens, "
                f"got {probs.shape[-1]}"
            )
        wide = lifted(probs)
        projected = _Product.apply(
            wide.reshape(probs.shape[:-1].numel(), self.student_vocab),
            *(self.teacher_pointers, self.teacher_rows, self.teacher_weights),
            *(self.student_pointers, self.student_columns, self.student_weights),
        )
        return cast("Tensor", projected).view(*probs.shape[:-1], self.teacher_vocab)

    def _rows_of_entries(self) -> Tensor:
        numbers = torch.arange(self.student_vocab, device=self.student_pointers.device)
        return numbers.repeat_interleave(self.student_pointers.diff())


torch.export.register_dataclass(VocabProjection, serialized_type_name="termwise.lm.VocabProjection")


def _from_entries(
    name: str,
    rows: Tensor,
    columns: Tensor,
    weights: Tensor,
    student_vocab: int,
    teacher_vocab: int,
) -> dict[str, Any]:
    """Refuse what cannot be right, then sum entries of one place."""
    name = f"VocabProjection.{name}"
    if rows.numel() == 0:
        raise ValueError(f"{name} needs at least 1 entry, got none")
    for side, ids, vocab in (("student", rows, student_vocab), ("teacher", columns, teacher_vocab)):
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise ValueError(
                f"{name} needs {side} tokens from 0 to {vocab - 1}, "
                f"got {int(ids.min())} to {int(ids.max())}"
            )
    wrong = ~(weights.isfinite() & (weights >= 0))
    if bool(wrong.any()):
        raise ValueError(
            f"{name} needs weights that are finite and not negative, got {float(weights[wrong][0])}"
        )
    place, where = torch.unique(rows * teacher_vocab + columns, return_inverse=True)
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


class _Product(torch.autograd.Function):
    """Rows times a sparse matrix, which is given by its columns and, for gradients, by its rows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, *orders: Tensor) -> Tensor:
        return _csr_product(rows, *orders[:3])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        by_column, by_row = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        # A compiled graph has no second derivative, and Dynamo would trace this one for ever.
        if torch.compiler.is_compiling():
            gradient = _csr_product(gradients[0], *by_row)
        else:
            gradient = cast("Tensor", _Product.apply(gradients[0], *by_row, *by_column))
        return gradient, *(None,) * 6


@torch.library.custom_op("termwise::csr_product", mutates_args=())
def _csr_product(rows: Tensor, pointers: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """Give rows [n, m] times the transpose of a sparse matrix [r, m]: [n, r]."""
    # The sum over a bag of embeddings is this product, without the sparse tensors' warnings.
    return F.embedding_bag(
        columns,
        rows.T.contiguous(),
        pointers,
        mode="sum",
        per_sample_weights=weights.to(rows.dtype),
        include_last_offset=True,
    ).T.contiguous()


@_csr_product.register_fake
def _(rows: Tensor, pointers: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], pointers.shape[0] - 1)


_csr_product.register_vmap(looped(_csr_product))
