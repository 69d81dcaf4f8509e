"""Sums over rows of the logits of a linear head, one block of rows at a time.

The gradient of a block's logits, and from it those of hidden states, weight and bias, are computed
before the next block: only one block is in memory. Few logits are computed as the formula is
written.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .._autograd import link_to, on_host, wants_gradient
from .._groups import ProcessGroup, name_of, replicated, resolved
from .._numbers import (
    ON_DEVICE,
    accumulator,
    block_rows,
    may_look_at,
    product,
    without_autocast,
)
from .._operators import Operator, with_gradients
from ._cross_entropy_rows import cross_entropy, cross_entropy_by_hand
from ._divergence_rows import Compared, divergence_by_hand, divergence_of_logs
from ._rows import (
    SHARDED_ROWS,
    ByHand,
    PerRow,
    Sums,
    clear,
    in_blocks,
    log_softmax,
    sums_of,
)

# Each block reads the weight and its gradient: on the CPU fewer rows than these, or than fill 16
# MiB in float32, take more time, and more rows only take more memory.
HOST_ROWS, ON_HOST = 128, 2**22
# So few logits are computed as the formula is written, which takes fewer calls.
FEW = 2**17


class Head(NamedTuple):
    """Hidden states and the head that maps them to logits."""

    hidden: Tensor
    """[rows, d_model]."""
    weight: Tensor
    """[vocab, d_model], of this rank."""
    bias: Tensor
    """[vocab], or [0] for none."""
    softcap: float | None
    """c: a logit x becomes c tanh(x / c)."""

    def logits(
        self, rows: slice | Tensor, left_out: Tensor | None, room: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return some hidden states, with 0 for those left out, and write their logits to room."""
        hidden = clear(self.hidden[rows], left_out)
        x = room[: len(hidden)]
        if len(self.bias):
            torch.addmm(self.bias, hidden, self.weight.T, out=x)
        else:
            torch.mm(hidden, self.weight.T, out=x)
        cap = self.softcap
        return hidden, x if cap is None else x.div_(cap).tanh_().mul_(cap)

    def all_logits(self, left_out: Tensor | None) -> Tensor:
        """Return all logits, with 0 in the hidden states left out, for autograd."""
        x, cap = product(clear(self.hidden, left_out), self.weight.T), self.softcap
        x = x + self.bias if len(self.bias) else x
        return x if cap is None else cap * (x / cap).tanh()


class Weighted(NamedTuple):
    """A row's part of the loss: its divergence and its cross-entropy, each times a weight."""

    compared: Compared = Compared("forward", 0.5, 1.0)
    divergence_weight: float = 0.0
    cross_entropy_weight: float = 0.0


def head_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Head:
    """Return the head over batch * time rows."""
    return Head(
        hidden.flatten(0, 1), weight, weight.new_empty(0) if bias is None else bias, softcap
    )


def lifted_heads(*heads: Head) -> list[Head]:
    """Convert heads to float64 if one of their tensors has it, else to float32."""
    dtypes = [x.dtype for head in heads for x in head[:3]]
    dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
    return [
        Head(head.hidden.to(dtype), head.weight.to(dtype), head.bias.to(dtype), head.softcap)
        for head in heads
    ]


def check_softcap(name: str, **softcaps: float | None) -> None:
    """Raise an error for a softcap that is not positive and finite."""
    for argument, softcap in softcaps.items():
        if softcap is not None and not 0 < softcap < float("inf"):
            raise ValueError(f"{name} needs {argument} positive and finite, got {softcap}")


def over_linear_rows(
    student: Head,
    teacher: Head | None,
    local: Tensor | None,
    unused: Tensor,
    weighted: Weighted,
    vocab_group: ProcessGroup | None,
    wide_sums: bool,
) -> Sums:
    """Return the sums of the loss, of its parts, and the number of the rows that count.

    The parts are the divergence, with a teacher, then, with local targets, the cross-entropy and
    those on top. Only the first has a gradient: with respect to the student's hidden states, weight
    and bias. `wide_sums` is as in `over_rows`.
    """
    few = student.hidden.shape[0] * student.weight.shape[0] <= FEW
    if not torch.compiler.is_compiling() and vocab_group is None and few:
        return _of_few(student, teacher, local, unused, weighted, wide_sums)
    inputs = _Inputs(
        student._replace(hidden=replicated(student.hidden, vocab_group)),
        _constant(student if teacher is None else teacher),
        teacher is not None,
        local,
        unused,
        weighted,
        [wants_gradient(x) for x in student[:3]],
        name_of(vocab_group),
        wide_sums,
    )
    loss, measured, *_ = with_gradients(_linear_rows, inputs, 3)
    return loss, *measured.unbind()


