"""Energy matching: one potential transports noise to data and has the data as its equilibrium."""

import dataclasses

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
from ._paths import straight_path, truncated_decay


@terms
class EnergyMatchingTerms(Terms):
    """Terms of [`energy_matching_loss`][termwise.energy.energy_matching_loss]."""

    loss: Float[Tensor, ""]
    """flow + contrastive_weight * contrast."""
    flow: Float[Tensor, ""]
    """Square of (-gradient - path velocity) times g(t), sum over the event and weighted mean over
    rows."""
    contrast: Float[Tensor, ""]
    """Energy of the data minus that of the negatives, means over rows; 0 without negatives."""


@contract
def energy_matching_loss(
    energy: Energy,
    x0: Float[Tensor, "batch *event"],
    x1: Float[Tensor, "batch *event"],
    time: Float[Tensor, " batch"],
    negatives: Float[Tensor, "negatives *event"] | None = None,
    *,
    contrastive_weight: float = 1.0,
    cutoff: float = 1.0,
    weights: Float[Tensor, " batch"] | None = None,
    higher_order_safe: bool = True,
    differentiation: Differentiation = "auto",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> EnergyMatchingTerms:
    r"""Match a flow far from the data, and the density of the data near them, with one energy.

    $$x_t = (1 - t)\, x_0 + t\, x_1, \qquad
    \mathrm{flow} = \sum_i w_i\, g(t)\, \| -\nabla E(x_t) - (x_1 - x_0) \|^2$$

    $$\mathrm{contrast} = \sum_i w_i E(x_1) - \frac{1}{m} \sum_j E(y_j)$$

    over pairs of rows, whose weights w sum to 1, with g(t) = min(1, (1 - t) / (1 - a)), and m
    negatives y from the density exp(-E / epsilon) at a temperature epsilon. The energy does not
    depend on t. First train without negatives: descending E then transports noise to data. Then add
    negatives, from Langevin steps at that temperature that start at data or at transported noise.
    The gradient of the contrast is epsilon times that of the negative log-likelihood; a
    `contrastive_weight` of 1 / epsilon compensates for it. The two terms do not have a common
    optimum.

    Args:
        energy: returns the energy of each row. Called on x_t and, with negatives, on x1 and on
            these.
        x0 (Float[Tensor, "batch *event"]): noise, paired with x1 by optimal transport over the
            batch in the paper.
        x1 (Float[Tensor, "batch *event"]): data.
        time (Float[Tensor, " batch"]): t of each row, 0 at the noise and 1 at the data.
        negatives (Float[Tensor, "negatives *event"] | None): samples of exp(-E / epsilon), in any
            number; detached. None: only the flow.
        contrastive_weight: weight of the contrast.
        cutoff: a, the time after which the weight of the flow decreases. 1: never.
        weights (Float[Tensor, " batch"] | None): weights of the rows, for both terms, normalized
            over all ranks. None: equal weights.
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
        The terms of all rows, the same on every rank. Without a row of any kind they are NaN.
        Gradient: combined over ranks as `grad_reduction` says, it is the gradient of one process
        that holds all rows. Each rank sends one sum of 2 float64 elements, of 5 with negatives,
        which all ranks have or none. Does not synchronize with the device. Autocast is disabled
        inside, also for the energy unless it enables autocast itself.

    Raises:
        ContractError: wrong shapes or dtypes, or the energy does not return one floating number for
            each row.
        ValueError: the energy does not depend on its input, has batch normalization in training
            mode, or is under DistributedDataParallel(static_graph=True); or cutoff is not in [0,
            1].

    References:
        Balcerak et al., Energy Matching: Unifying Flow Matching and Energy-Based Models for
        Generative Modeling (NeurIPS 2025), https://arxiv.org/abs/2504.10612. The authors' code
        (https://github.com/m1balcerak/EnergyMatching) uses the mean over the event instead of the
        sum, so that its lambda_cd is this weight divided by the number of elements. It also drops
        the tenth of the negatives of highest energy and keeps lambda_cd times the contrast above
        -0.02; this loss does neither, since both change the optimum. Its noise on x_t is equivalent
        to the same noise added to x0 and x1.

    Examples:
        >>> import torch
        >>> from termwise.energy import energy_matching_loss
        >>> x0, x1, time = torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]), torch.tensor([0.5, 0.5])
        >>> energy_matching_loss(lambda x: -2 * x.sum(1), x0, x1, time, x0).metrics()
        {'loss': -3.0, 'flow': 1.0, 'contrast': -4.0}
    """
    if not 0 <= cutoff <= 1:
        raise ValueError(f"energy_matching_loss needs cutoff in [0, 1], got {cutoff}")
    refuse_batch_statistics("energy_matching_loss", energy)
    with without_autocast(x1):
        name = "energy_matching_loss"
        x_t, target = straight_path(x0, x1, time)
        energies, gradient = energies_and_gradients(
            name, energy, x_t, differentiation, "x_t", higher_order_safe
        )
        residual = per_row_sum((-gradient - target).square())
        residual = anchored(residual * truncated_decay(time, cutoff).to(residual.dtype), energies)
        if negatives is None:
            (flow,) = weighted_means(
                ([residual], weights), batch_group=batch_group, grad_reduction=grad_reduction
            )
            contrast = torch.zeros_like(flow)
        else:
            flow, of_data, of_negatives = weighted_means(
                ([residual, energies_of(name, energy, x1, "x1")], weights),
                ([energies_of(name, energy, negatives.detach(), "negatives")], None),
                batch_group=batch_group,
                grad_reduction=grad_reduction,
            )
            contrast = of_data - of_negatives
        return EnergyMatchingTerms(
            loss=flow + contrastive_weight * contrast, flow=flow, contrast=contrast
        )


class EnergyMatchingLoss(LossModule):
    """[`energy_matching_loss`][termwise.energy.energy_matching_loss] as a module.

    Examples:
        >>> import torch
        >>> from termwise.energy import EnergyMatchingLoss
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(),
        ...                             torch.nn.Linear(8, 1), torch.nn.Flatten(0))
        >>> loss_fn = EnergyMatchingLoss(model, contrastive_weight=0.1)
        >>> x0, x1, time = torch.zeros(5, 3), torch.ones(5, 3), torch.rand(5)
        >>> loss_fn(x0, x1, time).loss.backward()
        >>> loss_fn(x0, x1, time, negatives=torch.rand(7, 3)).loss.backward()
    """

    energy: Energy = dataclasses.field(kw_only=False)
    contrastive_weight: float = 1.0
    cutoff: float = 1.0
    higher_order_safe: bool = True
    differentiation: Differentiation = "auto"
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        x0: Float[Tensor, "batch *event"],
        x1: Float[Tensor, "batch *event"],
        time: Float[Tensor, " batch"],
        negatives: Float[Tensor, "negatives *event"] | None = None,
        *,
        weights: Float[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> EnergyMatchingTerms:
        """Compute the terms of the loss."""
        return energy_matching_loss(
            self.energy,
            x0,
            x1,
            time,
            negatives,
            weights=weights,
            batch_group=batch_group,
            **self.hyperparameters(),
        )
