"""Score matching: fit the score of the data, using derivatives of the model only."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import weighted_means
from .._module import LossModule
from .._numbers import lifted, without_autocast
from .._terms import Terms, terms
from . import _higher_order
from ._energies import (
    Differentiation,
    Energy,
    anchored,
    creates_graph,
    differentiation_of,
    energies_of,
    gradient_function,
    gradient_of,
    per_row_sum,
    point_of,
    recordable,
    recording,
    refuse_batch_statistics,
    refuse_static_graph,
    uncompiled,
)
from ._fallback import Attempt, touch_saved_tensors
from ._forward_laplacian import NoCarrierError, carried, carrier_of
from ._hessian_products import hessian_products
from ._projections import dot
from ._row_space import Directions, ReadOtherwiseError

Trace: TypeAlias = Literal["forward_laplacian", "reverse", "forward_over_reverse"]


@terms
class ScoreMatchingTerms(Terms):
    """Terms of [`score_matching_loss`][termwise.energy.score_matching_loss]."""

    loss: Float[Tensor, ""]
    """0.5 * score_square - laplacian."""
    score_square: Float[Tensor, ""]
    """Squared norm of the energy's gradient with respect to x, weighted mean over rows."""
    laplacian: Float[Tensor, ""]
    """Trace of the energy's Hessian with respect to x, weighted mean over rows."""


