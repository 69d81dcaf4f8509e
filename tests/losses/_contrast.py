"""What declarations of contrastive losses share."""

import torch
from hypothesis import strategies as st
from torch import Tensor

# The path of strips, with more than one of them, beside the formula as written.
PATHS = (
    {},
    {
        "termwise.joint_embedding._contrast._SMALL": 0,
        "termwise.joint_embedding._contrast._rows_at_once": lambda rows, width: 2,
    },
)
# Rows are divided by their norms, whose derivative at 0 is none.
ELEMENTS = st.floats(0.25, 2.0) | st.floats(-2.0, -0.25)


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(1, keepdim=True).sqrt()


def log_sum(logits: Tensor, among: Tensor) -> Tensor:
    """Log of the sum of exponentials over some columns of each row."""
    highest = logits.detach().masked_fill(~among, -torch.inf).max(1, keepdim=True).values
    return (among * (logits.masked_fill(~among, 0) - highest.clamp_min(-1e300)).exp()).sum(
        1
    ).log() + highest[:, 0]


def nearest(logits: Tensor, positive: Tensor, hidden: Tensor) -> Tensor:
    """Whether the largest logit of each row is a positive's."""
    others = logits.masked_fill(hidden | positive, -torch.inf).max(1).values
    return logits.masked_fill(~positive, -torch.inf).max(1).values >= others


def two_views(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cosines of all views, which of them are the same one, and which are a pair."""
    z = unit(torch.cat((z1, z2)))
    itself = torch.eye(len(z), dtype=torch.bool)
    return z @ z.T, itself, itself.roll(len(z1), 1)


def noisy_views(n: int, dim: int, *, noise: float = 1.0, dtype=torch.float64) -> list[Tensor]:
    """Return unit rows, and others near them."""
    generator = torch.Generator().manual_seed(0)
    base = unit(torch.randn(n, dim, generator=generator, dtype=torch.float64))
    other = base + noise * torch.randn(n, dim, generator=generator, dtype=torch.float64) / dim**0.5
    return [x.to(dtype).requires_grad_() for x in (base, unit(other))]
