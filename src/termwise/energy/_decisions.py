"""How often a noise-contrastive loss classifies correctly which of two rows is data."""

import torch
from torch import Tensor


def share_right(margins: Tensor) -> Tensor:
    """Return 1 for a correct decision, 0.5 for a tie, 0 for a wrong one; detached."""
    margins = margins.detach()
    return torch.where(margins.isnan(), margins, (1 + margins.sign()) / 2)
