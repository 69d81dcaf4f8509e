"""Selection of latents: the k largest of each row or batch, or those above a threshold."""

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import _groups
from .._autograd import Function, on_host, transformed
from .._contract import contract
from .._groups import ProcessGroup
from .._numbers import accumulator, lifted
from ._latents import SparseLatents

# Stride of a sample. Prime, so that it reaches all columns.
_STRIDE = 61

Activation = Literal["relu", "none", "abs"]


@contract
def topk(
    pre: Float[Tensor, "batch d_sae"],
    *,
    k: int,
    score: Float[Tensor, "batch d_sae"] | None = None,
    activation: Activation = "relu",
) -> SparseLatents:
    """Keep the k largest latents of each row.

    Args:
        pre (Float[Tensor, "batch d_sae"]): latents before any selection.
        k: number of latents to keep, at most d_sae.
        score (Float[Tensor, "batch d_sae"] | None): values to rank latents by, such as latents
            times the norms of their decoder rows. It gets no gradient; NaN ranks first. None: rank
            by the activation.
        activation: "relu": rank and keep max(0, pre); "none": rank and keep pre; "abs": rank by
            |pre| and keep pre.

    Returns:
        The latents that are kept, the one with the largest score first. Gradients flow to those
        that are kept and, with "relu", positive.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: k is not in 1..d_sae.

    References:
        Gao et al., https://arxiv.org/abs/2406.04093, with the ReLU of their code. "abs" is AbsTopK.

    Examples:
        >>> import torch
        >>> from termwise.sae import topk
        >>> topk(torch.tensor([[3.0, -1.0, 5.0]]), k=2).indices
        tensor([[2, 0]])
        >>> topk(torch.tensor([[-5.0, 1.0, 0.5]]), k=2, activation="abs").values
        tensor([[-5.,  1.]])
        >>> topk(torch.tensor([[3.0, 2.0]]), k=1, score=torch.tensor([[1.0, 4.0]])).values
        tensor([[2.]])
    """
    if not 1 <= k <= pre.shape[1]:
        raise ValueError(f"topk needs k from 1 to {pre.shape[1]}, got {k}")
    if score is None and activation != "abs":
        values, indices = pre.topk(k, dim=1)
    else:
        ranked = ranked_by(pre.detach(), activation) if score is None else score.detach()
        indices = ranked.topk(k, dim=1).indices
        values = pre.gather(1, indices)
    return SparseLatents(values.relu() if activation == "relu" else values, indices)


@contract
def batch_topk(
    pre: Float[Tensor, "batch d_sae"],
    *,
    k: float,
    score: Float[Tensor, "batch d_sae"] | None = None,
    activation: Activation = "relu",
    mask: Bool[Tensor, " batch"] | None = None,
    batch_group: ProcessGroup | None = None,
) -> Float[Tensor, "batch d_sae"]:
    """Keep the k * batch largest latents of the whole batch.

    A row may keep more or fewer than k. The batch consists of the rows of all ranks that count.
    Exactly floor(k * batch) of its latents are kept, even with ties, which the lower rank and the
    earlier index win.

    Args:
        pre (Float[Tensor, "batch d_sae"]): latents before any selection.
        k: mean number of latents of a row to keep, at most d_sae. k * batch is computed in float64
            and rounded down, as in SAELens.
        score (Float[Tensor, "batch d_sae"] | None): values to rank latents by, such as latents
            times the norms of their decoder rows. It gets no gradient; NaN ranks first. None: rank
            by the activation.
        activation: "relu": rank and keep max(0, pre); "none": rank and keep pre; "abs": rank by
            |pre| and keep pre.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others keep no latents and get no
            gradient, even if they are NaN. None: all.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.

    Returns:
        Float[Tensor, "batch d_sae"]: the latents, with zeros where they are not kept. With "relu",
        fewer than k * batch are nonzero if fewer are positive. NaN is always kept. Communication: 3
        all-reduces of 2048 integers for float32 (6 for float64), and the numbers of ties and rows.
        Does not synchronize with the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: k is not positive or more than d_sae.

    References:
        Bussmann et al., BatchTopK Sparse Autoencoders (2024), https://arxiv.org/abs/2412.06410.

    Examples:
        >>> import torch
        >>> from termwise.sae import batch_topk
        >>> batch_topk(torch.tensor([[3.0, 4.0], [1.0, 2.0]]), k=1)
        tensor([[3., 4.],
                [0., 0.]])
        >>> batch_topk(torch.tensor([[3.0, 4.0], [1.0, 2.0]]), k=1.5)
        tensor([[3., 4.],
                [0., 2.]])
    """
    if not 0 < k <= pre.shape[1]:
        raise ValueError(f"batch_topk needs k above 0 and at most {pre.shape[1]}, got {k}")

    def over_ranks(counts: Tensor) -> Tensor:
        return counts if batch_group is None else _groups.all_reduce(counts, batch_group.group_name)

    latents = pre.relu() if activation == "relu" else pre
    ranked = ranked_by(pre.detach(), activation) if score is None else score.detach()
    places = _in_order(ranked, signed=score is not None or activation == "none")
    if mask is not None:
        places = places.masked_fill(~mask[:, None], torch.iinfo(places.dtype).min)
    places = places.flatten()
    n_local = k * pre.shape[0] if isinstance(k, int) else math.floor(k * pre.shape[0])
    if mask is None and batch_group is None and n_local:
        top = _candidates(places, n_local).topk(n_local).values
        last = top[-1]
        ties_wanted = (top == last).sum()
    else:
        rows = places.new_full((), pre.shape[0]) if mask is None else mask.sum()
        rows = over_ranks(rows.to(torch.int64))
        exact = rows if isinstance(k, int) else rows.to(accumulator(pre))
        wanted = (exact * k).floor().to(torch.int64)
        last, ties_wanted = _kth_largest(places, wanted, over_ranks)
    tied = places == last
    before: Tensor | int = 0
    if batch_group is not None:
        ties = _groups.each_rank(tied.sum(), batch_group)
        before = ties.cumsum(0)[batch_group.rank()] - ties[batch_group.rank()]
    selected_ties = tied & (tied.cumsum(0) + before <= ties_wanted)
    return latents.where(((places > last) | selected_ties).view(pre.shape), 0)


