"""The regularization of an energy's parameters, for the losses that have one."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .._groups import GradReduction, ProcessGroup
from .._numbers import lifted
from ._energies import replicated

Regularization = Literal["l1", "l2"]


def parameter_penalty(
    caller: str,
    x: Tensor,
    regularization: Regularization | None,
    parameters: Sequence[Tensor],
    batch_group: ProcessGroup | None,
    grad_reduction: GradReduction,
) -> Tensor:
    """Return R, which every rank computes; 0 on x's device without a regularization."""
    if regularization is None:
        return lifted(x.detach()).new_zeros(())
    if not parameters:
        raise ValueError(
            f'{caller} needs parameters for regularization="{regularization}", got none'
        )
    sizes = [
        lifted(p).abs().sum() if regularization == "l1" else lifted(p).square().sum()
        for p in parameters
    ]
    return replicated(torch.stack(sizes).sum(), batch_group, grad_reduction)
