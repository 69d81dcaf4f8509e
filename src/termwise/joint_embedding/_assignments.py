"""Soft assignments of samples to prototypes by a teacher, without a gradient."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _groups
from .._contract import contract
from .._groups import ProcessGroup
from .._numbers import accumulator, blocks, lifted


@contract
def sinkhorn(
    logits: Float[Tensor, "batch prototypes"],
    *,
    temperature: float,
    iterations: int = 3,
    batch_group: ProcessGroup | None = None,
) -> Float[Tensor, "batch prototypes"]:
    r"""Assign samples to prototypes so that all prototypes are used equally (Sinkhorn-Knopp).

    $$Q_{bk} = e^{\mathrm{logits}_{bk} / T}, \quad \text{then, } \mathrm{iterations} \text{ times:}
    \quad Q_{bk} \leftarrow Q_{bk} / \sum_{b'} Q_{b'k}, \quad
    Q_{bk} \leftarrow Q_{bk} / \sum_{k'} Q_{bk'}$$

    In the log domain: with f the logarithm of all that each prototype was divided by, Q is the
    softmax of logits / T - f over each row. An iteration adds the logarithms of Q's column sums to
    f; these sums are between 1 / prototypes and the batch. Finite for any logits, temperature and
    number of iterations, in float32 too.

    Prototypes are normalized first, so adding a constant to a prototype's logits has no effect.
    Adding a constant to a sample's logits has one, which decreases with each iteration, since it
    changes the weight of the sample in the first sums. So do not subtract the maximum of each row.

    Args:
        logits (Float[Tensor, "batch prototypes"]): logits of a teacher, a row for each sample. To
            balance prototypes over several views, as in DINOv2, pass them as one batch:
            `einops.rearrange(logits, "views batch prototypes -> (views batch) prototypes")`; the
            same holds for patches.
        temperature: T, positive; 0.05 in SwAV (epsilon), from 0.04 to 0.07 in DINOv2.
        iterations: number of iterations, at least 1; 3 in SwAV and DINOv2.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.

    Returns:
        Float[Tensor, "batch prototypes"]: this rank's rows of probabilities; each sums to 1. In
        float32 for half precision. Without a gradient.

        Communication of each rank: one maximum of `prototypes` elements, and one sum of as many for
        each iteration, in float64. The numbers of samples cancel and are not sent.

    Raises:
        ContractError: logits are not a floating "batch prototypes" tensor.
        ValueError: temperature is not positive, iterations less than 1, or no prototype.

    References:
        Cuturi (2013), https://arxiv.org/abs/1306.0895; Caron et al., SwAV (2020),
        https://arxiv.org/abs/2006.09882, whose code, as that of DINOv2 at b8931f7, DINOv3 at
        6876159 and lightly 1.6.0, takes the exponential first: in float32 that is infinite from a
        logit of 3.6 on at T = 0.04, and NaN where a sample's powers are all 0. Their results are
        ours where they are finite.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import sinkhorn
        >>> sinkhorn(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), temperature=0.1)
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    check_temperature("sinkhorn", temperature)
    if iterations < 1:
        raise ValueError(f"sinkhorn needs iterations >= 1, got {iterations}")
    if logits.shape[1] == 0:
        raise ValueError("sinkhorn needs at least 1 prototype, got 0")
    return assigned(logits[None], temperature, iterations, batch_group)[0]


def assigned(
    logits: Tensor, temperature: float, iterations: int, group: ProcessGroup | None
) -> Tensor:
    """Return the assignments of each view by itself, "views batch prototypes", all at a time."""
    views, count, prototypes = logits.shape
    samples = list(blocks(logits.movedim(1, 0), views * prototypes))
    with torch.no_grad():
        if len(samples) == 1 and group is None:
            return _as_written(logits, temperature, iterations)
        name = _groups.name_of(group)
        lowest = logits.new_full((views, 1, prototypes), -torch.inf)  # of a rank without samples
        top = lifted(logits.amax(1, keepdim=True) if count else lowest)
        top = _groups.all_reduce(top, name, "max")
        # Logarithms of what prototypes were divided by; a softmax divides the samples.
        scales: Tensor | None = None

        def powers(block: slice) -> Tensor:
            x = (lifted(logits[:, block]) - top).div_(temperature)
            return x.exp_() if scales is None else x.sub_(scales).softmax(2)

        for _ in range(iterations):
            sums = torch.zeros_like(top, dtype=accumulator(top))
            for block in samples:
                sums += powers(block).sum(1, keepdim=True)
            logs = _groups.all_reduce(sums, name).log().to(top.dtype)
            scales = logs if scales is None else scales + logs
        found = top.new_empty(logits.shape)
        for block in samples:
            found[:, block] = powers(block)
        return found


