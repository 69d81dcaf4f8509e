"""The directions of the forward Laplacian: all axes of x, or fewer if those suffice.

An energy that depends on x only through one layer W x, with fewer rows than x has elements, is
constant in directions orthogonal to the rows of W. An orthonormal basis of the row space therefore
gives the complete gradient and trace. The basis is treated as constant: the omitted terms are
quadratic in W v = 0, so the value and every first derivative are exact. A second derivative with
respect to W would not be, and raises an error.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor

from .._autograd import Function, refusing
from .._numbers import accumulator


class ReadOtherwiseError(NotImplementedError):
    """The energy uses x outside of the layer that its directions were chosen for."""


class Directions:
    """Orthonormal directions of the events of x, chosen when x is first used."""

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self._axes = math.prod(x.shape[1:])
        self._undecided = x.dtype in (torch.float32, torch.float64)  # else a basis is too imprecise
        self._weight: Tensor | None = None
        self._basis: Tensor | None = None
        self._jacobians: dict[torch.Size, Tensor] = {}

    @property
    def of_layer(self) -> bool:
        """Whether they span the row space of a layer, instead of all axes."""
        return self._basis is not None

    def begin(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Return the Jacobian of x, "directions batch *event", for a function that reads x.

        Args:
            x: x, or "batch axes" of the same elements in the same order.
            weight: weight of the layer, if the function only multiplies x by it.

        Raises:
            ReadOtherwiseError: the directions are those of another layer.
        """
        if self._undecided and weight is not None and self._suits(x, weight):
            self._weight, self._basis = weight, _basis(weight)
        self._undecided = False
        if self._weight is not None and weight is not self._weight:
            raise ReadOtherwiseError
        if x.shape not in self._jacobians:  # the same tensor at each use: carriers compare identity
            along = self._basis
            if along is None:
                along = torch.eye(self._axes, dtype=x.dtype, device=x.device)
            shaped = along.reshape(-1, 1, *x.shape[1:])
            self._jacobians[x.shape] = shaped.expand(-1, *x.shape)
        return self._jacobians[x.shape]

    def _suits(self, x: Tensor, weight: Tensor) -> bool:
        # A basis of half of the axes costs about as much as the layer for two samples.
        rows, axes = weight.shape
        return x.shape[1:] == (axes,) and weight.dtype == x.dtype and 2 * rows <= axes

    def gradient(self, jacobian: Tensor) -> Tensor:
        """Return the gradient with respect to x from the derivatives along each direction."""
        score = jacobian.movedim(0, -1)
        if self._basis is not None:
            score = score @ self._basis.to(score.dtype)
        shaped: Tensor = score.reshape(self._x.shape)
        return shaped


def _basis(weight: Tensor) -> Tensor:
    """Return an orthonormal basis of the rows, "rows axes"."""
    matrix = weight.detach().mT.to(accumulator(weight))
    linalg: Any = torch.linalg  # without types
    basis: Tensor = linalg.qr(matrix).Q.mT.to(weight.dtype)
    return basis


def once(weight: Tensor) -> Tensor:
    """Return the weight of the layer; a second derivative with respect to it raises an error."""
    return cast("Tensor", _Once.apply(weight))


class _Once(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return refusing(
            gradients[0],
            "a loss along the row space of an energy's first layer has no second derivative with "
            "respect to the parameters: pass row_space=False",
        )