@contract
def threshold_gate(
    pre: Float[Tensor, "batch d_sae"],
    threshold: float | Float[Tensor, ""] | Float[Tensor, " d_sae"],
) -> Float[Tensor, "batch d_sae"]:
    r"""Keep positive latents above a threshold: BatchTopK at inference.

    $$f_{ij} = \max(0, h_{ij}) \, [h_{ij} > \theta]$$

    The latents of a row do not depend on the other rows of its batch. With a threshold of 0 or less
    this is a ReLU.

    Args:
        pre (Float[Tensor, "batch d_sae"]): h, latents before any selection.
        threshold (float | Float[Tensor, ""] | Float[Tensor, " d_sae"]): theta, one for all latents,
            as [`ActivationThreshold.value`][termwise.sae.ActivationThreshold], or one for each. It
            gets no gradient; use [`jumprelu`][termwise.sae.jumprelu] to learn a threshold.

    Returns:
        Float[Tensor, "batch d_sae"]: the latents. Gradients flow to those that are kept. A
        threshold of NaN makes the latents NaN. Does not synchronize with the device.

    Raises:
        ContractError: shapes or dtypes do not fit.

    References:
        Bussmann et al., BatchTopK Sparse Autoencoders (2024), https://arxiv.org/abs/2412.06410.

    Examples:
        >>> import torch
        >>> from termwise.sae import threshold_gate
        >>> threshold_gate(torch.tensor([[-2.0, 0.5, 3.0]]), 1.0)
        tensor([[0., 0., 3.]])
    """
    gate = threshold.detach() if isinstance(threshold, Tensor) else pre.new_full((), threshold)
    # Not `pre > gate`, which is false for NaN and would replace it by 0.
    return pre.relu().masked_fill(pre.detach() <= gate, 0).masked_fill(gate.isnan(), torch.nan)


def ranked_by(pre: Tensor, activation: Activation) -> Tensor:
    """Return the values that an activation ranks latents by."""
    if activation == "relu":
        return pre.relu()
    return pre.abs() if activation == "abs" else pre


def _in_order(score: Tensor, *, signed: bool) -> Tensor:
    """Return integers in the order of the floats, with NaN of either sign above all others."""
    score = lifted(score)
    kind = torch.int64 if score.dtype == torch.float64 else torch.int32
    infinity = 0x7FF << 52 if kind == torch.int64 else 0xFF << 23
    sizes = score.abs()
    bits: Tensor = _Bits.apply(sizes, kind) if transformed() else sizes.view(kind)
    sizes = bits.clamp(max=infinity + 1)  # all NaN become one number
    if not signed:
        return sizes
    return torch.where(score < 0, -sizes, sizes)


class _Bits(Function):
    """The bits of floats as integers; vmap of PyTorch 2.11 has no rule for a view of that kind."""

    @staticmethod
    def forward(x: Tensor, kind: torch.dtype) -> Tensor:
        return x.view(kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        return _Bits.apply(*args), in_dims[0]


def _candidates(keys: Tensor, n: int) -> Tensor:
    """Return a few of the numbers that include the n largest, by a bound from a sample."""
    sample = keys[::_STRIDE] if on_host(keys) and not transformed() else keys[:0]
    rank = int(1.3 * n / _STRIDE) + 32  # the bound is too high only beyond 5 standard deviations
    if torch.compiler.is_compiling() or 4 * rank > len(sample):
        return keys
    found = keys[keys >= sample.topk(rank).values[-1]]
    return found if len(found) >= n else keys


def _kth_largest(
    keys: Tensor, wanted: Tensor, over_ranks: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Find the `wanted`-th largest integer of all ranks by a radix search on counts of digits.

    Return this integer, and how many of the integers equal to it are wanted.
    """
    widths = (11, 11, 10) if keys.dtype == torch.int32 else (11, 11, 11, 11, 10, 10)
    found = keys.new_zeros(())
    shift = sum(widths)
    lowest = -(2 ** (widths[0] - 1))  # of the first digit, which has the sign
    for place, width in enumerate(widths):
        shift -= width
        counts = torch.zeros(2**width, dtype=torch.int64, device=keys.device)
        # In parts, since the digits of all at once would take eight bytes each.
        size = max(1, len(keys)) if torch.compiler.is_compiling() else 2**20
        for part in cast("tuple[Tensor, ...]", keys.split(size)):
            if place == 0:
                digits = (part >> shift) - lowest
                alike = torch.ones_like(digits)
            else:
                digits = (part >> shift) & (2**width - 1)
                alike = (part >> (shift + width)) == found
            counts = counts.scatter_add(0, digits.long(), alike.long())
        at_least = over_ranks(counts).flip(0).cumsum(0)
        whole = (at_least < wanted).sum().clamp(max=2**width - 1)  # digits kept whole, from the top
        above = at_least.gather(0, (whole - 1).clamp(min=0)[None])[0]
        wanted = wanted - above.where(whole > 0, 0)
        digit = (2**width - 1 - whole).to(keys.dtype)
        found = digit + lowest if place == 0 else (found << width) | digit
    return found, wanted