def _as_written(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    x = (lifted(logits) - logits.amax(1, keepdim=True)).div_(temperature)
    scales = x.exp().sum(1, keepdim=True).log()
    for _ in range(iterations - 1):
        scales = scales + (x - scales).softmax(2).sum(1, keepdim=True).log()
    return (x - scales).softmax(2)


@contract
def centered_softmax(
    logits: Float[Tensor, "batch prototypes"],
    center: Float[Tensor, " prototypes"],
    *,
    temperature: float,
) -> Float[Tensor, "batch prototypes"]:
    r"""Return a teacher's probabilities, softmax((logits - center) / temperature).

    Args:
        logits (Float[Tensor, "batch prototypes"]): logits of a teacher, a row for each sample; pass
            several views as one batch, as for [`sinkhorn`][termwise.joint_embedding.sinkhorn].
        center (Float[Tensor, " prototypes"]): running mean of the logits; zeros at first. See
            [`updated_center`][termwise.joint_embedding.updated_center].
        temperature: positive; from 0.04 to 0.07 in DINO and DINOv2.

    Returns:
        Float[Tensor, "batch prototypes"]: rows that sum to 1, in float32 for half precision.
        Without a gradient. No communication.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: temperature is not positive.

    References:
        Caron et al., DINO (2021), https://arxiv.org/abs/2104.14294, section 3.1.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import centered_softmax
        >>> centered_softmax(torch.ones(1, 2), torch.ones(2), temperature=0.04)
        tensor([[0.5000, 0.5000]])
    """
    check_temperature("centered_softmax", temperature)
    # no_grad would let the tangents of forward mode pass.
    return ((lifted(logits.detach()) - center.detach()) / temperature).softmax(1)


@contract
def updated_center(
    center: Float[Tensor, " prototypes"],
    logits: Float[Tensor, "batch prototypes"],
    *,
    momentum: float = 0.9,
    batch_group: ProcessGroup | None = None,
) -> Float[Tensor, " prototypes"]:
    """Return the running mean of a teacher's logits after one more step.

    It is momentum * center + (1 - momentum) * mean of the logits over the samples of all ranks. Use
    it in the next step: DINO subtracts the center from before the current batch.

    Args:
        center (Float[Tensor, " prototypes"]): the current running mean; not modified.
        logits (Float[Tensor, "batch prototypes"]): logits of the teacher on this rank, before
            centering; pass several views or patches as one batch.
        momentum: from 0 to 1; 0.9 in DINO.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.

    Returns:
        Float[Tensor, " prototypes"]: the next state, the same on every rank, in the dtype of
        center; center itself if no rank has a sample. Without a gradient.

        Communication of each rank: a sum of `prototypes` elements in float64, and of one integer.
        DINOv2 averages the ranks' means, which assumes equal numbers of samples.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: momentum is not within 0..1.

    References:
        Caron et al., DINO (2021), https://arxiv.org/abs/2104.14294, equation 4.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import updated_center
        >>> updated_center(torch.zeros(2), torch.tensor([[1.0, 3.0], [3.0, 3.0]]))
        tensor([0.2000, 0.3000])
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"updated_center needs momentum in 0..1, got {momentum}")
    name = _groups.name_of(batch_group)
    center, logits = center.detach(), logits.detach()
    with torch.no_grad():
        total = torch.zeros_like(center, dtype=accumulator(center))
        for block in blocks(logits):
            total = total + lifted(logits[block]).sum(0)
        count = logits.new_full((), logits.shape[0], dtype=torch.int64)
        total, count = (_groups.all_reduce(x, name) for x in (total, count))
        mean = torch.where(count > 0, total / count, center)
        return (momentum * center + (1 - momentum) * mean).to(center.dtype)


def check_temperature(caller: str, temperature: float) -> None:
    """Raise an error for a temperature that is not positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"{caller} needs a finite temperature > 0, got {temperature}")
