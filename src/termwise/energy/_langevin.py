"""Langevin dynamics: sample from a model by gradient steps with noise, adjusted or not."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .._contract import contract
from .._numbers import lifted, without_autocast
from ._energies import (
    Energy,
    anchored,
    energies_and_gradients,
    normal_like,
    per_row_sum,
    refuse_batch_statistics,
)

Adjust = Literal["none", "metropolis"]


@contract
def langevin(
    energy: Energy,
    x: Float[Tensor, "batch *event"],
    *,
    steps: int,
    step_size: float,
    noise_scale: float | None = None,
    adjust: Adjust = "none",
    noise: Float[Tensor, "steps batch *event"] | None = None,
    uniform: Float[Tensor, "steps batch"] | None = None,
    generator: torch.Generator | None = None,
    differentiable_steps: int = 0,
    higher_order_safe: bool = True,
) -> Float[Tensor, "batch *event"]:
    r"""Move each row toward samples of p(x) = exp(-E(x)) / Z, with one chain for each row.

    $$x \leftarrow x - h \nabla E(x) + s\, \xi, \qquad \xi \sim N(0, I)$$

    With s = sqrt(2 h) the distribution of the chain converges to p up to an error of order h, which
    adjust="metropolis" removes: the same step to y is then accepted with probability

    $$\min\Big(1, \exp\big(E(x) - E(y)\big) \frac{q(x \mid y)}{q(y \mid x)}\Big), \qquad
    q(y \mid x) = N\big(y;\, x - h \nabla E(x),\, 2 h I\big)$$

    so that p is exactly invariant for any h.

    Args:
        energy: returns the energy of each row. It is called `steps` times, once more under
            "metropolis", on all rows in the order of x.
        x (Float[Tensor, "batch *event"]): start of the chains; not modified, no gradient.
        steps: number of steps of each chain.
        step_size: h, in units of x squared. For a Gaussian, the smallest variance should be well
            above it; below h / 2 the unadjusted chain diverges.
        noise_scale: s. None: sqrt(2 * step_size), which samples p in the limit of small steps.
            Other values sample at the temperature s^2 / (2 h); with 0 no noise is drawn, and the
            chain is gradient descent.
        adjust: "none", or "metropolis" (MALA). A proposal whose energy is NaN is never accepted.
        noise (Float[Tensor, "steps batch *event"] | None): xi, standard normal, of each step. None:
            drawn.
        uniform (Float[Tensor, "steps batch"] | None): numbers in [0, 1), one for each step and row:
            a proposal is accepted if its probability is larger. None: drawn, after the noise of the
            same step.
        generator: generator for the draws; pass a different one on each rank. None: the default
            generator of x's device.
        differentiable_steps: how many steps, counted from the end, stay in the graph, so that the
            result has a gradient with respect to the parameters of the energy (not to x).
            [`contrastive_divergence_kl_term`][termwise.energy.contrastive_divergence_kl_term] needs
            at least 1, which its paper uses. Each of these steps stores the graph of an energy and
            its gradient.
        higher_order_safe: whether to replace, in these steps, functions that have no second
            derivative in PyTorch (fused attention, cdist, hardsigmoid), or a wrong third one
            (layer_norm, instance_norm), by compositions. Otherwise an energy with attention raises
            an error in `backward`.

    Returns:
        Float[Tensor, "batch *event"]: the last samples of the chains, in x's dtype; half precision
        is computed in float32, so that small steps add up. Detached without differentiable_steps,
        and under no_grad. It works under no_grad and inference_mode, and does not modify flags,
        modes or gradients of the energy's parameters. Does not synchronize with the device.
        Autocast is disabled inside, also for the energy unless it enables autocast itself.

    Raises:
        ContractError: wrong shapes or dtypes, or the energy does not return one floating number for
            each row.
        ValueError: a number is out of range; noise or uniform are not those of `steps` steps, or
            uniform comes without "metropolis"; "metropolis" with another noise_scale than sqrt(2 *
            step_size), or with differentiable_steps, since the acceptance has no derivative; the
            energy does not depend on its input, or has batch normalization in training mode.

    References:
        Roberts, Tweedie, Exponential convergence of Langevin distributions and their discrete
        approximations (Bernoulli 1996), https://doi.org/10.2307/3318418. Their step is h / 2 where
        ours is h; TorchEBM's `LangevinDynamics` (https://github.com/soran-ghaderi/torchebm) takes
        noise_scale as s / sqrt(2 h), which is 1 for p.

    Examples:
        >>> import torch
        >>> from termwise.energy import langevin
        >>> x, energy = torch.tensor([[4.0], [-2.0]]), lambda x: 0.5 * x.square().sum(1)
        >>> langevin(energy, x, steps=2, step_size=0.5, noise_scale=0)
        tensor([[ 1.0000],
                [-0.5000]])
        >>> generator = torch.Generator().manual_seed(0)
        >>> samples = langevin(energy, torch.zeros(2000, 1), steps=20, step_size=0.3,
        ...                    adjust="metropolis", generator=generator)
        >>> round(samples.var().item(), 1)
        1.0
    """
    scale = _checked(steps, step_size, noise_scale, adjust, noise, uniform, differentiable_steps)
    refuse_batch_statistics("langevin", energy)
    with without_autocast(x):
        position = lifted(x).detach()
        if adjust == "metropolis":
            with torch.no_grad():
                moved = _metropolis(
                    energy, x, position, steps, step_size, noise, uniform, generator
                )
            return moved.detach().to(x.dtype)  # in forward mode no_grad does not detach
        tracked = torch.is_grad_enabled()
        for step in range(steps):
            differentiable = step >= steps - differentiable_steps
            with torch.set_grad_enabled(tracked and differentiable):
                energies, slope = energies_and_gradients(
                    "langevin",
                    energy,
                    position.to(x.dtype),
                    higher_order_safe=higher_order_safe and differentiable,
                )
                position = position - step_size * slope
                if scale > 0:
                    position = position + scale * _normal(x, noise, step, generator)
                if step == steps - 1:
                    position = anchored(position.movedim(0, -1), energies).movedim(-1, 0)
            if not differentiable:
                position = position.detach()  # in forward mode no_grad does not detach
        return position.to(x.dtype)


def _metropolis(
    energy: Energy,
    x: Tensor,
    position: Tensor,
    steps: int,
    step_size: float,
    noise: Tensor | None,
    uniform: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    energies, slope = energies_and_gradients("langevin", energy, position.to(x.dtype))
    for step in range(steps):
        normal = _normal(x, noise, step, generator)
        proposal = position - step_size * slope + math.sqrt(2 * step_size) * normal
        new_energies, new_slope = energies_and_gradients("langevin", energy, proposal.to(x.dtype))
        log_ratio = log_acceptance(energies - new_energies, slope + new_slope, normal, step_size)
        threshold = _uniform(energies, generator) if uniform is None else lifted(uniform[step])
        accepted = threshold.log() < log_ratio
        energies = new_energies.where(accepted, energies)
        of_event = accepted.view(-1, *[1] * (x.ndim - 1))
        slope = new_slope.where(of_event, slope)
        position = proposal.where(of_event, position)
    return position


def log_acceptance(fall: Tensor, slopes: Tensor, normal: Tensor, step_size: float) -> Tensor:
    """Return log of exp(E(x) - E(y)) q(x | y) / q(y | x) for each row.

    With u = sqrt(h / 2) (dE(x) + dE(y)), the step back from y = x - h dE(x) + sqrt(2 h) xi needs
    the noise u - xi, so the two log-densities differ by |xi|^2 / 2 - |u - xi|^2 / 2. Expanded, this
    contains no square of xi, which would cancel.

    Args:
        fall: E(x) - E(y).
        slopes: dE(x) + dE(y).
        normal: xi.
        step_size: h.
    """
    u = math.sqrt(step_size / 2) * slopes
    return fall + per_row_sum(u * (normal - u / 2))


def _normal(
    x: Tensor, noise: Tensor | None, step: int, generator: torch.Generator | None
) -> Tensor:
    return normal_like(x, generator) if noise is None else lifted(noise[step])


def _uniform(energies: Tensor, generator: torch.Generator | None) -> Tensor:
    device = energies.device if generator is None else generator.device
    drawn = torch.rand(energies.shape, generator=generator, dtype=energies.dtype, device=device)
    return drawn.to(energies.device)


def _checked(
    steps: int,
    step_size: float,
    noise_scale: float | None,
    adjust: Adjust,
    noise: Tensor | None,
    uniform: Tensor | None,
    differentiable_steps: int,
) -> float:
    """Check the arguments and return the scale of the noise."""
    if steps < 1:
        raise ValueError(f"langevin needs at least 1 of steps, got {steps}")
    if not 0 < step_size < math.inf:
        raise ValueError(f"langevin needs a finite step_size > 0, got {step_size}")
    exact = math.sqrt(2 * step_size)
    scale = exact if noise_scale is None else noise_scale
    if not 0 <= scale < math.inf:
        raise ValueError(f"langevin needs a finite noise_scale >= 0, got {scale}")
    if not 0 <= differentiable_steps <= steps:
        raise ValueError(
            f"langevin needs differentiable_steps in 0..{steps}, got {differentiable_steps}"
        )
    for name, draws in (("noise", noise), ("uniform", uniform)):
        if draws is not None and draws.shape[0] != steps:
            raise ValueError(f"langevin needs {name} of {steps} steps, got {draws.shape[0]}")
    if adjust == "metropolis":
        if abs(scale - exact) > 1e-6 * exact:
            raise ValueError(
                "langevin needs noise_scale = sqrt(2 * step_size) = "
                f'{exact} for adjust="metropolis", got {scale}'
            )
        if differentiable_steps:
            raise ValueError(
                'langevin needs differentiable_steps = 0 for adjust="metropolis", whose acceptance '
                f"has no derivative, got {differentiable_steps}"
            )
    elif uniform is not None:
        raise ValueError('langevin needs uniform for adjust="metropolis" alone, got it for "none"')
    return scale
