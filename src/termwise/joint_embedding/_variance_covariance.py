"""VCReg: variance and covariance of the features of any layer."""

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


@terms
class VarianceCovarianceTerms(Terms):
    """Terms of [`variance_covariance_loss`][termwise.joint_embedding.variance_covariance_loss]."""

    loss: Float[Tensor, ""]
    """var_weight * var + cov_weight * cov, without those of weight 0."""
    var: Float[Tensor, ""]
    """Hinge on the standard deviation: mean over dim."""
    cov: Float[Tensor, ""]
    """Squared off-diagonal covariance: sum over pairs / dim."""
    std: Float[Tensor, ""]
    """Standard deviation of a column, mean over dim; detached. Near 0: collapse."""
    rank: Float[Tensor, ""]
    """Effective rank (sum lambda)^2 / sum lambda^2 of the covariance; detached.

    1 if all rows are on a line, dim if no direction is preferred, 0 without variance. It shows the
    collapse of dimensions, which std does not.
    """


@contract
def variance_covariance_loss(
    z: Float[Tensor, "batch dim"],
    *,
    var_weight: float = 25.0,
    cov_weight: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    covariance_path: CovariancePath = "auto",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> VarianceCovarianceTerms:
    r"""Keep the variance of each column of features, and decorrelate the columns.

    $$\mathrm{var} = \frac{1}{d} \sum_j
    \max \left( 0, \gamma - \sqrt{\mathrm{Var}(z_j) + \epsilon} \right)$$

    $$\mathrm{cov} = \frac{1}{d} \sum_{j \ne k} C_{jk}^2, \qquad
    C = \frac{1}{n-1} \sum_i (z_i - \bar{z})(z_i - \bar{z})^\top$$

    with the unbiased variance, n - 1. `loss = var_weight * var + cov_weight * cov`: the terms of
    [`vicreg_loss`][termwise.joint_embedding.vicreg_loss] that take one view, for the features of
    any layer, for example in addition to a supervised loss. Memory and precision are the same.

    For feature maps, einops.rearrange(z, "b c h w -> (b h w) c") computes statistics of each
    channel over samples and positions, "b c h w -> b (c h w)" those of each channel at each
    position.

    Args:
        z (Float[Tensor, "batch dim"]): features, a row for each sample. Do not normalize them: the
            variance term sets their scale.
        var_weight: weight of `var`; 25 as in VICReg. Tune both weights if you add another loss. A
            weight of exactly 0 removes its term from the loss and the gradient, even if the term is
            infinite.
        cov_weight: weight of `cov`; 1 as in VICReg. For the weight of code that divides the squares
            by d (d - 1), pass the weight / (d - 1).
        gamma: target of the standard deviation of each column, in units of z; 1 in the paper.
        eps: added to the variance before its root is taken, in squared units of z; 1e-4 as in
            VICReg. At 0 a constant column has an infinite gradient.
        covariance_path: form the dim x dim covariance ("covariance") or the batch x batch Gram
            matrix ("gram"), each as strips of its upper triangle. The terms are equal up to
            rounding. "auto": gram where 2 * batch <= dim, with the batch over all ranks.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. Gradients, combined over ranks as
        `grad_reduction` says, equal those of one process that holds all rows. Second derivatives,
        in eager and in reverse mode, are correct without a group and raise NotImplementedError with
        one.

        Communication of each rank, for d = dim, N = rows over all ranks, n = rows of this rank, W =
        ranks, in elements of that dtype (float32 for half precision): W counts, 2 sums of d, and
        either sums of about d * (d + 256) / 2 elements (covariance), or sums of about N * (N + 256)
        / 2 and two exchanges of rows for columns, n * d out and N * d / W in (gram). With a group a
        call synchronizes with the device once, to read the numbers of rows.

    Raises:
        ContractError: z is not a floating "batch dim" tensor.
        ValueError: fewer than 2 rows over all ranks, dim of 0, or gamma or eps negative.

    References:
        Zhu, Evtimova, Chen, Shwartz-Ziv, LeCun, Variance-Covariance Regularization Improves
        Representation Learning (2023), https://arxiv.org/abs/2306.13292. The terms are VICReg's
        (https://arxiv.org/abs/2105.04906, equations 1-4); stable-pretraining's VCRegLoss (d15ec96d)
        halves `var`.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import variance_covariance_loss
        >>> z = torch.tensor([[0.0, 0.0], [0.5, 0.5]])  # variances and covariance 1/8
        >>> terms = variance_covariance_loss(z, eps=0.125)
        >>> terms.metrics()  # 1 - sqrt(1/8 + 1/8), 2 (1/8)^2 / 2, sqrt(1/8)
        {'loss': 12.515..., 'var': 0.5, 'cov': 0.015625, 'std': 0.353..., 'rank': 1.0}
    """
    refuse_moments(z, gamma, eps, batch_group, "variance_covariance_loss")
    moments = view_moments(
        z,
        _groups.row_counts(z, batch_group),
        gamma=gamma,
        eps=eps,
        path=covariance_path,
        group=batch_group,
        grad_reduction=grad_reduction,
        caller="variance_covariance_loss",
    )
    loss = weighted(var_weight, moments.var) + weighted(cov_weight, moments.cov)
    if is_zero(var_weight) and is_zero(cov_weight):
        # 0 with a gradient of 0, so that a trainer can call backward.
        loss = loss + lifted(link_to(z))
    return VarianceCovarianceTerms(
        loss=loss, var=moments.var, cov=moments.cov, std=moments.std, rank=moments.rank
    )


class VarianceCovarianceLoss(LossModule):
    """[`variance_covariance_loss`][termwise.joint_embedding.variance_covariance_loss] as a module.

    Has no parameters and stores no process group: pass the group with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import VarianceCovarianceLoss
        >>> loss_fn = VarianceCovarianceLoss(var_weight=1.0, cov_weight=0.04)
        >>> loss_fn(torch.zeros(8, 3)).metrics()["var"]  # gamma - sqrt(eps)
        0.99...
    """

    var_weight: float = 25.0
    cov_weight: float = 1.0
    gamma: float = 1.0
    eps: float = 1e-4
    covariance_path: CovariancePath = "auto"
    grad_reduction: GradReduction = "mean"

    def __call__(
        self, z: Float[Tensor, "batch dim"], *, batch_group: ProcessGroup | None = None
    ) -> VarianceCovarianceTerms:
        """Compute the terms of the loss of one batch of features."""
        return variance_covariance_loss(z, batch_group=batch_group, **self.hyperparameters())
