"""Divergences between rows of two models' logits: by autograd, and with their own gradients."""

import functools
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._groups import ProcessGroup
from ._rows import (
    ByHand,
    PerRow,
    centred,
    highest,
    log_softmax,
    over_columns,
    weighted_log_sums,
    weighted_logs,
    write_gradient,
)

Divergence = Literal["forward", "reverse", "jensen_shannon"]


class Compared(NamedTuple):
    """Settings of the divergence of each row."""

    divergence: str
    """One of Divergence."""
    beta: float
    temperature: float


def check_beta(name: str, beta: float) -> None:
    """Raise an error for a weight of the Jensen-Shannon mixture outside (0, 1)."""
    if not 0 < beta < 1:
        raise ValueError(f"{name} needs beta in (0, 1), got {beta}")


def divergence_of_logs(q: Tensor, p: Tensor, compared: Compared) -> Tensor:
    """Return the divergence of each row, given log-probabilities of student (q) and teacher (p)."""
    if compared.divergence == "forward":
        parts = weighted_logs(p.exp(), p - q)
    elif compared.divergence == "reverse":
        parts = weighted_logs(q.exp(), q - p)
    else:
        # If both are -inf, as for padded tokens, the gradient of the mixture would be NaN.
        beta, mixed = compared.beta, mixture(finite(p), finite(q), compared.beta)
        parts = beta * weighted_logs(p.exp(), p - mixed) + (1 - beta) * weighted_logs(
            q.exp(), q - mixed
        )
    return parts.sum(1)


def divergence_by_hand(compared: Compared, vocab_group: ProcessGroup | None) -> ByHand:
    """Return the formula for rows of logits x of the student and y of the teacher."""
    kind = _jensen_shannon_by_hand if compared.divergence == "jensen_shannon" else _kl_by_hand
    return functools.partial(kind, compared=compared, vocab_group=vocab_group)


def _kl_by_hand(
    out: Tensor | None,
    unused: Tensor | None,
    x: Tensor,
    y: Tensor,
    *,
    compared: Compared,
    vocab_group: ProcessGroup | None,
) -> PerRow:
    """Compute the forward or the reverse divergence from e^(logits - highest), each computed once.

    With a the centered logits of the model that the mean is over, and b those of the other: KL =
    sum e^a (a - b) / sum e^a - log sum e^a + log sum e^b.
    """
    forward = compared.divergence == "forward"
    a = centred(x, highest(x, vocab_group), compared.temperature, out)
    b = centred(y, highest(y, vocab_group), compared.temperature)
    other, difference = b.exp(), b.sub_(a)  # b is no longer needed
    own = a.exp_()
    if not forward:
        difference.neg_()
    gap = weighted_log_sums(other if forward else own, difference)
    own_sum, other_sum = own.sum(1), other.sum(1)
    if vocab_group is not None:
        sums = torch.stack([gap, own_sum, other_sum])
        gap, own_sum, other_sum = over_columns(sums, vocab_group)
    gap = gap / (other_sum if forward else own_sum)
    logs = own_sum.log() - other_sum.log()
    if out is not None:
        own.div_(own_sum[:, None])
        if forward:
            own.sub_(other.div_(other_sum[:, None]))
        else:
            own.mul_(difference.sub_(gap[:, None]))
        _write(out, own, unused, compared.temperature)
    return (gap + logs if forward else gap - logs,)


def _jensen_shannon_by_hand(
    out: Tensor | None,
    unused: Tensor | None,
    x: Tensor,
    y: Tensor,
    *,
    compared: Compared,
    vocab_group: ProcessGroup | None,
) -> PerRow:
    """Compute Jensen-Shannon, whose derivative with respect to log q is q's part of it."""
    q, p = (log_softmax(logits, None, compared.temperature, vocab_group) for logits in (x, y))
    mixed = mixture(p, q, compared.beta)
    student = (1 - compared.beta) * weighted_logs(q.exp(), q - mixed)
    student_sum = student.sum(1)
    teacher_sum = compared.beta * weighted_logs(p.exp(), p - mixed).sum(1)
    if vocab_group is not None:
        sums = torch.stack([student_sum, teacher_sum])
        student_sum, teacher_sum = over_columns(sums, vocab_group)
    if out is not None:
        student.addcmul_(q.exp_(), student_sum[:, None], value=-1)
        _write(out, student, unused, compared.temperature)
    return (student_sum + teacher_sum,)


def _write(out: Tensor, gradient: Tensor, unused: Tensor | None, temperature: float) -> None:
    if temperature != 1:
        gradient.div_(temperature)
    write_gradient(out, gradient, unused)


def mixture(p: Tensor, q: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(p + math.log(beta), q + math.log(1 - beta))


def finite(logs: Tensor) -> Tensor:
    """Replace -inf by the lowest finite number: a sum of only e^-inf has a gradient of NaN."""
    return logs.clamp_min(torch.finfo(logs.dtype).min)
