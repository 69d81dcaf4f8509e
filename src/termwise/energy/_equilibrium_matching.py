"""Equilibrium matching: a gradient field that leads from noise to data and vanishes there."""

import dataclasses

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
)
from ._paths import for_rows, squares, straight_path, truncated_decay


@terms
class EquilibriumMatchingTerms(Terms):
    """Terms of [`equilibrium_matching_loss`][termwise.energy.equilibrium_matching_loss]."""

    loss: Float[Tensor, ""]
    """gradient_square + cross + target_square."""
    gradient_square: Float[Tensor, ""]
    """|gradient of the energy|^2, sum over the event and weighted mean over rows."""
    cross: Float[Tensor, ""]
    """-2 gradient . target, sum over the event and weighted mean over rows; at the optimum
    -2 gradient_square."""
    target_square: Float[Tensor, ""]
    """|target gradient|^2, sum over the event and weighted mean over rows."""


@contract
def equilibrium_matching_loss(
    energy: Energy,
    x0: Float[Tensor, "batch *event"],
    x1: Float[Tensor, "batch *event"],
    time: Float[Tensor, " batch"],
    *,
    cutoff: float = 0.8,
    multiplier: float = 4.0,
    weights: Float[Tensor, " batch"] | None = None,
    higher_order_safe: bool = True,
    differentiation: Differentiation = "auto",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> EquilibriumMatchingTerms:
    r"""Make an energy's gradient point from data to noise, and decrease to 0 at the data.

    $$x_t = (1 - t)\, x_0 + t\, x_1, \quad
    c(t) = \lambda \min\Big(1, \frac{1 - t}{1 - a}\Big), \quad
    \mathrm{loss} = \sum_i w_i \left\| \nabla E(x_t) - c(t)\, (x_0 - x_1) \right\|^2$$

    over pairs of rows, whose weights w sum to 1. The energy does not depend on t: descending it
    from noise, with any optimizer, leads to data. It serves for sampling only: exp(-E) is not the
    density of the data. The square is not halved.

    Args:
        energy: returns the energy of each row of x_t. Called once.
        x0 (Float[Tensor, "batch *event"]): noise.
        x1 (Float[Tensor, "batch *event"]): data.
        time (Float[Tensor, " batch"]): t of each row (the paper's gamma), 0 at the noise and 1 at
            the data.
        cutoff: a, the time after which the gradient decreases; 0.8 in the authors' code; 0: from
            the start.
        multiplier: lambda, the length of the gradient before that; 4 in the authors' code.
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
            mode, or is under DistributedDataParallel(static_graph=True); or cutoff is not in [0,
            1).

    References:
        Wang, Du, Equilibrium Matching: Generative Modeling with Implicit Energy-Based Models
        (2025), https://arxiv.org/abs/2510.02300, its explicit-energy form. The sign is an energy's,
        as in TorchEBM: a sampler descends the gradient of E. The authors' code
        (https://github.com/raywang4/EqM) learns the opposite field and ascends it, and uses the
        mean over the event instead of the sum. Their dispersive regularizer is not included.

    Examples:
        >>> import torch
        >>> from termwise.energy import equilibrium_matching_loss
        >>> x0, x1, time = torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]), torch.tensor([0.5, 1.0])
        >>> equilibrium_matching_loss(lambda x: -4 * x.sum(1), x0, x1, time).metrics()
        {'loss': 8.0, 'gradient_square': 16.0, 'cross': -16.0, 'target_square': 8.0}
    """
    if not 0 <= cutoff < 1:
        raise ValueError(f"equilibrium_matching_loss needs cutoff in [0, 1), got {cutoff}")
    refuse_batch_statistics("equilibrium_matching_loss", energy)
    with without_autocast(x1):
        x_t, velocity = straight_path(x0, x1, time)
        energies, gradient = energies_and_gradients(
            "equilibrium_matching_loss", energy, x_t, differentiation, "x_t", higher_order_safe
        )
        lengths = multiplier * truncated_decay(time, cutoff)
        residual, *parts = squares(gradient, -for_rows(lengths, velocity) * velocity)
        loss, gradient_square, cross, target_square = weighted_means(
            ([anchored(residual, energies), *parts], weights),
            batch_group=batch_group,
            grad_reduction=grad_reduction,
        )
        return EquilibriumMatchingTerms(
            loss=loss,
            gradient_square=gradient_square,
            cross=cross,
            target_square=target_square,
        )


class EquilibriumMatchingLoss(LossModule):
    """[`equilibrium_matching_loss`][termwise.energy.equilibrium_matching_loss] as a module.

    Examples:
        >>> import torch
        >>> from termwise.energy import EquilibriumMatchingLoss
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(),
        ...                             torch.nn.Linear(8, 1), torch.nn.Flatten(0))
        >>> loss_fn = EquilibriumMatchingLoss(model, multiplier=1.0)
        >>> loss_fn(torch.zeros(5, 3), torch.ones(5, 3), torch.rand(5)).loss.backward()
    """

    energy: Energy = dataclasses.field(kw_only=False)
    cutoff: float = 0.8
    multiplier: float = 4.0
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
    ) -> EquilibriumMatchingTerms:
        """Compute the terms of the loss."""
        return equilibrium_matching_loss(
            self.energy,
            x0,
            x1,
            time,
            weights=weights,
            batch_group=batch_group,
            **self.hyperparameters(),
        )
