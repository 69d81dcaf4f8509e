"""Differences between the views of a sample, in time linear in the number of views.

Among the V views z_v of a sample, the first G are global, with mean m. By

    sum_{g <= G} sum_{v <= V} |z_g - z_v|^2 = V A + G B,
    A = sum_{g <= G} |z_g - m|^2,    B = sum_{v <= V} |z_v - m|^2,

the mean over pairs is computed without forming pairs, and without cancellation, since differences
from m are squared.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .. import _groups
from .._groups import GradReduction, ProcessGroup
from .._numbers import lifted


class Spread(NamedTuple):
    """Squared distances of the views from the mean of the global ones, over all rows."""

    of_global: Tensor
    """A: summed over the global views, rows and dim."""
    of_all: Tensor
    """B: summed over all views, rows and dim."""
    views: int
    num_global: int
    elements: Tensor | int
    """Number of elements of one view: rows over all ranks times dim."""

    def between_views(self) -> Tensor:
        """Return the mean squared difference of each global view and each other view."""
        total = self.of_global * self.views + self.of_all * self.num_global
        return total / (self.num_global * (self.views - 1) * self.elements)

    def from_the_mean(self) -> Tensor:
        """Return the mean squared difference of each view and the mean of the global ones."""
        return self.of_all / (self.views * self.elements)


def refuse_views(z: Tensor, num_global: int | None, caller: str) -> None:
    """Raise ValueError unless z, "views batch dim", has views to compare."""
    views = z.shape[0]
    if views < 2:
        raise ValueError(
            f"{caller} needs z with at least 2 views along its first axis, got {views}: "
            f"torch.stack((z1, z2)) makes such a tensor of two"
        )
    if num_global is not None and not 1 <= num_global <= views:
        raise ValueError(
            f"{caller} needs num_global between 1 and the {views} views of z, got {num_global}"
        )


def spread(
    z: Tensor,
    num_global: int | None,
    rows: Tensor | int,
    *,
    group: ProcessGroup | None,
    grad_reduction: GradReduction,
) -> Spread:
    """Compute the distances of the views.

    Args:
        z: this rank's rows, "views batch dim"; the first `num_global` views are global. Half
            precision is converted to float32.
        num_global: None: all views are.
        rows: over all ranks.
        group: process group whose ranks hold different rows; one sum of two numbers is sent. None:
            no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.
    """
    views, count = lifted(z), z.shape[0] if num_global is None else num_global
    if count == z.shape[0]:
        parts = [F.mse_loss(views, views.mean(0).expand_as(views), reduction="sum")]
    else:
        centre = views[:count].mean(0).expand_as(views)
        parts = [
            F.mse_loss(views[part], centre[part], reduction="sum")
            for part in (slice(count), slice(count, None))
        ]
    scale = _groups.gradient_scale(group, grad_reduction)
    of_global, *of_others = _groups.terminal_sums(parts, group, scale)
    of_all = of_global + of_others[0] if of_others else of_global
    return Spread(of_global, of_all, z.shape[0], count, rows * z.shape[2])
