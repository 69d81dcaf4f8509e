"""TiCo: align two views, and push embeddings away from the directions that earlier ones have."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .. import _groups
from .._coefficients import weighted
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import means_over_rows
from .._module import LossModule
from .._numbers import alike, lifted, plain_product
from .._terms import Terms, terms


@terms
class TiCoTerms(Terms):
    """Terms of [`tico_loss`][termwise.joint_embedding.tico_loss]."""

    loss: Float[Tensor, ""]
    """invariance + contrast_weight * contrast, without the last if its weight is 0."""
    invariance: Float[Tensor, ""]
    """Half the squared distance of an embedding and its target, which is 1 - cosine, mean over the
    batch."""
    contrast: Float[Tensor, ""]
    """z^T C z for rows of length 1, mean over the batch: at most the largest eigenvalue of C."""


@contract
def tico_loss(
    z: Float[Tensor, "batch dim"],
    target: Float[Tensor, "batch dim"],
    covariance: Float[Tensor, "dim dim"],
    *,
    contrast_weight: float = 8.0,
    stop_gradient: bool = True,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> TiCoTerms:
    r"""Align two views of each sample, and push z away from the directions that samples share.

    $$\mathrm{invariance} = \frac{1}{2n} \sum_i \| \hat{z}_i - \hat{t}_i \|^2, \qquad
    \mathrm{contrast} = \frac{1}{n} \sum_i \hat{z}_i^T C \hat{z}_i, \qquad
    \hat{z}_i = \frac{z_i}{\| z_i \|}$$

    `loss = invariance + contrast_weight * contrast`. C is the running mean of z z^T over the
    batches until now, this one included: call
    [`updated_covariance`][termwise.joint_embedding.updated_covariance] first. It takes the place of
    MoCo's queue of keys, and it is constant here.

    The distance is computed from differences, without cancellation if the directions agree. Half
    precision is converted to float32 first, with or without autocast; the terms are float64 if one
    of the inputs is. A row of zeros stays zero. A non-finite input makes the terms non-finite.

    For feature maps, einops.rearrange(z, "b c h w -> (b h w) c") compares each position, "b c h w
    -> b (c h w)" whole images.

    Args:
        z (Float[Tensor, "batch dim"]): embeddings of one view, a row for each sample.
        target (Float[Tensor, "batch dim"]): embeddings of the other view, from the momentum
            encoder, in the same order.
        covariance (Float[Tensor, "dim dim"]): C, from `updated_covariance`: symmetric, and not
            centered.
        contrast_weight: weight of `contrast` (rho); 8 in lightly, 20 in stable-pretraining.
        stop_gradient: whether to detach the target. False, if both views pass the same encoder.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. Gradients, combined over ranks as
        `grad_reduction` says, equal those of one process that holds all rows; covariance has none.
        Second derivatives are correct without a group and raise NotImplementedError with one.
        Without a row on any rank the terms are NaN. Communication of each rank: one sum of 3
        numbers in float64, 24 bytes.

    Raises:
        ContractError: z and target are not floating "batch dim" tensors of one shape, or covariance
            is not "dim dim".

    References:
        Zhu, Moraes, Karakulak, Sobol, Canziani, LeCun, TiCo (2022),
        https://arxiv.org/abs/2206.10698, as lightly 1.6.0 implements it: C is constant there, as
        here. In sayannag/TiCo-pytorch
        (2259b83), and in lightly until January 2024, the gradient also passes the current batch's
        share of C, which counts twice in the gradient then. In stable-pretraining 0.1.8 the
        distance is not halved, and C is the unbiased covariance of both views, centered: pass
        that as `covariance`, with contrast_weight rho / 2, for half their loss.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import tico_loss, updated_covariance
        >>> z, target, covariance = torch.eye(2), torch.eye(2).flip(0), torch.zeros(2, 2)
        >>> covariance = updated_covariance(covariance, z)  # 0.1 * I / 2
        >>> tico_loss(z, target, covariance).metrics()
        {'loss': 1.39999..., 'invariance': 1.0, 'contrast': 0.05...}
    """
    target = target.detach() if stop_gradient else target
    z, target, covariance = alike(z, target, covariance.detach())
    unit, t = (F.normalize(lifted(x), dim=1, eps=1e-12) for x in (z, target))
    pushed = plain_product(unit, lifted(covariance))
    per_row = [(unit - t).square().sum(1), (pushed * unit).sum(1)]
    distance, contrast = means_over_rows(per_row, None, batch_group, grad_reduction)
    invariance = distance / 2
    return TiCoTerms(
        loss=invariance + weighted(contrast_weight, contrast),
        invariance=invariance,
        contrast=contrast,
    )


@contract
def updated_covariance(
    covariance: Float[Tensor, "dim dim"],
    z: Float[Tensor, "batch dim"],
    *,
    momentum: float = 0.9,
    batch_group: ProcessGroup | None = None,
) -> Float[Tensor, "dim dim"]:
    """Return the running mean of z z^T, of embeddings of length 1, after one more batch.

    It is momentum * covariance + (1 - momentum) * mean of z z^T over the samples of all ranks. Use
    it in the same step: TiCo's C includes the current batch. The mean is not subtracted.

    Args:
        covariance (Float[Tensor, "dim dim"]): the current running mean, zeros at first; not
            modified.
        z (Float[Tensor, "batch dim"]): embeddings on this rank of the view that is trained, a row
            for each sample. They are divided by their Euclidean norms (at least 1e-12).
        momentum: from 0 to 1 (beta); 0.9 in TiCo.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.

    Returns:
        Float[Tensor, "dim dim"]: the next state, the same on every rank, in the dtype of
        covariance; covariance itself if no rank has a sample. Without a gradient.

        Communication of each rank: a sum of dim * dim elements of z's dtype (float32 for half
        precision, float64 if covariance is), and of one integer.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: momentum is not within 0..1.

    References:
        Zhu et al., TiCo (2022), https://arxiv.org/abs/2206.10698. lightly 1.6.0 keeps C in the
        loss and gathers the rows of all ranks, equally many.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import updated_covariance
        >>> updated_covariance(torch.zeros(2, 2), torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([[0.0500, 0.0000],
                [0.0000, 0.0500]])
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"updated_covariance needs momentum in 0..1, got {momentum}")
    name = _groups.name_of(batch_group)
    z, before = (lifted(x.detach()) for x in alike(z, covariance))
    with torch.no_grad():
        unit = F.normalize(z, dim=1, eps=1e-12)
        count = z.new_full((), z.shape[0], dtype=torch.int64)
        total, count = (_groups.all_reduce(x, name) for x in (plain_product(unit.T, unit), count))
        mean = torch.where(count > 0, total / count, before)
        return (momentum * before + (1 - momentum) * mean).to(covariance.dtype)


class TiCoLoss(LossModule):
    """[`tico_loss`][termwise.joint_embedding.tico_loss] as a module.

    Has no parameters and stores neither the covariance nor a process group: pass both with each
    call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import TiCoLoss
        >>> loss_fn = TiCoLoss(contrast_weight=20.0)
        >>> loss_fn(torch.eye(2), torch.eye(2), 0.5 * torch.eye(2)).loss.item()
        10.0
    """

    contrast_weight: float = 8.0
    stop_gradient: bool = True
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        z: Float[Tensor, "batch dim"],
        target: Float[Tensor, "batch dim"],
        covariance: Float[Tensor, "dim dim"],
        *,
        batch_group: ProcessGroup | None = None,
    ) -> TiCoTerms:
        """Compute the terms of the loss of embeddings, targets and a covariance."""
        return tico_loss(z, target, covariance, batch_group=batch_group, **self.hyperparameters())
