"""What declarations of losses of an energy share."""

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor

from losses import GROUPS, Declaration, Variant

PAIR = ("rows columns", "rows columns")
PATH = (*PAIR, "rows")
NOISES = ("rows columns", "noises rows columns")
PROJECTIONS = {"projections": Float[Tensor, "projections batch *event"]}
POSITIVE = st.integers(1, 64).map(lambda n: n / 32)
SHARES = st.integers(1, 31).map(lambda n: n / 32)


def bowl(x: Tensor) -> Tensor:
    """An energy of events of any shape, not quadratic, that couples the elements of a row."""
    flat = x.flatten(1) if x.ndim > 1 else x[:, None]
    return (flat.square() / 2 - flat.cos() + 0.3 * flat * flat.roll(1, 1)).sum(1)


def timed_bowl(x: Tensor, time: Tensor) -> Tensor:
    """What the module of a loss with times holds, where the function takes a closure."""
    return bowl(x)


def of_energy(
    *,
    overrides: Mapping[str, Any] | None = None,
    sizes: Mapping[str, Any] | None = None,
    **others: Any,
) -> Declaration:
    events = {"event": st.sampled_from([(2,), (), (2, 2)]), "batch": st.integers(2, 4)}
    known = {"energy": bowl, "regularization": None, "differentiation": "auto"}
    return Declaration(
        sizes={**events, **(sizes or {})},
        overrides={**known, **(overrides or {})},
        elements={"weights": POSITIVE, "time": SHARES, "uniform": SHARES, "sigma": POSITIVE},
        **{"shards": GROUPS, **others},
    )


def variant(module: Any, **fields: Any) -> Variant:
    return Variant(module=module, first=(bowl,), **fields)


def minus(argument: str):
    return lambda call: -call[argument]


# --- parts of formulas ----------------------------------------------------------------------


def mean(rows: Tensor, weights: Tensor | None) -> Tensor:
    return rows.mean() if weights is None else (weights / weights.sum() * rows).sum()


def per_row(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1) if x.ndim > 1 else x


def each(per_row: Tensor, of: Tensor) -> Tensor:
    """Return one number of each row with the axes of an event."""
    return per_row.view(-1, *[1] * (of.ndim - 1))


def of_all(energy: Any, noise: Tensor) -> Tensor:
    """Return the energies of several rows to each row."""
    return torch.stack([energy(rows) for rows in noise])


def slope(energy: Any, x: Tensor) -> Tensor:
    x = x if x.requires_grad else x.requires_grad_()
    (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
    return gradient


def curvature(energy: Any, x: Tensor, direction: Tensor) -> Tensor:
    """v' H v of each row."""
    (product,) = torch.autograd.grad(
        (slope(energy, x) * direction).sum(), x, create_graph=True, materialize_grads=True
    )
    return per_row(product * direction)


def laplacian(energy: Any, x: Tensor) -> Tensor:
    axes = torch.eye(x[0].numel(), dtype=x.dtype).reshape(-1, 1, *x.shape[1:])
    return sum(curvature(energy, x, axis.expand_as(x)) for axis in axes)


def right(margins: Tensor) -> Tensor:
    """1 for a decision that is right, 0.5 for a tie."""
    return (margins.detach() > 0).double() + 0.5 * (margins.detach() == 0)


PENALISED = {
    "regularization": st.sampled_from(("l1", "l2")),
    "regularization_weight": 0.3,
    "parameters": st.just([torch.tensor([[1.5, -2.0]]).double(), torch.tensor([0.5]).double()]),
}


def penalty(regularization: str | None, parameters: Any, like: Tensor) -> Tensor:
    if regularization is None:
        return like.new_zeros(())
    every = torch.cat([parameter.flatten() for parameter in parameters])
    return every.abs().sum() if regularization == "l1" else (every**2).sum()


def field_terms(field: Tensor, target: Tensor, weights: Tensor | None) -> tuple[Tensor, ...]:
    """|field - target|^2, and its three parts."""
    parts = ((field - target) ** 2, field**2, -2 * field * target, target**2)
    return tuple(mean(per_row(part), weights) for part in parts)


def truncated_decay(time: Tensor, cutoff: float) -> Tensor:
    return torch.where(time <= cutoff, 1, (1 - time) / max(1 - cutoff, 1e-9))
