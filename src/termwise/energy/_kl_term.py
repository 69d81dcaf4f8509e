"""The term that contrastive divergence omits: move samples to low energy, and apart."""

import dataclasses
import math
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from .._autograd import Function, apply_own, refusing
from .._coefficients import weighted
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import weighted_means
from .._module import LossModule
from .._numbers import accumulator, lifted, without_autocast
from .._terms import Terms, terms
from ._energies import (
    Differentiation,
    Energy,
    energies_and_gradients,
    refuse_batch_statistics,
)


@terms
class ContrastiveDivergenceKLTerms(Terms):
    """Terms of [`contrastive_divergence_kl_term`][termwise.energy.contrastive_divergence_kl_term]."""  # noqa: E501

    loss: Float[Tensor, ""]
    """energy - entropy_weight * entropy."""
    energy: Float[Tensor, ""]
    """Energy of the samples, mean over rows; only in the graph of the samples."""
    entropy: Float[Tensor, ""]
    """Entropy of the samples, from the distance of each to its nearest neighbor; nats."""


@contract
def contrastive_divergence_kl_term(
    energy: Energy,
    samples: Float[Tensor, "batch *event"],
    *,
    neighbours: Float[Tensor, "neighbours *event"] | None = None,
    entropy_weight: float = 1.0,
    differentiation: Differentiation = "auto",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> ContrastiveDivergenceKLTerms:
    r"""Estimate KL(q, p) of the sampler's density q from p = exp(-E) / Z, up to log Z.

    $$\mathrm{loss} = \frac{1}{n} \sum_i \bar E(x_i) - H, \qquad
    H = \frac{d}{n} \sum_i \log \rho_i + \log\, V_d + \psi(n) - \psi(1)$$

    over n samples x with d elements each, with rho_i the distance from x_i to the nearest of the
    others, V_d the volume of the unit ball and psi the digamma function (Kozachenko, Leonenko). The
    bar means that the parameters of E are constant: they get a gradient only through the samples,
    which must be in the graph of the sampler, such as those of
    [`langevin`][termwise.energy.langevin] with differentiable_steps. Add the term to
    [`contrastive_divergence_loss`][termwise.energy.contrastive_divergence_loss], which omits
    exactly this gradient. Detached samples yield no gradient.

    Args:
        energy: returns the energy of each row. Called once.
        samples (Float[Tensor, "batch *event"]): samples of the model, in the sampler's graph.
        neighbours (Float[Tensor, "neighbours *event"] | None): m other samples of the same q to
            measure distances to, such as those of a [`ReplayBuffer`][termwise.energy.ReplayBuffer]
            before the samples are written there; psi(m + 1) then replaces psi(n). Detached. If they
            have another distribution r, H is the cross-entropy -E_q log r. None: the other samples
            of the batch, so that both samples of a pair move apart.
        entropy_weight: weight of H in the loss. 0: it is computed but not added.
        differentiation: how to differentiate E with respect to the samples: "autograd", "func"
            (torch.func), or "auto", which chooses.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank. If two samples are equal, or one is among the
        neighbours, their distance is 0: the entropy is -inf, the loss inf and the gradient not
        finite; nothing is clamped. Samples in half precision are often equal. The gradient with
        respect to the samples is exact; a second derivative raises an error. Combined over ranks as
        `grad_reduction` says, it is the gradient of one process that holds all rows. Each rank
        sends one sum of 3 float64 elements. Memory: n x n distances, n x m with neighbours, in
        float64. Does not synchronize with the device. Autocast is disabled inside, also for the
        energy unless it enables autocast itself.

    Raises:
        ContractError: wrong shapes or dtypes, or the energy does not return one floating number for
            each row.
        ValueError: fewer than 2 samples and no neighbours; neighbours of no row; a batch_group
            without neighbours, since the nearest sample may be on another rank; the energy does not
            depend on its input, or has batch normalization in training mode.
        NotImplementedError: it is compiled within `torch.func.grad` or `torch.vmap`, where PyTorch
            loses its gradient; not under `torch.no_grad()`.

    References:
        Du, Li, Tenenbaum, Mordatch, Improved Contrastive Divergence Training of Energy-Based Models
        (ICML 2021), https://arxiv.org/abs/2012.01316; Kozachenko, Leonenko (1987). The authors'
        code (https://github.com/yilundu/improved_contrastive_divergence) leaves out d and the
        constants and weights the mean of log rho by 0.3, which is entropy_weight = 0.3 / d here; it
        uses 100 samples of its buffer as neighbours, clamps the samples to [0, 1], and always adds
        the squares of the energies to the loss.

    Examples:
        >>> import torch
        >>> from termwise.energy import contrastive_divergence_kl_term, langevin
        >>> samples = torch.tensor([[0.0], [1.0], [3.0]])
        >>> contrastive_divergence_kl_term(lambda x: x.sum(1), samples).metrics()
        {'loss': -1.09..., 'energy': 1.33..., 'entropy': 2.42...}

        The gradient reaches the parameters through the last step of the chains:

        >>> precision = torch.tensor(1.0, requires_grad=True)
        >>> energy = lambda x: 0.5 * precision * x.square().sum(1)
        >>> samples = langevin(energy, samples, steps=3, step_size=0.1, noise_scale=0,
        ...                    differentiable_steps=1)
        >>> contrastive_divergence_kl_term(energy, samples, entropy_weight=0).loss.backward()
        >>> precision.grad
        tensor(-0.1968)
    """
    name = "contrastive_divergence_kl_term"
    if neighbours is None and batch_group is not None:
        raise ValueError(
            f"{name} needs neighbours where it has a batch_group: the nearest sample may be on "
            "another rank"
        )
    if neighbours is None and samples.shape[0] < 2:
        raise ValueError(
            f"{name} needs at least 2 samples, each other's neighbours, got {samples.shape[0]}"
        )
    if neighbours is not None and neighbours.shape[0] < 1:
        raise ValueError(f"{name} needs at least 1 of neighbours, got 0")
    refuse_batch_statistics(name, energy)
    with without_autocast(samples):
        points = lifted(samples)
        entropies = _entropies(points, None if neighbours is None else neighbours.detach())
        with torch.no_grad():
            energies, slope = energies_and_gradients(
                name, energy, samples.detach(), differentiation, "samples"
            )
        given = (points, energies.detach(), slope.detach())
        held = cast("Tensor", apply_own(name, _HeldEnergies, *given))
        mean_energy, entropy = weighted_means(
            ([held, entropies.to(held.dtype)], None),
            batch_group=batch_group,
            grad_reduction=grad_reduction,
        )
        loss = mean_energy - weighted(entropy_weight, entropy)
        return ContrastiveDivergenceKLTerms(loss=loss, energy=mean_energy, entropy=entropy)


def _entropies(points: Tensor, neighbours: Tensor | None) -> Tensor:
    """Return each row's part of the entropy, which is their mean."""
    dtype = accumulator(points)
    points = points.flatten(1) if points.ndim != 1 else points[:, None]
    points = points.to(dtype)
    others = points if neighbours is None else neighbours.to(dtype).reshape(-1, points.shape[1])
    with torch.no_grad():
        # Distances from differences: from products, those of close rows would be rounding errors.
        distances = torch.cdist(
            points.detach(), others.detach(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        if neighbours is None:
            itself = torch.arange(points.shape[0], device=points.device)
            distances = distances.masked_fill(itself[:, None] == itself, math.inf)
        nearest = distances.argmin(1)
    # The gradient of the smallest distance is that of its pair.
    difference = points - others.index_select(0, nearest)
    log_distance = difference.square().sum(1).log() / 2
    d = points.shape[1]
    count = others.shape[0] + (neighbours is not None)
    log_ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    surplus = torch.digamma(points.new_full((), count)) - torch.digamma(points.new_ones(()))
    return d * log_distance + log_ball + surplus


class _HeldEnergies(Function):
    """The energies of samples, differentiable with respect to the samples only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(samples: Tensor, energies: Tensor, slope: Tensor) -> Tensor:
        return energies.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        samples, slope = ctx.saved_tensors
        why = (
            "contrastive_divergence_kl_term has no second derivative: it holds the gradient of the "
            "energy"
        )
        # A derivative with respect to the samples would need the Hessian.
        gradient = slope * gradients[0].view(-1, *[1] * (slope.ndim - 1))
        return refusing(gradient, why, samples), None, None


class ContrastiveDivergenceKLTerm(LossModule):
    """[`contrastive_divergence_kl_term`][termwise.energy.contrastive_divergence_kl_term] of an energy.

    Examples:
        >>> import torch
        >>> from termwise.energy import ContrastiveDivergenceKLTerm, langevin
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.SiLU(),
        ...                             torch.nn.Linear(8, 1), torch.nn.Flatten(0))
        >>> kl_term = ContrastiveDivergenceKLTerm(model, entropy_weight=0.1)
        >>> samples = langevin(model, torch.rand(4, 3), steps=5, step_size=0.1,
        ...                    differentiable_steps=1)
        >>> kl_term(samples).loss.backward()
    """  # noqa: E501

    energy: Energy = dataclasses.field(kw_only=False)
    entropy_weight: float = 1.0
    differentiation: Differentiation = "auto"
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        samples: Float[Tensor, "batch *event"],
        *,
        neighbours: Float[Tensor, "neighbours *event"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> ContrastiveDivergenceKLTerms:
        """Compute the terms of the loss."""
        return contrastive_divergence_kl_term(
            self.energy,
            samples,
            neighbours=neighbours,
            batch_group=batch_group,
            **self.hyperparameters(),
        )