def _of_few(
    student: Head,
    teacher: Head | None,
    local: Tensor | None,
    unused: Tensor,
    weighted: Weighted,
    wide_sums: bool,
) -> Sums:
    """Return the same sums of so few logits that calls take longer than their computation."""
    seen: Tensor | None = unused
    compared = weighted.compared
    if may_look_at(unused):  # only the rows that count
        rows, seen = unused.logical_not().nonzero()[:, 0], None
        student = student._replace(hidden=student.hidden.index_select(0, rows))
        if teacher is not None:
            teacher = teacher._replace(hidden=teacher.hidden.index_select(0, rows))
        local = None if local is None else local[rows]
    x = student.all_logits(seen)
    per_row: list[Tensor] = []
    if teacher is not None:
        y = _constant(teacher).all_logits(seen)
        q, p = (log_softmax(rows, seen, compared.temperature, None) for rows in (x, y))
        per_row.append(divergence_of_logs(q, p, compared))
    if local is not None:
        per_row += cross_entropy(seen, x, local)
    dtype = accumulator(x) if wide_sums else x.dtype
    sums = sums_of(tuple(per_row), seen, dtype).unbind()
    loss = _weighed(sums, teacher is not None, local is not None, weighted)
    return (link_to(x).to(dtype) if loss is None else loss), *sums


def _weighed(
    sums: Sequence[Tensor], taught: bool, has_targets: bool, weighted: Weighted
) -> Tensor | None:
    """Add the sums of the parts that have a weight; one without may be infinite."""
    divergence_weight, cross_entropy_weight = weighted[1:]
    parts = [divergence_weight * sums[0]] if taught and divergence_weight else []
    if has_targets and cross_entropy_weight:
        parts.append(cross_entropy_weight * sums[-3])
    return functools.reduce(torch.add, parts) if parts else None


def _constant(head: Head) -> Head:
    return Head(head.hidden.detach(), head.weight.detach(), head.bias.detach(), head.softcap)


class _Inputs(NamedTuple):
    student: Head
    teacher: Head
    """Not read unless taught."""
    taught: bool
    local: Tensor | None
    unused: Tensor
    weighted: Weighted
    asked: Sequence[bool]
    """Which of the student's tensors require a gradient."""
    vocab_name: str | None
    wide_sums: bool

    @property
    def dtype(self) -> torch.dtype:
        """The type of the sums."""
        x = self.student.hidden
        return accumulator(x) if self.wide_sums else x.dtype


