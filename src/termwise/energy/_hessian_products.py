"""Products of vectors by the Hessian, backward through a gradient."""

import torch
from torch import Tensor


def hessian_products(
    score: Tensor, point: Tensor, directions: Tensor, create_graph: bool
) -> Tensor | None:
    """Differentiate a gradient backward along several directions, "directions batch *event".

    All at once; one after the other where that fails: in anomaly mode, and through backward passes
    that `torch.vmap` cannot follow.

    Args:
        score: the gradient of the energies with respect to the point, in a graph.
        point: where it was taken.
        directions: of score's dtype.
        create_graph: whether the products are in a graph.

    Returns:
        The products, in the shape of the directions. None: the gradient does not depend on x.
    """
    if not score.requires_grad:  # an energy that is linear and frozen
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

    # Anomaly mode looks at each number, which a batched gradient does not have.
    if torch.compiler.is_compiling() or not torch.is_anomaly_enabled():
        try:
            return products(directions, True)
        except Exception:
            if torch.compiler.is_compiling():
                raise
    rows = [products(along, False) for along in directions.unbind(0)]
    found = [row for row in rows if row is not None]
    return torch.stack(found) if found else None
