"""Gram anchoring: keep the similarities of patches close to those of an earlier model."""

from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .. import _groups
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._numbers import accumulator, alike, blocks, inner, lifted, product, tiles, without_autocast
from .._operators import Operator, with_gradients
from .._terms import Terms, terms

# Up to so many pairs, storing them all is faster than the calls that avoid it.
_FEW_PAIRS = 2**16

Negatives = Literal["both", "teacher", "keep"]
Level = Literal["image", "batch"]


@terms
class GramAnchorTerms(Terms):
    """Terms of [`gram_anchor_loss`][termwise.joint_embedding.gram_anchor_loss]."""

    loss: Float[Tensor, ""]
    """Squared difference of the student's and the teacher's similarities, mean over pairs."""
    agreement: Float[Tensor, ""]
    """Cosine of the two Gram matrices over all pairs, after `negatives`; detached."""


@contract
def gram_anchor_loss(
    student: Float[Tensor, "images patches dim"],
    teacher: Float[Tensor, "images patches teacher_dim"],
    *,
    normalize: bool = True,
    negatives: Negatives = "both",
    level: Level = "image",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> GramAnchorTerms:
    r"""Match the similarities between an image's patches to those of a teacher's features.

    $$\mathrm{loss} = \frac{1}{b p^2} \sum_{i} \lVert S_i S_i^\top - T_i T_i^\top \rVert_F^2$$

    with the features S_i of the student and T_i of the teacher, patches x dim, of image i of b. The
    loss is invariant to rotations of the student's features. `negatives` says how negative
    similarities enter.

    Above 2^16 pairs the patches x patches matrices are formed in tiles, together with the gradient,
    and never stored as a whole. Inputs in half precision are converted to float32, with or without
    autocast; the terms of float64 inputs are float64. A non-finite input makes the terms
    non-finite.

    Args:
        student (Float[Tensor, "images patches dim"]): features of the student. Feature maps have
            one row for each patch: `einops.rearrange(student, "b c h w -> b (h w) c")`. Leave out
            the class token and registers.
        teacher (Float[Tensor, "images patches teacher_dim"]): features of the same patches by an
            earlier checkpoint, in any number of dimensions. No gradient.
        normalize: whether to divide the features of each patch by their Euclidean norm (at least
            1e-12), so that similarities are cosines.
        negatives: "both" sets negative similarities of student and teacher to 0 (DINOv3's default);
            "teacher" sets those of the teacher to 0, and the student's where both are negative;
            "keep" changes nothing.
        level: "image" compares patches of one image; "batch" those of all images with each other,
            and divides by (b p)^2.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. The student's gradients, combined over
        ranks as `grad_reduction` says, equal those of one process that holds all images. Second
        derivatives are correct for up to 2^16 pairs (images * patches^2) without a group, and raise
        NotImplementedError otherwise.

        With "keep" and more patches than features, of student and teacher, both norms are computed
        from products of features x features (three terms that cancel: the error is about 1e-7 of
        the mean squared similarity in float32, 1e-16 in float64).

        Communication of each rank, for d = dim + teacher_dim, N = patches of all ranks, W = ranks,
        in elements of that dtype (float32 for half precision): a sum of W + 3 numbers and, at level
        "batch", the features of both in a ring, less than N * d in and out in W - 1 messages, or,
        if products of features are computed, a sum of about d^2 elements. The numbers of images are
        read on the host, so with a group a call synchronizes with the device once. The same is sent
        under `torch.no_grad()`.

    Raises:
        ContractError: student and teacher are not floating "images patches dim" tensors with the
            same images and patches.
        ValueError: no image over all ranks, or no patch.

    References:
        Simeoni et al., DINOv3 (2025), https://arxiv.org/abs/2508.10104, equation 2, which sums over
        pairs of one image and does not mention clipping; the authors' code (`gram_loss.py`,
        6876159) takes the mean over images and pairs and clips negatives by default: we side with
        the code. Its configurations do not clip. Its `remove_neg`, and neither, are "both" and
        "keep". Its `remove_only_teacher_neg` is "teacher", except that the student's similarities
        stay where both are negative: it compares after the teacher's are set to 0. Its
        `img_level=False` is "batch", of one rank's images.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import gram_anchor_loss
        >>> student = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # a similarity of 1, twice
        >>> teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # of 0
        >>> gram_anchor_loss(student, teacher).metrics()
        {'loss': 0.5, 'agreement': 0.70...}
    """
    if student.shape[1] < 1 or (batch_group is None and student.shape[0] < 1):
        raise ValueError(
            f"gram_anchor_loss needs at least 1 image and 1 patch, got {student.shape[0]} images "
            f"of {student.shape[1]} patches"
        )
    student, teacher = (lifted(x) for x in alike(student, teacher.detach()))
    if normalize:
        student, teacher = F.normalize(student, dim=2), F.normalize(teacher, dim=2)
    if batch_group is None and student.shape[0] * student.shape[1] ** 2 <= _FEW_PAIRS:
        loss, agreement = _as_written(student, teacher, negatives, level)
    else:
        inputs = _Inputs(
            student,
            teacher,
            _groups.row_counts(student, batch_group),
            negatives,
            level,
            torch.is_grad_enabled(),
            "" if batch_group is None else batch_group.group_name,
            _groups.gradient_scale(batch_group, grad_reduction),
        )
        loss, agreement, _ = with_gradients(_gram_anchor, inputs)
    return GramAnchorTerms(loss=loss, agreement=agreement)


def _as_written(
    student: Tensor, teacher: Tensor, negatives: Negatives, level: Level
) -> tuple[Tensor, Tensor]:
    """Compute loss and agreement by operations with derivatives of any order."""
    if level == "batch":
        student, teacher = (x.flatten(0, 1).unsqueeze(0) for x in (student, teacher))
    own, wanted = product(student, student.mT), product(teacher, teacher.mT)
    if negatives == "both":
        own, wanted = own.relu(), wanted.relu()
    elif negatives == "teacher":
        own, wanted = own.where((own > 0) | (wanted > 0), 0), wanted.relu()
    one, other = own.detach().flatten(), wanted.flatten()
    norms = one.square().sum().sqrt() * other.square().sum().sqrt()
    agreement = (one * other).sum() / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    return F.mse_loss(own, wanted), agreement


class _Inputs(NamedTuple):
    student: Tensor
    teacher: Tensor
    counts: Tensor | None
    negatives: str
    level: str
    gradient: bool
    group_name: str
    weight: float
    """Of the gradient, over ranks."""


def _kernel(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss, the agreement and the gradient of the loss (or an empty tensor)."""
    student, teacher, counts = inputs.student.detach(), inputs.teacher.detach(), inputs.counts
    each = [student.shape[0]] if counts is None else cast("list[int]", counts.tolist())
    images, patches = sum(each), student.shape[1]
    if images < 1:
        raise ValueError("gram_anchor_loss needs at least 1 image over all ranks, got 0")
    pairs = images * patches**2
    if inputs.level == "batch":  # one large image, of which each rank has a part
        student, teacher = (x.flatten(0, 1).unsqueeze(0) for x in (student, teacher))
        each = [count * patches for count in each]
        patches, pairs = patches * images, pairs * images

    with without_autocast(student):
        by_features = patches > max(student.shape[2], teacher.shape[2])
        if inputs.negatives == "keep" and by_features:
            sums, gradient = _by_features(student, teacher, inputs)
        else:
            sums, gradient = _by_patches(student, teacher, each, inputs)
        difference, of_student, of_teacher = sums
        inner = (of_student + of_teacher - difference) / 2
        bound = (of_student * of_teacher).sqrt().clamp(min=torch.finfo(sums.dtype).tiny)
        loss, agreement = (x.to(student.dtype) for x in (difference / pairs, inner / bound))
        if not inputs.gradient:
            return loss, agreement, student.new_empty(0)
        gradient = gradient.mul_(4 * inputs.weight / pairs).view(inputs.student.shape)
        return loss, agreement, gradient


def _by_features(student: Tensor, teacher: Tensor, inputs: _Inputs) -> tuple[Tensor, Tensor]:
    """Return |S S^T - T T^T|^2, |S S^T|^2 and |T T^T|^2, over ranks, and S S^T S - T T^T S.

    By |S S^T|^2 = |S^T S|^2 and <S S^T, T T^T> = |S^T T|^2.
    """

    def over_ranks(x: Tensor) -> Tensor:
        return x if inputs.counts is None else _groups.all_reduce(x, inputs.group_name)

    sums = student.new_zeros(3, dtype=accumulator(student))
    gradient = torch.empty_like(student)
    for images in blocks(student, max(student.shape[2], teacher.shape[2]) ** 2):
        s, t = student[images], teacher[images]
        products = [s.mT @ s, s.mT @ t, t.mT @ t]
        if inputs.level == "batch":  # the sum over patches is one over ranks
            products = [over_ranks(x) for x in products]
        of_student, both, of_teacher = (inner(x, x) for x in products)
        sums += torch.stack((of_student - 2 * both + of_teacher, of_student, of_teacher))
        torch.sub(s @ products[0], t @ products[1].mT, out=gradient[images])
    return sums if inputs.level == "batch" else over_ranks(sums), gradient


def _by_patches(
    student: Tensor, teacher: Tensor, each: list[int], inputs: _Inputs
) -> tuple[Tensor, Tensor]:
    """Return the same from the matrices S S^T and T T^T, after `negatives`, tile by tile."""
    name, visits = inputs.group_name, inputs.level == "batch" and inputs.counts is not None
    rank = _groups.resolved(name).rank() if visits else 0
    owners = [(rank - step) % len(each) for step in range(len(each) if visits else 1)]

    sums = student.new_zeros(3, dtype=accumulator(student))
    gradient, students, teachers = torch.zeros_like(student), student, teacher
    for owner in owners:  # of the patches that this rank's are compared with
        count = students.shape[1]
        for images in blocks(student, student.shape[1] * count):
            for rows, tile in tiles(student[0], count):
                own = student[images, rows] @ students[images, tile].mT
                wanted = teacher[images, rows] @ teachers[images, tile].mT
                gate = _gate(own, wanted, inputs.negatives)
                if gate is not None:
                    own, wanted = _opened(own, gate), wanted.clamp_(min=0)
                sums[1] += inner(own, own)
                sums[2] += inner(wanted, wanted)
                difference = own.sub(wanted)
                sums[0] += inner(difference, difference)
                if inputs.gradient:
                    if gate is not None:
                        difference = _opened(difference, gate)
                    gradient[images, rows].baddbmm_(difference, students[images, tile])
        if owner != owners[-1]:
            moved = torch.cat((students, teachers), 2)[0]
            moved = _groups.passed_on(moved, each[owner - 1], name).unsqueeze(0)
            students, teachers = moved[..., : student.shape[2]], moved[..., student.shape[2] :]
    return _groups.all_reduce(sums, name or None), gradient


def _gate(own: Tensor, wanted: Tensor, negatives: str) -> Tensor | None:
    """Return a tensor that is positive where the student's similarities count; None: everywhere."""
    if negatives == "keep":
        return None
    return own if negatives == "both" else torch.maximum(own, wanted)


def _opened(x: Tensor, gate: Tensor) -> Tensor:
    """Return x, or 0 where gate <= 0; ten times as fast as `where` on a CPU."""
    return cast("Tensor", torch.ops.aten.threshold_backward(x, gate, 0))


def _fake(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor]:
    student = inputs.student
    gradient = student.new_empty(student.shape if inputs.gradient else 0)
    return student.new_empty(()), student.new_empty(()), gradient


_gram_anchor = Operator("gram_anchor", _Inputs, _kernel, _fake)


class GramAnchorLoss(LossModule):
    """[`gram_anchor_loss`][termwise.joint_embedding.gram_anchor_loss] as a module.

    Has no parameters and stores no process group: pass the group with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import GramAnchorLoss
        >>> loss_fn = GramAnchorLoss(negatives="keep")
        >>> features = torch.randn(2, 4, 8)
        >>> loss_fn(features.flip(2), features).metrics()["loss"] < 1e-12  # a rotation of them
        True
    """

    normalize: bool = True
    negatives: Negatives = "both"
    level: Level = "image"
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        student: Float[Tensor, "images patches dim"],
        teacher: Float[Tensor, "images patches teacher_dim"],
        *,
        batch_group: ProcessGroup | None = None,
    ) -> GramAnchorTerms:
        """Compute the terms of the loss of a batch of images."""
        return gram_anchor_loss(student, teacher, batch_group=batch_group, **self.hyperparameters())
