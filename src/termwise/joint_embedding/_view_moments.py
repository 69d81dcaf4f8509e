"""Variance and covariance terms of views, which prevent collapse in VICReg and VCReg."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _moments
from .._groups import GradReduction, ProcessGroup
from .._moments import CovariancePath


class ViewMoments(NamedTuple):
    """Terms of some views, over the rows of all ranks."""

    var: Tensor
    """Hinge on the standard deviation: mean over dim, summed over views."""
    cov: Tensor
    """Squared off-diagonal covariance: sum over pairs / dim, summed over views."""
    std: Tensor
    """Standard deviation of a column, mean over dim and views; detached."""
    rank: Tensor
    """Effective rank of the covariance, mean over views; detached."""


def refuse_moments(
    rows: Tensor, gamma: float, eps: float, group: ProcessGroup | None, caller: str
) -> None:
    """Raise ValueError unless the moments of rows, "batch dim", can be computed."""
    if not (gamma >= 0 and eps >= 0):
        raise ValueError(f"{caller} needs gamma >= 0 and eps >= 0, got {gamma} and {eps}")
    if rows.shape[1] == 0:
        raise ValueError(f"{caller} needs dim >= 1, got 0")
    if group is None and rows.shape[0] < 2:
        raise ValueError(f"{caller} needs a batch of at least 2 rows, got {rows.shape[0]}")


def view_moments(
    views: Sequence[Tensor] | Tensor,
    counts: Tensor | None,
    *,
    gamma: float,
    eps: float,
    path: CovariancePath,
    group: ProcessGroup | None,
    grad_reduction: GradReduction,
    caller: str,
) -> ViewMoments:
    """Compute the terms of views, each "batch dim".

    Args:
        views: this rank's rows of each view, or a tensor of them all, or of one.
        counts: `_groups.row_counts` of a view.
        gamma: target of the standard deviation of each column.
        eps: added to the variance under the root.
        path: as in `_moments.second_moments`, like the other arguments.
        group: process group whose ranks hold different rows. None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.
        caller: the loss that an error names.
    """
    variance, energy = _moments.second_moments(
        views, counts, path=path, group=group, grad_reduction=grad_reduction, caller=caller
    )
    return ViewMoments(
        var=F.relu(gamma - torch.sqrt(variance + eps)).sum() / variance.shape[-1],
        cov=(energy.sum() / variance.shape[-1]).to(variance.dtype),
        std=variance.detach().sqrt().mean(),
        rank=_moments.effective_rank(variance, energy).mean(),
    )
