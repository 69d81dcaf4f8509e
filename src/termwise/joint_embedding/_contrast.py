r"""Cross-entropy over pairs of embeddings, one strip of the similarity matrix at a time.

For rows a and columns b the logits are L = scale a b^T. Each row has positives among the columns;
the other columns are its negatives, except the row itself. With

    N_i = log sum_negatives exp(L_ij),    P_i = log sum_positives exp(L_ij)

the cross-entropy of a row is log(1 + exp(N_i - P_i)). No positive is in N_i, so nothing cancels if
the loss is small, and the derivative with respect to N_i is a sigmoid, not a difference of 1 and
another number.

A first pass over the strips takes the log-sums of the rows, and of the columns for the other
direction; a second one forms the strips again and turns them into the gradient. That is four
products of rows * columns * dim, and two strips in memory, of which an accelerator has at most 8:
a quarter of the matrix, for kernels that do not grow with the rows. Where the columns are the rows
L is symmetric: the strips of its upper triangle make two such products.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from .. import _groups
from .._autograd import on_host, wants_gradient
from .._groups import GradReduction, ProcessGroup
from .._numbers import (
    IN_CACHE,
    MOST_BLOCKS,
    ON_DEVICE,
    accumulator,
    alike,
    lifted,
    plain_product,
    softplus,
    without_autocast,
)
from .._operators import Operator, with_gradients

Form = Literal["softmax", "outside", "decoupled"]

# Least number of rows of a strip on the CPU: products of fewer are slow.
_STRIP = 128
# For so few logits, on one rank, the formula as written is faster.
_SMALL = 2**17


class Contrast(NamedTuple):
    """A loss, and measurements without a gradient."""

    loss: Tensor
    forward: Tensor
    """Mean over the rows."""
    backward: Tensor
    """Mean over the columns if symmetric, else that over the rows."""
    accuracy: Tensor
    """Fraction of rows whose largest logit is that of a positive."""
    without_positive: Tensor
    """Number of rows without a positive; they are in no mean."""


def contrast(
    rows: Tensor,
    columns: Tensor | None,
    scale: Tensor | float,
    *,
    positive: Tensor | None = None,
    labels: Tensor | None = None,
    given: Tensor | None = None,
    weight: Tensor | None = None,
    form: Form = "softmax",
    symmetric: bool = False,
    group: ProcessGroup | None,
    grad_reduction: GradReduction,
    caller: str,
    at_least: int = 1,
) -> Contrast:
    """Average a loss over the rows of all ranks. Pass one of positive, labels and given.

    Args:
        rows: this rank's rows, "batch dim", in float32 or float64.
        columns: this rank's columns, "candidates dim". None: the rows, without each row's pair with
            itself.
        scale: factor of the products; a number if the columns are the rows.
        positive: for each row, which of this rank's columns is its positive. If the columns are the
            rows, the positive of the positive is the row.
        labels: labels of the rows, which are the columns: rows with equal labels are positives.
        given: logits of positives that are not among the columns. The columns are then the same on
            every rank, and are not sent.
        weight: for each row, the factor of its positive's logit; "decoupled" only.
        form: "softmax": log(1 + exp(N - P)). "outside": the mean over the positives of
            log(sum over all) - L. "decoupled": N - weight P.
        symmetric: average with the loss of the columns; column i is the positive of row i.
        group: process group whose ranks hold different rows, and columns. None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.
        caller: the loss that an error names.
        at_least: least number of columns over all ranks.
    """
    if rows.shape[1] == 0:
        raise ValueError(f"{caller} needs dim >= 1, got 0")
    labels = None if labels is None else labels.contiguous()  # else torch.searchsorted warns
    width = rows.shape[0] if columns is None else columns.shape[0]
    if group is None and rows.shape[0] * width <= _SMALL:
        _refuse_fewer(width, at_least, caller)
        return _as_written(rows, columns, scale, positive, labels, given, weight, form, symmetric)
    within, columns = columns is None, rows[:0].detach() if columns is None else columns
    factor = scale.to(rows.dtype) if isinstance(scale, Tensor) else rows.new_full((), scale)
    gathered = group is not None and given is None
    given = rows.new_empty(0) if given is None else given
    asked = [wants_gradient(x) for x in (rows, columns, factor, given)]
    inputs = _Inputs(
        rows,
        columns,
        factor.reshape(1),
        given,
        positive,
        labels,
        weight,
        form,
        within,
        symmetric,
        _groups.row_counts(rows if within else columns, group) if gathered else None,
        _groups.name_of(group),
        gathered or asked[0] or asked[2] or asked[3],
        gathered or asked[1],
        _groups.gradient_scale(group, grad_reduction),
        caller,
        at_least,
    )
    loss, measured, *_ = with_gradients(_contrast, inputs, 4)
    return Contrast(loss, *measured.unbind())


def unit_rows(x: Tensor) -> Tensor:
    """Divide rows by their norms; a row of zeros stays 0. Half precision is converted."""
    x = lifted(x)  # as F.normalize does, in fewer calls
    norms = cast("Tensor", torch.linalg.vector_norm(x, dim=1, keepdim=True))
    return x / norms.clamp_min(1e-12)


def two_views(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit rows of both views, concatenated, and the index of each row's other view."""
    rows = unit_rows(torch.cat(alike(z1, z2)))
    return rows, torch.arange(rows.shape[0], device=z1.device).roll(z1.shape[0])


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each pair of rows with equal index."""
    with without_autocast(a):
        return cast("Tensor", torch.linalg.vecdot(a, b))


def _refuse_fewer(count: int, at_least: int, caller: str) -> None:
    if count < at_least:
        needed = f"{caller} needs at least {at_least} embeddings over all ranks"
        raise ValueError(f"{needed}, got {count}")


def _as_written(
    rows: Tensor,
    columns: Tensor | None,
    scale: Tensor | float,
    positive: Tensor | None,
    labels: Tensor | None,
    given: Tensor | None,
    weight: Tensor | None,
    form: Form,
    symmetric: bool,
) -> Contrast:
    """Compute the same with the whole matrix, in operations that autograd follows to any order."""
    logits = plain_product(rows * scale, (rows if columns is None else columns).mT)
    lowest = torch.finfo(logits.dtype).min  # not -inf, for the gradient of a row of nothing else
    positives = rows[:, 0] if given is None else given
    count = highest = None
    if labels is not None:
        among = labels.unsqueeze(1) == labels
        among.diagonal().fill_(False)
        count = among.sum(1)
        highest = logits.detach().where(among, lowest).amax(1)
        if form == "outside":
            # One positive is hidden, for precision; of several the loss is log 2 or more.
            positives = logits.where(among, 0).sum(1) / count.clamp_min(1)
            hidden = among & (count == 1).unsqueeze(1)
        else:
            positives, hidden = logits.where(among, lowest).logsumexp(1), among.clone()
        hidden.diagonal().fill_(True)
        logits = logits.masked_fill(hidden, lowest)
    elif positive is not None:
        hidden = place = positive.unsqueeze(1)
        positives = logits.gather(1, place).squeeze(1)
        if columns is None:
            itself = torch.arange(rows.shape[0], device=rows.device)
            hidden = torch.stack((positive, itself), 1)
        logits = logits.scatter(1, hidden, lowest)
    negatives = logits.logsumexp(1)
    highest = positives.detach() if highest is None else highest
    right = highest >= logits.detach().amax(1)
    each = negatives - (positives if weight is None else weight * positives)
    if symmetric:
        each = torch.stack((each, logits.logsumexp(0) - positives))
    if form == "softmax":
        each = softplus(each)
    elif count is not None:
        each = torch.where(count > 1, each, softplus(each))
    if count is None:
        loss, without = each.mean(), each.new_zeros(())
        accuracy = right.sum(dtype=each.dtype) / right.shape[0]
    else:
        counted = (count > 0).to(each.dtype)
        total = counted.sum()
        loss, without = (each * counted).sum() / total.clamp_min(1), right.shape[0] - total
        accuracy = (right * counted).sum() / total.clamp_min(1)
    forward, backward = each.detach().mean(1).unbind() if symmetric else (loss.detach(),) * 2
    return Contrast(loss, forward, backward, accuracy, without)


class _Inputs(NamedTuple):
    rows: Tensor
    columns: Tensor
    scale: Tensor
    given: Tensor
    """[0]: the positives are among the columns."""
    positive: Tensor | None
    labels: Tensor | None
    weight: Tensor | None
    form: str
    within: bool
    """Whether the columns are the rows."""
    symmetric: bool
    counts: Tensor | None
    """Numbers of each rank's columns, which are gathered."""
    group_name: str | None
    of_rows: bool
    """Whether to compute the gradients with respect to rows and scale; always if columns are
    gathered, since collective calls must not depend on the grad mode."""
    of_columns: bool
    gradient_scale: float
    caller: str
    at_least: int


Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _kernel(inputs: _Inputs) -> Results:
    """Return the loss, the measurements, and the gradients of rows, columns, scale and given."""
    with without_autocast(inputs.rows), torch.no_grad():
        matrix, dtype = _matrix(inputs), inputs.rows.dtype
        by_row, by_column = _log_sums(matrix, inputs)
        negatives, positives = (sums.value() for sums in by_row)
        rows = _rows(matrix, inputs, negatives, positives)
        right = (by_row[1].top >= by_row[0].top) & rows.counted
        sums = [rows.loss, right, rows.counted, ~rows.counted]
        of_rows = [_share(negatives, rows.of_negatives, dtype)]
        if matrix.labels is not None:
            of_rows.append(_share(positives, rows.of_positives, dtype))
        of_columns = of_rows if matrix.triangle else []
        if inputs.symmetric:
            negatives, positives = _column_sums(matrix, by_column[0], positives)
            difference = negatives - positives
            of_columns = [_share(negatives, difference.sigmoid(), dtype)]
            rows.of_positives.sub_(difference[matrix.own].sigmoid())
            sums.append(softplus(difference[matrix.own]))
        totals = torch.stack([x.sum(dtype=rows.loss.dtype) for x in sums])
        totals = _groups.all_reduce(totals, inputs.group_name)
        count = totals[2] if inputs.labels is None else totals[2].clamp_min(1)
        forward, backward = totals[0] / count, totals[-1 if inputs.symmetric else 0] / count
        loss, measured = (forward + backward) / 2, (forward, backward, totals[1] / count, totals[3])
        factor = inputs.gradient_scale / count / (2 if inputs.symmetric else 1)
        gradients = _gradients(matrix, inputs, rows, of_rows, of_columns, factor)
        return loss.to(dtype), torch.stack(measured).to(dtype), *gradients


