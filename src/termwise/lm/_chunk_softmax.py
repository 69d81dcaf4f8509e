"""Softmax of rows of logits whose columns may be held by several ranks, and its gradient."""

import torch
from torch import Tensor

from .._groups import all_reduce
from ._chunk_blocks import ChunkRows


def centred(x: Tensor, vocab_name: str | None) -> Tensor:
    """Subtract each row's highest logit over the tokens of all ranks.

    A common offset of the logits of a row then does not reduce the precision.
    """
    highest = x.amax(1) if x.shape[1] else x.new_full((x.shape[0],), -torch.inf)
    return x - all_reduce(highest, vocab_name, "max")[:, None]


def exponentials(x: Tensor, temperature: float, vocab_name: str | None) -> tuple[Tensor, Tensor]:
    """Return e^(x / temperature) of centered rows, in place of x, and 1 / its sum over ranks."""
    if temperature != 1:
        x.div_(temperature)
    powers = x.exp_()
    return powers, all_reduce(powers.sum(1), vocab_name).reciprocal()


class MeanSoftmax:
    """The softmax of a block's rows, averaged over each of its chunks."""

    def __init__(
        self, rows: ChunkRows, x: Tensor, temperature: float, vocab_name: str | None
    ) -> None:
        self.rows, self.vocab_name = rows, vocab_name
        self.powers, self.inverse = exponentials(centred(x, vocab_name), temperature, vocab_name)
        self.factor = self.inverse * rows.share()

    def means(self) -> Tensor:
        """Return this rank's part of the means over the rows of all ranks."""
        return self.rows.sums(self.powers, self.factor)

    def gradient(self, push: Tensor, scale: Tensor) -> Tensor:
        """Return scale * the gradient with respect to x / temperature, given that of the means."""
        back = self.rows.spread(push, self.factor * scale).mul_(self.powers)
        mean = all_reduce(back.sum(1), self.vocab_name) * self.inverse
        return back.addcmul_(self.powers, mean[:, None], value=-1)


def all_columns(x: Tensor, own: Tensor | None, vocab: int, vocab_name: str | None) -> Tensor:
    """Return x with the columns of all ranks; own are the indices of this rank's columns."""
    if own is None:
        return x
    return all_reduce(x.new_zeros(len(x), vocab).index_copy_(1, own, x), vocab_name)


def own_columns(first: Tensor | None, x: Tensor) -> Tensor | None:
    """Return the indices of x's columns among those of all ranks, given the first one."""
    return None if first is None else first + torch.arange(x.shape[-1], device=x.device)
