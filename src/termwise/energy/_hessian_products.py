"""Hessian-vector products, in reverse mode through a gradient."""

import torch
from torch import Tensor


def hessian_products(
    score: Tensor, point: Tensor, directions: Tensor, create_graph: bool
) -> Tensor | None:
    """Differentiate a gradient in reverse mode along directions, "directions batch *event".

    All at once, or one after the other if that fails: in anomaly mode, and for backward passes that
    `torch.vmap` does not support.

    Args:
        score: the gradient of the energies with respect to the point, in a graph.
        point: the point of the gradient.
        directions: of score's dtype.
        create_graph: whether the products are in a graph.

    Returns:
        The products, in the shape of the directions. None: the gradient does not depend on x.
    """
    if not score.requires_grad:  # a linear energy whose parameters require no gradient
        return None

    def products(along: Tensor, batched: bool) -> Tensor | None:
        return torch.autograd.grad(
            score,
            point,
            along,
            create_graph=create_graph,
            retain_graph=True,
            is_grads_batched=batched,
            allow_unused=True,
        )[0]

    # Anomaly mode reads values, which a batched gradient does not have.
    if torch.compiler.is_compiling() or not torch.is_anomaly_enabled():
        try:
            return products(directions, True)
        except Exception:
            if torch.compiler.is_compiling():
                raise
    rows = [products(along, False) for along in directions.unbind(0)]
    found = [row for row in rows if row is not None]
    return torch.stack(found) if found else None