def _fake(inputs: _Inputs) -> Results:
    made = inputs.of_rows, inputs.of_columns, inputs.of_rows, inputs.of_rows
    one, two, three, four = (
        x.new_empty(x.shape if wanted else 0) for x, wanted in zip(inputs[:4], made, strict=True)
    )
    return inputs.rows.new_empty(()), inputs.rows.new_empty(4), one, two, three, four


_contrast = Operator("contrast", _Inputs, _kernel, _fake)


class _Strip(NamedTuple):
    """The logits of some rows and columns."""

    rows: slice
    columns: slice
    parts: list[Tensor]
    """Logits of the negatives, and of the positives if a row may have several; else -inf."""
    beyond: int
    """From this column on, they represent the transpose too."""
    place: Tensor | None
    """Index of the one positive of each row."""
    picked: Tensor | None
    """Its logit."""
    spare: Tensor
    """A buffer of their shape."""


class _Matrix(NamedTuple):
    """The logits of this rank's rows and the columns of all ranks, never all in memory."""

    rows: Tensor
    columns: Tensor
    scale: Tensor
    each: list[int]
    """Number of columns of each rank."""
    own: slice
    """This rank's columns."""
    group_name: str | None
    """None: this rank has all columns."""
    itself: Tensor | None
    """The column that is the row itself, which is excluded."""
    positive: Tensor | None
    """The column that is the positive of each row."""
    labels: Tensor | None
    column_labels: Tensor | None
    triangle: bool
    """Whether the matrix is symmetric, and strips begin at the diagonal."""

    def strips(self) -> Iterator[_Strip]:
        count, width = len(self.rows), len(self.columns)
        step = _rows_at_once(self.rows, width)
        room = self.rows.new_empty(2, step * width)
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            first = start if self.triangle else 0
            shape = rows.stop - start, width - first
            logits, spare = (part[: shape[0] * shape[1]].view(shape) for part in room.unbind())
            torch.mm(self.rows[rows] * self.scale, self.columns[first:].T, out=logits)
            place = picked = None
            itself = None if self.itself is None else self.itself[rows, None] - first
            if self.positive is not None:
                place = self.positive[rows, None] - first
                if self.triangle and itself is not None:  # left of the strip: in its transpose
                    place = place.where(place >= 0, itself)
                picked = logits.gather(1, place)[:, 0]
                logits.scatter_(1, place, -torch.inf)
            if itself is not None:
                logits.scatter_(1, itself, -torch.inf)
            parts = [logits]
            if self.labels is not None and self.column_labels is not None:
                same = self.labels[rows, None] == self.column_labels[first:]
                parts.append(logits.masked_fill(~same, -torch.inf))
                logits.masked_fill_(same, -torch.inf)
            beyond = shape[0] if self.triangle else 0
            yield _Strip(rows, slice(first, width), parts, beyond, place, picked, spare)


