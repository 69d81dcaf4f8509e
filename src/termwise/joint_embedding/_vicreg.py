"""VICReg: variance, invariance and covariance of two views."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .. import _groups
from .._autograd import link_to
from .._coefficients import is_zero, weighted
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._moments import CovariancePath
from .._numbers import lifted
from .._terms import Terms, terms
from ._view_moments import refuse_moments, view_moments

Views = Literal["sum", "mean"]


@terms
class VICRegTerms(Terms):
    """Terms of [`vicreg_loss`][termwise.joint_embedding.vicreg_loss]."""

    loss: Float[Tensor, ""]
    """sim_weight * sim + var_weight * var + cov_weight * cov, without those of weight 0."""
    sim: Float[Tensor, ""]
    """Invariance: squared difference of the views, mean over batch and dim."""
    var: Float[Tensor, ""]
    """Hinge on the standard deviation: mean over dim, summed (or averaged) over the views."""
    cov: Float[Tensor, ""]
    """Squared off-diagonal covariance: sum over pairs / dim, summed (or averaged) over views."""
    std: Float[Tensor, ""]
    """Standard deviation of a column, mean over dim and both views; detached. Near 0: collapse."""
    rank: Float[Tensor, ""]
    """Effective rank (sum lambda)^2 / sum lambda^2 of a view's covariance, mean over both views.

    Detached. 1 if all rows are on a line, dim if no direction is preferred, 0 without variance. It
    shows the collapse of dimensions, which std does not."""


@contract
def vicreg_loss(
    z1: Float[Tensor, "batch dim"],
    z2: Float[Tensor, "batch dim"],
    *,
    sim_weight: float = 25.0,
    var_weight: float = 25.0,
    cov_weight: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    variance_views: Views = "sum",
    covariance_views: Views = "sum",
    covariance_path: CovariancePath = "auto",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> VICRegTerms:
    r"""Pull two views together while each column keeps its variance and columns decorrelate.

    $$\mathrm{sim} = \frac{1}{n d} \sum_{i,j} (z^1_{ij} - z^2_{ij})^2$$

    $$\mathrm{var} = \sum_{v} \frac{1}{d} \sum_j
    \max \left( 0, \gamma - \sqrt{\mathrm{Var}(z^v_j) + \epsilon} \right)$$

    $$\mathrm{cov} = \sum_{v} \frac{1}{d} \sum_{j \ne k} C(z^v)_{jk}^2, \qquad
    C(z) = \frac{1}{n-1} \sum_i (z_i - \bar{z})(z_i - \bar{z})^\top$$

    with the unbiased variance, n - 1. `loss = sim_weight * sim + var_weight * var + cov_weight *
    cov`.

    On the CPU no dim x dim matrix is stored: see `covariance_path`. On an accelerator it is up to a
    dim of 4096, and a quarter of it at a time beyond; on any device it is for up to 32,768 elements
    of a dim of 256 or less. No GPU has run this yet. Inputs in half precision are converted to
    float32 before anything is subtracted or squared, with or without autocast; the terms of float64
    inputs are float64. A non-finite input makes the terms non-finite.

    Args:
        z1 (Float[Tensor, "batch dim"]): embeddings of the first view, a row for each sample. Do not
            normalize them: the variance term sets their scale.
        z2 (Float[Tensor, "batch dim"]): embeddings of the second view, in the same order.
        sim_weight: weight of `sim`; 25 in the paper (lambda). A weight of exactly 0 removes its
            term from the loss and the gradient, even if the term is infinite.
        var_weight: weight of `var`; 25 in the paper (mu).
        cov_weight: weight of `cov`; 1 in the paper (nu).
        gamma: target of the standard deviation of each column, in units of z; 1 in the paper.
        eps: added to the variance before its root is taken, in squared units of z; 1e-4 in the
            paper. At 0 a constant column has an infinite gradient.
        variance_views: "sum" over the views as in the paper, or "mean", half of it: what the
            authors' code and lightly do.
        covariance_views: "sum" over the views as in the paper and the authors' code, or "mean".
        covariance_path: form the dim x dim covariance ("covariance") or the batch x batch Gram
            matrix ("gram"), each as strips of its upper triangle. The terms are equal up to
            rounding: "gram" has an error of about 1e-9 * (off + diagonal) / off of the squared
            entries. "auto": gram where 2 * batch <= dim, with the batch over all ranks.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. Gradients, combined over ranks as
        `grad_reduction` says, equal those of one process that holds all rows. Second derivatives,
        in eager and in reverse mode, are correct without a group and raise NotImplementedError with
        one; forward mode is for views of up to 2^15 elements and a dim of 256, or of 2^16 elements
        and a dim of twice the batch or more, alone.

        Communication of each rank, for d = dim, N = rows over all ranks, n = rows of this rank, W =
        ranks, in elements of that dtype (float32 for half precision): 4 sums of d and one of 1, and
        for each view either sums of about d * (d + 256) / 2 elements (covariance), or sums of about
        N * (N + 256) / 2 and two exchanges of rows for columns, n * d out and N * d / W in (gram),
        also under `torch.no_grad()`. No rank holds the whole batch. To agree on the path, the
        numbers of rows are read on the host: with a group a call synchronizes with the device once
        for each view.

    Raises:
        ContractError: z1 and z2 are not floating "batch dim" tensors of one shape.
        ValueError: fewer than 2 rows over all ranks, dim of 0, or gamma or eps negative.

    References:
        Bardes, Ponce, LeCun, VICReg (2022), https://arxiv.org/abs/2105.04906, equations 1-6. Its
        equation 5 divides the squared distance by n alone; the authors' code
        (https://github.com/facebookresearch/vicreg) by n * d, which is what the weights 25, 25, 1
        belong to: we side with the code. The paper sums the variance term over the views, the
        code averages it: the default sides with the paper, `variance_views="mean"` with the code.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import vicreg_loss
        >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> vicreg_loss(z, z).metrics()
        {'loss': 0.0, 'sim': 0.0, 'var': 0.0, 'cov': 0.0, 'std': 1.154..., 'rank': 2.0}
    """
    refuse_moments(z1, gamma, eps, batch_group, "vicreg_loss")
    counts = _groups.row_counts(z1, batch_group)
    rows = z1.shape[0] if counts is None else counts.sum()
    scale = _groups.gradient_scale(batch_group, grad_reduction)
    distance = _groups.terminal_sum(
        F.mse_loss(lifted(z1), lifted(z2), reduction="sum"), batch_group, scale
    )
    sim = distance / (rows * z1.shape[1])
    moments = view_moments(
        (z1, z2),
        counts,
        gamma=gamma,
        eps=eps,
        path=covariance_path,
        group=batch_group,
        grad_reduction=grad_reduction,
        caller="vicreg_loss",
    )
    var = moments.var / (1 if variance_views == "sum" else 2)
    cov = moments.cov / (1 if covariance_views == "sum" else 2)
    loss = weighted(sim_weight, sim) + weighted(var_weight, var) + weighted(cov_weight, cov)
    if all(map(is_zero, (sim_weight, var_weight, cov_weight))):
        # 0 with a gradient of 0, so that a trainer can call backward.
        loss = loss + lifted(link_to(z1)) + lifted(link_to(z2))
    return VICRegTerms(
        loss=loss,
        sim=sim,
        var=var,
        cov=cov,
        std=moments.std,
        rank=moments.rank,
    )


class VICRegLoss(LossModule):
    """[`vicreg_loss`][termwise.joint_embedding.vicreg_loss] as a module.

    Has no parameters and stores no process group: pass the group with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import VICRegLoss
        >>> loss_fn = VICRegLoss(cov_weight=0.04)
        >>> z1 = z2 = torch.zeros(8, 3)
        >>> round(loss_fn(z1, z2).metrics()["var"], 4)  # 2 (gamma - sqrt(eps))
        1.98
    """

    sim_weight: float = 25.0
    var_weight: float = 25.0
    cov_weight: float = 1.0
    gamma: float = 1.0
    eps: float = 1e-4
    variance_views: Views = "sum"
    covariance_views: Views = "sum"
    covariance_path: CovariancePath = "auto"
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        z1: Float[Tensor, "batch dim"],
        z2: Float[Tensor, "batch dim"],
        *,
        batch_group: ProcessGroup | None = None,
    ) -> VICRegTerms:
        """Compute the terms of the loss of two views."""
        return vicreg_loss(z1, z2, batch_group=batch_group, **self.hyperparameters())