def _kernel(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the sum of the loss, the sums of its parts, and the gradients of the loss."""
    student, sharded = inputs.student, inputs.vocab_name is not None
    run = functools.partial(
        _of_rows,
        weighted=inputs.weighted,
        taught=inputs.taught,
        vocab_group=None if inputs.vocab_name is None else resolved(inputs.vocab_name),
    )
    of_hidden, of_weight, of_bias = _room(inputs)
    if on_host(of_hidden):
        of_hidden.zero_()  # rows that do not count are in no block
    with_gradient, capped = any(inputs.asked), student.softcap is not None
    # The logits of a block, their gradient, and the teacher's logits reuse the same memory.
    size = _rows_at_once(inputs.unused, len(student.weight), sharded)
    room, slope_room, teacher_room = (
        student.weight.new_empty(size if needed else 0, len(student.weight))
        for needed in (True, with_gradient and capped, inputs.taught)
    )
    found: list[PerRow] = []
    with without_autocast(room), torch.no_grad():
        for number, (rows, left_out) in enumerate(_row_blocks(inputs.unused, size)):
            h, x = student.logits(rows, left_out, room)
            others: list[Tensor] = []
            if inputs.taught:
                others.append(inputs.teacher.logits(rows, left_out, teacher_room)[1])
            if inputs.local is not None:
                others.append(inputs.local[rows])
            slope = None
            if with_gradient:  # in place, unless x itself is needed
                slope = slope_room[: len(x)] if capped else x
            step = SHARDED_ROWS if sharded else block_rows(x)
            found.append(in_blocks(run, step, slope, left_out, (x, *others)))
            if slope is None:
                continue
            if student.softcap is not None:  # tanh' = 1 - tanh^2
                slope.mul_(x.div_(student.softcap).square_().neg_().add_(1))
            if len(of_hidden) and isinstance(rows, slice):
                torch.mm(slope, student.weight, out=of_hidden[rows])
            elif len(of_hidden):
                of_hidden[rows] = slope @ student.weight
            if len(of_weight):  # of which nothing is there before the first block
                of_weight.addmm_(slope.T, h, beta=min(number, 1))
            if len(of_bias):
                of_bias.copy_(slope.sum(0) + of_bias if number else slope.sum(0))
    per_row = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
    unused = None if on_host(inputs.unused) else inputs.unused  # which is in no block
    sums = sums_of(tuple(per_row), unused, inputs.dtype)
    # Not a view of the sums, for no result of an operator may be one of another.
    loss = _weighed(sums.unbind(), inputs.taught, inputs.local is not None, inputs.weighted)
    if loss is None:
        loss = torch.zeros_like(sums[0])
    return loss, sums, of_hidden, of_weight, of_bias


def _room(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return tensors for the gradients that are wanted."""
    student, asked = inputs.student, inputs.asked
    of_hidden, of_weight, of_bias = (
        x.new_empty(x.shape if wanted else 0) for x, wanted in zip(student[:3], asked, strict=True)
    )
    return of_hidden, of_weight, of_bias


def _fake(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = 1 + inputs.taught + 2 * (inputs.local is not None)
    sums = inputs.unused.new_empty(count, dtype=inputs.dtype)
    return sums.new_empty(()), sums, *_room(inputs)


_linear_rows = Operator("linear_rows", _Inputs, _kernel, _fake)


def _rows_at_once(unused: Tensor, vocab: int, sharded: bool) -> int:
    """Return the number of rows of a block, the same on every rank."""
    if sharded:
        return min(SHARDED_ROWS, len(unused))
    if on_host(unused):
        return min(max(HOST_ROWS, ON_HOST // max(vocab, 1)), len(unused))
    return min(max(1, ON_DEVICE // max(vocab, 1)), len(unused))


def _row_blocks(unused: Tensor, size: int) -> Iterator[tuple[slice | Tensor, Tensor | None]]:
    """Cut the rows into blocks, each with a mask of the rows that do not count.

    On the CPU, where reading values does not synchronize, blocks have only rows that count.
    """
    if on_host(unused):
        for index in cast("Sequence[Tensor]", (~unused).nonzero()[:, 0].split(max(size, 1))):
            yield index, None
        return
    for start in range(0, max(len(unused), 1), max(size, 1)):
        yield slice(start, start + size), unused[start : start + size]


def _of_rows(
    out: Tensor | None,
    unused: Tensor | None,
    x: Tensor,
    *others: Tensor,
    weighted: Weighted,
    taught: bool,
    vocab_group: ProcessGroup | None,
) -> PerRow:
    """Return the parts of the loss of some rows; write the gradient of its sum to out."""
    parts: list[tuple[float, ByHand, tuple[Tensor, ...]]] = []
    if taught:
        by_hand = divergence_by_hand(weighted.compared, vocab_group)
        parts.append((weighted.divergence_weight, by_hand, others[:1]))
    if len(others) > taught:
        by_hand = functools.partial(cross_entropy_by_hand, vocab_group=vocab_group)
        parts.append((weighted.cross_entropy_weight, by_hand, others[-1:]))
    found: list[Tensor] = []
    slopes: list[Tensor] = []
    for weight, by_hand, rest in parts:
        # A part of weight 0 is left out, even if it is not finite.
        slope = None
        if out is not None and weight:  # in place, unless another part reads x
            slope = out if len(parts) == 1 else torch.empty_like(x)
        found += by_hand(slope, unused, x, *rest)
        if slope is not None:
            slopes.append(slope.mul_(weight) if weight != 1 else slope)
    if out is not None and not (len(slopes) == 1 and slopes[0] is out):
        out.zero_()
        for slope in slopes:
            out.add_(slope)
    return tuple(found)
