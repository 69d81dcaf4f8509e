"""Sums over the rows of logits that a linear head makes, a block of rows at a time.

A block's logits are turned into their gradient, and that into the gradients of hidden states,
weight and bias, before the next block is made: no more than one block is ever held.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .._autograd import Function, apply, chain, link_to, on_host, wants_gradient
from .._groups import ProcessGroup, all_reduce, resolved
from .._numbers import accumulator, looped
from ._cross_entropy_rows import cross_entropy_by_hand
from ._divergence_rows import Compared, Divergence, divergence_by_hand
from ._rows import ON_DEVICE, SHARDED_ROWS, ByHand, Sums, clear, in_blocks, rows_of_a_block

# Each block reads the weight and its gradient again: on the CPU fewer rows than these, or than fill
# 16 MiB in float32, take more time, and more only memory.
HOST_ROWS, ON_HOST = 128, 2**22


class Head(NamedTuple):
    """Hidden states and what makes logits of them."""

    hidden: Tensor
    """[rows, d_model]."""
    weight: Tensor
    """[vocab, d_model], of this rank."""
    bias: Tensor | None
    """[vocab]."""
    softcap: float | None
    """c: a logit x becomes c tanh(x / c)."""

    def to(self, dtype: torch.dtype) -> "Head":
        """Lift all but the hidden states."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._replace(weight=self.weight.to(dtype), bias=bias)

    def logits(
        self, rows: slice | Tensor, left_out: Tensor | None, room: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return some hidden states, with 0 for those left out, and their logits, in room."""
        hidden = clear(self.hidden[rows].to(room.dtype), left_out)
        x = room[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, self.weight.T, out=x)
        else:
            torch.addmm(self.bias, hidden, self.weight.T, out=x)
        cap = self.softcap
        return hidden, x if cap is None else x.div_(cap).tanh_().mul_(cap)


class Weighted(NamedTuple):
    """What a row adds to the loss: its divergence and its cross-entropy, each times a number."""

    compared: Compared = Compared("forward", 0.5, 1.0)
    divergence_weight: float = 0.0
    cross_entropy_weight: float = 0.0


def widest(*tensors: Tensor | None) -> torch.dtype:
    """Return float64 if one of them is, else float32: the type of all that is computed."""
    return functools.reduce(
        torch.promote_types, [x.dtype for x in tensors if x is not None], torch.float32
    )


def check_softcap(name: str, **softcaps: float | None) -> None:
    """Refuse a bound of logits that is not positive and finite."""
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
) -> tuple[Tensor, Tensor]:
    """Return the sum of the loss over rows, and those of divergence, cross-entropy, and right ones.

    Without a teacher there is no divergence, without local targets no cross-entropy. Only the first
    has a gradient: with respect to the student's hidden states, weight and bias.
    """
    asked = student[:3]
    others = (None,) * 4 if teacher is None else teacher
    found = apply(
        _LinearRows,
        *asked,
        *[None if x is None else link_to(x) for x in asked],
        *[x.detach() if isinstance(x, Tensor) else x for x in others],
        student.softcap,
        local,
        unused,
        *weighted.compared,
        *weighted[1:],
        *[x is not None and wants_gradient(x) for x in asked],
        None if vocab_group is None else vocab_group.group_name,
    )
    return cast("tuple[Tensor, Tensor]", found[:2])


class _LinearRows(Function):
    """Outputs the sums, and the gradients of the first one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return cast(
            "tuple[Tensor, Tensor, Tensor, Tensor, Tensor]", _linear_rows(*inputs[:3], *inputs[6:])
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.inputs, ctx.vocab_name = len(inputs), inputs[-1]
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
        ctx.save_for_backward(*output[2:], *inputs[3:6])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *own, hidden_link, weight_link, bias_link = ctx.saved_tensors
        if ctx.needs_input_grad[0]:  # each rank's columns have a part in it
            own[0] = all_reduce(own[0], ctx.vocab_name)
        chained: list[Tensor | None] = []
        for index, link in enumerate((hidden_link, weight_link, bias_link)):
            gradient = None
            if ctx.needs_input_grad[index]:
                gradient = chain(own[index], gradients[0], link)
            chained.append(None if gradient is None else gradient.to(ctx.dtypes[index]))
        return *chained, *(None,) * (ctx.inputs - 3)


@torch.library.custom_op("termwise::linear_rows", mutates_args=())
def _linear_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_softcap: float | None,
    softcap: float | None,
    local: Tensor | None,
    unused: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    divergence_weight: float,
    cross_entropy_weight: float,
    with_hidden: bool,
    with_weight: bool,
    with_bias: bool,
    vocab_name: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = widest(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    student = Head(hidden, weight, bias, softcap).to(wide)
    teacher = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher = Head(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap)
        teacher = teacher.to(wide)
    compared = Compared(cast("Divergence", divergence), beta, temperature)
    weighted = Weighted(compared, divergence_weight, cross_entropy_weight)
    run = functools.partial(
        _of_rows,
        weighted=weighted,
        taught=teacher is not None,
        vocab_group=None if vocab_name is None else resolved(vocab_name),
    )
    of_hidden, of_weight, of_bias = (
        torch.zeros_like(x, dtype=wide) if asked and x is not None else hidden.new_empty(0)
        for x, asked in ((hidden, with_hidden), (weight, with_weight), (bias, with_bias))
    )
    sums = hidden.new_zeros(4, dtype=accumulator(hidden))
    sharded, vocab = vocab_name is not None, weight.shape[0]
    size = _rows_at_once(unused, vocab, sharded)
    # A block's logits, its gradient, and the teacher's logits, in the same memory for each of them.
    room, slope_room, teacher_room = (
        student.weight.new_empty(size if needed else 0, vocab)
        for needed in (True, softcap is not None, teacher is not None)
    )
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        for rows, left_out in _row_blocks(unused, size):
            h, x = student.logits(rows, left_out, room)
            others: list[Tensor] = []
            if teacher is not None:
                others.append(teacher.logits(rows, left_out, teacher_room)[1])
            if local is not None:
                others.append(local[rows])
            slope = None
            if with_hidden or with_weight or with_bias:  # in place, unless x itself is needed
                slope = x if softcap is None else slope_room[: len(x)]
            step = rows_of_a_block(x, sharded, False)
            sums += torch.stack(in_blocks(run, step, slope, left_out, (x, *others)))
            if slope is None:
                continue
            if softcap is not None:  # tanh' = 1 - tanh^2
                slope.mul_(x.div_(softcap).square_().neg_().add_(1))
            if with_hidden:
                of_hidden[rows] = slope @ student.weight
            if with_weight:
                of_weight.addmm_(slope.T, h)
            if with_bias:
                of_bias.add_(slope.sum(0))
    return sums[0].clone(), sums[1:].clone(), of_hidden, of_weight, of_bias


@_linear_rows.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    wide, asked = widest(hidden, weight, bias, *others[:3]), others[12:15]
    sums = hidden.new_empty(4, dtype=accumulator(hidden))
    gradients = [
        x.new_empty(x.shape, dtype=wide) if needed and x is not None else hidden.new_empty(0)
        for x, needed in zip((hidden, weight, bias), asked, strict=True)
    ]
    return sums[0].clone(), sums[1:].clone(), *gradients


_linear_rows.register_vmap(looped(_linear_rows))


def _rows_at_once(unused: Tensor, vocab: int, sharded: bool) -> int:
    """Return how many rows a block has, the same on every rank."""
    if sharded:
        return min(SHARDED_ROWS, len(unused))
    if on_host(unused):
        return min(max(HOST_ROWS, ON_HOST // max(vocab, 1)), len(unused))
    return min(max(1, ON_DEVICE // max(vocab, 1)), len(unused))


def _row_blocks(unused: Tensor, size: int) -> Iterator[tuple[slice | Tensor, Tensor | None]]:
    """Cut the rows into blocks, with those of each that do not count.

    On the CPU, where to look does not wait, only the others are in a block.
    """
    if on_host(unused):
        for index in cast("Sequence[Tensor]", (~unused).nonzero()[:, 0].split(max(size, 1))):
            if len(index):
                yield index, None
        return
    for start in range(0, len(unused), max(size, 1)):
        yield slice(start, start + size), unused[start : start + size]


def _of_rows(
    out: Tensor | None,
    unused: Tensor | None,
    x: Tensor,
    *others: Tensor,
    weighted: Weighted,
    taught: bool,
    vocab_group: ProcessGroup | None,
) -> Sums:
    """Sum the loss of some rows, and its parts; write the gradient of the loss into out."""
    parts: list[tuple[float, ByHand, tuple[Tensor, ...]]] = []
    if taught:
        by_hand = divergence_by_hand(weighted.compared, vocab_group)
        parts.append((weighted.divergence_weight, by_hand, others[:1]))
    if len(others) > taught:
        by_hand = functools.partial(cross_entropy_by_hand, vocab_group=vocab_group)
        parts.append((weighted.cross_entropy_weight, by_hand, others[-1:]))
    total = x.new_zeros((), dtype=accumulator(x))
    found: list[Sums] = []
    slopes: list[Tensor] = []
    for weight, by_hand, rest in parts:
        # A part of weight 0 is left out, even if it is not finite.
        slope = None
        if out is not None and weight:  # in place, unless another part reads x
            slope = out if len(parts) == 1 else torch.empty_like(x)
        found.append(by_hand(slope, unused, x, *rest))
        if weight:
            total = total + weight * found[-1][0]
        if slope is not None:
            slopes.append(slope.mul_(weight) if weight != 1 else slope)
    if out is not None and not (len(slopes) == 1 and slopes[0] is out):
        out.zero_()
        for slope in slopes:
            out.add_(slope)
    zero = torch.zeros_like(total)
    divergence = found[0][0] if taught else zero
    nats, right = found[-1] if len(others) > taught else (zero, zero)
    return total, divergence, nats, right
