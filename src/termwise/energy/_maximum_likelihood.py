"""Maximum likelihood: lower the energy of data, raise that of the model's own samples."""

import dataclasses
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from .._coefficients import weighted
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import weighted_means
from .._module import LossModule
from .._numbers import without_autocast
from .._terms import Terms, terms
from ._energies import Energy, energies_of, refuse_batch_statistics
from ._parameter_penalty import Regularization, parameter_penalty


@terms
class MaximumLikelihoodTerms(Terms):
    """Terms of [`maximum_likelihood_loss`][termwise.energy.maximum_likelihood_loss]."""

    loss: Float[Tensor, ""]
    """energy_data - negative_weight * energy_model + regularization_weight * regularization."""
    energy_data: Float[Tensor, ""]
    """Energy of the data, weighted mean over rows."""
    energy_model: Float[Tensor, ""]
    """Energy of the model's samples, mean over rows."""
    gap: Float[Tensor, ""]
    """energy_data - energy_model, near 0 once the model fits; detached."""
    regularization: Float[Tensor, ""]
    """Sum of |parameter| or of its square over `parameters`; 0 without regularization."""


@contract
def maximum_likelihood_loss(
    energy: Energy,
    x: Float[Tensor, "batch *event"],
    negatives: Float[Tensor, "negatives *event"],
    *,
    negative_weight: float = 1.0,
    regularization: Regularization | None = None,
    regularization_weight: float = 0.0,
    parameters: Sequence[Tensor] = (),
    weights: Float[Tensor, " batch"] | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> MaximumLikelihoodTerms:
    r"""Lower the energy of data and raise that of samples of the model.

    $$\mathrm{loss} = \sum_i w_i E(x_i) - \alpha \frac{1}{m} \sum_j E(y_j) + \lambda R$$

    over the rows of data x, whose weights w sum to 1, and m samples y of the model. With alpha = 1
    and exact samples its gradient is that of the negative log-likelihood. Its value is not: it is
    the difference of the energies, which a constant added to E does not change.

    Args:
        energy: returns the energy of each row. It is called twice, on x and on the negatives.
        x (Float[Tensor, "batch *event"]): data, with the axes of a sample that the energy takes.
        negatives (Float[Tensor, "negatives *event"]): samples of the model, in any number;
            detached.
        negative_weight: alpha. The true model is stationary only for 1; any other weight is biased,
            and below 1 energies may decrease without bound.
        regularization: R, "l1" or "l2" (the sum of squares, without a half). None: none.
        regularization_weight: lambda.
        parameters: tensors to regularize, such as `list(model.parameters())`.
        weights (Float[Tensor, " batch"] | None): weights of the rows of x, normalized over all
            ranks. None: equal weights.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank. Without a row of either kind they are NaN.
        Gradient: combined over ranks as `grad_reduction` says, it is the gradient of one process
        that holds all rows. Each rank sends one sum of 4 float64 elements. Does not synchronize
        with the device. Autocast is disabled inside, also for the energy unless it enables autocast
        itself.

    Raises:
        ContractError: wrong shapes or dtypes, or the energy does not return one floating number for
            each row.
        ValueError: regularization without parameters; or the energy has batch normalization in
            training mode.

    References:
        LeCun et al., A Tutorial on Energy-Based Learning (2006), section 1.2; Song, Kingma, How to
        Train Your Energy-Based Models (2021), https://arxiv.org/abs/2101.03288, section 2. TorchEBM
        (https://github.com/soran-ghaderi/torchebm) reports the gap with the other sign.

    Examples:
        >>> import torch
        >>> from termwise.energy import maximum_likelihood_loss
        >>> x, negatives = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0]])
        >>> maximum_likelihood_loss(lambda x: 0.5 * x.square().sum(1), x, negatives).metrics()
        {'loss': 2.5, 'energy_data': 2.5, 'energy_model': 0.0, 'gap': 2.5, 'regularization': 0.0}
    """
    refuse_batch_statistics("maximum_likelihood_loss", energy)
    with without_autocast(x):
        penalty = parameter_penalty(
            "maximum_likelihood_loss", x, regularization, parameters, batch_group, grad_reduction
        )
        of_data = energies_of("maximum_likelihood_loss", energy, x)
        of_model = energies_of("maximum_likelihood_loss", energy, negatives.detach(), "negatives")
        energy_data, energy_model = weighted_means(
            ([of_data], weights),
            ([of_model], None),
            batch_group=batch_group,
            grad_reduction=grad_reduction,
        )
        contrast = energy_data - negative_weight * energy_model
        return MaximumLikelihoodTerms(
            loss=contrast + weighted(regularization_weight, penalty),
            energy_data=energy_data,
            energy_model=energy_model,
            gap=(energy_data - energy_model).detach(),
            regularization=penalty,
        )


class MaximumLikelihoodLoss(LossModule):
    """[`maximum_likelihood_loss`][termwise.energy.maximum_likelihood_loss] as a module.

    The regularization covers all parameters of the energy, which must then be a module.

    Examples:
        >>> import torch
        >>> from termwise.energy import MaximumLikelihoodLoss
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0))
        >>> loss_fn = MaximumLikelihoodLoss(model, regularization="l2", regularization_weight=0.1)
        >>> loss_fn(torch.ones(4, 3), torch.zeros(8, 3)).loss.backward()
    """

    energy: Energy = dataclasses.field(kw_only=False)
    negative_weight: float = 1.0
    regularization: Regularization | None = None
    regularization_weight: float = 0.0
    grad_reduction: GradReduction = "mean"

    def __post_init__(self) -> None:
        if self.regularization is not None and not isinstance(self.energy, nn.Module):
            raise ValueError(
                "MaximumLikelihoodLoss needs a module to regularize, got "
                f"{type(self.energy).__name__}: pass parameters to maximum_likelihood_loss"
            )

    def __call__(
        self,
        x: Float[Tensor, "batch *event"],
        negatives: Float[Tensor, "negatives *event"],
        *,
        weights: Float[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> MaximumLikelihoodTerms:
        """Compute the terms of the loss."""
        return maximum_likelihood_loss(
            self.energy,
            x,
            negatives,
            parameters=list(self.parameters()) if self.regularization else (),
            weights=weights,
            batch_group=batch_group,
            **self.hyperparameters(),
        )
