"""Check that a loss of energy-based models finds the true model, without sampling noise.

The data and the model are Gaussian. Sigma points have exactly the mean and covariance of their
Gaussian. A loss that depends on no other property of the data therefore has a gradient of 0 at the
true parameters, up to rounding.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._contract import contract
from .._terms import Terms

LossFunction: TypeAlias = Callable[["GaussianEnergy", Tensor], Terms | Tensor]


class GaussianEnergy(nn.Module):
    """The energy 0.5 (x - mean)^T precision (x - mean), with known true parameters.

    `GaussianEnergy(mean, covariance)` takes the true mean, " d", and the true covariance, "d d",
    positive definite. The parameters start at their true values, `precision` at the inverse of the
    covariance. Calling the module returns the energy of each row. Only the symmetric part of
    `precision` has an effect.
    """

    mean: nn.Parameter
    """The mean, " d"."""
    precision: nn.Parameter
    """The precision, "d d", positive definite: the inverse of the covariance."""
    log_z: nn.Parameter
    """log Z, for a loss that learns it; the energy does not use it. It starts at the true value."""
    true_mean: Tensor
    """The true mean, " d"."""
    true_precision: Tensor
    """The inverse of the true covariance, "d d"."""

    @contract
    def __init__(self, mean: Float[Tensor, " d"], covariance: Float[Tensor, "d d"]) -> None:
        super().__init__()
        precision = covariance.inverse()
        self.mean = nn.Parameter(mean.clone())
        self.precision = nn.Parameter(precision.clone())
        self.log_z = nn.Parameter(_log_z(precision))
        self.register_buffer("true_mean", mean.clone())
        self.register_buffer("true_precision", precision)

    def forward(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, " batch"]:
        """Return the energy of each row."""
        return _energy(x, self.mean, self.precision)

    if TYPE_CHECKING:  # nn.Module annotates the result of a call with Any

        def __call__(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, " batch"]:
            """Return the energy of each row."""
            ...

    def log_density(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, " batch"]:
        """Return the log-density of each row under the true Gaussian, detached.

        It does not depend on the parameters. Use it in noise-contrastive losses, as the log-density
        of noise that is drawn from the true Gaussian.
        """
        energies = _energy(x, self.true_mean, self.true_precision)
        return (-energies - _log_z(self.true_precision)).detach()

    def samples(self) -> Float[Tensor, "points d"]:
        """Return sigma points of the model with its current parameters, detached."""
        precision = ((self.precision + self.precision.T) / 2).detach()
        return sigma_points(self.mean.detach(), precision.inverse())


def _energy(x: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    centred = x - mean
    return 0.5 * (centred @ precision * centred).sum(1)


def _log_z(precision: Tensor) -> Tensor:
    return 0.5 * (precision.shape[0] * math.log(2 * math.pi) - torch.logdet(precision))


@contract
def sigma_points(
    mean: Float[Tensor, " d"], covariance: Float[Tensor, "d d"]
) -> Float[Tensor, "points d"]:
    r"""Return 2 d points that have exactly the given mean and covariance.

    $$x = \mu \pm \sqrt{d}\, L e_i, \qquad \Sigma = L L^\top$$

    Args:
        mean (Float[Tensor, " d"]): the mean, mu.
        covariance (Float[Tensor, "d d"]): the covariance, Sigma; positive definite.

    Returns:
        Float[Tensor, "points d"]: the points: first those with a plus, then those with a minus.

    Examples:
        >>> import torch
        >>> from termwise.testing import sigma_points
        >>> sigma_points(torch.zeros(1), torch.tensor([[4.0]]))
        tensor([[ 2.],
                [-2.]])
    """
    root = cast("Tensor", torch.linalg.cholesky(covariance))
    steps = math.sqrt(mean.shape[0]) * root.T
    return torch.cat([mean + steps, mean - steps])


@contract
def exact_projections(x: Float[Tensor, "batch d"]) -> Float[Tensor, "d batch d"]:
    r"""Return the projections v = sqrt(d) e_i for each row: the mean of v v^T is exactly I.

    Args:
        x (Float[Tensor, "batch d"]): data; only its shape, dtype and device are used.

    Returns:
        Float[Tensor, "d batch d"]: the d projections of each row.

    Examples:
        >>> import torch
        >>> from termwise.testing import exact_projections
        >>> v = exact_projections(torch.zeros(5, 4))
        >>> torch.einsum("kni,knj->nij", v, v)[0] / 4
        tensor([[1., 0., 0., 0.],
                [0., 1., 0., 0.],
                [0., 0., 1., 0.],
                [0., 0., 0., 1.]])
    """
    d = x.shape[1]
    return (math.sqrt(d) * torch.eye(d, dtype=x.dtype, device=x.device))[:, None].expand(
        d, *x.shape
    )


@contract
def exact_noise(
    x: Float[Tensor, "batch d"],
) -> tuple[Float[Tensor, "crossed d"], Float[Tensor, "crossed d"]]:
    r"""Combine each row with 2 d noise vectors, +-sqrt(d) e_i, of mean 0 and covariance I exactly.

    Args:
        x (Float[Tensor, "batch d"]): data.

    Returns:
        tuple[Float[Tensor, "crossed d"], Float[Tensor, "crossed d"]]: each row repeated 2 d times,
        and the noise vector for each.

    Examples:
        >>> import torch
        >>> from termwise.testing import exact_noise
        >>> exact_noise(torch.tensor([[5.0]]))
        (tensor([[5.],
                [5.]]), tensor([[ 1.],
                [-1.]]))
    """
    d = x.shape[1]
    steps = math.sqrt(d) * torch.eye(d, dtype=x.dtype, device=x.device)
    return x.repeat_interleave(2 * d, 0), torch.cat([steps, -steps]).repeat(x.shape[0], 1)


@contract
def check_recovers(
    loss_fn: LossFunction,
    *,
    dimensions: int = 3,
    smoothing: float = 0.0,
    tolerance: float = 1e-6,
) -> None:
    r"""Check that the true parameters of a Gaussian model are a minimum of a loss.

    `loss_fn(energy, x)` is called with a [`GaussianEnergy`][termwise.testing.GaussianEnergy] and
    the sigma points of Gaussian data, in float64. For three random problems:

    - At the true parameters the gradient is 0, relative to its norm a small step away.
    - A small step away, in each of several directions, the inner product of the gradient and the
      step is positive, so gradient descent returns to the true parameters. A loss with the wrong
      sign is stationary at the true parameters too, and fails here.

    Args:
        loss_fn: returns the loss, or terms that contain it; it must return the same loss each time.
            A loss that needs more than the data is exact with `energy.samples()` as samples of the
            model, `energy.log_density` as the log-density of noise with the distribution of the
            data (such as x itself), `energy.log_z`,
            [`exact_projections`][termwise.testing.exact_projections] and
            [`exact_noise`][termwise.testing.exact_noise].
        dimensions: number of dimensions d of the data.
        smoothing: standard deviation of the noise that the model includes, for losses that learn
            the density of noisy data. The true covariance is that of the data plus smoothing^2 I.
        tolerance: largest norm of the gradient at the true parameters, relative to the norm a step
            of 5% of the parameters' norm away. Exact losses reach about 1e-13.

    Raises:
        AssertionError: if the true parameters are not a minimum. The message names the parameter
            and contains both norms.
        ValueError: if `dimensions` is below 1, or the loss is not one finite number.

    References:
        Hyvarinen (2005), Gutmann, Hyvarinen (2012) and Vincent (2011) prove that the true model is
        an optimum of their losses. This function checks an implementation.

    Examples:
        >>> from termwise.energy import maximum_likelihood_loss, score_matching_loss
        >>> from termwise.testing import check_recovers
        >>> check_recovers(score_matching_loss)
        >>> check_recovers(lambda energy, x: maximum_likelihood_loss(energy, x, energy.samples()))
        >>> check_recovers(
        ...     lambda energy, x: maximum_likelihood_loss(
        ...         energy, x, energy.samples(), negative_weight=0.8
        ...     )
        ... )
        Traceback (most recent call last):
        AssertionError: the true parameters are not a stationary point: the gradient with
            respect to precision...
    """
    if dimensions < 1:
        raise ValueError(f"check_recovers needs at least one dimension, got {dimensions}")
    for seed in range(3):
        _check_problem(loss_fn, dimensions, smoothing, tolerance, seed)


def _check_problem(
    loss_fn: LossFunction, d: int, smoothing: float, tolerance: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    root = normal(d, d) / math.sqrt(d)
    identity = torch.eye(d, dtype=torch.float64)
    mean, covariance = normal(d), root @ root.T + 0.5 * identity
    x = sigma_points(mean, covariance)
    energy = GaussianEnergy(mean, covariance + smoothing**2 * identity)
    true_gradients = _gradients(loss_fn, energy, x)
    norms = {name: _norm(p) for name, p in energy.named_parameters()}
    away: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for _ in range(4):
        steps: dict[str, Tensor] = {}
        for name, parameter in energy.named_parameters():
            if name in true_gradients:
                step = normal(*parameter.shape)
                step = step + step.T if name == "precision" else step
                steps[name] = 0.05 * norms[name] / _norm(step) * step
        gradients = _gradients_after(steps, loss_fn, energy, x)
        away.append((steps, gradients))
    for name, gradient in true_gradients.items():
        norm = _norm(gradient)
        scale = max(_norm(gradients[name]) for _, gradients in away)
        if not norm <= tolerance * scale:
            raise AssertionError(
                "the true parameters are not a stationary point: the gradient with respect to "
                f"{name} has norm {norm:.3g} there, and at most {scale:.3g} a step of 5% away"
            )
    for steps, gradients in away:
        products = {name: float((steps[name] * gradients[name]).sum()) for name in steps}
        if not sum(products.values()) > 0:
            parts = ", ".join(f"{value:.3g} from {name}" for name, value in products.items())
            raise AssertionError(
                "the true parameters are not a minimum, and gradient descent does not return to "
                "them (is a sign wrong?): a step of 5% away, the inner product of the gradient and "
                f"the step is {sum(products.values()):.3g} ({parts})"
            )


def _norm(x: Tensor) -> float:
    return math.sqrt(float(x.detach().square().sum()))


def _gradients_after(
    steps: dict[str, Tensor], loss_fn: LossFunction, energy: GaussianEnergy, x: Tensor
) -> dict[str, Tensor]:
    """Return the gradients a step away, and restore the parameters."""
    before = {name: parameter.detach().clone() for name, parameter in energy.named_parameters()}
    with torch.no_grad():
        for name, step in steps.items():
            energy.get_parameter(name).add_(step)
    try:
        return _gradients(loss_fn, energy, x)
    finally:
        with torch.no_grad():
            for name, value in before.items():
                energy.get_parameter(name).copy_(value)


def _gradients(loss_fn: LossFunction, energy: GaussianEnergy, x: Tensor) -> dict[str, Tensor]:
    """Return the gradient with respect to each parameter that the loss depends on."""
    result = loss_fn(energy, x.clone())
    loss = result.loss if isinstance(result, Terms) else result
    if loss.ndim or not bool(loss.isfinite()):
        raise ValueError(
            f"check_recovers needs a loss that is one finite number, got {loss.detach()}"
        )
    names = [name for name, _ in energy.named_parameters()]
    found: dict[str, Tensor | None] = dict.fromkeys(names)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, list(energy.parameters()), allow_unused=True)
        found = dict(zip(names, gradients, strict=True))
    for name in ("mean", "precision"):
        if found[name] is None:
            raise AssertionError(f"the loss does not depend on the energy's {name}")
    return {name: gradient for name, gradient in found.items() if gradient is not None}
