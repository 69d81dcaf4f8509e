"""Energy discrepancy: compare data with perturbed copies, without gradients of the energy."""

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import weighted_means
from .._module import LossModule
from .._numbers import lifted, without_autocast
from .._terms import Terms, terms
from ._energies import (
    Energy,
    displaced,
    energies_of,
    normal_like,
    refuse_batch_statistics,
)


@terms
class EnergyDiscrepancyTerms(Terms):
    """Terms of [`energy_discrepancy_loss`][termwise.energy.energy_discrepancy_loss]."""

    loss: Float[Tensor, ""]
    """The stabilized energy discrepancy, weighted mean over rows; nats."""
    gap: Float[Tensor, ""]
    """Energy of the data minus that of the copies, mean over copies and weighted mean over rows;
    detached."""
    stabilization: Float[Tensor, ""]
    """Fraction of w in the sum inside the log, in [0, 1], weighted mean over rows; detached. Near 1
    a row has almost no gradient."""
    effective_copies: Float[Tensor, ""]
    """Effective number of copies, (sum v)^2 / sum v^2 with v = exp(-E), weighted mean over rows;
    detached. If it is near 1 the estimate is poor: use more copies, or a smaller t."""


@contract
def energy_discrepancy_loss(
    energy: Energy,
    x: Float[Tensor, "batch *event"],
    *,
    t: float,
    copies: int = 16,
    w_stable: float = 1.0,
    noise: Float[Tensor, "draws batch *event"] | None = None,
    generator: torch.Generator | None = None,
    weights: Float[Tensor, " batch"] | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> EnergyDiscrepancyTerms:
    r"""Compare the energy of data with that of copies that are perturbed twice.

    $$\mathrm{loss} = \sum_i w_i \log\Big( \frac{w}{M} + \frac{1}{M} \sum_{j=1}^{M}
    e^{E(x_i) - E(y_{ij})} \Big), \qquad y_{ij} = x_i + \sqrt{t}\, (\xi_i + \xi'_{ij})$$

    over the rows of data x, whose weights w_i sum to 1, and M copies of each. With many copies it
    is E(x) minus the contrastive potential, -log of exp(-E) convolved with a normal density of
    variance t, at x plus noise of the same variance. The true density is its minimum for any t. For
    small t it is t times score matching, for large t maximum likelihood plus a constant. The energy
    is not differentiated with respect to x.

    Args:
        energy: returns the energy of each row. It is called M + 1 times, on x and on each of the
            copies, always with the rows in the order of x.
        x (Float[Tensor, "batch *event"]): data, with the axes of a sample that the energy takes.
        t: variance of each of the two perturbations, for data scaled to about 1.
        copies: M, the number of copies.
        w_stable: w, which bounds the log from below, so that copies of low energy cannot dominate.
            The authors' value of 1 has a small bias that vanishes with M; with 0 the loss is
            unbounded below for any finite number of copies.
        noise (Float[Tensor, "draws batch *event"] | None): standard normal, M + 1 for each row:
            first xi, which all copies of a row share, then xi' for each copy. None: drawn.
        generator: generator for the noise. None: the default generator of x's device.
        weights (Float[Tensor, " batch"] | None): weights of the rows of x, normalized over all
            ranks. None: equal weights.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication. Ranks need generators of their own.
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
        ValueError: t is not positive, w_stable is negative, copies is below 1, or the noise does
            not have copies + 1 draws; or the energy has batch normalization in training mode.

    References:
        Schroder et al., Energy Discrepancies: A Score-Independent Loss for Energy-Based Models
        (NeurIPS 2023), https://arxiv.org/abs/2307.06431. We take the paper's side: the authors'
        notebooks (https://github.com/J-zin/energy-discrepancy) leave out the constant -log M, one
        takes its `t_noise` for a standard deviation, and another divides the loss by t below 1.

    Examples:
        >>> import torch
        >>> from termwise.energy import energy_discrepancy_loss
        >>> x, noise = torch.tensor([[1.0], [3.0]]), torch.ones(2, 2, 1)
        >>> energy = lambda x: x.sum(1)
        >>> energy_discrepancy_loss(energy, x, t=1.0, copies=1, w_stable=0, noise=noise).metrics()
        {'loss': -2.0, 'gap': -2.0, 'stabilization': 0.0, 'effective_copies': 1.0}
    """
    if not t > 0:
        raise ValueError(f"energy_discrepancy_loss needs t > 0, got {t}")
    if not 0 <= w_stable < math.inf:
        raise ValueError(f"energy_discrepancy_loss needs a finite w_stable >= 0, got {w_stable}")
    if copies < 1:
        raise ValueError(f"energy_discrepancy_loss needs at least 1 of copies, got {copies}")
    if noise is not None and noise.shape[0] != copies + 1:
        raise ValueError(
            f"energy_discrepancy_loss needs noise of copies + 1 = {copies + 1} draws, "
            f"got {noise.shape[0]}"
        )
    refuse_batch_statistics("energy_discrepancy_loss", energy)
    with without_autocast(x):
        name = "energy_discrepancy_loss"
        if noise is None:
            noise = normal_like(x, generator, copies + 1)
        forward, *back = math.sqrt(t) * lifted(noise)
        of_data = energies_of(name, energy, x)
        of_copies = torch.stack(
            [energies_of(name, energy, displaced(x, forward + step)[0], "copy") for step in back]
        )
        gaps = of_data - of_copies
        summands = gaps
        if w_stable > 0:
            summands = torch.cat([gaps, torch.full_like(gaps[:1], math.log(w_stable))])
        per_row = summands.logsumexp(0) - math.log(copies)
        shares = summands.detach().softmax(0)
        of_copies_alone = gaps.detach().softmax(0)
        loss, gap, stabilization, effective = weighted_means(
            (
                [
                    per_row,
                    gaps.detach().mean(0),
                    shares[copies:].sum(0),
                    1 / of_copies_alone.square().sum(0),
                ],
                weights,
            ),
            batch_group=batch_group,
            grad_reduction=grad_reduction,
        )
        return EnergyDiscrepancyTerms(
            loss=loss,
            gap=gap.detach(),
            stabilization=stabilization.detach(),
            effective_copies=effective.detach(),
        )


class EnergyDiscrepancyLoss(LossModule):
    """[`energy_discrepancy_loss`][termwise.energy.energy_discrepancy_loss] as a module.

    Examples:
        >>> import torch
        >>> from termwise.energy import EnergyDiscrepancyLoss
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0))
        >>> loss_fn = EnergyDiscrepancyLoss(model, t=0.1, copies=4)
        >>> loss_fn(torch.ones(4, 3), generator=torch.Generator().manual_seed(0)).loss.backward()
    """

    energy: Energy = dataclasses.field(kw_only=False)
    t: float
    copies: int = 16
    w_stable: float = 1.0
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        x: Float[Tensor, "batch *event"],
        *,
        noise: Float[Tensor, "draws batch *event"] | None = None,
        generator: torch.Generator | None = None,
        weights: Float[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> EnergyDiscrepancyTerms:
        """Compute the terms of the loss."""
        return energy_discrepancy_loss(
            self.energy,
            x,
            noise=noise,
            generator=generator,
            weights=weights,
            batch_group=batch_group,
            **self.hyperparameters(),
        )
