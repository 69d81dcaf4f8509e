"""Rows that differ between ranks."""

from collections.abc import Sequence

import torch


def rows(sizes: Sequence[int], columns: int = 4, seed: int = 0) -> list[torch.Tensor]:
    """Return rows for each rank, of a different scale and place."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, columns, generator=generator, dtype=torch.float64) * (rank + 0.5) + rank
        for rank, n in enumerate(sizes)
    ]
