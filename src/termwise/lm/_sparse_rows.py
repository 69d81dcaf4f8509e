"""Sparse matrices by their rows, times dense ones."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class SparseRows(NamedTuple):
    """A sparse matrix, by its rows."""

    pointers: Tensor
    """[rows + 1], where each row begins among the columns, and their number."""
    columns: Tensor
    weights: Tensor

    def matmul(self, x: Tensor) -> Tensor:
        """Return the product with a dense matrix, in a fixed order: the same bits each time."""
        # The sum over a bag of embeddings is this product, without the sparse tensors' warnings.
        return F.embedding_bag(
            self.columns,
            x,
            self.pointers,
            mode="sum",
            per_sample_weights=self.weights.to(x.dtype),
            include_last_offset=True,
        )
