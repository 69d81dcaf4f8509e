"""The largest entries of each row of probabilities."""

import torch
from torch import Tensor


def largest_of_rows(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest of each row of numbers from 0 to 1, sorted, and their places."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        found = x.topk(k, dim=1)
        return found.values, found.indices
    # The bits of such floats, read as integers, are in the floats' order. Integers are sorted by
    # their digits, all rows in one go, in a third of the time that comparisons take.
    numbers = torch.arange(len(x))[:, None]
    last = 0x3FFFFFFF  # just under 2.0
    bits = last - (x.view(torch.int32) & 0x7FFFFFFF).clamp_(max=last)
    order = ((numbers << 30) | bits).flatten().sort().indices.view(x.shape)
    places = order[:, :k] - numbers * x.shape[1]
    return x.gather(1, places), places
