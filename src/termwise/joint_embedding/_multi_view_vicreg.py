"""VICReg of many views, some of them local, in time linear in their number."""

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
from ._views import refuse_views, spread


@terms
class MultiViewVICRegTerms(Terms):
    """Terms of [`multi_view_vicreg_loss`][termwise.joint_embedding.multi_view_vicreg_loss]."""

    loss: Float[Tensor, ""]
    """invariance_weight * invariance + var_weight * var + cov_weight * cov."""
    invariance: Float[Tensor, ""]
    """Squared difference of a global and another view: mean over pairs, batch and dim."""
    var: Float[Tensor, ""]
    """Hinge on the standard deviation: mean over dim and all views."""
    cov: Float[Tensor, ""]
    """Squared off-diagonal covariance: sum over pairs of columns / dim, mean over all views."""
    std: Float[Tensor, ""]
    """Standard deviation of a column, mean over dim and views; detached. Near 0: collapse."""
    rank: Float[Tensor, ""]
    """Effective rank (sum lambda)^2 / sum lambda^2 of a view's covariance, mean over all views.

    Detached. 1 if all rows are on a line, dim if no direction is preferred, 0 without variance. It
    shows the collapse of dimensions, which std does not."""


@contract
def multi_view_vicreg_loss(
    z: Float[Tensor, "views batch dim"],
    *,
    num_global: int | None = None,
    invariance_weight: float = 25.0,
    var_weight: float = 25.0,
    cov_weight: float = 1.0,
    gamma: float = 1.0,
    eps: float = 1e-4,
    covariance_path: CovariancePath = "auto",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> MultiViewVICRegTerms:
    r"""Pull many views of a sample together; keep the variance of each view, and decorrelate it.

    $$\mathrm{invariance} = \frac{1}{G (V - 1) n d} \sum_{g \le G} \sum_{v \ne g}
    \sum_{i,j} (z^g_{ij} - z^v_{ij})^2$$

    $$\mathrm{var} = \frac{1}{V} \sum_v \frac{1}{d} \sum_j
    \max \left( 0, \gamma - \sqrt{\mathrm{Var}(z^v_j) + \epsilon} \right), \qquad
    \mathrm{cov} = \frac{1}{V} \sum_v \frac{1}{d} \sum_{j \ne k} C(z^v)_{jk}^2$$

    for V views, of which the first G are global: each global view is compared with every other
    view, and local views are not compared with each other. `loss = invariance_weight * invariance +
    var_weight * var + cov_weight * cov`. The invariance is computed from the mean of the global
    views, exactly and without a loop over pairs. With two views the loss is
    [`vicreg_loss`][termwise.joint_embedding.vicreg_loss] with both means over views; memory,
    precision and paths are the same, for one view at a time.

    For feature maps, with einops.rearrange(z, "v b c h w -> v (b h w) c") positions are samples, so
    the same position of each view is compared; with "v b c h w -> v b (c h w)" each channel at each
    position is a column.

    Args:
        z (Float[Tensor, "views batch dim"]): embeddings of each view, samples in the same order:
            torch.stack((z1, z2, ...)). Do not normalize them: the variance term sets their scale.
        num_global: number of global views, which come first. None: all, so that every pair counts.
        invariance_weight: weight of `invariance`; 25 in the paper. A weight of exactly 0 removes
            its term from the loss and the gradient, even if the term is infinite.
        var_weight: weight of `var`; 25 in the paper.
        cov_weight: weight of `cov`; 1 in the paper.
        gamma: target of the standard deviation of each column, in units of z; 1 in the paper.
        eps: added to the variance before its root is taken, in squared units of z; 1e-4 in the
            paper. At 0 a constant column has an infinite gradient.
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
        ranks, in elements of that dtype (float32 for half precision): W counts, 1 or 2 numbers of
        the invariance, and for each view 2 sums of d and either sums of about d * (d + 256) / 2
        elements (covariance), or sums of about N * (N + 256) / 2 and two exchanges of rows for
        columns, n * d out and N * d / W in (gram). With a group a call synchronizes with the device
        once for each view, to read the numbers of rows.

    Raises:
        ContractError: z is not a floating "views batch dim" tensor.
        ValueError: fewer than 2 views, num_global outside 1 to views, fewer than 2 rows over all
            ranks, dim of 0, or gamma or eps negative.

    References:
        Bardes, Ponce, LeCun, VICReg (2022), https://arxiv.org/abs/2105.04906, for each view.
        Several views as in the global part of VICRegL (https://arxiv.org/abs/2210.01571; authors'
        code https://github.com/facebookresearch/VICRegL at 803ae4c): its means over pairs of a
        global and another view, and over views, where two-view VICReg sums `var` and `cov`.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import multi_view_vicreg_loss
        >>> z = torch.tensor([[[1.0], [-1.0]], [[1.0], [-1.0]], [[4.0], [-1.0]]])
        >>> terms = multi_view_vicreg_loss(z, num_global=2)
        >>> terms.invariance.item()  # of 4 pairs 2 differ, each by 9 in one row of two: 4.5 / 2
        2.25
        >>> multi_view_vicreg_loss(z).invariance.item()  # of 6 pairs 4
        3.0
    """
    refuse_views(z, num_global, "multi_view_vicreg_loss")
    refuse_moments(z[0], gamma, eps, batch_group, "multi_view_vicreg_loss")
    counts = _groups.row_counts(z[0], batch_group)
    rows = z.shape[1] if counts is None else counts.sum()
    apart = spread(z, num_global, rows, group=batch_group, grad_reduction=grad_reduction)
    moments = view_moments(
        z,
        counts,
        gamma=gamma,
        eps=eps,
        path=covariance_path,
        group=batch_group,
        grad_reduction=grad_reduction,
        caller="multi_view_vicreg_loss",
    )
    invariance, var, cov = apart.between_views(), moments.var / z.shape[0], moments.cov / z.shape[0]
    loss = weighted(invariance_weight, invariance)
    loss = loss + weighted(var_weight, var) + weighted(cov_weight, cov)
    if all(map(is_zero, (invariance_weight, var_weight, cov_weight))):
        # 0 with a gradient of 0, so that a trainer can call backward.
        loss = loss + lifted(link_to(z))
    return MultiViewVICRegTerms(
        loss=loss, invariance=invariance, var=var, cov=cov, std=moments.std, rank=moments.rank
    )


class MultiViewVICRegLoss(LossModule):
    """[`multi_view_vicreg_loss`][termwise.joint_embedding.multi_view_vicreg_loss] as a module.

    Has no parameters and stores no process group: pass the group with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import MultiViewVICRegLoss
        >>> loss_fn = MultiViewVICRegLoss(num_global=2)
        >>> round(loss_fn(torch.zeros(4, 8, 3)).metrics()["var"], 4)  # gamma - sqrt(eps)
        0.99
    """

    num_global: int | None = None
    invariance_weight: float = 25.0
    var_weight: float = 25.0
    cov_weight: float = 1.0
    gamma: float = 1.0
    eps: float = 1e-4
    covariance_path: CovariancePath = "auto"
    grad_reduction: GradReduction = "mean"

    def __call__(
        self, z: Float[Tensor, "views batch dim"], *, batch_group: ProcessGroup | None = None
    ) -> MultiViewVICRegTerms:
        """Compute the terms of the loss of the views."""
        return multi_view_vicreg_loss(z, batch_group=batch_group, **self.hyperparameters())
