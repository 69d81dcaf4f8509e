"""MMCR: pull the views of a sample together, and spread their centroids over all directions."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .. import _groups
from .._autograd import Function, apply, chain, link_to
from .._coefficients import weighted
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._numbers import accumulator, lifted_dtype, product
from .._terms import Terms, terms
from ._views import refuse_views


@terms
class MMCRTerms(Terms):
    """Terms of [`mmcr_loss`][termwise.joint_embedding.mmcr_loss]."""

    loss: Float[Tensor, ""]
    """local_weight * local_nuclear - centroid_nuclear, without the first term if its weight is
    0."""
    centroid_nuclear: Float[Tensor, ""]
    """Sum of the singular values of the centroids, "batch dim"; at most the batch size."""
    local_nuclear: Float[Tensor, ""]
    """Sum of the singular values of a sample's views, mean over the batch; sqrt(views) if equal."""


@contract
def mmcr_loss(
    z: Float[Tensor, "views batch dim"],
    *,
    local_weight: float,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> MMCRTerms:
    r"""Spread the centroids of views over all directions, and keep the views of a sample together.

    $$\mathrm{centroid\_nuclear} = \| C \|_*, \qquad C_b = \frac{1}{V} \sum_v \hat{z}^v_b, \qquad
    \mathrm{local\_nuclear} = \frac{1}{n} \sum_b \| \hat{Z}_b \|_*$$

    with rows of length 1, where Z_b is the V x d matrix of a sample's views and the nuclear norm is
    the sum of singular values. `loss = local_weight * local_nuclear - centroid_nuclear`: at least
    `local_weight * sqrt(V) - n` for n <= d, reached if views are equal and samples are orthogonal.

    Singular values are the roots of the eigenvalues of Gram matrices in float64, views x views for
    each sample, and dim x dim (or batch x batch, if that is smaller and there is no group) for the
    centroids; no singular vectors are computed. Singular values below 1e-6 of the largest one count
    as 0 and get a gradient of 0: if a matrix does not have full rank the norm is not
    differentiable, and this is its smallest subgradient. A row of zeros stays zero. A non-finite
    input makes the terms non-finite.

    For feature maps, with einops.rearrange(z, "v b c h w -> v b (c h w)") an image is a sample,
    with "v b c h w -> v (b h w) c" each position is one.

    Args:
        z (Float[Tensor, "views batch dim"]): embeddings of each view, samples in the same order:
            torch.stack((z1, z2, ...)). They are normalized here.
        local_weight: weight of `local_nuclear` (lambda); 0, without the term, in most of the paper;
            5e-3 in lightly.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication. The Gram matrix of centroids adds over ranks exactly.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. Gradients, combined over ranks as
        `grad_reduction` says, equal those of one process that holds all rows. Second derivatives
        are correct without a group and raise NotImplementedError with one; third ones raise it
        always. Without a sample on any rank `local_nuclear` is NaN.

        Communication of each rank: as many counts as ranks, and one sum of dim * dim + 1 elements
        in float64, 8 * dim^2 bytes. On an accelerator torch.linalg.eigh synchronizes with the host;
        no GPU has run this yet.

    Raises:
        ContractError: z is not a floating "views batch dim" tensor.
        ValueError: fewer than 2 views, an empty batch on a single process, or dim of 0.

    References:
        Yerxa, Kuang, Simoncelli, Chung, Learning Efficient Coding of Natural Images with Maximum
        Manifold Capacity Representations (2023), https://arxiv.org/abs/2303.03307. lightly's
        MMCRLoss does not normalize, and uses only the centroids of a rank's own rows.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import mmcr_loss
        >>> z = torch.eye(3).expand(4, 3, 3)  # 4 equal views of 3 orthogonal samples
        >>> terms = mmcr_loss(z, local_weight=0.5)
        >>> terms.loss.item(), terms.local_nuclear.item()  # -n + w sqrt(V)
        (-2.0, 2.0)
    """
    refuse_views(z, None, "mmcr_loss")
    if z.shape[2] == 0:
        raise ValueError("mmcr_loss needs dim >= 1, got 0")
    if batch_group is None and z.shape[1] == 0:
        raise ValueError("mmcr_loss needs a batch of at least 1 row, got 0")
    counts = _groups.row_counts(z[0], batch_group)
    unit = F.normalize(z.to(accumulator(z)), dim=2, eps=1e-12)
    centroids, views = unit.mean(0), unit.transpose(0, 1)
    if batch_group is None and centroids.shape[0] < centroids.shape[1]:
        gram = product(centroids, centroids.T)
    else:
        gram = product(centroids.T, centroids)
    local = _nuclear_norm(product(views, views.mT)).sum()
    scale = _groups.gradient_scale(batch_group, grad_reduction)
    gram, local = _groups.terminal_sums([gram, local], batch_group, scale)
    dtype = lifted_dtype(z)
    centroid_nuclear = _nuclear_norm(gram).to(dtype)
    local_nuclear = (local / (z.shape[1] if counts is None else counts.sum())).to(dtype)
    return MMCRTerms(
        loss=weighted(local_weight, local_nuclear) - centroid_nuclear,
        centroid_nuclear=centroid_nuclear,
        local_nuclear=local_nuclear,
    )


class MMCRLoss(LossModule):
    """[`mmcr_loss`][termwise.joint_embedding.mmcr_loss] as a module.

    Has no parameters and stores no process group: pass the group with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import MMCRLoss
        >>> MMCRLoss(local_weight=0.0)(torch.eye(3).expand(2, 3, 3)).loss.item()
        -3.0
    """

    local_weight: float
    grad_reduction: GradReduction = "mean"

    def __call__(
        self, z: Float[Tensor, "views batch dim"], *, batch_group: ProcessGroup | None = None
    ) -> MMCRTerms:
        """Compute the terms of the loss of the views."""
        return mmcr_loss(z, batch_group=batch_group, **self.hyperparameters())


def _nuclear_norm(gram: Tensor) -> Tensor:
    """Return the nuclear norm of each M, of gram = M M^T, "*matrices k k"."""
    # eigh raises an error for values that are not finite.
    finite = gram.isfinite().all(-1).all(-1)
    norm, _, _ = cast(
        "tuple[Tensor, Tensor, Tensor]",
        apply(_SumOfRoots, gram.where(finite[..., None, None], 0)),
    )
    return norm.where(finite, torch.nan)


class _SumOfRoots(Function):
    """Sum of the roots of eigenvalues, tr gram^(1/2), whose derivative is gram^(-1/2) / 2."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(gram))
        # Singular values below 1e-6 of the largest are 0, with a gradient of 0. Dynamo would make a
        # symbol of a global number, which it cannot pass into this function.
        is_significant = values > 1e-12 * values[..., -1:]
        roots = values.where(is_significant, 0).sqrt()
        return roots.sum(-1), roots.reciprocal().where(is_significant, 0), vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Tensor | None:
        gradient = gradients[0]
        if gradient is None:
            return None
        gram, inverses, vectors = ctx.saved_tensors
        half_inverse = cast("Tensor", apply(_HalfInverseRoot, gram, inverses, vectors))
        return half_inverse * gradient[..., None, None]


class _HalfInverseRoot(Function):
    """gram^(-1/2) / 2 from its eigenvectors and the inverse roots p of its eigenvalues.

    In the basis of eigenvectors its derivative multiplies element (i, j) by the divided difference
    -p_i^2 p_j^2 / (2 (p_i + p_j)), which is finite where eigenvalues coincide.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gram: Tensor, inverses: Tensor, vectors: Tensor) -> Tensor:
        return vectors * (inverses / 2)[..., None, :] @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        gram, inverses, vectors = ctx.saved_tensors
        left, right = inverses[..., :, None], inverses[..., None, :]
        total = left + right
        difference = -((left * right) ** 2) / (2 * total.masked_fill(total == 0, 1))
        inside = vectors.mT @ gradients[0] @ vectors
        second = vectors @ (inside * difference) @ vectors.mT
        (refused,) = chain(second.new_ones(()), link_to(gram), second)
        return refused, None, None
