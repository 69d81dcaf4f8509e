"""Cross-entropy between views of a student and a teacher, over prototypes, without forming pairs.

With logits x_s of a student's view, divided by the temperature, and a teacher's probabilities p_t,

    sum over pairs of H(t, s) = sum_s |sum_t p_t| logsumexp(x_s) - <sum_s x_s, sum_t p_t>

minus the pairs that are left out. Each view is read once, in blocks of samples that stay in cache,
and the gradient, softmax minus targets, is computed with the value and in place.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .. import _groups
from .._autograd import wants_gradient
from .._groups import GradReduction, ProcessGroup
from .._numbers import accumulator, alike, blocks, lifted, lifted_dtype
from .._operators import Operator, with_gradients

# Number of tensors of the size of a view's block that are in use at a time.
_HELD = 2
# For so few logits, kernel launches cost more than a second pass over the logits.
_SMALL = 2**18


class CrossEntropy(NamedTuple):
    """The terms of losses over prototypes, except `loss`, in their order."""

    cross_entropy: Tensor
    teacher_entropy: Tensor
    kl: Tensor
    marginal_entropy: Tensor


def cross_entropy_of_views(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    divisor: Tensor | int,
    *,
    temperature: float,
    skip_same_view: bool,
    group: ProcessGroup | None,
    grad_reduction: GradReduction,
) -> CrossEntropy:
    """Sum H(teacher, student) over pairs of views, samples and ranks; divide by the divisor.

    Args:
        student: logits of this rank, "student_views batch prototypes"; "batch prototypes" is one
            view.
        teacher: probabilities, "teacher_views batch prototypes", without a gradient; one view as
            of the student.
        weights: weights of the samples, " batch". None: all 1.
        divisor: divisor of the sums over all ranks.
        temperature: divisor of the logits.
        skip_same_view: whether to exclude the pairs of view i of the student and view i of the
            teacher.
        group: process group whose ranks hold different samples; one sum of prototypes + 2 numbers
            is sent. None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.
    """
    student, teacher = alike(student, teacher.detach())
    if weights is not None:  # the sums are linear in them: a call less than to divide two sums
        weights = weights / -divisor
    inputs = _Inputs(
        student, teacher, weights, temperature, skip_same_view, wants_gradient(student)
    )
    compiling = torch.compiler.is_compiling()
    if student.numel() <= _SMALL or compiling:  # a compiler fuses it
        # Ranks may take different paths, but must send the same dtype; compiled, sums may be long.
        wide_sums = group is not None or compiling
        sums = _as_written(inputs, accumulator(student) if wide_sums else None)
    else:
        if student.ndim == 2:
            inputs = inputs._replace(student=student.unsqueeze(0), teacher=teacher.unsqueeze(0))
        sums = with_gradients(_cross_entropy, inputs)[:3]
    scale = _groups.gradient_scale(group, grad_reduction)
    value, entropy, marginal = _groups.terminal_sums(sums, group, scale)
    entropy, marginal = entropy.detach(), marginal.detach()
    if weights is None:
        value, entropy = value / -divisor, entropy / -divisor
    surprise = cast("Tensor", torch.special.entr(marginal / marginal.sum()))
    found = value, entropy, value.detach() - entropy, surprise.sum()
    dtype = lifted_dtype(student)
    return CrossEntropy(*(found if value.dtype == dtype else [x.to(dtype) for x in found]))


def over_ranks(
    counts: Sequence[int], like: Tensor, group: ProcessGroup | None
) -> Sequence[int | Tensor]:
    """Sum counts over ranks, as integers on the device of `like`; unchanged without a group."""
    if group is None:
        return counts
    stacked = torch.stack([like.new_full((), n, dtype=torch.int64) for n in counts])
    return _groups.all_reduce(stacked, group.group_name).unbind()


class _Inputs(NamedTuple):
    student: Tensor
    teacher: Tensor
    weights: Tensor | None
    temperature: float
    skip: bool
    gradient: bool


def _as_written(inputs: _Inputs, dtype: torch.dtype | None) -> Sequence[Tensor]:
    """Compute the sums, in this dtype, by operations with derivatives of any order."""
    student, p, weights, temperature, skip, _ = inputs
    logs, p = (lifted(student) * (1 / temperature)).log_softmax(-1), lifted(p)
    views, of_teacher = (x.shape[0] if x.ndim == 3 else 1 for x in (student, p))
    same = min(views, of_teacher) if skip else 0
    negatives = _finite_logs(p)
    if weights is not None:  # all that follows is linear in p
        p = p * weights.to(p.dtype).unsqueeze(1)
    negatives = negatives * p
    # Each teacher's view has as many pairs, less one where it is the student's too.
    entropy, pairs = negatives.sum(dtype=dtype), views - (same == of_teacher)
    if pairs != 1:
        entropy = entropy * pairs
    if 0 < same < of_teacher:
        entropy = entropy - negatives[:same].sum(dtype=dtype)
    targets = target = _summed(p)
    if same:
        targets = target - p[:same]
    if 0 < same < views:
        targets = torch.cat((targets, target.expand(views - same, -1, -1)))
    return (logs * targets).sum(dtype=dtype), entropy, target.sum(0, dtype=dtype)


def _kernel(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher, weights, temperature, skip, _ = inputs
    count, _, width = student.shape
    same, slope = min(count, len(teacher)) if skip else 0, 1 / temperature
    value, entropy, marginal, gradient = _fake(inputs)
    for total in (value, entropy, marginal):
        total.zero_()
    for samples in blocks(student.movedim(1, 0), _HELD * width):
        p = lifted(teacher[:, samples])
        logs = _finite_logs(p)
        if weights is not None:  # all that follows is linear in p
            p = p * weights[samples, None].to(p.dtype)
        negatives = logs.mul_(p)
        entropy += negatives.sum() * count - negatives[:same].sum()
        target, masses = _summed(p), p.sum(2)
        marginal += target.sum(0)
        mass = masses.sum(0).repeat(count, 1)
        mass[:same] -= masses[:same]
        x_sum = torch.zeros_like(target)
        for views in blocks(student, _HELD * target.numel()):
            logits = lifted(student[views, samples])
            out = gradient[views, samples] if inputs.gradient else None
            room = out if out is not None and out.dtype == logits.dtype else None
            x = torch.sub(logits, logits.amax(2, keepdim=True), out=room).mul_(slope)
            own = p[:same][views]  # which form no pairs with the first of x
            x_sum += _summed(x)
            if len(own):
                value -= (x[: len(own)] * own).sum()
            powers = x.exp_()
            total = powers.sum(2)
            value -= (mass[views] * total.log()).sum()
            if out is not None:
                powers.mul_((mass[views] / total).mul_(-slope)[:, :, None])
                powers.add_(target, alpha=slope)
                if len(own):
                    powers[: len(own)].sub_(own, alpha=slope)
                if powers is not out:
                    out.copy_(powers)
        value += (x_sum * target).sum()
    return value, entropy, marginal, gradient


def _summed(views: Tensor) -> Tensor:
    """Sum over views; "batch prototypes" is one."""
    if views.ndim == 2:
        return views
    return views.squeeze(0) if views.shape[0] == 1 else views.sum(0)


def _finite_logs(p: Tensor) -> Tensor:
    """Return log p, finite at 0, so that 0 log 0 = 0. A third of the time of torch.special.entr."""
    return p.clamp_min(torch.finfo(p.dtype).tiny).log_()


def _fake(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student = inputs.student
    number = student.new_empty((), dtype=accumulator(student))
    # For most prototypes the softmax is near the smallest float16 number until it is scaled.
    dtype = torch.float32 if student.dtype == torch.float16 else student.dtype
    gradient = student.new_empty(student.shape if inputs.gradient else 0, dtype=dtype)
    marginal = number.new_empty(student.shape[2])
    return number, torch.empty_like(number), marginal, gradient


_cross_entropy = Operator("cross_entropy_of_views", _Inputs, _kernel, _fake)
