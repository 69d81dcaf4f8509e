"""Whether a loss of energy-based models finds the true model, by finite sums alone.

The data are Gaussian, and so is the model. Sigma points have the mean and covariance of their
Gaussian exactly, so a loss whose expectation asks no more of the data has at the true parameters a
gradient of 0, not of 0 up to noise.
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
    """The energy 0.5 (x - mean)^T precision (x - mean), whose true parameters are known.

    Calling it returns the energy of each row. Of its precision the symmetric part counts.
    """

    mean: nn.Parameter
    """m, " d"."""
    precision: nn.Parameter
    """P, "d d", positive definite."""
    log_z: nn.Parameter
    """What a loss that learns log Z takes for it; the energy does not use it."""
    true_mean: Tensor
    """The mean it began with, " d"."""
    true_precision: Tensor
    """The inverse of the covariance it began with, "d d"."""

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

    if TYPE_CHECKING:  # nn.Module's own says that a call returns Any

        def __call__(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, " batch"]:
            """Return the energy of each row."""
            ...

    def log_density(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, " batch"]:
        """Return the log-density of the true Gaussian, whatever the parameters are now.

        A constant: it is what noise-contrastive losses are told of noise that was drawn from it.
        """
        energies = _energy(x, self.true_mean, self.true_precision)
        return (-energies - _log_z(self.true_precision)).detach()

    def samples(self) -> Float[Tensor, "points d"]:
        """Return sigma points of the model as its parameters are now, detached."""
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
    r"""Return 2 d points whose mean and covariance are exactly those given.

    $$x = \mu \pm \sqrt{d}\, L e_i, \qquad \Sigma = L L^\top$$

    Args:
        mean (Float[Tensor, " d"]): mu.
        covariance (Float[Tensor, "d d"]): Sigma, positive definite.

    Returns:
        Float[Tensor, "points d"]: the points, the upper signs first.

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
    r"""Return for each row the directions sqrt(d) e_i, over which the mean of v v^T is I exactly.

    Args:
        x (Float[Tensor, "batch d"]): data, of which the shape, dtype and device count.

    Returns:
        Float[Tensor, "d batch d"]: direction i of each row.

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
    r"""Cross each row with the noises +-sqrt(d) e_i, of mean 0 and covariance I exactly.

    Args:
        x (Float[Tensor, "batch d"]): data.

    Returns:
        tuple[Float[Tensor, "crossed d"], Float[Tensor, "crossed d"]]: each row 2 d times, and the
        noise of each.

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
    r"""Check that a loss has the true parameters of a Gaussian model for a minimum.

    `loss_fn(energy, x)` is called with a [`GaussianEnergy`][termwise.testing.GaussianEnergy] and
    the sigma points of Gaussian data, in float64. Two things are held, of three problems:

    - at the true parameters the gradient is 0, against its size a step away;
    - at parameters a small step away, to several sides, it points away from the true ones, so that
      descent comes back. A loss of the wrong sign is stationary at the truth too, and fails here.

    Args:
        loss_fn: returns the loss, or terms that contain it. Where the loss needs more than data, it
            is exact with: `energy.samples()` for samples of the model, `energy.log_density` for the
            log-density of noise that has the data's distribution (such as x itself),
            `energy.log_z`, [`exact_projections`][termwise.testing.exact_projections] and
            [`exact_noise`][termwise.testing.exact_noise]. It must return the same loss each time.
        dimensions: d of the data.
        smoothing: standard deviation of the noise that the model is to have in it, for losses that
            learn the density of noisy data: the true covariance is that of the data plus
            smoothing^2 I.
        tolerance: how large a gradient may be at the truth, as a share of that a step of about 5%
            of the parameters away. Exact losses have about 1e-13.

    Raises:
        AssertionError: the true parameters are no minimum. The message names the parameter and
            gives both numbers.
        ValueError: dimensions below 1, or a loss that is no single finite number.

    References:
        Hyvarinen (2005), Gutmann, Hyvarinen (2012) and Vincent (2011) prove that their losses have
        the true model for their optimum; what is checked is the code.

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
    at_the_truth = _gradients(loss_fn, energy, x)
    size = {name: _norm(p) for name, p in energy.named_parameters()}
    away: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    for _ in range(4):
        moves: dict[str, Tensor] = {}
        for name, parameter in energy.named_parameters():
            if name in at_the_truth:
                move = normal(*parameter.shape)
                move = move + move.T if name == "precision" else move
                moves[name] = 0.05 * size[name] / _norm(move) * move
        gradients = _moved(loss_fn, energy, x, moves)
        away.append((moves, gradients))
    for name, gradient in at_the_truth.items():
        norm = _norm(gradient)
        scale = max(_norm(gradients[name]) for _, gradients in away)
        if not norm <= tolerance * scale:
            raise AssertionError(
                "the true parameters are not a stationary point: the gradient with respect to "
                f"{name} has norm {norm:.3g} there, against at most {scale:.3g} a step of 5% away"
                + (", where it should vanish too" if scale == 0 else "")
            )
    for moves, gradients in away:
        along = {name: float((moves[name] * gradients[name]).sum()) for name in moves}
        if not sum(along.values()) > 0:
            parts = ", ".join(f"{value:.3g} by {name}" for name, value in along.items())
            raise AssertionError(
                "descent does not come back to the true parameters, which are no minimum (is a "
                "sign flipped?): a step of 5% away the inner product of the gradient and the step "
                f"is {sum(along.values()):.3g}, of which {parts}"
            )


def _norm(x: Tensor) -> float:
    return math.sqrt(float(x.detach().square().sum()))


def _moved(
    loss_fn: LossFunction, energy: GaussianEnergy, x: Tensor, moves: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the gradients where the parameters are moved to, and move them back."""
    kept = {name: parameter.detach().clone() for name, parameter in energy.named_parameters()}
    with torch.no_grad():
        for name, move in moves.items():
            energy.get_parameter(name).add_(move)
    try:
        return _gradients(loss_fn, energy, x)
    finally:
        with torch.no_grad():
            for name, value in kept.items():
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
