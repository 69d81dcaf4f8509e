"""Products of sparse matrices (CSR) with dense ones."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class SparseRows(NamedTuple):
    """A sparse matrix in CSR format."""

    pointers: Tensor
    """[rows + 1], the start of each row among the columns, and their number."""
    columns: Tensor
    weights: Tensor

    def matmul(self, x: Tensor) -> Tensor:
        """Return the product with a dense matrix, summed in a fixed order."""
        # embedding_bag computes this product without the warnings of sparse tensors.
        return F.embedding_bag(
            self.columns,
            x,
            self.pointers,
            mode="sum",
            per_sample_weights=self.weights.to(x.dtype),
            include_last_offset=True,
        )
