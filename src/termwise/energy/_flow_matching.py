"""Flow matching with an energy: its negative gradient is the velocity from noise to data."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias, cast

from jaxtyping import Float
from torch import Tensor

from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import weighted_means
from .._module import LossModule
from .._numbers import without_autocast
from .._terms import Terms, terms
from ._energies import (
    Differentiation,
    Energy,
    anchored,
    energies_and_gradients,
    refuse_batch_statistics,
    uncompiled,
)
from ._paths import squares, straight_path

TimedEnergy: TypeAlias = Callable[
    [Float[Tensor, "batch *event"], Float[Tensor, " batch"]], Float[Tensor, " batch"]
]
"""A callable that returns the energy of each row at its time."""


@terms
class FlowMatchingTerms(Terms):
    """Terms of [`flow_matching_loss`][termwise.energy.flow_matching_loss]."""

    loss: Float[Tensor, ""]
    """velocity_square + cross + target_square."""
    velocity_square: Float[Tensor, ""]
    """|velocity of the energy|^2, sum over the event and weighted mean over rows."""
    cross: Float[Tensor, ""]
    """-2 velocity . target, sum over the event and weighted mean over rows; at the optimum
    -2 velocity_square."""
    target_square: Float[Tensor, ""]
    """|velocity of the path|^2, sum over the event and weighted mean over rows."""


@contract
def flow_matching_loss(
    energy: Energy,
    x0: Float[Tensor, "batch *event"],
    x1: Float[Tensor, "batch *event"],
    time: Float[Tensor, " batch"],
    *,
    sigma_min: float = 0.0,
    weights: Float[Tensor, " batch"] | None = None,
    higher_order_safe: bool = True,
    differentiation: Differentiation = "auto",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> FlowMatchingTerms:
    r"""Match the negative gradient of an energy to the velocity of paths from noise to data.

    $$x_t = (1 - (1 - \sigma)\, t)\, x_0 + t\, x_1, \qquad
    \mathrm{loss} = \sum_i w_i \left\| -\nabla E(x_{t}) - (x_1 - (1 - \sigma)\, x_0) \right\|^2$$

    over pairs of rows, whose weights w sum to 1. Its optimum is the mean velocity of the paths that
    pass through a point at a time, or the gradient field nearest to it. For independent normal
    noise both are the same; for other pairs they may differ. The square is not halved.

    Args:
        energy: returns the energy of each row of x_t. Called once. If it depends on time, pass a
            closure: `lambda x: model(x, time)`.
        x0 (Float[Tensor, "batch *event"]): noise.
        x1 (Float[Tensor, "batch *event"]): data.
        time (Float[Tensor, " batch"]): t of each row, 0 at the noise and 1 at the data.
        sigma_min: sigma, the standard deviation of a path's end around its row of data, for
            standard normal x0.
        weights (Float[Tensor, " batch"] | None): weights of the rows, normalized over all ranks.
            None: equal weights.
        higher_order_safe: whether to replace functions that have no second derivative in PyTorch
            (fused attention, cdist, hardsigmoid), or a wrong third one (layer_norm, instance_norm),
            by compositions. Otherwise an energy with attention raises an error in `backward`, and
            second derivatives of the loss may be silently wrong.
        differentiation: how to differentiate with respect to x_t: "autograd", "func" (torch.func),
            or "auto", which chooses.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank. Without a row they are NaN. Gradient:
        combined over ranks as `grad_reduction` says, it is the gradient of one process that holds
        all rows. Each rank sends one sum of 5 float64 elements. Does not synchronize with the
        device. Autocast is disabled inside, also for the energy unless it enables autocast itself.

    Raises:
        ContractError: wrong shapes or dtypes, or the energy does not return one floating number for
            each row.
        ValueError: the energy does not depend on its input, has batch normalization in training
            mode, or is under DistributedDataParallel(static_graph=True); or sigma_min is not in [0,
            1].

    References:
        Lipman et al., Flow Matching for Generative Modeling (ICLR 2023),
        https://arxiv.org/abs/2210.02747, the optimal-transport path; Liu, Gong, Liu, Flow Straight
        and Fast (ICLR 2023), https://arxiv.org/abs/2209.03003, which is sigma_min = 0. Code often
        uses the mean over the event instead of the papers' squared norm.

    Examples:
        >>> import torch
        >>> from termwise.energy import flow_matching_loss
        >>> x0, x1, time = torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]), torch.tensor([0.5, 0.5])
        >>> flow_matching_loss(lambda x: -2 * x.sum(1), x0, x1, time).metrics()
        {'loss': 1.0, 'velocity_square': 4.0, 'cross': -8.0, 'target_square': 5.0}
    """
    if not 0 <= sigma_min <= 1:
        raise ValueError(f"flow_matching_loss needs sigma_min in [0, 1], got {sigma_min}")
    refuse_batch_statistics("flow_matching_loss", energy)
    with without_autocast(x1):
        x_t, target = straight_path(x0, x1, time, sigma_min)
        energies, gradient = energies_and_gradients(
            "flow_matching_loss", energy, x_t, differentiation, "x_t", higher_order_safe
        )
        residual, *parts = squares(-gradient, target)
        loss, velocity_square, cross, target_square = weighted_means(
            ([anchored(residual, energies), *parts], weights),
            batch_group=batch_group,
            grad_reduction=grad_reduction,
        )
        return FlowMatchingTerms(
            loss=loss,
            velocity_square=velocity_square,
            cross=cross,
            target_square=target_square,
        )


class FlowMatchingLoss(LossModule):
    """[`flow_matching_loss`][termwise.energy.flow_matching_loss] of an energy that is given time.

    Examples:
        >>> import torch
        >>> from termwise.energy import FlowMatchingLoss
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = torch.nn.Sequential(
        ...             torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1)
        ...         )
        ...     def forward(self, x, time):
        ...         return self.layers(torch.cat([x, time[:, None]], 1))[:, 0]
        >>> loss_fn = FlowMatchingLoss(Model())
        >>> loss_fn(torch.zeros(5, 3), torch.ones(5, 3), torch.rand(5)).loss.backward()
    """

    energy: TimedEnergy = dataclasses.field(kw_only=False)
    sigma_min: float = 0.0
    higher_order_safe: bool = True
    differentiation: Differentiation = "auto"
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        x0: Float[Tensor, "batch *event"],
        x1: Float[Tensor, "batch *event"],
        time: Float[Tensor, " batch"],
        *,
        weights: Float[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> FlowMatchingTerms:
        """Compute the terms of the loss."""
        # The function gets a closure, which would hide that the model is compiled.
        model = cast("TimedEnergy", uncompiled(cast("Energy", self.energy)))
        return flow_matching_loss(
            lambda x: model(x, time),
            x0,
            x1,
            time,
            weights=weights,
            batch_group=batch_group,
            **self.hyperparameters(),
        )
