"""Conditional noise-contrastive estimation: distinguish each row of data from its noisy copies."""

import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import weighted_means
from .._module import LossModule
from .._numbers import lifted, without_autocast
from .._terms import Terms, terms
from ._decisions import share_right
from ._energies import Energy, energies_of, refuse_batch_statistics


@terms
class ConditionalNoiseContrastiveTerms(Terms):
    """Terms of [`conditional_noise_contrastive_loss`][termwise.energy.conditional_noise_contrastive_loss]."""  # noqa: E501

    loss: Float[Tensor, ""]
    """2 * classification."""
    classification: Float[Tensor, ""]
    """-log of the probability that the data row of a pair is classified as data, mean over noises
    and weighted mean over rows; nats."""
    accuracy: Float[Tensor, ""]
    """Fraction of pairs classified correctly, ties as half, weighted as the loss; detached."""
    log_odds: Float[Tensor, ""]
    """G, mean over noises and weighted mean over rows; detached."""


@contract
def conditional_noise_contrastive_loss(
    energy: Energy,
    x: Float[Tensor, "batch *event"],
    noise: Float[Tensor, "noises batch *event"],
    *,
    log_forward: Float[Tensor, "noises batch"] | None = None,
    log_backward: Float[Tensor, "noises batch"] | None = None,
    weights: Float[Tensor, " batch"] | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> ConditionalNoiseContrastiveTerms:
    r"""Classify which of two rows is data and which is a noisy copy of it.

    $$G(x, y) = E(y) - E(x) + \log\, p(y \mid x) - \log\, p(x \mid y), \qquad
    \mathrm{loss} = 2 \sum_i w_i \frac{1}{K} \sum_{k=1}^{K} \log(1 + e^{-G(x_i, y_{ki})})$$

    over the rows of data x, whose weights w sum to 1, and K noises y drawn from p(y | x) for each.
    log Z cancels, and so does p if it is symmetric, as for x + eps * normal noise. The true density
    is stationary for any p. The loss is 2 log 2 at y = x, and for small symmetric noise it is 2 log
    2 + eps^2 / 2 times that of score matching.

    Args:
        energy: returns the energy of each row. It is called K + 1 times, on x and on each of the
            noises, always with the rows in the order of x.
        x (Float[Tensor, "batch *event"]): data, with the axes of a sample that the energy takes.
        noise (Float[Tensor, "noises batch *event"]): samples of p(y | x), K for each row of x.
        log_forward (Float[Tensor, "noises batch"] | None): log p(y | x) of each. If this and
            log_backward are None, p is symmetric.
        log_backward (Float[Tensor, "noises batch"] | None): log p(x | y) of each.
        weights (Float[Tensor, " batch"] | None): weights of the rows of x, normalized over all
            ranks. None: equal weights.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank. Without a row they are NaN. Gradient:
        combined over ranks as `grad_reduction` says, it is the gradient of one process that holds
        all rows. Each rank sends one sum of 4 float64 elements. Does not synchronize with the
        device. Autocast is disabled inside, also for the energy unless it enables autocast itself.

    Raises:
        ContractError: wrong shapes or dtypes, or the energy does not return one floating number for
            each row.
        ValueError: no noise, one of log_forward and log_backward without the other, or the energy
            has batch normalization in training mode.

    References:
        Ceylan, Gutmann, Conditional Noise-Contrastive Estimation of Unnormalised Models (ICML
        2018), https://arxiv.org/abs/1806.03664, equations 8 and 9, factor 2 included.

    Examples:
        >>> import torch
        >>> from termwise.energy import conditional_noise_contrastive_loss
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> energy = lambda x: 0.5 * x.square().sum(1)
        >>> conditional_noise_contrastive_loss(energy, x, x[None]).metrics()
        {'loss': 1.386..., 'classification': 0.693..., 'accuracy': 0.5, 'log_odds': 0.0}
    """
    if len(noise) == 0:
        raise ValueError("conditional_noise_contrastive_loss needs at least 1 noise for each row")
    if (log_forward is None) != (log_backward is None):
        raise ValueError(
            "conditional_noise_contrastive_loss needs log_forward and log_backward, or neither "
            f"(p is symmetric), got log_{'forward' if log_backward is None else 'backward'} alone"
        )
    refuse_batch_statistics("conditional_noise_contrastive_loss", energy)
    with without_autocast(x):
        name = "conditional_noise_contrastive_loss"
        of_data = energies_of(name, energy, x)
        log_odds = torch.stack(
            [energies_of(name, energy, rows, "noise[k]") - of_data for rows in noise]
        )
        if log_forward is not None and log_backward is not None:
            log_odds = log_odds + (lifted(log_forward) - lifted(log_backward))
        classification, right, mean_log_odds = weighted_means(
            (
                [
                    F.softplus(-log_odds).mean(0),
                    share_right(log_odds).mean(0),
                    log_odds.detach().mean(0),
                ],
                weights,
            ),
            batch_group=batch_group,
            grad_reduction=grad_reduction,
        )
        return ConditionalNoiseContrastiveTerms(
            loss=2 * classification,
            classification=classification,
            accuracy=right.detach(),
            log_odds=mean_log_odds.detach(),
        )


class ConditionalNoiseContrastiveLoss(LossModule):
    """[`conditional_noise_contrastive_loss`][termwise.energy.conditional_noise_contrastive_loss] of an energy.

    Examples:
        >>> import torch
        >>> from termwise.energy import ConditionalNoiseContrastiveLoss
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0))
        >>> loss_fn, x = ConditionalNoiseContrastiveLoss(model), torch.ones(4, 3)
        >>> loss_fn(x, x + 0.3 * torch.randn(8, 4, 3)).loss.backward()
    """  # noqa: E501

    energy: Energy = dataclasses.field(kw_only=False)
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        x: Float[Tensor, "batch *event"],
        noise: Float[Tensor, "noises batch *event"],
        *,
        log_forward: Float[Tensor, "noises batch"] | None = None,
        log_backward: Float[Tensor, "noises batch"] | None = None,
        weights: Float[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> ConditionalNoiseContrastiveTerms:
        """Compute the terms of the loss."""
        return conditional_noise_contrastive_loss(
            self.energy,
            x,
            noise,
            log_forward=log_forward,
            log_backward=log_backward,
            weights=weights,
            batch_group=batch_group,
            **self.hyperparameters(),
        )
