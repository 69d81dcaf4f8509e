"""Contrastive divergence: maximum likelihood whose negatives are short chains of a sampler."""

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
"""Moves rows of data toward samples of an energy's model. Any callable of the two."""


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
    """energy_data - energy_model, near 0 once the chains stay where the data are; detached."""
    regularization: Float[Tensor, ""]
    """Sum of |parameter| or of its square over the parameters given; 0 where none were."""
    energy_squares: Float[Tensor, ""]
    """Square of the energy of the data, weighted mean over rows, plus that of the negatives, mean
    over rows."""
    negatives: Float[Tensor, "negatives *event"]
    """Float[Tensor, "negatives *event"]: where the chains ended, on this rank; detached. Not among
    the metrics."""


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
    r"""Lower the energy of data, raise it where chains that start at the data have moved to.

    $$\mathrm{loss} = \sum_i w_i E(x_i) - \alpha \frac{1}{m} \sum_j E(y_j)
    + \beta \Big( \sum_i w_i E(x_i)^2 + \frac{1}{m} \sum_j E(y_j)^2 \Big) + \lambda R$$

    over the rows of data x, whose weights w sum to 1, and m negatives y, the sampler's chains. The
    dependence of y on the parameters is left out, as Hinton does;
    [`contrastive_divergence_kl_term`][termwise.energy.contrastive_divergence_kl_term] is that rest.
    With alpha = 1, beta = lambda = 0 and chains that leave p as it is, the true model is
    stationary, however short they are. The value of the loss is the gap of the energies, unchanged
    by a constant added to E: it does not say how good the model is.

    Args:
        energy: returns the energy of each row. Called twice, on x and on the negatives, besides
            what the sampler does: `steps` gradients by default.
        x (Float[Tensor, "batch *event"]): data, as many axes to a sample as the energy takes.
        negatives (Float[Tensor, "negatives *event"] | None): what the sampler would give, in any
            number of rows; then nothing is sampled. Detached.
        sampler: called as sampler(energy, x), without grad mode, which it may turn on inside to
            differentiate (`langevin` does). It must leave x as it is. None:
            [`langevin`][termwise.energy.langevin], unadjusted, with the next four arguments, which
            another sampler does not get.
        steps: moves of each chain, the k of CD-k.
        step_size: of a move, for data scaled to about 1.
        noise_scale: of a move. None: sqrt(2 * step_size).
        generator: what draws the moves; give each rank its own. None: the default generator of x's
            device.
        negative_weight: alpha. Only at 1 is the true model stationary: any other weight is biased,
            below 1 toward energies that fall without bound.
        energy_square_weight: beta, which keeps the constant in E from drifting and biases the
            model. 0: the squares are reported, not added.
        regularization: R, "l1" or "l2" (the sum of squares, without a half). None: none.
        regularization_weight: lambda.
        parameters: what R is taken over, such as `list(model.parameters())`.
        weights (Float[Tensor, " batch"] | None): of the rows of x, normalised over all ranks. None:
            equal. Chains that start at the rows do not inherit them: weigh by resampling x instead,
            where the two must match.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank but for `negatives`. Without a row of either
        kind they are NaN. Gradient: combined over ranks as `grad_reduction` says, it is the
        gradient of one process that holds all rows. Each rank sends one sum of 6 float64 elements.
        Does not synchronize with the device. Autocast is off inside, for the energy and the sampler
        too unless they enter autocast themselves.

    Raises:
        ContractError: shapes or dtypes do not fit, the energy does not return one floating number
            for each row, or the sampler returns another event than x's.
        ValueError: negatives and a sampler, regularization without parameters, what `langevin`
            refuses, or the energy has batch normalisation in training mode.

    References:
        Hinton, Training Products of Experts by Minimizing Contrastive Divergence (2002),
        https://doi.org/10.1162/089976602760128018; Tieleman, Training Restricted Boltzmann Machines
        using Approximations to the Likelihood Gradient (2008),
        https://doi.org/10.1145/1390156.1390290, for chains that persist, here a
        [`ReplayBuffer`][termwise.energy.ReplayBuffer]; Du, Mordatch, Implicit Generation and
        Modeling with Energy-Based Models (2019), https://arxiv.org/abs/1903.08689, for the squares.
        TorchEBM (https://github.com/soran-ghaderi/torchebm) adds the squares by default, at 0.001,
        and puts 0.1 in place of a loss that is not finite: here it stays not finite.

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

        Persistent chains, of which one in twenty begins anew each time:

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
        with torch.inference_mode(False):  # where a sampler can turn grad mode on
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

    The regularization is taken over all parameters of the energy, which must then be a module.

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
                f"{type(self.energy).__name__}: give the parameters to contrastive_divergence_loss"
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
