"""Sliced score matching: the trace of the Hessian from a few random directions."""

import dataclasses
from typing import Any

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
from ._fallback import Attempt
from ._forward_laplacian import carried, carrier_of
from ._hessian_products import hessian_products
from ._projections import Distribution, dot, projections_of

FEWEST_PROJECTIONS, FEWEST_CARRIED = 2, 256  # of each row, and of all rows: measured on MLPs, convs


@terms
class SlicedScoreMatchingTerms(Terms):
    """Terms of [`sliced_score_matching_loss`][termwise.energy.sliced_score_matching_loss]."""

    loss: Float[Tensor, ""]
    """0.5 * score_square - curvature."""
    score_square: Float[Tensor, ""]
    """|grad E|^2, or without variance reduction (v . grad E)^2, mean over projections; weighted
    mean over rows."""
    curvature: Float[Tensor, ""]
    """v^T H v with H the Hessian of the energy in x, mean over projections and weighted mean over
    rows."""


@contract
def sliced_score_matching_loss(
    energy: Energy,
    x: Float[Tensor, "batch *event"],
    *,
    projections: int | Float[Tensor, "projections batch *event"] = 1,
    distribution: Distribution = "rademacher",
    variance_reduced: bool = True,
    higher_order_safe: bool = True,
    differentiation: Differentiation = "auto",
    generator: torch.Generator | None = None,
    weights: Float[Tensor, " batch"] | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> SlicedScoreMatchingTerms:
    r"""Match scores, with the trace of the Hessian estimated along random directions.

    $$\mathrm{loss} = \sum_i w_i \Big( \frac{1}{2} \|\nabla E(x_i)\|^2 -
    \frac{1}{K} \sum_k v_{ik}^\top \nabla^2 E(x_i)\, v_{ik} \Big)$$

    over the rows of data x, whose weights w sum to 1, and K directions of each, E[v v^T] = I, so
    that its expectation is the loss of score matching. Without variance reduction the square is
    that of v . grad E, mean over the directions.

    Args:
        energy: returns the energy of each row. Called once for any K (twice if forward mode fails):
            all projections share the energies and their gradient, and each adds only second-order
            products.
        x (Float[Tensor, "batch *event"]): data, with the axes of a sample that the energy takes.
        projections (int | Float[Tensor, "projections batch *event"]): K, the number of directions
            to draw for each row, or the directions, of length sqrt(d) on average.
        distribution: distribution of the directions: "rademacher" (signs, the least variance),
            "sphere" (of radius sqrt(d)) or "gaussian".
        variance_reduced: use the squared norm of the gradient, which is E[(v . grad E)^2], instead
            of its estimate along the directions.
        higher_order_safe: whether to replace functions whose third derivatives are wrong or missing
            in PyTorch (layer_norm, instance_norm, prod, fused attention, cdist, hardsigmoid) by
            compositions. Otherwise gradients with respect to the parameters may be silently wrong.
        differentiation: "autograd" differentiates the gradient again, and so does "func", which
            works under torch.func and torch.compile. "auto" does this for one projection, or fewer
            than 256 over all rows. Otherwise it propagates derivatives along the directions forward
            through the energy, which is then faster; if the energy calls a function without a rule
            for that, it uses reverse mode, and a warning, once for each energy, names the cause.
            All results are equal up to rounding.
        generator: generator for the draws. None: the default generator of x's device.
        weights (Float[Tensor, " batch"] | None): weights of the rows of x, normalized over all
            ranks. None: equal weights.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication. Ranks need generators of their own.
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
        ValueError: there is no projection; or the energy does not depend on x, has batch
            normalization in training mode, or is under DistributedDataParallel(static_graph=True).

    References:
        Song et al., Sliced Score Matching (UAI 2019), https://arxiv.org/abs/1905.07088, whose
        variance reduced form is the default here. With p(x) = exp(-E(x)) / Z the score is -grad E,
        hence the minus. Code that adds the curvature learns the negated energy. Code that scales
        directions to length 1 weights the curvature by 1 / d, and learns an energy that is d times
        too flat.

    Examples:
        >>> import torch
        >>> from termwise.energy import sliced_score_matching_loss
        >>> x = torch.tensor([[1.0, 1.0], [3.0, 1.0]])
        >>> sliced_score_matching_loss(lambda x: 0.5 * x.square().sum(1), x).metrics()
        {'loss': 1.0, 'score_square': 6.0, 'curvature': 2.0}
    """
    refuse_batch_statistics("sliced_score_matching_loss", energy)
    energy = uncompiled(energy)
    create_graph = creates_graph()
    # An autocast region that contains only this mode would be exported in a form that cannot be
    # loaded.
    with recording(), without_autocast(x):
        v = projections_of("sliced_score_matching_loss", x, projections, distribution, generator)
        # In half precision these are the directions after rounding.
        x, v = recordable(x), recordable(v.to(x.dtype))
        safe = _higher_order.higher_order_safe(higher_order_safe)
        with _higher_order.in_our_words("sliced_score_matching_loss"), safe:
            if differentiation_of(differentiation) == "func":
                rows = _by_func(energy, x, v, variance_reduced)
            elif differentiation == "auto" and _carries(v):
                rows = _forward_or_backward(energy, x, v, variance_reduced)
            else:
                rows = _by_autograd(energy, x, v, variance_reduced)
    with without_autocast(x):
        score_square, curvature = weighted_means(
            ([part if create_graph else part.detach() for part in rows], weights),
            batch_group=batch_group,
            grad_reduction=grad_reduction,
        )
        return SlicedScoreMatchingTerms(
            loss=0.5 * score_square - curvature,
            score_square=score_square,
            curvature=curvature,
        )


def _carries(v: Tensor) -> bool:
    """Whether to use forward mode, which is slower than reverse mode for few projections."""
    projections, rows, *_ = v.shape
    enough = projections >= FEWEST_PROJECTIONS and projections * rows >= FEWEST_CARRIED
    return enough and not torch.compiler.is_compiling()


def _forward_or_backward(
    energy: Energy, x: Tensor, v: Tensor, variance_reduced: bool
) -> tuple[Tensor, Tensor]:
    way = 'differentiation="auto", by carriers,'
    attempt = Attempt("sliced_score_matching_loss", energy, x, way)
    problem = None
    if not attempt.has_failed():
        try:
            return _forward(energy, x, v, variance_reduced)
        except _higher_order.CoupledRowsError:
            raise
        except Exception as error:  # an error of the energy for a tensor subclass
            problem = error
    rows = _by_autograd(energy, x, v, variance_reduced)
    if problem is not None:
        attempt.fail(problem)
    return rows


def _forward(energy: Energy, x: Tensor, v: Tensor, variance_reduced: bool) -> tuple[Tensor, Tensor]:
    """Propagate both derivatives along v through the energy."""
    point = point_of(x)
    result = carrier_of(energy(carried(point, v, True)))
    energies = energies_of("sliced_score_matching_loss", lambda _: result.value, x)
    refuse_static_graph("sliced_score_matching_loss", energies)
    curvature = torch.zeros_like(energies)
    if result.laplacian is not None:  # the sum over directions, as it was propagated
        curvature = lifted(result.laplacian) / v.shape[0]
    if variance_reduced:
        score = gradient_of("sliced_score_matching_loss", energies.sum(), point, True)
        square = per_row_sum(lifted(score).square())
    else:
        square = lifted(result.jacobian).square().mean(0)
    return square, anchored(curvature, energies)


def _by_autograd(
    energy: Energy, x: Tensor, v: Tensor, variance_reduced: bool
) -> tuple[Tensor, Tensor]:
    """Differentiate the gradient in reverse mode along all v at once."""
    point = point_of(x)
    energies = energies_of("sliced_score_matching_loss", energy, point)
    refuse_static_graph("sliced_score_matching_loss", energies)
    score = gradient_of("sliced_score_matching_loss", energies.sum(), point, True)
    products = hessian_products(score, point, v.to(score.dtype), True)
    square, curvature = _along(lifted(score), products, lifted(v), variance_reduced)
    return square, anchored(curvature, energies)


def _by_func(energy: Energy, x: Tensor, v: Tensor, variance_reduced: bool) -> tuple[Tensor, Tensor]:
    """Compute the same by torch.func."""
    score_of = gradient_function("sliced_score_matching_loss", energy)
    results: tuple[Any, ...] = torch.func.vjp(score_of, x, has_aux=True)
    score, pulled, energies = results
    (products,) = torch.vmap(pulled, randomness="same")(v)
    square, curvature = _along(lifted(score), products, lifted(v), variance_reduced)
    return square, anchored(curvature, energies)


def _along(
    score: Tensor, products: Tensor | None, v: Tensor, variance_reduced: bool
) -> tuple[Tensor, Tensor]:
    """Return both terms of each row from the gradient and H v."""
    square = per_row_sum(score.square()) if variance_reduced else dot(v, score).square().mean(0)
    if products is None:
        return square, torch.zeros_like(square)
    return square, dot(v, lifted(products)).mean(0)


class SlicedScoreMatchingLoss(LossModule):
    """[`sliced_score_matching_loss`][termwise.energy.sliced_score_matching_loss] as a module.

    Examples:
        >>> import torch
        >>> from termwise.energy import SlicedScoreMatchingLoss
        >>> layers = torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        >>> model = torch.nn.Sequential(*layers, torch.nn.Flatten(0))
        >>> loss_fn = SlicedScoreMatchingLoss(model, projections=4)
        >>> loss_fn(torch.ones(5, 3)).loss.backward()
    """

    energy: Energy = dataclasses.field(kw_only=False)
    projections: int = 1
    distribution: Distribution = "rademacher"
    variance_reduced: bool = True
    higher_order_safe: bool = True
    differentiation: Differentiation = "auto"
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        x: Float[Tensor, "batch *event"],
        *,
        projections: Float[Tensor, "projections batch *event"] | None = None,
        generator: torch.Generator | None = None,
        weights: Float[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> SlicedScoreMatchingTerms:
        """Compute the terms of the loss, with these projections or new random ones."""
        options = self.hyperparameters()
        if projections is not None:
            options["projections"] = projections
        return sliced_score_matching_loss(
            self.energy,
            x,
            generator=generator,
            weights=weights,
            batch_group=batch_group,
            **options,
        )
