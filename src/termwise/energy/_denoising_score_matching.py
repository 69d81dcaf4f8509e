"""Denoising score matching: match the gradient of the energy at noisy data to the noise."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .._contract import contract, show
from .._groups import GradReduction, ProcessGroup
from .._means import weighted_means
from .._module import LossModule
from .._numbers import lifted, without_autocast
from .._terms import Terms, terms
from ._energies import (
    Differentiation,
    Energy,
    anchored,
    displaced,
    energies_and_gradients,
    normal_like,
    per_row_sum,
    refuse_batch_statistics,
)

Weighting = Literal["none", "sigma2"]


@terms
class DenoisingScoreMatchingTerms(Terms):
    """Terms of [`denoising_score_matching_loss`][termwise.energy.denoising_score_matching_loss].

    Every mean is over rows with their weights, and over noise levels with those of `weighting`.
    """

    loss: Float[Tensor, ""]
    """0.5 * score_square - cross + 0.5 * noise_square, which is the mean of per_sigma."""
    score_square: Float[Tensor, ""]
    """|grad E(x + sigma n)|^2, sum over the event, mean."""
    cross: Float[Tensor, ""]
    """grad E(x + sigma n) . n / sigma, sum over the event, mean."""
    noise_square: Float[Tensor, ""]
    """|n|^2 / sigma^2, sum over the event, mean; no gradient to the energy. Antithetic: 0."""
    per_sigma: Float[Tensor, " levels"]
    """Float[Tensor, " levels"]: the loss of each noise level, including its weight; one level if
    each row has its own sigma."""


@contract
def denoising_score_matching_loss(
    energy: Energy,
    x: Float[Tensor, "batch *event"],
    *,
    sigma: float | Float[Tensor, " batch"] | Sequence[float],
    weighting: Weighting | Float[Tensor, " n"] = "none",
    antithetic: bool = False,
    noise: Float[Tensor, "..."] | None = None,
    generator: torch.Generator | None = None,
    weights: Float[Tensor, " batch"] | None = None,
    higher_order_safe: bool = True,
    differentiation: Differentiation = "auto",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> DenoisingScoreMatchingTerms:
    r"""Match the gradient of the energy at noisy data to the noise divided by sigma.

    $$\mathrm{loss} = \frac{1}{L} \sum_l \lambda_l \sum_i w_i \frac{1}{2} \left\|
    \nabla E(x_i + \sigma_l n_{il}) - \frac{n_{il}}{\sigma_l} \right\|^2$$

    over the rows of data x, whose weights w sum to 1, and L levels of noise; n is standard normal.
    Its minimum is the density of the data convolved with a normal density of standard deviation
    sigma, not that of the data. With several levels, an energy that does not depend on the level
    fits none of them exactly.

    With `antithetic` each row is perturbed by n and by -n, and the part that does not depend on the
    energy is omitted:

    $$\begin{align*} & \frac{1}{4} \big( \|\nabla E(x + \sigma n)\|^2
    + \|\nabla E(x - \sigma n)\|^2 \big) \\
    &- \frac{1}{2 \sigma} (\nabla E(x + \sigma n) - \nabla E(x - \sigma n)) \cdot n \end{align*}$$

    In expectation this is the plain loss of a level minus d / (2 sigma^2), so its gradient is the
    same. As sigma decreases, the variance of the plain loss grows as 1 / sigma^2, while that of
    this one stays finite: its limit is sliced score matching.

    Args:
        energy: returns the energy of each row. It is differentiated L times, 2 L with `antithetic`,
            each time on as many rows as x, in the order of x. To let it depend on the level of each
            row, pass a closure.
        x (Float[Tensor, "batch *event"]): data, with the axes of a sample that the energy takes.
        sigma (float | Float[Tensor, " batch"] | Sequence[float]): standard deviation of the noise:
            one for all rows, one for each row (a tensor, whose values are not checked), or a
            sequence of levels, each applied to every row.
        weighting (Weighting | Float[Tensor, " n"]): lambda, "none" (1), "sigma2" (sigma squared,
            which makes the levels similar in size), or a tensor with one weight for each level, or
            for each row if sigma has one for each row.
        antithetic: whether to use each noise together with its negative.
        noise (Float[Tensor, "..."] | None): n, standard normal, in the shape of x; "levels batch
            *event" if sigma is a sequence. None: drawn.
        generator: generator for the noise. None: the default generator of x's device.
        weights (Float[Tensor, " batch"] | None): weights of the rows of x, normalized over all
            ranks. None: equal weights.
        higher_order_safe: whether to replace functions that have no second derivative in PyTorch
            (fused attention, cdist, hardsigmoid), or a wrong third one (layer_norm, instance_norm),
            by compositions. Otherwise an energy with attention raises an error in `backward`, and
            second derivatives of the loss may be silently wrong.
        differentiation: how to differentiate with respect to x: "autograd", "func" (torch.func), or
            "auto", which chooses.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication. Ranks need generators of their own.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank. Without a row they are NaN. Gradient:
        combined over ranks as `grad_reduction` says, it is the gradient of one process that holds
        all rows. Each rank sends one sum of 4 L + 1 float64 elements. Does not synchronize with the
        device. Autocast is disabled inside, also for the energy unless it enables autocast itself.

    Raises:
        ContractError: wrong shapes or dtypes, or the energy does not return one floating number for
            each row.
        ValueError: a sigma that is a number is not positive, there is no level, or the shape of the
            noise or the weighting does not match sigma; or the energy does not depend on its input,
            has batch normalization in training mode, or is under
            DistributedDataParallel(static_graph=True).

    References:
        Vincent, A Connection Between Score Matching and Denoising Autoencoders (Neural Computation
        2011), https://doi.org/10.1162/NECO_a_00142; Song, Ermon, Generative Modeling by Estimating
        Gradients of the Data Distribution (NeurIPS 2019), https://arxiv.org/abs/1907.05600, which
        weighs levels by sigma2. The score of the model is -grad E: code that adds n / sigma to grad
        E learns the negated energy.

    Examples:
        >>> import torch
        >>> from termwise.energy import denoising_score_matching_loss
        >>> x, n = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [-2.0]])
        >>> energy = lambda x: x.square().sum(1)
        >>> denoising_score_matching_loss(energy, x, sigma=0.5, noise=n).metrics()
        {'loss': 16.0, 'score_square': 16.0, 'cross': 0.0, 'noise_square': 16.0,
        'per_sigma[0]': 16.0}
    """
    refuse_batch_statistics("denoising_score_matching_loss", energy)
    levels = _levels(x, sigma, noise, weighting)
    with without_autocast(x):
        several = isinstance(sigma, Sequence)
        if noise is None:
            noise = normal_like(x, generator, len(levels) if several else None)
        noises = list(noise) if several else [noise]
        rows_by_level = [
            _of_level(energy, x, level, of_level, antithetic, differentiation, higher_order_safe)
            for level, of_level in zip(levels, noises, strict=True)
        ]
        factors = _factors(levels, weighting)
        parts = [
            torch.stack([factor * rows for factor, rows in zip(factors, part, strict=True)], 1)
            for part in zip(*rows_by_level, strict=True)
        ]
        per_sigma, score_square, cross, noise_square = weighted_means(
            (parts, weights), batch_group=batch_group, grad_reduction=grad_reduction
        )
        return DenoisingScoreMatchingTerms(
            loss=per_sigma.mean(),
            score_square=score_square.mean(),
            cross=cross.mean(),
            noise_square=noise_square.mean(),
            per_sigma=per_sigma,
        )


def _levels(
    x: Tensor,
    sigma: float | Tensor | Sequence[float],
    noise: Tensor | None,
    weighting: str | Tensor,
) -> Sequence[float | Tensor]:
    """Return sigma as one for each level, and see that what comes with it has its shape."""
    levels: Sequence[float | Tensor]
    if isinstance(sigma, Tensor):
        levels, factors = [lifted(sigma)], x.shape[0]
    else:
        levels = [float(level) for level in (sigma if isinstance(sigma, Sequence) else [sigma])]
        factors = len(levels)
        if not levels:
            raise ValueError("denoising_score_matching_loss needs a level of noise, got none")
        for level in levels:
            if not 0 < level < math.inf:
                raise ValueError(
                    f"denoising_score_matching_loss needs a positive finite sigma, got {level}"
                )
    shape = (len(levels), *x.shape) if isinstance(sigma, Sequence) else tuple(x.shape)
    if noise is not None and noise.shape != shape:
        raise ValueError(
            f"denoising_score_matching_loss needs noise of shape {list(shape)}, got {show(noise)}"
        )
    if isinstance(weighting, Tensor) and weighting.shape != (factors,):
        raise ValueError(
            f"denoising_score_matching_loss needs a weighting of shape {[factors]}, one of each "
            f"{'row' if isinstance(sigma, Tensor) else 'level'}, got {show(weighting)}"
        )
    return levels


def _factors(levels: Sequence[float | Tensor], weighting: str | Tensor) -> Sequence[float | Tensor]:
    """Return lambda of each level; of each row, where the one level is the rows' own."""
    if isinstance(weighting, Tensor):
        of_rows = isinstance(levels[0], Tensor)
        return [lifted(weighting)] if of_rows else lifted(weighting).unbind()
    return [level**2 for level in levels] if weighting == "sigma2" else [1.0] * len(levels)


