"""Softmax of rows of logits whose columns may be held by several ranks, and its gradient."""

import torch
from torch import Tensor

from .._groups import all_reduce
from ._rows import row_products


def centred(x: Tensor, vocab_name: str | None) -> Tensor:
    """Subtract each row's highest logit over the tokens of all ranks.

    What the logits of a row have in common then costs no digits in what follows.
    """
    highest = x.amax(1) if x.shape[1] else x.new_full((x.shape[0],), -torch.inf)
    return x - all_reduce(highest, vocab_name, "max")[:, None]


def exponentials(x: Tensor, temperature: float, vocab_name: str | None) -> tuple[Tensor, Tensor]:
    """Return e^(x / temperature) of centred rows, in place of x, and 1 / its sum over all ranks."""
    if temperature != 1:
        x.div_(temperature)
    powers = x.exp_()
    return powers, 1 / all_reduce(powers.sum(1), vocab_name)


def softmax_gradient(
    powers: Tensor, inverse: Tensor, push: Tensor, vocab_name: str | None
) -> Tensor:
    """Return the gradient in x of softmax(x), from that in the softmax, which is overwritten."""
    mean = all_reduce(row_products(powers, push), vocab_name) * inverse
    return push.sub_(mean[:, None]).mul_(powers).mul_(inverse[:, None])
