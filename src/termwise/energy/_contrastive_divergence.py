"""Contrastive divergence: maximum likelihood with negatives from short chains of a sampler."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._coefficients import weighted
from .._contract import ContractError, contract, show
from .._groups import GradReduction, ProcessGroup
from .._means import weighted_means
from .._module import LossModule
from .._numbers import without_autocast
from .._terms import Terms, terms
from ._energies import Energy, energies_of, refuse_batch_statistics
from ._langevin import langevin
from ._parameter_penalty import Regularization, parameter_penalty

Sampler: TypeAlias = Callable[
    [Energy, Float[Tensor, "batch *event"]], Float[Tensor, "negatives *event"]
]
"""A callable of an energy and rows of data that moves the rows toward samples of the model."""


@terms
class ContrastiveDivergenceTerms(Terms):
    """Terms of [`contrastive_divergence_loss`][termwise.energy.contrastive_divergence_loss]."""

    loss: Float[Tensor, ""]
    """energy_data - negative_weight * energy_model + energy_square_weight * energy_squares
    + regularization_weight * regularization."""
    energy_data: Float[Tensor, ""]
    """Energy of the data, weighted mean over rows."""
    energy_model: Float[Tensor, ""]
    """Energy of the negatives, mean over rows."""
    gap: Float[Tensor, ""]
    """energy_data - energy_model; near 0 once the chains stay near the data; detached."""
    regularization: Float[Tensor, ""]
    """Sum of |parameter| or of its square over `parameters`; 0 without regularization."""
    energy_squares: Float[Tensor, ""]
    """Square of the energy of the data, weighted mean over rows, plus that of the negatives, mean
    over rows."""
    negatives: Float[Tensor, "negatives *event"]
    """Float[Tensor, "negatives *event"]: the last samples of this rank's chains; detached. Not
    among the metrics."""


@contract
def contrastive_divergence_loss(
    energy: Energy,
    x: Float[Tensor, "batch *event"],
    negatives: Float[Tensor, "negatives *event"] | None = None,
    *,
    sampler: Sampler | None = None,
    steps: int = 10,
    step_size: float = 0.01,
    noise_scale: float | None = None,
    generator: torch.Generator | None = None,
    negative_weight: float = 1.0,
    energy_square_weight: float = 0.0,
    regularization: Regularization | None = None,
    regularization_weight: float = 0.0,
    parameters: Sequence[Tensor] = (),
    weights: Float[Tensor, " batch"] | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> ContrastiveDivergenceTerms:
    r"""Lower the energy of data and raise that of chains that start at the data.

    $$\begin{align*} \mathrm{loss} &= \sum_i w_i E(x_i) - \alpha \frac{1}{m} \sum_j E(y_j) \\
    &+ \beta \Big( \sum_i w_i E(x_i)^2 + \frac{1}{m} \sum_j E(y_j)^2 \Big) + \lambda R
    \end{align*}$$

    over the rows of data x, whose weights w sum to 1, and m negatives y, the sampler's chains. As
    in Hinton's paper, y is treated as independent of the parameters;
    [`contrastive_divergence_kl_term`][termwise.energy.contrastive_divergence_kl_term] is the part
    of the gradient that this omits. With alpha = 1, beta = lambda = 0 and chains that leave p
    invariant, the true model is stationary for chains of any length. The value of the loss is the
    difference of the energies, and does not measure the quality of the model.

    Args:
        energy: returns the energy of each row. Called on x, on the negatives, and by the sampler,
            which by default computes `steps` gradients.
        x (Float[Tensor, "batch *event"]): data, with the axes of a sample that the energy takes.
        negatives (Float[Tensor, "negatives *event"] | None): samples to use instead of the
            sampler's, with any number of rows; detached.
        sampler: called as sampler(energy, x) under `torch.no_grad()`; it may enable gradients
            inside, as `langevin` does. It must not modify x. None:
            [`langevin`][termwise.energy.langevin], unadjusted, with the next four arguments, which
            are not passed to another sampler.
        steps: number of steps of each chain, the k of CD-k.
        step_size: size of a step, for data scaled to about 1.
        noise_scale: standard deviation of the noise of a step. None: sqrt(2 * step_size).
        generator: generator for the steps; pass a different one on each rank. None: the default
            generator of x's device.
        negative_weight: alpha. The true model is stationary only for 1; any other weight is biased,
            and below 1 energies may decrease without bound.
        energy_square_weight: beta, which prevents a drift of the additive constant of E, and biases
            the model. 0: the squares are computed but not added.
        regularization: R, "l1" or "l2" (the sum of squares, without a half). None: none.
        regularization_weight: lambda.
        parameters: tensors to regularize, such as `list(model.parameters())`.
        weights (Float[Tensor, " batch"] | None): weights of the rows of x, normalized over all
            ranks. None: equal weights. They do not apply to the chains that start at the rows: if
            both must match, resample x instead.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank except `negatives`. Without a row of either
        kind they are NaN. Gradient: combined over ranks as `grad_reduction` says, it is the
        gradient of one process that holds all rows. Each rank sends one sum of 6 float64 elements.
        Does not synchronize with the device. Autocast is disabled inside, also for the energy and
        the sampler unless they enable it themselves.

    Raises:
        ContractError: shapes or dtypes do not fit, the energy does not return one floating number
            for each row, or the sampler returns another event than x's.
        ValueError: negatives and a sampler, regularization without parameters, what `langevin`
            refuses, or the energy has batch normalization in training mode.

    References:
        Hinton, Training Products of Experts by Minimizing Contrastive Divergence (2002),
        https://doi.org/10.1162/089976602760128018; Tieleman, Training Restricted Boltzmann Machines
        using Approximations to the Likelihood Gradient (2008),
        https://doi.org/10.1145/1390156.1390290, for chains that persist, here a
        [`ReplayBuffer`][termwise.energy.ReplayBuffer]; Du, Mordatch, Implicit Generation and
        Modeling with Energy-Based Models (2019), https://arxiv.org/abs/1903.08689, for the squares.
        TorchEBM (https://github.com/soran-ghaderi/torchebm) adds the squares by default, with
        weight 0.001, and replaces a loss that is not finite by 0.1; here it stays non-finite.

    Examples:
        >>> import torch
        >>> from termwise.energy import ReplayBuffer, contrastive_divergence_loss, langevin
        >>> x, energy = torch.tensor([[1.0], [3.0]]), lambda x: 0.5 * x.square().sum(1)
        >>> descent = lambda energy, x: langevin(energy, x, steps=1, step_size=1.0, noise_scale=0)
        >>> terms = contrastive_divergence_loss(energy, x, sampler=descent)
        >>> terms.gap
        tensor(2.5000)
        >>> terms.negatives
        tensor([[0.],
                [0.]])

        Persistent chains, one in twenty of which restarts in each step:

        >>> fresh = lambda n, generator: torch.rand(n, 1, generator=generator)
        >>> buffer = ReplayBuffer.start(fresh, 100)
        >>> chains = lambda energy, x: buffer.write(
        ...     langevin(energy, (drawn := buffer.draw(len(x), init_fn=fresh))[0],
        ...              steps=20, step_size=0.1), drawn[1])
        >>> contrastive_divergence_loss(energy, x, sampler=chains).negatives.shape
        torch.Size([2, 1])
    """
    name = "contrastive_divergence_loss"
    if negatives is not None and sampler is not None:
        raise ValueError(f"{name} needs negatives or a sampler, got both")
    refuse_batch_statistics(name, energy)
    with without_autocast(x):
        penalty = parameter_penalty(
            name, x, regularization, parameters, batch_group, grad_reduction
        )
        if negatives is None:

            def by_langevin(energy: Energy, x: Tensor) -> Tensor:
                return langevin(
                    energy,
                    x,
                    steps=steps,
                    step_size=step_size,
                    noise_scale=noise_scale,
                    generator=generator,
                )

            negatives = _sampled(sampler or by_langevin, energy, x)
        negatives = negatives.detach()
        of_data = energies_of(name, energy, x)
        of_model = energies_of(name, energy, negatives, "negatives")
        energy_data, square_data, energy_model, square_model = weighted_means(
            ([of_data, of_data.square()], weights),
            ([of_model, of_model.square()], None),
            batch_group=batch_group,
            grad_reduction=grad_reduction,
        )
        squares = square_data + square_model
        contrast = energy_data - negative_weight * energy_model
        priced = weighted(energy_square_weight, squares)
        return ContrastiveDivergenceTerms(
            loss=contrast + priced + weighted(regularization_weight, penalty),
            energy_data=energy_data,
            energy_model=energy_model,
            gap=(energy_data - energy_model).detach(),
            regularization=penalty,
            energy_squares=squares,
            negatives=negatives,
        )


def _sampled(sampler: Sampler, energy: Energy, x: Tensor) -> Tensor:
    if not torch.compiler.is_dynamo_compiling() and (
        torch.is_inference_mode_enabled() or x.is_inference()
    ):
        with torch.inference_mode(False):  # in which a sampler can enable gradients
            return _sampled(sampler, energy, x.clone())
    with torch.no_grad():
        negatives: Any = sampler(energy, x.detach())
    if (
        not isinstance(negatives, Tensor)
        or not negatives.is_floating_point()
        or negatives.ndim != x.ndim
        or negatives.shape[1:] != x.shape[1:]
    ):
        raise ContractError(
            'contrastive_divergence_loss: sampler(energy, x) needs Float[Tensor, "negatives '
            f'*event"] with event {list(x.shape[1:])}, got {show(negatives)}'
        )
    return negatives


class ContrastiveDivergenceLoss(LossModule):
    """[`contrastive_divergence_loss`][termwise.energy.contrastive_divergence_loss] as a module.

    The regularization covers all parameters of the energy, which must then be a module.

    Examples:
        >>> import torch
        >>> from termwise.energy import ContrastiveDivergenceLoss
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(),
        ...                             torch.nn.Linear(8, 1), torch.nn.Flatten(0))
        >>> loss_fn = ContrastiveDivergenceLoss(model, steps=5, step_size=0.1)
        >>> loss_fn(torch.ones(4, 3), generator=torch.Generator().manual_seed(0)).loss.backward()
    """

    energy: Energy = dataclasses.field(kw_only=False)
    sampler: Sampler | None = None
    steps: int = 10
    step_size: float = 0.01
    noise_scale: float | None = None
    negative_weight: float = 1.0
    energy_square_weight: float = 0.0
    regularization: Regularization | None = None
    regularization_weight: float = 0.0
    grad_reduction: GradReduction = "mean"

    def __post_init__(self) -> None:
        if self.regularization is not None and not isinstance(self.energy, nn.Module):
            raise ValueError(
                "ContrastiveDivergenceLoss needs a module to regularize, got "
                f"{type(self.energy).__name__}: pass parameters to contrastive_divergence_loss"
            )

    def __call__(
        self,
        x: Float[Tensor, "batch *event"],
        negatives: Float[Tensor, "negatives *event"] | None = None,
        *,
        generator: torch.Generator | None = None,
        weights: Float[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> ContrastiveDivergenceTerms:
        """Compute the terms of the loss."""
        regularized = self.energy.parameters() if isinstance(self.energy, nn.Module) else ()
        return contrastive_divergence_loss(
            self.energy,
            x,
            negatives,
            generator=generator,
            parameters=list(regularized) if self.regularization else (),
            weights=weights,
            batch_group=batch_group,
            **self.hyperparameters(),
        )