def _of_level(
    energy: Energy,
    x: Tensor,
    sigma: float | Tensor,
    noise: Tensor,
    antithetic: bool,
    differentiation: Differentiation,
    higher_order_safe: bool,
) -> list[Tensor]:
    """Return the loss of each row, and its parts score_square, cross and noise_square."""
    noise = lifted(noise)
    if isinstance(sigma, Tensor):
        sigma = sigma.to(noise.dtype).view(-1, *[1] * (x.ndim - 1))

    def moved(displacement: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        point, made = displaced(x, displacement)
        return made, *energies_and_gradients(
            "denoising_score_matching_loss",
            energy,
            point,
            differentiation,
            "x + sigma * noise",
            higher_order_safe,
        )

    made, energies, score = moved(sigma * noise)
    if not antithetic:
        target = made / sigma**2
        return [
            anchored(0.5 * per_row_sum((score - target).square()), energies),
            per_row_sum(score.square()),
            per_row_sum(score * target),
            per_row_sum(target.square()),
        ]
    made_back, _, score_back = moved(-sigma * noise)
    # In half precision the two steps are not opposite: what lies between the points counts.
    target = (made - made_back) / (2 * sigma**2)
    square = 0.5 * (per_row_sum(score.square()) + per_row_sum(score_back.square()))
    cross = 0.5 * per_row_sum((score - score_back) * target)
    return [anchored(0.5 * square - cross, energies), square, cross, torch.zeros_like(cross)]


class DenoisingScoreMatchingLoss(LossModule):
    """[`denoising_score_matching_loss`][termwise.energy.denoising_score_matching_loss] as a module.

    Examples:
        >>> import torch
        >>> from termwise.energy import DenoisingScoreMatchingLoss
        >>> layers = torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        >>> model = torch.nn.Sequential(*layers, torch.nn.Flatten(0))
        >>> loss_fn = DenoisingScoreMatchingLoss(model, sigma=[0.1, 0.5], weighting="sigma2")
        >>> loss_fn(torch.ones(5, 3)).loss.backward()
    """

    energy: Energy = dataclasses.field(kw_only=False)
    sigma: float | Sequence[float]
    weighting: Weighting = "none"
    antithetic: bool = False
    higher_order_safe: bool = True
    differentiation: Differentiation = "auto"
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        x: Float[Tensor, "batch *event"],
        *,
        sigma: Float[Tensor, " batch"] | None = None,
        noise: Float[Tensor, "..."] | None = None,
        generator: torch.Generator | None = None,
        weights: Float[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> DenoisingScoreMatchingTerms:
        """Compute the terms of the loss; a sigma for each row replaces the field."""
        options = self.hyperparameters()
        if sigma is not None:
            options["sigma"] = sigma
        return denoising_score_matching_loss(
            self.energy,
            x,
            noise=noise,
            generator=generator,
            weights=weights,
            batch_group=batch_group,
            **options,
        )
