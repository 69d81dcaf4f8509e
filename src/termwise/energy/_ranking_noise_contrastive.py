"""Ranking noise-contrastive estimation: classify the row of data among noises, without log Z."""

import dataclasses

import torch
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
class RankingNoiseContrastiveTerms(Terms):
    """Terms of [`ranking_noise_contrastive_loss`][termwise.energy.ranking_noise_contrastive_loss]."""  # noqa: E501

    loss: Float[Tensor, ""]
    """data + normalizer: -log of the probability given to the row of data; nats."""
    data: Float[Tensor, ""]
    """E(x) + log q(x), weighted mean over rows."""
    normalizer: Float[Tensor, ""]
    """Log of the sum of exp(-E - log q) over a row of data and its noises, weighted mean."""
    accuracy: Float[Tensor, ""]
    """Fraction of rows of data ranked above all their noises, ties as half, weighted; detached."""
    effective_candidates: Float[Tensor, ""]
    """Effective number of the noises + 1 candidates, 1 / sum of squared probabilities, weighted
    mean over rows; detached. If it is near 1 the noise is too far from the model to be useful."""


@contract
def ranking_noise_contrastive_loss(
    energy: Energy,
    x: Float[Tensor, "batch *event"],
    noise: Float[Tensor, "noises batch *event"],
    *,
    log_noise_x: Float[Tensor, " batch"],
    log_noise_noise: Float[Tensor, "noises batch"],
    weights: Float[Tensor, " batch"] | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> RankingNoiseContrastiveTerms:
    r"""Classify the row of data among it and K noises, by the ratio of the model to the noise.

    $$s(u) = -E(u) - \log\, q(u), \qquad
    \mathrm{loss} = -\sum_i w_i \log \frac{e^{s(x_i)}}{e^{s(x_i)} + \sum_{k=1}^{K} e^{s(y_{ki})}}$$

    over the rows of data x, whose weights w sum to 1. Adding a constant to E, even a different one
    for each row, has no effect: log Z is neither needed nor learnt, and a conditional model may be
    unnormalized for each condition. The true density is stationary for any K; if the model is q,
    the loss is log(K + 1).

    Args:
        energy: returns the energy of each row. It is called K + 1 times, on x and on each of the
            noises, always with the rows in the order of x.
        x (Float[Tensor, "batch *event"]): data, with the axes of a sample that the energy takes.
        noise (Float[Tensor, "noises batch *event"]): samples of q, K for each row of x; for a
            conditional q, those of the row's condition. Not detached, so a model that generates
            them gets a gradient.
        log_noise_x (Float[Tensor, " batch"]): log q of the rows of x, up to a constant of the row.
        log_noise_noise (Float[Tensor, "noises batch"]): log q of the noises, up to the same
            constant.
        weights (Float[Tensor, " batch"] | None): weights of the rows of x, normalized over all
            ranks. None: equal weights.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank. Without a row they are NaN. Gradient:
        combined over ranks as `grad_reduction` says, it is the gradient of one process that holds
        all rows. Each rank sends one sum of 6 float64 elements. Does not synchronize with the
        device. Autocast is disabled inside, also for the energy unless it enables autocast itself.

    Raises:
        ContractError: wrong shapes or dtypes, or the energy does not return one floating number for
            each row.
        ValueError: no noise, or the energy has batch normalization in training mode.

    References:
        Jozefowicz et al., Exploring the Limits of Language Modeling (2016),
        https://arxiv.org/abs/1602.02410; Ma, Collins, Noise Contrastive Estimation and Negative
        Sampling for Conditional Models (EMNLP 2018), https://arxiv.org/abs/1809.01812, who show it
        consistent, while classifying with one log Z for all conditions is not. InfoNCE is the same
        without q, and learns the ratio to q.

    Examples:
        >>> import torch
        >>> from termwise.energy import ranking_noise_contrastive_loss
        >>> x, noise = torch.zeros(4, 2), torch.randn(7, 4, 2)
        >>> energy = lambda x: 0.5 * x.square().sum(1)
        >>> q = torch.distributions.Normal(torch.zeros(2), 1.0)
        >>> terms = ranking_noise_contrastive_loss(
        ...     energy, x, noise,
        ...     log_noise_x=q.log_prob(x).sum(-1), log_noise_noise=q.log_prob(noise).sum(-1),
        ... )
        >>> round(terms.loss.exp().item(), 3), round(terms.effective_candidates.item(), 3)
        (8.0, 8.0)
    """
    if len(noise) == 0:
        raise ValueError("ranking_noise_contrastive_loss needs at least 1 noise for each row")
    refuse_batch_statistics("ranking_noise_contrastive_loss", energy)
    with without_autocast(x):
        name = "ranking_noise_contrastive_loss"
        of_data = -energies_of(name, energy, x) - lifted(log_noise_x)
        of_noises = torch.stack(
            [
                -energies_of(name, energy, rows, "noise[k]") - lifted(log_density)
                for rows, log_density in zip(noise, log_noise_noise, strict=True)
            ]
        )
        scores = torch.cat([of_data[None], of_noises.to(of_data.dtype)])
        probabilities = scores.detach().softmax(0)
        data, normalizer, right, effective = weighted_means(
            (
                [
                    -of_data,
                    scores.logsumexp(0),
                    share_right(of_data - of_noises.amax(0)),
                    1 / probabilities.square().sum(0),
                ],
                weights,
            ),
            batch_group=batch_group,
            grad_reduction=grad_reduction,
        )
        return RankingNoiseContrastiveTerms(
            loss=data + normalizer,
            data=data,
            normalizer=normalizer,
            accuracy=right.detach(),
            effective_candidates=effective.detach(),
        )


class RankingNoiseContrastiveLoss(LossModule):
    """[`ranking_noise_contrastive_loss`][termwise.energy.ranking_noise_contrastive_loss] of an energy.

    Examples:
        >>> import torch
        >>> from termwise.energy import RankingNoiseContrastiveLoss
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0))
        >>> loss_fn = RankingNoiseContrastiveLoss(model)
        >>> x, noise, same = torch.ones(4, 3), torch.rand(8, 4, 3), torch.zeros(8, 4)
        >>> loss_fn(x, noise, log_noise_x=same[0], log_noise_noise=same).loss.backward()
    """  # noqa: E501

    energy: Energy = dataclasses.field(kw_only=False)
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        x: Float[Tensor, "batch *event"],
        noise: Float[Tensor, "noises batch *event"],
        *,
        log_noise_x: Float[Tensor, " batch"],
        log_noise_noise: Float[Tensor, "noises batch"],
        weights: Float[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> RankingNoiseContrastiveTerms:
        """Compute the terms of the loss."""
        return ranking_noise_contrastive_loss(
            self.energy,
            x,
            noise,
            log_noise_x=log_noise_x,
            log_noise_noise=log_noise_noise,
            weights=weights,
            batch_group=batch_group,
            **self.hyperparameters(),
        )
