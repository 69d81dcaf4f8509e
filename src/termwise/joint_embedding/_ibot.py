"""iBOT: a student predicts the teacher's assignment of each masked patch."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._numbers import lifted_dtype, may_look_at
from .._terms import Terms, terms
from ._assignments import check_temperature
from ._prototypes import cross_entropy_of_views, over_ranks

Over = Literal["images", "patches"]


@terms
class IBOTTerms(Terms):
    """Terms of [`ibot_loss`][termwise.joint_embedding.ibot_loss]."""

    loss: Float[Tensor, ""]
    """cross_entropy."""
    cross_entropy: Float[Tensor, ""]
    """Cross-entropy of teacher and student in nats: mean over images of the mean over their masked
    patches, or mean over patches."""
    teacher_entropy: Float[Tensor, ""]
    """Entropy of the teacher's probabilities in nats, with the same mean; detached."""
    kl: Float[Tensor, ""]
    """KL divergence of the student from the teacher, cross_entropy - teacher_entropy; detached."""
    marginal_entropy: Float[Tensor, ""]
    """Entropy of the teacher's probabilities averaged with each patch's weight in the loss, in
    nats; detached. It is log prototypes if all prototypes are used equally; NaN without a patch."""
    n_masked: Float[Tensor, ""]
    """Number of masked patches on all ranks; detached."""


@contract
def ibot_loss(
    student_logits: Float[Tensor, "masked prototypes"],
    teacher_probs: Float[Tensor, "masked prototypes"],
    image_index: Int[Tensor, " masked"],
    *,
    images: int,
    temperature: float = 0.1,
    over: Over = "images",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> IBOTTerms:
    r"""Cross-entropy of student and teacher at masked patches (iBOT, DINOv2, DINOv3).

    $$\mathrm{cross\_entropy} = \frac{1}{N} \sum_{i=1}^N \frac{1}{\max(1, M_i)}
    \sum_{m \in i} H(p_m, q_m), \qquad H(p, q) = -\sum_k p_k \log q_k, \qquad
    q_m = \mathrm{softmax}(\mathrm{student\_logits}_m / T)$$

    with N images over all ranks and M_i masked patches of image i. An image without a mask adds 0
    to the sum and 1 to N, as in DINOv2: if half of the images have masks, the loss is half as
    large. `over="patches"` averages over all masked patches instead, with equal weights.
    `cross_entropy = teacher_entropy + kl`.

    Args:
        student_logits (Float[Tensor, "masked prototypes"]): logits at the masked patches, before
            the softmax, in any order: `logits[mask]` of "images patches prototypes".
        teacher_probs (Float[Tensor, "masked prototypes"]): probabilities of the teacher at these
            patches, which it saw unmasked, each row a distribution, from
            [`sinkhorn`][termwise.joint_embedding.sinkhorn] or
            [`centered_softmax`][termwise.joint_embedding.centered_softmax]. It gets no gradient.
        image_index (Int[Tensor, " masked"]): image of each patch, from 0 to images - 1 on this
            rank: `mask.nonzero()[:, 0]`. All patches of an image are on one rank.
        images: number of images on this rank, with and without a mask; each global crop counts as
            one. 0 for a rank without images.
        temperature: T of the student, positive; 0.1 in iBOT. The probabilities of the teacher
            include its own temperature.
        over: mean over "images" of the mean over their patches (DINOv2, DINOv3, lightly), or over
            all "patches".
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. Without a masked patch loss and
        gradient are 0. Gradients, combined over ranks as `grad_reduction` says, equal those of one
        process that holds all images. Second derivatives of up to 262,144 logits are correct
        without a group; otherwise they raise NotImplementedError.

        Communication of each rank: one sum of prototypes + 2 elements in float64, and one of two
        integers, also under `torch.no_grad()`. Does not synchronize with the device. Arguments are
        not modified.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: temperature is not positive, images is negative or, without a group, 0, there is
            no prototype, or, on a CPU in eager mode, an index is out of range. Compiled or on an
            accelerator, PyTorch raises the error for an index out of range; no GPU has run this
            yet.

    References:
        Zhou et al., iBOT (2022), https://arxiv.org/abs/2111.07832, equation 2 and its masks; the
        mean over images is that of DINOv2 (https://github.com/facebookresearch/dinov2, b8931f7),
        DINOv3 (6876159) and lightly 1.6.0.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import ibot_loss
        >>> mask = torch.tensor([[True, False], [True, True]])
        >>> logits, probs = torch.zeros(2, 2, 16), torch.full((2, 2, 16), 1 / 16)
        >>> index = mask.nonzero()[:, 0]
        >>> ibot_loss(logits[mask], probs[mask], index, images=2).loss  # log 16
        tensor(2.7726)
    """
    check_temperature("ibot_loss", temperature)
    if images < 0 or (images == 0 and batch_group is None):
        raise ValueError(f"ibot_loss needs images >= 1, got {images}")
    rows, prototypes = student_logits.shape
    if prototypes == 0:
        raise ValueError("ibot_loss needs at least 1 prototype, got 0")
    n_images, n_masked = over_ranks((images, rows), student_logits, batch_group)
    if over == "images":
        ones = torch.ones_like(image_index, dtype=lifted_dtype(student_logits))
        try:
            sizes = ones.new_zeros(images).index_add_(0, image_index, ones)
        except IndexError:  # a call less than to look first
            _check_index(image_index, images)
            raise
        weights = sizes.index_select(0, image_index).reciprocal_()
        divisor = n_images
    else:
        _check_index(image_index, images)
        weights = None
        divisor = n_masked.clamp_min(1) if isinstance(n_masked, Tensor) else max(n_masked, 1)
    means = cross_entropy_of_views(
        student_logits,
        teacher_probs,
        weights,
        divisor,
        temperature=temperature,
        skip_same_view=False,
        group=batch_group,
        grad_reduction=grad_reduction,
    )
    counted = n_masked if isinstance(n_masked, Tensor) else torch.full_like(means.kl, n_masked)
    return IBOTTerms(
        loss=means.cross_entropy, **means._asdict(), n_masked=counted.to(means.kl.dtype)
    )


def _check_index(image_index: Tensor, images: int) -> None:
    """Raise an error for an index out of range, if that can be read."""
    if len(image_index) and may_look_at(image_index):
        least, most = (int(x) for x in image_index.aminmax())
        if not 0 <= least <= most < images:
            raise ValueError(
                f"ibot_loss needs image_index in 0..{images - 1} for images={images}, "
                f"got {least}..{most}"
            )


class IBOTLoss(LossModule):
    """[`ibot_loss`][termwise.joint_embedding.ibot_loss] as a module.

    Has no parameters and no center: pass the teacher's probabilities with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import IBOTLoss
        >>> loss_fn = IBOTLoss(over="patches")
        >>> patches = torch.zeros(3, 16), torch.full((3, 16), 1 / 16)
        >>> loss_fn(*patches, torch.tensor([0, 0, 1]), images=4).loss  # log 16
        tensor(2.7726)
    """

    temperature: float = 0.1
    over: Over = "images"
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        student_logits: Float[Tensor, "masked prototypes"],
        teacher_probs: Float[Tensor, "masked prototypes"],
        image_index: Int[Tensor, " masked"],
        *,
        images: int,
        batch_group: ProcessGroup | None = None,
    ) -> IBOTTerms:
        """Compute the terms of the loss of masked patches."""
        return ibot_loss(
            student_logits,
            teacher_probs,
            image_index,
            images=images,
            batch_group=batch_group,
            **self.hyperparameters(),
        )
