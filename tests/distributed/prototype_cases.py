"""What each rank runs of the losses on prototypes."""

import torch
from cases import values

from termwise import _groups
from termwise.joint_embedding import (
    _prototypes,
    dino_loss,
    ibot_loss,
    sinkhorn,
    swapped_prediction_loss,
    updated_center,
)


def ibot(group, student, teacher, index, images, options):
    student = student.clone().requires_grad_()
    options = {"images": images, "batch_group": group, **options}
    terms = ibot_loss(student, teacher, index, **options)
    (gradient,) = torch.autograd.grad(terms.loss, student)
    return values(terms), gradient


def dino(group, student, teacher, small, gradients):
    """One rank's few logits go another way than another's many, and it may only evaluate."""
    student, usual = student.clone().requires_grad_(), _prototypes._SMALL
    _prototypes._SMALL = small
    try:
        with torch.set_grad_enabled(gradients):
            terms = dino_loss(student, teacher, batch_group=group)
    finally:
        _prototypes._SMALL = usual
    gradient = torch.autograd.grad(terms.loss, student)[0] if gradients else None
    return values(terms), gradient, terms.loss.dtype


def teachers(group, center, logits):
    return (
        sinkhorn(logits, temperature=0.05, batch_group=group),
        updated_center(center, logits, batch_group=group),
    )


def sent(group, logits, teacher):
    """Record dtype, elements and kind of each reduction."""
    found, reduce = [], _groups.all_reduce

    def recorded(x, group_name, how="sum"):
        # The highest is found as the least of what is negated, by a second call.
        if group_name is not None and how != "max":
            found.append((str(x.dtype), x.numel(), how))
        return reduce(x, group_name, how)

    _groups.all_reduce = recorded
    try:
        sinkhorn(logits[0], temperature=0.05, iterations=2, batch_group=group)
        dino_loss(logits, teacher, batch_group=group)
        swapped_prediction_loss(logits, num_global=2, batch_group=group)
        updated_center(logits[0, 0], logits[0], batch_group=group)
    finally:
        _groups.all_reduce = reduce
    return found
