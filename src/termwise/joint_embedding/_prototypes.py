"""Cross-entropy of views of a student with views of a teacher, over prototypes, without pairs.

With logits x_s of a student's view, over the temperature, and a teacher's probabilities p_t,

    sum over pairs of H(t, s) = sum_s |sum_t p_t| logsumexp(x_s) - <sum_s x_s, sum_t p_t>

less the pairs that are left out. Each view is read once, in blocks of samples that stay in cache,
and the gradient, softmax less targets, is made with the value and in its place.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .. import _groups
from .._autograd import wants_gradient
from .._groups import GradReduction, ProcessGroup
from .._numbers import accumulator, alike, blocks, few, lifted, lifted_dtype, without_autocast
from .._operators import Operator, with_gradients

# Tensors of a view's block that are in use at a time.
_HELD = 2


class CrossEntropy(NamedTuple):
    """What losses over prototypes return beside `loss`, in its order and by its names."""

    cross_entropy: Tensor
    teacher_entropy: Tensor
    kl: Tensor
    marginal_entropy: Tensor


def cross_entropy_of_views(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None,
    divisor: Tensor,
    *,
    temperature: float,
    skip_same_view: bool,
    group: ProcessGroup | None,
    grad_reduction: GradReduction,
) -> CrossEntropy:
    """Sum H(teacher, student) over pairs of views, samples and ranks; divide by the divisor.

    Args:
        student: logits of this rank, "student_views batch prototypes".
        teacher: probabilities, "teacher_views batch prototypes", without a gradient.
        weights: of the samples, " batch". None: all 1.
        divisor: what the sums over all ranks are divided by.
        temperature: what the logits are divided by.
        skip_same_view: whether view i of the student and view i of the teacher are no pair.
        group: process group whose ranks hold different samples; one sum of prototypes + 2 numbers
            is sent. None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients.
    """
    student, teacher = alike(student, teacher.detach())
    gradient = wants_gradient(student)
    inputs = _Inputs(student, teacher, weights, temperature, skip_same_view, gradient)
    sums = _as_written(inputs) if few(student) else with_gradients(_cross_entropy, inputs)[:3]
    scale = _groups.gradient_scale(group, grad_reduction)
    value, entropy, marginal = _groups.terminal_sums(sums, group, scale)
    value, entropy, marginal = value / divisor, entropy.detach() / divisor, marginal.detach()
    found = CrossEntropy(
        value,
        entropy,
        value.detach() - entropy,
        torch.special.entr(marginal / marginal.sum()).sum(),
    )
    return CrossEntropy(*[x.to(lifted_dtype(student)) for x in found])


def over_ranks(numbers: Sequence[int], like: Tensor, group: ProcessGroup | None) -> list[Tensor]:
    """Sum counts over ranks, as integers on the device of `like`."""
    counts = torch.stack([like.new_full((), n, dtype=torch.int64) for n in numbers])
    return list(_groups.all_reduce(counts, _groups.name_of(group)).unbind())


class _Inputs(NamedTuple):
    student: Tensor
    teacher: Tensor
    weights: Tensor | None
    temperature: float
    skip: bool
    gradient: bool


def _as_written(inputs: _Inputs) -> list[Tensor]:
    """Compute the sums in operations that autograd follows to any order."""
    dtype = accumulator(inputs.student)
    teacher = lifted(inputs.teacher)
    logs = (lifted(inputs.student) / inputs.temperature).log_softmax(2)
    target = teacher.sum(0)
    per_sample = -(logs.sum(0) * target).sum(1)
    entropy = torch.special.entr(teacher).sum(2)
    same = min(len(logs), len(teacher)) if inputs.skip else 0
    entropies = entropy.sum(0) * len(logs)
    if same:
        per_sample = per_sample + (logs[:same] * teacher[:same]).sum((0, 2))
        entropies = entropies - entropy[:same].sum(0)
    if inputs.weights is not None:
        weights = inputs.weights.to(target.dtype)
        per_sample, entropies = per_sample * weights, entropies * weights
        target = target * weights[:, None]
    return [x.sum(0, dtype=dtype) for x in (per_sample, entropies, target)]


def _kernel(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher, all_weights, temperature, skip, _ = inputs
    count, _, width = student.shape
    same = min(count, len(teacher)) if skip else 0
    value, entropy, marginal, gradient = _fake(inputs)
    for total in (value, entropy, marginal):
        total.zero_()
    for samples in blocks(student.movedim(1, 0), _HELD * width):
        p = lifted(teacher[:, samples])
        weights = p.new_ones(p.shape[1]) if all_weights is None else all_weights[samples]
        target, masses = p.sum(0), p.sum(2)
        mass = masses.sum(0).repeat(count, 1)
        mass[:same] -= masses[:same]
        entropies = -_dot(p, p.clamp_min(torch.finfo(p.dtype).tiny).log_())
        entropies = entropies.sum(0) * count - entropies[:same].sum(0)
        slopes = weights.to(p.dtype)[:, None] / temperature
        pull, own_pull = target * slopes, p[:same] * slopes
        x_sum, nats = torch.zeros_like(target), torch.zeros_like(entropies)
        for views in blocks(student, _HELD * target.numel()):
            logits = lifted(student[views, samples])
            out = gradient[views, samples] if inputs.gradient else None
            room = out if out is not None and out.dtype == logits.dtype else None
            x = torch.sub(logits, logits.amax(2, keepdim=True), out=room).div_(temperature)
            for view in x:
                x_sum += view
            own = p[:same][views]  # of which x has the same views first
            nats += _dot(x[: len(own)], own).sum(0)
            powers = x.exp_()
            total = powers.sum(2)
            nats += (mass[views] * total.log()).sum(0)
            if out is not None:
                powers.mul_((mass[views] / total)[:, :, None] * slopes).sub_(pull)
                powers[: len(own)] += own_pull[views]
                if powers is not out:
                    out.copy_(powers)
        nats -= _dot(x_sum, target)
        value += (nats * weights).sum(dtype=value.dtype)
        entropy += (entropies * weights).sum(dtype=value.dtype)
        marginal += pull.sum(0)
    return value, entropy, marginal.mul_(temperature), gradient


def _dot(x: Tensor, y: Tensor) -> Tensor:
    with without_autocast(x):
        return cast("Tensor", torch.linalg.vecdot(x, y))


def _fake(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student = inputs.student
    number = student.new_empty((), dtype=accumulator(student))
    # Of most prototypes the softmax is near the least number of float16, until it is scaled.
    dtype = torch.float32 if student.dtype == torch.float16 else student.dtype
    gradient = student.new_empty(student.shape if inputs.gradient else 0, dtype=dtype)
    marginal = number.new_empty(student.shape[2])
    return number, torch.empty_like(number), marginal, gradient


_cross_entropy = Operator("cross_entropy_of_views", _Inputs, _kernel, _fake)