@contract
def score_matching_loss(
    energy: Energy,
    x: Float[Tensor, "batch *event"],
    *,
    trace: Trace = "forward_laplacian",
    chunk_size: int | None = None,
    row_space: bool = True,
    higher_order_safe: bool = True,
    differentiation: Differentiation = "auto",
    weights: Float[Tensor, " batch"] | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> ScoreMatchingTerms:
    r"""Match the gradient of log p to that of the unknown density of the data.

    $$\mathrm{loss} = \sum_i w_i \left( \tfrac12 \lVert \nabla E(x_i) \rVert^2
    - \operatorname{tr} \nabla^2 E(x_i) \right)$$

    over the rows of data x, whose weights w sum to 1. With p(x) = exp(-E(x)) / Z the score is -grad
    E, hence the minus. Up to a constant that depends only on the data, the expected loss is half
    the mean squared distance between the scores of the data and the model. It needs neither Z nor
    samples of the model.

    Args:
        energy: returns the energy of each row. It must be twice differentiable with respect to x:
            with ReLU networks the trace is 0 almost everywhere, and the loss has no useful minimum.
        x (Float[Tensor, "batch *event"]): data, with the axes of a sample that the energy takes.
        trace: how to compute the trace; all ways are exact. "forward_laplacian" propagates
            derivatives forward through the energy, in one call. "forward_over_reverse" and
            "reverse" differentiate the gradient along each of the d axes of x. If one of the first
            two fails (a function without a rule, an autograd.Function, activation checkpointing),
            the energy is called again with "reverse", and a warning, once for each energy, names
            the cause.
        chunk_size: number of axes of x to process together, to save memory. None: all. With
            "forward_laplacian" the energy is called once for each chunk.
        row_space: if the energy begins with a linear layer that has at most half as many rows as x
            has axes, let "forward_laplacian" use an orthonormal basis of those rows instead of the
            d axes: value and gradient are the same, time and memory are less. It costs a QR
            decomposition of the layer. If the energy also uses x elsewhere, the first call repeats
            it along all axes. No effect if chunk_size is set, in half precision, or if the energy
            begins differently.
        higher_order_safe: whether to replace functions whose third derivatives are wrong or missing
            in PyTorch (layer_norm, instance_norm, prod, fused attention, cdist, hardsigmoid) by
            compositions. Otherwise gradients with respect to the parameters may be silently wrong.
            The forward Laplacian has its own rules for these functions.
        differentiation: how "reverse" differentiates: "autograd", or "func", which works under
            torch.func and torch.compile. "auto" chooses.
        weights (Float[Tensor, " batch"] | None): weights of the rows of x, normalized over all
            ranks. None: equal weights.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank. Without a row they are NaN. Gradient:
        combined over ranks as `grad_reduction` says, it is the gradient of one process that holds
        all rows. Each rank sends one sum of 3 float64 elements. Does not synchronize with the
        device. Autocast is disabled inside, also for the energy unless it enables autocast itself.

    Raises:
        ContractError: wrong shapes or dtypes, or the energy does not return one floating number for
            each row.
        ValueError: the energy does not depend on x, or has batch normalization in training mode;
            chunk_size below 1.
        NotImplementedError: a second derivative with respect to the parameters is taken through
            "forward_laplacian" along a row space: pass row_space=False.

    References:
        Hyvarinen, Estimation of Non-Normalized Statistical Models by Score Matching, JMLR 6 (2005),
        https://jmlr.org/papers/v6/hyvarinen05a.html, equation 4, whose psi is -grad E. TorchEBM
        (https://github.com/soran-ghaderi/torchebm) used to add the trace, which on Gaussian data
        learns the negated model. The forward Laplacian: Li et al. (2024),
        https://arxiv.org/abs/2307.08214.

    Examples:
        >>> import torch
        >>> from termwise.energy import score_matching_loss
        >>> x = torch.tensor([[1.0, 1.0], [3.0, 1.0]])
        >>> score_matching_loss(lambda x: 0.5 * x.square().sum(1), x).metrics()
        {'loss': 1.0, 'score_square': 6.0, 'laplacian': 2.0}
    """
    energies, score, laplacian = score_and_trace(
        "score_matching_loss",
        energy,
        x,
        trace=trace,
        chunk_size=chunk_size,
        row_space=row_space,
        higher_order_safe=higher_order_safe,
        differentiation=differentiation,
    )
    with without_autocast(x):
        squares = per_row_sum(score.square())
        score_square, mean_laplacian = weighted_means(
            ([squares, anchored(laplacian, energies)], weights),
            batch_group=batch_group,
            grad_reduction=grad_reduction,
        )
        return ScoreMatchingTerms(
            loss=0.5 * score_square - mean_laplacian,
            score_square=score_square,
            laplacian=mean_laplacian,
        )


@contract
def hessian_trace(
    energy: Energy,
    x: Float[Tensor, "batch *event"],
    *,
    trace: Trace = "forward_laplacian",
    chunk_size: int | None = None,
    row_space: bool = True,
    higher_order_safe: bool = True,
    differentiation: Differentiation = "auto",
) -> Float[Tensor, " batch"]:
    r"""Return the exact trace of the Hessian of each row's energy, its Laplacian.

    $$t_i = \operatorname{tr} \nabla^2 E(x_i) = \sum_k \partial^2 E / \partial x_{ik}^2$$

    Args:
        energy: returns the energy of each row.
        x (Float[Tensor, "batch *event"]): points to compute it at.
        trace: as in [`score_matching_loss`][termwise.energy.score_matching_loss], like the other
            arguments.
        chunk_size: number of axes of x to process together. None: all.
        row_space: whether to use the rows of a first linear layer instead of all axes.
        higher_order_safe: whether to replace functions without correct third derivatives.
        differentiation: how "reverse" differentiates: "autograd" or "func".

    Returns:
        Float[Tensor, " batch"]: the trace of each row, in float32 or float64, differentiable with
        respect to the parameters of the energy and x. Does not synchronize with the device.
        Autocast is disabled inside.

    Raises:
        ContractError: the energy does not return one floating number for each row.
        ValueError: the energy does not depend on x, or has batch normalization in training mode;
            chunk_size below 1.

    Examples:
        >>> import torch
        >>> from termwise.energy import hessian_trace
        >>> hessian_trace(lambda x: x.pow(3).sum(1), torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
        tensor([18., 18.])
    """
    energies, _, laplacian = score_and_trace(
        "hessian_trace",
        energy,
        x,
        trace=trace,
        chunk_size=chunk_size,
        row_space=row_space,
        higher_order_safe=higher_order_safe,
        differentiation=differentiation,
    )
    return anchored(laplacian, energies)


def score_and_trace(
    caller: str,
    energy: Energy,
    x: Tensor,
    *,
    trace: Trace,
    chunk_size: int | None,
    row_space: bool,
    higher_order_safe: bool,
    differentiation: Differentiation,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return energies, their gradients and the traces of their Hessians, at least in float32."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{caller} needs chunk_size of at least 1, got {chunk_size}")
    refuse_batch_statistics(caller, energy)
    energy = uncompiled(energy)
    create_graph = creates_graph()
    with recording():
        x = recordable(x)
    if torch.compiler.is_compiling():  # which supports no carriers and no jvp of a dynamic batch
        trace = "reverse"
        x = x * 1  # export cannot save a region without an operation, and one begins here
    problem = attempt = None
    if trace != "reverse":
        attempt = Attempt(caller, energy, x, f'trace="{trace}"', higher_order_safe)
    # The modes are outside of autocast: an autocast region that contains only a mode would be
    # exported in a form that cannot be loaded.
    if attempt is not None and not attempt.has_failed():
        with recording(), without_autocast(x):
            try:
                if trace == "forward_laplacian":
                    results = None
                    if row_space and chunk_size is None and math.prod(x.shape[1:]) > 1:
                        results = _forward_by_layer(caller, energy, x, create_graph)
                    if results is None:
                        results = _forward(caller, energy, x, chunk_size, create_graph)
                else:
                    with _higher_order.higher_order_safe(higher_order_safe):
                        results = _forward_over_reverse(caller, energy, x, chunk_size)
                    if create_graph:
                        touch_saved_tensors(results)
                return _lifted(results, create_graph)
            except _higher_order.CoupledRowsError as coupled:
                raise ValueError(f"{caller} {coupled}") from None
            except Exception as error:  # an error of the energy for a tensor subclass
                problem = error
    with (
        recording(),
        without_autocast(x),
        _higher_order.higher_order_safe(higher_order_safe),
        _higher_order.in_our_words(caller),
    ):
        if differentiation_of(differentiation) == "func":
            results = _reverse_func(caller, energy, x, chunk_size)
        else:
            results = _reverse(caller, energy, x, chunk_size, create_graph)
    if attempt is not None and problem is not None:
        attempt.fail(problem)
    return _lifted(results, create_graph)


def _lifted(
    results: tuple[Tensor, Tensor, Tensor], create_graph: bool
) -> tuple[Tensor, Tensor, Tensor]:
    energies, score, laplacian = (
        lifted(part if create_graph else part.detach()) for part in results
    )
    return energies, score, laplacian


def _directions(x: Tensor, chunk_size: int | None) -> Iterator[Tensor]:
    """Yield the unit vectors of an event, "directions *event", one chunk at a time."""
    event = x.shape[1:]
    d = event.numel()
    step = d if chunk_size is None else chunk_size
    for start in range(0, d, max(step, 1)):
        rows = torch.arange(start, min(start + step, d), device=x.device)
        axes = torch.arange(d, device=x.device)
        yield (rows[:, None] == axes).to(x.dtype).reshape(-1, *event)


def _forward(
    caller: str, energy: Energy, x: Tensor, chunk_size: int | None, create_graph: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Propagate derivatives forward along each axis of x."""
    parts = [
        _carry(caller, energy, x, directions, create_graph)
        for directions in _directions(x, chunk_size)
    ]
    if not parts:
        raise NoCarrierError("x has no axis")
    energies, jacobians, traces = zip(*parts, strict=True)
    score = torch.cat(jacobians).movedim(0, -1).reshape(x.shape)
    return energies[-1], score, functools.reduce(torch.add, traces)


def _forward_by_layer(
    caller: str, energy: Energy, x: Tensor, create_graph: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Propagate derivatives along the rows of a first layer; None if x is used elsewhere too."""
    attempt = Attempt(caller, energy, x, "row_space")
    if attempt.has_failed():
        return None
    directions = Directions(x)
    try:
        energies, jacobian, laplacian = _carry(caller, energy, x, directions, create_graph)
    except ReadOtherwiseError:
        attempt.remember()
        return None
    return energies, directions.gradient(jacobian), laplacian


def _carry(
    caller: str, energy: Energy, x: Tensor, directions: Tensor | Directions, create_graph: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return energies, their derivatives along directions, and the sum of their second ones."""
    carrier = carrier_of(energy(carried(x, directions, create_graph)))
    energies = energies_of(caller, lambda _: carrier.value, x)
    if differentiation_of("auto") == "autograd":
        refuse_static_graph(caller, energies)
    laplacian = carrier.laplacian
    if laplacian is None:
        laplacian = torch.zeros_like(carrier.value)
    return energies, carrier.jacobian, laplacian


def _reverse(
    caller: str, energy: Energy, x: Tensor, chunk_size: int | None, create_graph: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate the gradient in reverse mode, along several axes at once."""
    point = point_of(x)
    energies = energies_of(caller, energy, point)
    refuse_static_graph(caller, energies)
    score = gradient_of(caller, energies.sum(), point, True)
    trace = torch.zeros_like(energies)
    for directions in _directions(x, chunk_size):
        along = directions.unsqueeze(1).expand(-1, *x.shape).to(score.dtype)
        rows = hessian_products(score, point, along, create_graph)
        if rows is not None:
            trace = trace + dot(lifted(rows), directions.unsqueeze(1)).sum(0)
    return energies, score, trace


def _reverse_func(
    caller: str, energy: Energy, x: Tensor, chunk_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    results: tuple[Any, ...] = torch.func.vjp(gradient_function(caller, energy), x, has_aux=True)
    score, pulled, energies = results
    trace = torch.zeros_like(energies)

    def curvature(direction: Tensor) -> Tensor:
        (row,) = pulled(direction.expand(x.shape).to(score.dtype))
        return per_row_sum(lifted(row) * direction)

    for directions in _directions(x, chunk_size):
        trace = trace + torch.vmap(curvature, randomness="same")(directions).sum(0)
    return energies, score, trace


def _forward_over_reverse(
    caller: str, energy: Energy, x: Tensor, chunk_size: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate the gradient in forward mode, along several axes of x at once."""
    score_of = gradient_function(caller, energy)
    score, energies = score_of(x)
    trace = torch.zeros_like(energies)

    def curvature(direction: Tensor) -> Tensor:
        along = direction.expand(x.shape)
        results: tuple[Any, ...] = torch.func.jvp(score_of, (x,), (along,), has_aux=True)
        return per_row_sum(lifted(results[1]) * direction)

    for directions in _directions(x, chunk_size):
        trace = trace + torch.vmap(curvature, randomness="same")(directions).sum(0)
    return energies, score, trace


class ScoreMatchingLoss(LossModule):
    """[`score_matching_loss`][termwise.energy.score_matching_loss] as a module.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from termwise.energy import ScoreMatchingLoss
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 1), nn.Flatten(0))
        >>> loss_fn = ScoreMatchingLoss(model)
        >>> loss_fn(torch.ones(4, 3)).loss.backward()
    """

    energy: Energy = dataclasses.field(kw_only=False)
    trace: Trace = "forward_laplacian"
    chunk_size: int | None = None
    row_space: bool = True
    higher_order_safe: bool = True
    differentiation: Differentiation = "auto"
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        x: Float[Tensor, "batch *event"],
        *,
        weights: Float[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> ScoreMatchingTerms:
        """Compute the terms of the loss."""
        return score_matching_loss(
            self.energy,
            x,
            weights=weights,
            batch_group=batch_group,
            **self.hyperparameters(),
        )
