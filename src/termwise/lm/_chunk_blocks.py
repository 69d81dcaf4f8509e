"""Blocks of chunks that stay in cache, so that the logits are never copied.

The kernels of the losses over chunks are loops over these blocks. On the CPU a block is as many
whole chunks as fit; elsewhere, where reading the ids would synchronize with the device, it is a few
samples, of 2^26 logits or an eighth of all, and rows outside every chunk are masked. Over ranks the
blocks are the same on every rank, which may hold any part of their rows, and the sums of each block
are reduced one after the other.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .._autograd import on_host
from .._groups import all_reduce
from .._numbers import MOST_BLOCKS, block_rows, blocks, lifted, without_autocast
from ._chunks import Chunks
from ._sparse_rows import SparseRows

# Elements of a block of logits: 2 MiB in float32, so that several fit into a shared cache.
BLOCK = 2**19


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkRows:
    """The rows of one model's logits that a block reads."""

    index: slice | Tensor
    """Indices among the batch * time rows."""
    chunk: Tensor
    """[rows], the index of the row's chunk in the block."""
    order: Tensor
    """[rows], the rows in the order of chunks, those that are not used last."""
    starts: Tensor
    """[chunks + 1], the start of each chunk in this order, and the end of the last one; then, if
    some rows are not used, the number of rows."""
    inverse_size: Tensor
    """[chunks], 1 / the number of rows of the chunk, over the sequence's ranks."""
    used: Tensor | None
    """[rows], False outside every chunk. None: all are used."""

    def read(self, flat: Tensor) -> Tensor:
        """Return the rows in float32 or float64, with 0 in those that are not used."""
        return self._only_used(lifted(flat[self.index]))

    def write(self, flat: Tensor, rows: Tensor) -> None:
        """Write the rows, with 0 in those that are not used."""
        flat[self.index] = self._only_used(rows).to(flat.dtype)

    def share(self) -> Tensor:
        """Return each row's weight in the mean of its chunk."""
        return self.inverse_size[self.chunk]

    def sums(self, rows: Tensor, factor: Tensor) -> Tensor:
        """Sum the rows of each chunk, times a factor for each row."""
        sums = SparseRows(self.starts, self.order, factor[self.order]).matmul(rows)
        return sums[: len(self.inverse_size)]

    def mean(self, rows: Tensor, sequence_name: str | None) -> Tensor:
        """Average rows over chunks."""
        return all_reduce(self.sums(rows, self.share()), sequence_name)

    def spread(self, chunks: Tensor, factor: Tensor) -> Tensor:
        """Return for each row the value of its chunk, times a factor for each row."""
        starts = torch.arange(len(self.chunk) + 1, device=chunks.device)
        return SparseRows(starts, self.chunk, factor).matmul(chunks)

    def _only_used(self, rows: Tensor) -> Tensor:
        if self.used is None:
            return rows
        return rows.masked_fill(~self.used.view(-1, *[1] * (rows.ndim - 1)), 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """Some chunks, and their rows on both sides."""

    chunks: int
    counted: Tensor | None
    """[chunks], whether it counts. None: all count."""
    student: ChunkRows
    teacher: ChunkRows


def chunk_blocks(
    chunks: Chunks, width: int, dtype: torch.dtype, sequence_name: str | None
) -> Iterator[Block]:
    """Cut the chunks that count into blocks, the same on every rank with this width."""
    if on_host(chunks.valid):
        return _blocks_that_fit(chunks, max(1, BLOCK // max(width, 1)), dtype)
    if sequence_name is not None:  # ranks may hold different numbers of positions
        return _blocks_of_samples(chunks, -(-len(chunks.valid) // MOST_BLOCKS), dtype)
    time = max(chunks.student_id.shape[1], chunks.teacher_id.shape[1])
    return _blocks_of_samples(chunks, block_rows(chunks.valid, time * width), dtype)


def _blocks_of_samples(chunks: Chunks, samples: int, dtype: torch.dtype) -> Iterator[Block]:
    batch, number = chunks.valid.shape
    if not number:
        return
    for start in range(0, batch, samples):
        part = Chunks(*(x[start : start + samples] for x in chunks))
        valid = part.valid.reshape(-1)
        sides: list[ChunkRows] = []
        for ids, sizes in (
            (part.student_id, part.student_size),
            (part.teacher_id, part.teacher_size),
        ):
            first = torch.arange(0, len(valid), number, device=ids.device)
            chunk = (ids.clamp(min=0) + first[:, None]).reshape(-1)
            used = _used(ids, part.valid).reshape(-1)
            in_order = chunk.where(used, len(valid)).sort(stable=True)
            ends = torch.arange(len(valid) + 2, device=ids.device)
            starts = torch.searchsorted(in_order.values, ends)
            index = slice(start * ids.shape[1], (start + len(ids)) * ids.shape[1])
            inverse_size = sizes.reshape(-1).to(dtype).reciprocal_().where(valid, 0)
            sides.append(ChunkRows(index, chunk, in_order.indices, starts, inverse_size, used))
        yield Block(len(valid), valid, *sides)


def _blocks_that_fit(chunks: Chunks, rows: int, dtype: torch.dtype) -> Iterator[Block]:
    counted = chunks.valid.reshape(-1).nonzero()[:, 0]
    place = counted.new_full((chunks.valid.numel(),), -1)
    place[counted] = torch.arange(len(counted))
    student_sizes = chunks.student_size.reshape(-1)[counted]
    teacher_sizes = chunks.teacher_size.reshape(-1)[counted]
    student = _InOrder.of(chunks.student_id, place, student_sizes, dtype)
    teacher = _InOrder.of(chunks.teacher_id, place, teacher_sizes, dtype)
    both = zip(_integers(student_sizes), _integers(teacher_sizes), strict=True)
    start = student_rows = teacher_rows = 0
    for stop, (students, teachers) in enumerate(both):
        student_rows, teacher_rows = student_rows + students, teacher_rows + teachers
        if stop > start and max(student_rows, teacher_rows) > rows:
            yield Block(stop - start, None, student.rows(start, stop), teacher.rows(start, stop))
            start, student_rows, teacher_rows = stop, students, teachers
    if len(counted):
        stop = len(counted)
        yield Block(stop - start, None, student.rows(start, stop), teacher.rows(start, stop))


@dataclasses.dataclass(frozen=True, slots=True)
class _InOrder:
    """The used rows of one model in the order of their chunks."""

    order: Tensor
    chunk: Tensor
    inverse_size: Tensor
    starts: Tensor
    ends: list[int]

    @classmethod
    def of(cls, ids: Tensor, place: Tensor, sizes: Tensor, dtype: torch.dtype) -> "_InOrder":
        max_chunks = len(place) // max(len(ids), 1)
        first = torch.arange(len(ids))[:, None] * max_chunks
        place = torch.cat([place, place.new_full((1,), -1)])  # the last: rows outside every chunk
        placed = place[torch.where(ids >= 0, first + ids, -1)].reshape(-1)
        order = placed.argsort(stable=True)[int((placed < 0).sum()) :]
        chunk = placed[order]
        starts = F.pad(chunk.bincount(minlength=len(sizes)).cumsum(0), (1, 0))
        return cls(order, chunk, 1 / sizes.to(dtype), starts, _integers(starts))

    def rows(self, start: int, stop: int) -> ChunkRows:
        first, last = self.ends[start], self.ends[stop]
        starts = self.starts[start : stop + 1] - first
        index = _as_slice(self.order[first:last])
        order = torch.arange(last - first)
        chunk = self.chunk[first:last] - start
        return ChunkRows(index, chunk, order, starts, self.inverse_size[start:stop], None)


def _as_slice(index: Tensor) -> slice | Tensor:
    """Read adjacent rows without a copy."""
    if not len(index):
        return slice(0, 0)
    first, last = int(index[0]), int(index[-1])
    if last - first == len(index) - 1 and bool((index.diff() == 1).all()):
        return slice(first, last + 1)
    return index


def _integers(x: Tensor) -> list[int]:
    return cast("list[int]", x.tolist())


# What a loss does with a block: step(block, student's rows, teacher's rows) returns sums over the
# block's chunks, and how to compute the gradient of the first with respect to the student's rows.
Step = Callable[[Block, Tensor, Tensor], tuple[Tensor, Callable[[], Tensor]]]


def sum_over_chunks(
    step: Step,
    chunks: Chunks,
    student: Tensor,
    teacher: Tensor,
    *,
    width: int,
    sequence_name: str | None,
    sums: Tensor,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return sums plus those of all blocks, and the student's gradient or an empty tensor.

    A block has as many rows of `width` elements as fit in cache. sequence_name is the group whose
    ranks hold different positions.
    """
    dtype = lifted(student[:0]).dtype
    gradient = _new_gradient(student, chunks) if with_gradient else student.new_empty(0)
    flat_student, flat_teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    with without_autocast(student):
        for block in chunk_blocks(chunks, width, dtype, sequence_name):
            rows = block.student.read(flat_student), block.teacher.read(flat_teacher)
            parts, compute_gradient = step(block, *rows)
            sums = sums + parts
            if with_gradient:
                block.student.write(gradient.flatten(0, 1), compute_gradient())
            del rows, compute_gradient  # before those of the next block are allocated
    return sums, gradient


def _new_gradient(student: Tensor, chunks: Chunks) -> Tensor:
    """Return an uninitialized gradient, with 0 in the rows that no block will write."""
    if not on_host(student):
        return torch.zeros_like(student, memory_format=torch.contiguous_format)
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
    unused = ~_used(chunks.student_id, chunks.valid)
    gradient.flatten(0, 1).index_fill_(0, unused.reshape(-1).nonzero()[:, 0], 0)
    return gradient


def _used(ids: Tensor, valid: Tensor) -> Tensor:
    """Return which positions are in a chunk that counts."""
    return F.pad(valid, (1, 0)).gather(1, ids + 1)


def highest_logits(logits: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    """Return the highest logit of each token over the rows in chunks that count."""
    return cast("Tensor", _highest_logits(logits.detach(), ids, valid))


@torch.library.custom_op("termwise::highest_logits", mutates_args=())
def _highest_logits(logits: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    highest = logits.new_full(logits.shape[2:], -torch.inf)
    rows, used = logits.flatten(0, 1), _used(ids, valid).reshape(-1)
    if on_host(logits):
        step = max(1, BLOCK // max(rows.shape[1], 1))
        for index in cast("tuple[Tensor, ...]", used.nonzero()[:, 0].split(step)):
            if len(index):
                torch.maximum(highest, rows[_as_slice(index)].amax(0), out=highest)
        return highest
    for part in blocks(rows):
        read = rows[part].masked_fill(~used[part, None], -torch.inf)
        torch.maximum(highest, read.amax(0), out=highest)
    return highest


@_highest_logits.register_fake
def _(logits: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[2:])
