"""Barlow Twins: make the cross-correlation of two views the identity."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from .. import _groups
from .._autograd import link_to
from .._coefficients import is_zero, weighted
from .._contract import contract
from .._cross_moments import EpsAddedTo, cross_moments
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._numbers import lifted
from .._terms import Terms, terms

Correction = Literal[0, 1]


@terms
class BarlowTwinsTerms(Terms):
    """Terms of [`barlow_twins_loss`][termwise.joint_embedding.barlow_twins_loss]."""

    loss: Float[Tensor, ""]
    """loss_scale * (on_diagonal + off_weight * off_diagonal)."""
    on_diagonal: Float[Tensor, ""]
    """Sum over columns of (1 - C_jj)^2."""
    off_diagonal: Float[Tensor, ""]
    """Sum over pairs of different columns of C_jk^2, before off_weight."""
    alignment: Float[Tensor, ""]
    """Correlation of a column with itself in the other view, C_jj, mean over dim; detached."""
    std: Float[Tensor, ""]
    """Standard deviation of a column before it is divided by it, mean over dim and both views.

    Detached. Uses `correction`, but not eps. Near 0: collapse.
    """
    rank: Float[Tensor, ""]
    """Effective rank (sum_j C_jj)^2 / sum_jk C_jk^2 of the cross-correlation C; detached.

    If the views are equal this is the participation ratio of their correlation matrix: 1 if all
    columns are equal, dim if they are uncorrelated. Differences between the views lower it. 0 if C
    is 0.
    """


@contract
def barlow_twins_loss(
    z1: Float[Tensor, "batch dim"],
    z2: Float[Tensor, "batch dim"],
    *,
    off_weight: float = 5e-3,
    eps: float = 1e-5,
    correction: Correction = 0,
    eps_added_to: EpsAddedTo = "variance",
    loss_scale: float = 1.0,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> BarlowTwinsTerms:
    r"""Make each column of two views agree, and different columns uncorrelated.

    $$C = \frac{1}{n} A^\top B, \qquad
    A_{ij} = \frac{z^1_{ij} - \bar{z}^1_j}{\sqrt{\mathrm{Var}(z^1_j) + \epsilon}}$$

    and B likewise for the second view.

    $$\mathrm{on\_diagonal} = \sum_j (1 - C_{jj})^2, \qquad
    \mathrm{off\_diagonal} = \sum_{j \ne k} C_{jk}^2$$

    `loss = loss_scale * (on_diagonal + off_weight * off_diagonal)`. Implementations divide by the
    deviation in three ways:

    - The authors' and lightly's, by batch normalization: the default. The variance is divided by n,
      and eps is added to it.
    - stable-pretraining's and MONAI's: `correction=1, eps_added_to="deviation"`. The variance is
      divided by n - 1 and eps is added to its root, so that C_jj is at most (n - 1) / n.
    - solo-learn's: the first one with `loss_scale=0.025`.

    On the CPU no dim x dim matrix is stored; on an accelerator, above a dim of 4096, a quarter of
    it at a time (no GPU has run this yet). If 2 * batch <= dim (over all ranks), two batch x batch
    Gram matrices are formed instead, in strips: ||A^T B||^2 = <A A^T, B B^T>. Half precision is
    converted to float32 first, with or without autocast.

    For feature maps, einops.rearrange(z, "b c h w -> (b h w) c") computes statistics of each
    channel over samples and positions, "b c h w -> b (c h w)" those of each channel at each
    position.

    Args:
        z1 (Float[Tensor, "batch dim"]): embeddings of the first view, a row for each sample.
        z2 (Float[Tensor, "batch dim"]): embeddings of the second view, in the same order. Both
            views get a gradient.
        off_weight: weight of `off_diagonal` (lambda); 5e-3 in the paper, 0.0051 in the authors'
            code. A weight of exactly 0 removes its term from the loss and the gradient.
        eps: keeps the divisor of a constant column above 0; 1e-5, as in batch normalization. In
            squared units of z if added to the variance, in units of z if added to the deviation. At
            0 a constant column makes the loss NaN.
        correction: the variance is the sum of squares / (n - correction).
        eps_added_to: "variance" (inside the root) or "deviation" (outside it).
        loss_scale: factor of the whole loss; 1 in the paper.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication. Means, variances and C are those of all ranks.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. Gradients, combined over ranks as
        `grad_reduction` says, equal those of one process that holds all rows. Second derivatives,
        in eager and in reverse mode, are correct without a group and raise NotImplementedError with
        one.

        Communication of each rank, for d = dim, N = rows over all ranks, n = rows of this rank, W =
        ranks, in elements of that dtype (float32 for half precision): W counts, 7 sums of d in
        float64, and either sums of d^2 elements (C itself), or two sums of about N * (N + 256) / 2
        and, for each view, two exchanges of rows for columns, n * d out and N * d / W in (where 2 N
        <= d), also under `torch.no_grad()`. No rank holds the whole batch. With a group a call
        synchronizes with the device once, to read the numbers of rows.

    Raises:
        ContractError: z1 and z2 are not floating "batch dim" tensors of one shape.
        ValueError: fewer than 2 rows over all ranks, dim of 0, or eps negative.

    References:
        Zbontar, Jing, Misra, LeCun, Deny, Barlow Twins (2021), https://arxiv.org/abs/2103.03230,
        equations 1 and 2 and algorithm 1. The algorithm divides by an unbiased deviation without
        eps, the authors' code (https://github.com/facebookresearch/barlowtwins at 8e8d284) by batch
        normalization over all ranks: we side with the code. With its all-reduce of C, the gradients
        after DDP's mean are 1 / W of those of the loss; ours are correct. lightly takes means and
        variances of each rank's own rows.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import barlow_twins_loss
        >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> terms = barlow_twins_loss(z, z, eps=0.25)
        >>> round(terms.alignment.item(), 6), round(terms.loss.item(), 6)  # e = 0.8, 2 (1 - e)^2
        (0.8, 0.08)
        >>> round(barlow_twins_loss(z, -z, eps=0.25).loss.item(), 6)  # 2 (1 + e)^2
        6.48
    """
    if not eps >= 0:
        raise ValueError(f"barlow_twins_loss needs eps >= 0, got {eps}")
    if z1.shape[1] == 0:
        raise ValueError("barlow_twins_loss needs dim >= 1, got 0")
    if batch_group is None and z1.shape[0] < 2:
        raise ValueError(f"barlow_twins_loss needs a batch of at least 2 rows, got {z1.shape[0]}")
    diagonal, off, deviation = cross_moments(
        z1,
        z2,
        _groups.row_counts(z1, batch_group),
        correction=correction,
        eps=eps,
        eps_added_to=eps_added_to,
        group=batch_group,
        grad_reduction=grad_reduction,
        caller="barlow_twins_loss",
    )
    on_diagonal = (1 - diagonal).square().sum()
    off_diagonal = off.to(diagonal.dtype)
    held = diagonal.detach()
    trace, energy = held.sum(), held.square().sum() + off_diagonal.detach()
    loss = weighted(loss_scale, on_diagonal + weighted(off_weight, off_diagonal))
    if is_zero(loss_scale):
        # 0 with a gradient of 0, so that a trainer can call backward.
        loss = loss + lifted(link_to(z1)) + lifted(link_to(z2))
    return BarlowTwinsTerms(
        loss=loss,
        on_diagonal=on_diagonal,
        off_diagonal=off_diagonal,
        alignment=trace / z1.shape[1],
        std=deviation.mean(),
        rank=(trace.square() / energy).masked_fill(energy == 0, 0),
    )


class BarlowTwinsLoss(LossModule):
    """[`barlow_twins_loss`][termwise.joint_embedding.barlow_twins_loss] as a module.

    Has no parameters and stores no process group: pass the group with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import BarlowTwinsLoss
        >>> loss_fn = BarlowTwinsLoss(loss_scale=0.025)
        >>> loss_fn(torch.zeros(8, 3), torch.zeros(8, 3)).metrics()["on_diagonal"]
        3.0
    """

    off_weight: float = 5e-3
    eps: float = 1e-5
    correction: Correction = 0
    eps_added_to: EpsAddedTo = "variance"
    loss_scale: float = 1.0
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        z1: Float[Tensor, "batch dim"],
        z2: Float[Tensor, "batch dim"],
        *,
        batch_group: ProcessGroup | None = None,
    ) -> BarlowTwinsTerms:
        """Compute the terms of the loss of two views."""
        return barlow_twins_loss(z1, z2, batch_group=batch_group, **self.hyperparameters())