def _rows_at_once(rows: Tensor, width: int) -> int:
    """Return how many rows a strip of so many columns has."""
    count, width = len(rows), max(width, 1)
    if on_host(rows):
        step = max(_STRIP, IN_CACHE // width)
    else:
        step = max(ON_DEVICE // width, -(-count // MOST_BLOCKS))
    return max(1, min(step, count))


def _matrix(inputs: _Inputs) -> _Matrix:
    rows = inputs.rows.detach()
    columns = rows if inputs.within else inputs.columns.detach()
    column_labels, each, start = inputs.labels, [len(columns)], 0
    count, gathered = len(columns), None
    if inputs.counts is not None and inputs.group_name is not None:
        gathered, each = inputs.group_name, cast("list[int]", inputs.counts.tolist())
        start = sum(each[: _groups.resolved(gathered).rank()])
        columns = _groups.gathered_rows(columns, each, gathered)
        if inputs.labels is not None:
            column_labels = _groups.gathered_rows(inputs.labels[:, None], each, gathered)[:, 0]
    _refuse_fewer(len(columns), inputs.at_least, inputs.caller)
    positive, itself = inputs.positive, None
    if positive is not None:
        positive = positive + start
    if inputs.within:
        itself = torch.arange(start, start + count, device=rows.device)
    return _Matrix(
        rows,
        columns,
        inputs.scale.detach(),
        each,
        slice(start, start + count),
        gathered,
        itself,
        positive,
        inputs.labels,
        column_labels,
        inputs.within and gathered is None,
    )


class _LogSums:
    """Logs of sums of exponentials, to which logits are added strip by strip (online softmax)."""

    def __init__(self, like: Tensor, count: int) -> None:
        self.top = like.new_full((count,), torch.finfo(like.dtype).min)
        self.sum_exp = like.new_zeros(count, dtype=accumulator(like))

    def add(self, where: slice, logits: Tensor, dim: int, room: Tensor) -> None:
        """Add logits along an axis; overwrites room, which may be the logits."""
        top, sum_exp = self.top[where], self.sum_exp[where]
        high = torch.maximum(top, logits.amax(dim))
        powers = torch.sub(logits, high.unsqueeze(dim), out=room).exp_()
        sum_exp.mul_((top - high).exp()).add_(powers.sum(dim))
        top.copy_(high)

    def value(self) -> Tensor:
        return self.sum_exp.log() + self.top


def _log_sums(matrix: _Matrix, inputs: _Inputs) -> tuple[list[_LogSums], list[_LogSums]]:
    """Return the log-sums of the negatives and of the positives, by row and by column."""
    by_row = [_LogSums(matrix.rows, len(matrix.rows)) for _ in range(2)]
    by_column = by_row if matrix.triangle else []
    if inputs.symmetric:
        by_column = [_LogSums(matrix.rows, len(matrix.columns))]
    one = by_row[1]
    for strip in matrix.strips():
        if strip.picked is not None:
            one.top[strip.rows] = strip.picked
        for part, logits in enumerate(strip.parts):
            beyond = logits[:, strip.beyond :]
            if by_column and beyond.numel():
                where = slice(strip.columns.start + strip.beyond, None)
                by_column[part].add(where, beyond, 0, strip.spare[:, strip.beyond :])
            if logits.numel():
                by_row[part].add(strip.rows, logits, 1, logits)
    if inputs.labels is None:
        one.sum_exp.fill_(1)
    if len(inputs.given):
        one.top.copy_(inputs.given)
    if matrix.triangle and matrix.positive is not None and matrix.itself is not None:
        one.top = one.top.where(matrix.positive > matrix.itself, one.top[matrix.positive])
    return by_row, by_column


class _Rows(NamedTuple):
    """The loss of each row, and its derivatives."""

    loss: Tensor
    counted: Tensor
    """Whether it has a positive; without one the other fields are 0."""
    of_negatives: Tensor
    of_positives: Tensor
    pull: Tensor | None
    """The gradient with respect to rows, divided by scale, except that of the log-sums."""


def _rows(matrix: _Matrix, inputs: _Inputs, negatives: Tensor, positives: Tensor) -> _Rows:
    count = mean = pull = None
    slope = (negatives - positives).sigmoid()
    of_negatives, of_positives = slope, -slope
    if inputs.form == "decoupled":
        of_negatives = torch.ones_like(slope)
        of_positives = -(of_negatives if inputs.weight is None else inputs.weight.to(slope.dtype))
    if matrix.labels is not None and matrix.column_labels is not None:
        ordered = matrix.column_labels.sort().values
        first = torch.searchsorted(ordered, matrix.labels)
        count = torch.searchsorted(ordered, matrix.labels, right=True) - first - 1
        if inputs.form == "outside":
            of_class = torch.searchsorted(ordered, matrix.column_labels)
            sums = torch.zeros_like(matrix.columns).index_add_(0, of_class, matrix.columns)
            pull = sums[first].sub_(matrix.rows).div_(count.clamp_min(1)[:, None])
            mean = row_products(matrix.rows, pull) * matrix.scale
            # A row is in its own mean, and in that of each of its positives.
            several = (count > 1).to(slope.dtype)
            of_positives, pull = several - slope, pull.mul_(-2 * several.to(pull.dtype)[:, None])
        of_negatives, of_positives = (x.where(count > 0, 0) for x in (of_negatives, of_positives))
    if inputs.form == "decoupled":
        loss = negatives - (positives if inputs.weight is None else inputs.weight * positives)
    else:
        loss = softplus(negatives - positives)
    if mean is not None and count is not None:
        # Not their log-sum counts but the mean of their logits; of one positive the two are equal.
        loss = torch.where(count > 1, loss + (positives - mean), loss)
    if count is not None:
        loss = loss.where(count > 0, 0)
    counted = torch.ones_like(loss, dtype=torch.bool) if count is None else count > 0
    return _Rows(loss, counted, of_negatives, of_positives, pull)


def _column_sums(matrix: _Matrix, sums: _LogSums, picked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-sum of each column's negatives, and the logit of its positive."""
    if matrix.group_name is None:
        return sums.value(), picked.to(sums.sum_exp.dtype)
    top = _groups.all_reduce(sums.top, matrix.group_name, "max")
    placed = torch.zeros_like(sums.sum_exp)
    placed[matrix.own] = picked.to(placed.dtype)
    parts = torch.stack([sums.sum_exp * (sums.top - top).exp(), placed])
    sum_exp, positive = _groups.all_reduce(parts, matrix.group_name).unbind()
    return sum_exp.log() + top, positive


class _Share(NamedTuple):
    """Computes d loss / d L from logits L: exp(L - reference) * factor."""

    reference: Tensor
    factor: Tensor


def _share(log_sum: Tensor, slope: Tensor, dtype: torch.dtype) -> _Share:
    log_sum = log_sum.clamp_min(torch.finfo(dtype).min)  # of an empty sum: each exp is 0, not NaN
    reference = log_sum.to(dtype)
    return _Share(reference, (slope * (reference - log_sum).exp()).to(dtype))


def _gradients(
    matrix: _Matrix,
    inputs: _Inputs,
    rows: _Rows,
    by_row: Sequence[_Share],
    by_column: Sequence[_Share],
    factor: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of rows, columns, scale and given, by a second pass over the strips."""
    of_rows, of_columns, of_scale, of_given = _fake(inputs)[2:]
    if not (inputs.of_rows or inputs.of_columns):
        return of_rows, of_columns, of_scale, of_given
    dtype = matrix.rows.dtype
    into_rows = torch.zeros_like(matrix.rows)
    into_columns = into_rows if matrix.triangle else torch.zeros_like(matrix.columns)
    one = rows.of_positives.to(dtype)
    if matrix.triangle and matrix.positive is not None:
        one = one + one[matrix.positive]
    for strip in matrix.strips():
        for part, logits in enumerate(strip.parts):
            if by_column:
                shares = by_column[part]
                torch.sub(logits, shares.reference[strip.columns], out=strip.spare)
                strip.spare.exp_().mul_(shares.factor[strip.columns])
            shares = by_row[part]
            logits.sub_(shares.reference[strip.rows, None]).exp_()
            logits.mul_(shares.factor[strip.rows, None])
            if by_column:
                logits.add_(strip.spare)
        weights = strip.parts[0] if len(strip.parts) == 1 else strip.parts[0].add_(strip.parts[1])
        if strip.place is not None and matrix.positive is not None:
            has_positive = matrix.positive[strip.rows] >= strip.columns.start
            weights.scatter_add_(1, strip.place, one[strip.rows].where(has_positive, 0)[:, None])
        into_rows[strip.rows].addmm_(weights, matrix.columns[strip.columns])
        if matrix.triangle or inputs.of_columns:
            beyond = slice(strip.columns.start + strip.beyond, None)
            into_columns[beyond].addmm_(weights[:, strip.beyond :].T, matrix.rows[strip.rows])
    by_scale = row_products(into_rows, matrix.rows).sum(dtype=factor.dtype)
    if matrix.group_name is not None:
        into_columns = _groups.scattered_rows(into_columns, matrix.each, matrix.group_name)
        if inputs.within:
            into_rows.add_(into_columns)
    if rows.pull is not None:
        into_rows.add_(rows.pull)
    scale = matrix.scale * factor.to(dtype)
    if inputs.of_rows:
        of_rows = into_rows.mul_(scale)
        of_scale = (by_scale * factor).to(dtype).reshape(1)
        of_given = (rows.of_positives * factor).to(dtype) if len(inputs.given) else of_given
    if inputs.of_columns and not inputs.within:
        of_columns = into_columns.mul_(scale)
    return of_rows, of_columns, of_scale, of_given
