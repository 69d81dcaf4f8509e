"""Penalties on the value and gradient of an energy, for your own objectives."""

import dataclasses
from typing import cast

import torch
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
    energies_of,
    per_row_sum,
    refuse_batch_statistics,
)


@terms
class EnergySquareTerms(Terms):
    """Terms of [`energy_square_penalty`][termwise.energy.energy_square_penalty]."""

    loss: Float[Tensor, ""]
    """Square of the energy, weighted mean over rows."""
    energy: Float[Tensor, ""]
    """The energy, weighted mean over rows; detached."""


@terms
class GradientPenaltyTerms(Terms):
    """Terms of [`gradient_penalty`][termwise.energy.gradient_penalty]."""

    loss: Float[Tensor, ""]
    """(|gradient of the energy| - target)^2, weighted mean over rows."""
    gradient_norm: Float[Tensor, ""]
    """|gradient of the energy|, weighted mean over rows; detached."""


@contract
def energy_square_penalty(
    energy: Energy,
    x: Float[Tensor, "batch *event"],
    *,
    weights: Float[Tensor, " batch"] | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> EnergySquareTerms:
    r"""Penalize the square of energies; no loss of this family adds this by default.

    $$\mathrm{loss} = \sum_i w_i E(x_i)^2$$

    over rows x, whose weights w sum to 1, without a coefficient. It determines the additive
    constant of E, which contrastive losses leave free, and bounds E; with it the true density is no
    longer exactly stationary.

    Args:
        energy: returns the energy of each row. Called once.
        x (Float[Tensor, "batch *event"]): data or samples, with the axes of a sample that the
            energy takes.
        weights (Float[Tensor, " batch"] | None): weights of the rows of x, normalized over all
            ranks. None: equal weights.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank. Without a row they are NaN. Gradient:
        combined over ranks as `grad_reduction` says, it is the gradient of one process that holds
        all rows. Each rank sends one sum of 3 float64 elements. Does not synchronize with the
        device. Autocast is disabled inside, also for the energy unless it enables autocast itself.

    Raises:
        ContractError: wrong shapes or dtypes, or the energy does not return one floating number for
            each row.
        ValueError: the energy has batch normalization in training mode.

    References:
        Du, Mordatch, Implicit Generation and Modeling with Energy-Based Models (2019),
        https://arxiv.org/abs/1903.08689, where it is taken of data and of negatives.

    Examples:
        >>> import torch
        >>> from termwise.energy import energy_square_penalty
        >>> energy_square_penalty(lambda x: x.sum(1), torch.tensor([[1.0], [3.0]])).metrics()
        {'loss': 5.0, 'energy': 2.0}
    """
    refuse_batch_statistics("energy_square_penalty", energy)
    with without_autocast(x):
        energies = energies_of("energy_square_penalty", energy, x)
        loss, mean_energy = weighted_means(
            ([energies.square(), energies.detach()], weights),
            batch_group=batch_group,
            grad_reduction=grad_reduction,
        )
        return EnergySquareTerms(loss=loss, energy=mean_energy.detach())


@contract
def gradient_penalty(
    energy: Energy,
    x: Float[Tensor, "batch *event"],
    *,
    target: float = 0.0,
    weights: Float[Tensor, " batch"] | None = None,
    higher_order_safe: bool = True,
    differentiation: Differentiation = "auto",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> GradientPenaltyTerms:
    r"""Penalize the norm of an energy's gradient; no loss of this family adds this by default.

    $$\mathrm{loss} = \sum_i w_i \big( \| \nabla E(x_i) \| - c \big)^2$$

    over rows x, whose weights w sum to 1, without a coefficient and not halved. At c = 0 it is the
    zero-centered penalty (R1 if x is data, R2 if x are samples).

    Args:
        energy: returns the energy of each row. Called once.
        x (Float[Tensor, "batch *event"]): where the gradient is penalized: data, samples, or points
            between them.
        target: c. If it is not 0, the derivative of the norm at a gradient of 0 is taken as 0.
        weights (Float[Tensor, " batch"] | None): weights of the rows of x, normalized over all
            ranks. None: equal weights.
        higher_order_safe: whether to replace functions that have no second derivative in PyTorch
            (fused attention, cdist, hardsigmoid), or a wrong third one (layer_norm, instance_norm),
            by compositions. Otherwise an energy with attention raises an error in `backward`, and
            second derivatives of the loss may be silently wrong.
        differentiation: how to differentiate with respect to x: "autograd", "func" (torch.func), or
            "auto", which chooses.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank. Without a row they are NaN. Gradient:
        combined over ranks as `grad_reduction` says, it is the gradient of one process that holds
        all rows. Each rank sends one sum of 3 float64 elements. Does not synchronize with the
        device. Autocast is disabled inside, also for the energy unless it enables autocast itself.

    Raises:
        ContractError: wrong shapes or dtypes, or the energy does not return one floating number for
            each row.
        ValueError: target is negative; the energy does not depend on its input, has batch
            normalization in training mode, or is under DistributedDataParallel(static_graph=True).

    References:
        Mescheder, Geiger, Nowozin, Which Training Methods for GANs do actually Converge? (ICML
        2018), https://arxiv.org/abs/1801.04406, where R1 is halved; Gulrajani et al., Improved
        Training of Wasserstein GANs (2017), https://arxiv.org/abs/1704.00028, for c = 1.

    Examples:
        >>> import torch
        >>> from termwise.energy import gradient_penalty
        >>> x, energy = torch.tensor([[1.0], [3.0]]), lambda x: 0.5 * x.square().sum(1)
        >>> gradient_penalty(energy, x).metrics()
        {'loss': 5.0, 'gradient_norm': 2.0}
        >>> gradient_penalty(energy, x, target=1.0).metrics()
        {'loss': 2.0, 'gradient_norm': 2.0}
    """
    if not target >= 0:
        raise ValueError(f"gradient_penalty needs target >= 0, got {target}")
    refuse_batch_statistics("gradient_penalty", energy)
    with without_autocast(x):
        x = x.view_as(x)  # torch.export does not save a region of autocast that begins with a graph
        energies, gradient = energies_and_gradients(
            "gradient_penalty", energy, x, differentiation, "x", higher_order_safe
        )
        rows = gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None]
        if target == 0:  # without a root, whose derivative at 0 is infinite
            per_row = per_row_sum(gradient.square())
            norms = per_row.detach().sqrt()
        else:
            norms = cast("Tensor", torch.linalg.vector_norm(rows, dim=1))
            per_row = (norms - target).square()
        loss, norm = weighted_means(
            ([anchored(per_row, energies), norms.detach()], weights),
            batch_group=batch_group,
            grad_reduction=grad_reduction,
        )
        return GradientPenaltyTerms(loss=loss, gradient_norm=norm.detach())


class EnergySquarePenalty(LossModule):
    """[`energy_square_penalty`][termwise.energy.energy_square_penalty] of an energy.

    Examples:
        >>> import torch
        >>> from termwise.energy import EnergySquarePenalty
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0))
        >>> EnergySquarePenalty(model)(torch.ones(4, 3)).loss.backward()
    """

    energy: Energy = dataclasses.field(kw_only=False)
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        x: Float[Tensor, "batch *event"],
        *,
        weights: Float[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> EnergySquareTerms:
        """Compute the terms of the penalty."""
        return energy_square_penalty(
            self.energy,
            x,
            weights=weights,
            batch_group=batch_group,
            **self.hyperparameters(),
        )


class GradientPenalty(LossModule):
    """[`gradient_penalty`][termwise.energy.gradient_penalty] as a module.

    Examples:
        >>> import torch
        >>> from termwise.energy import GradientPenalty
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(),
        ...                             torch.nn.Linear(8, 1), torch.nn.Flatten(0))
        >>> GradientPenalty(model, target=1.0)(torch.ones(4, 3)).loss.backward()
    """

    energy: Energy = dataclasses.field(kw_only=False)
    target: float = 0.0
    higher_order_safe: bool = True
    differentiation: Differentiation = "auto"
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        x: Float[Tensor, "batch *event"],
        *,
        weights: Float[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> GradientPenaltyTerms:
        """Compute the terms of the penalty."""
        return gradient_penalty(
            self.energy,
            x,
            weights=weights,
            batch_group=batch_group,
            **self.hyperparameters(),
        )
