"""DINO: a student's views predict the teacher's assignments of the other views."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._terms import Terms, terms
from ._assignments import check_temperature
from ._prototypes import cross_entropy_of_views, over_ranks

SameView = Literal["skip", "keep"]
OverPairs = Literal["mean", "sum"]


@terms
class DINOTerms(Terms):
    """Terms of [`dino_loss`][termwise.joint_embedding.dino_loss]."""

    loss: Float[Tensor, ""]
    """cross_entropy, times the number of pairs with `over_pairs="sum"`."""
    cross_entropy: Float[Tensor, ""]
    """Cross-entropy of teacher and student in nats, mean over the pairs of views that count and the
    batch."""
    teacher_entropy: Float[Tensor, ""]
    """Entropy of the teacher's probabilities in nats, with the same mean; detached. If it is near
    log prototypes, the teacher is uniform."""
    kl: Float[Tensor, ""]
    """KL divergence of the student from the teacher, cross_entropy - teacher_entropy; detached."""
    marginal_entropy: Float[Tensor, ""]
    """Entropy of the teacher's probabilities averaged over its views and the batch, in nats;
    detached. It is log prototypes if all prototypes are used equally, and 0 if one prototype gets
    all samples."""


@contract
def dino_loss(
    student_logits: Float[Tensor, "student_views batch prototypes"],
    teacher_probs: Float[Tensor, "teacher_views batch prototypes"],
    *,
    temperature: float = 0.1,
    same_view: SameView = "skip",
    over_pairs: OverPairs = "mean",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> DINOTerms:
    r"""Cross-entropy of each view of a student with each view of a teacher (DINO, DINOv2, DINOv3).

    $$\mathrm{cross\_entropy} = \frac{1}{|P| n} \sum_{(t, s) \in P} \sum_{b=1}^n
    H(p_{tb}, q_{sb}), \qquad H(p, q) = -\sum_k p_k \log q_k, \qquad
    q_{sb} = \mathrm{softmax}(\mathrm{student\_logits}_{sb} / T)$$

    over the pairs P of a teacher's view t and a student's view s; `same_view="skip"` leaves out t =
    s. `cross_entropy = teacher_entropy + kl`. If student and teacher are uniform it is log
    prototypes.

    Conventions. DINOv3 (6876159) takes the mean over the pairs that count, as the default here;
    its `ignore_diagonal` is `same_view`, "skip" for global student's views and "keep" for local
    ones. lightly 1.6.0 is the default. DINOv2 (b8931f7) sums over all pairs of the lists that it
    gets: `same_view="keep", over_pairs="sum"`.

    Pairs are never formed: the logits of each view are read once.

    Args:
        student_logits (Float[Tensor, "student_views batch prototypes"]): logits of all views, the
            global ones first, before the softmax. Use `torch.stack` for a list. Patches are not
            views: [`ibot_loss`][termwise.joint_embedding.ibot_loss] takes them, or
            `einops.rearrange(x, "views batch patches prototypes -> views (batch patches)
            prototypes")` pairs each position with itself.
        teacher_probs (Float[Tensor, "teacher_views batch prototypes"]): probabilities of the
            teacher's views, in the order in which the student has them, each row a distribution,
            from [`sinkhorn`][termwise.joint_embedding.sinkhorn] or
            [`centered_softmax`][termwise.joint_embedding.centered_softmax]. It is not checked that
            rows sum to 1. No gradient.
        temperature: T of the student, positive; 0.1 in DINO. The probabilities of the teacher
            include its own temperature.
        same_view: "skip" excludes pairs of view i of the student and view i of the teacher; "keep"
            includes them.
        over_pairs: "mean" over the pairs that count, or "sum"; affects only `loss`.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank; NaN without a sample. Gradients,
        combined over ranks as `grad_reduction` says, equal those of one process that holds all
        samples. Second derivatives of up to 262,144 logits are correct without a group; otherwise
        they raise NotImplementedError.

        Communication of each rank: one sum of prototypes + 2 elements in float64, and one of an
        integer, also under `torch.no_grad()`. Does not synchronize with the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: temperature is not positive, there is no pair, or no prototype.

    References:
        Caron et al., DINO (2021), https://arxiv.org/abs/2104.14294, equation 3, and its algorithm
        1, which skips equal views and takes the mean; Oquab et al., DINOv2 (2023),
        https://arxiv.org/abs/2304.07193; Simeoni et al., DINOv3 (2025),
        https://arxiv.org/abs/2508.10104.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import dino_loss
        >>> terms = dino_loss(torch.zeros(4, 8, 16), torch.full((2, 8, 16), 1 / 16))
        >>> terms.loss  # log 16
        tensor(2.7726)
    """
    check_temperature("dino_loss", temperature)
    views, rows, prototypes = student_logits.shape
    pairs = views * len(teacher_probs)
    if same_view == "skip":
        pairs -= min(views, len(teacher_probs))
    if pairs == 0:
        raise ValueError(
            f"dino_loss needs a pair of views, got {views} of the student and {len(teacher_probs)} "
            f'of the teacher with same_view="{same_view}"'
        )
    if prototypes == 0:
        raise ValueError("dino_loss needs at least 1 prototype, got 0")
    means = cross_entropy_of_views(
        student_logits,
        teacher_probs,
        None,
        pairs * over_ranks((rows,), student_logits, batch_group)[0],
        temperature=temperature,
        skip_same_view=same_view == "skip",
        group=batch_group,
        grad_reduction=grad_reduction,
    )
    loss = means.cross_entropy * (pairs if over_pairs == "sum" else 1)
    return DINOTerms(loss=loss, **means._asdict())


class DINOLoss(LossModule):
    """[`dino_loss`][termwise.joint_embedding.dino_loss] as a module.

    Has no parameters and no center: pass the teacher's probabilities with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import DINOLoss
        >>> loss_fn = DINOLoss(same_view="keep", over_pairs="sum")  # as DINOv2
        >>> loss_fn(torch.zeros(1, 8, 16), torch.full((2, 8, 16), 1 / 16)).loss  # 2 log 16
        tensor(5.5452)
    """

    temperature: float = 0.1
    same_view: SameView = "skip"
    over_pairs: OverPairs = "mean"
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        student_logits: Float[Tensor, "student_views batch prototypes"],
        teacher_probs: Float[Tensor, "teacher_views batch prototypes"],
        *,
        batch_group: ProcessGroup | None = None,
    ) -> DINOTerms:
        """Compute the terms of the loss of all views."""
        return dino_loss(
            student_logits, teacher_probs, batch_group=batch_group, **self.hyperparameters()
        )
