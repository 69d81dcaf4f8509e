"""What each rank runs of a variant that tests/losses declares: its rows, of the whole batch."""

from typing import Any

import torch
from cases import Numbers, values
from declared import VARIANTS
from torch import Tensor
from torch.utils._pytree import tree_map


def part(name: str, sizes: list[int], rank: int | None) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the tensors and the keywords of a rank, or of all of them for None.

    An axis is cut if its size follows the number of rows.
    """
    held, rows = VARIANTS[name][1], sum(sizes)
    whole, larger = ((held.tensors(n), held.extra(n)) for n in (rows, rows + 1))
    start = 0 if rank is None else sum(sizes[:rank])
    stop = rows if rank is None else start + sizes[rank]

    def cut(x: Any, other: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        for axis, size in enumerate(x.shape):
            if size != other.shape[axis]:
                x = wide(x.narrow(axis, start, stop - start))
        return x

    inputs, extra = tree_map(cut, whole, larger)
    return [wide(x) for x in inputs], {name: wide(value) for name, value in extra.items()}


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def on_a_rank(group, name, sizes, how) -> tuple[Numbers, list[Tensor]]:
    """Terms, and the gradients of this rank's tensors."""
    declared, held = VARIANTS[name]
    inputs, extra = part(name, sizes, None if group is None else group.rank())
    inputs = [x.clone().requires_grad_() for x in inputs]
    terms = declared.function(
        *held.first, *inputs, **held.options, **extra, batch_group=group, grad_reduction=how
    )
    gradients = torch.autograd.grad(terms.loss, inputs, materialize_grads=True)
    return values(terms), list(gradients)
