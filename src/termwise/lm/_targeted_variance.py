"""Targeted variance: keep the variance of the rows of an embedding at a target."""

from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import _groups
from .._autograd import Function, link_to
from .._contract import contract
from .._groups import ProcessGroup
from .._module import LossModule
from .._numbers import accumulator, blocks, few, lifted, looped
from .._terms import Terms, terms


@terms
class TargetedVarianceTerms(Terms):
    """Terms of [`targeted_variance_loss`][termwise.lm.targeted_variance_loss]."""

    loss: Float[Tensor, ""]
    """coefficient * squared_error."""
    squared_error: Float[Tensor, ""]
    """(variance - target)^2, in units of weight to the fourth."""
    variance: Float[Tensor, ""]
    """Biased variance of a row over its dim, mean over all counted rows on all ranks."""


@contract
def targeted_variance_loss(
    weight: Float[Tensor, "vocab dim"],
    *,
    coefficient: float = 0.1,
    target: float = 1.0,
    valid_rows: Bool[Tensor, " vocab"] | None = None,
    vocab_group: ProcessGroup | None = None,
) -> TargetedVarianceTerms:
    r"""Pull the mean variance of the rows of an embedding matrix to a target.

    $$\mathrm{loss} = c (V - t)^2, \qquad
    V = \frac{1}{|R|} \sum_{r \in R} \frac{1}{d} \sum_j (w_{rj} - \bar{w}_r)^2$$

    over all counted rows R on all ranks, with the biased variance of each row. Inputs in half
    precision are converted to float32, block by block: in bfloat16 a variance of 1.002 would be
    rounded to 1, and loss and gradient would be 0. One pass reads the weight, another writes its
    gradient; no other tensor of its size is allocated.

    Args:
        weight (Float[Tensor, "vocab dim"]): embeddings, a row for each word. A row of width 0 has
            variance 0.
        coefficient: weight of the squared error. 0 removes it, even if it overflows.
        target: target of the variance, in squared units of weight; not negative.
        valid_rows (Bool[Tensor, " vocab"] | None): rows that count. Others (padding up to a round
            number of rows) affect neither value nor gradient, even if they are NaN. None: all rows.
            If no row counts, on any rank, the terms are NaN.
        vocab_group: process group whose ranks hold different rows of the matrix, in any numbers, 0
            included. None: no communication.

    Returns:
        The terms of the whole matrix, the same on every rank. Gradient: each rank gets its shard of
        the gradient of the whole matrix, which is not to be averaged. Second derivatives, in eager
        mode and reverse mode, are correct without a group and raise NotImplementedError with one;
        PyTorch does not support forward mode. Each rank sends one sum of 2 float64 elements. Does
        not synchronize with the device.

    Raises:
        ContractError: weight is not a floating "vocab dim" tensor, or valid_rows not a mask of it.
        ValueError: target is negative, or there is no row and no group.

    References:
        BioNeMo's `SquaredErrorTargetedVarianceLoss` (https://github.com/NVIDIA/bionemo-framework),
        for Evo 2. It averages the ranks' means, which gives rows of a shorter shard more weight and
        counts an empty shard as variance 0; ours is the mean over rows, equal for even shards.

    Examples:
        >>> import torch
        >>> from termwise.lm import targeted_variance_loss
        >>> targeted_variance_loss(torch.tensor([[1.0, 3.0], [0.0, 4.0]]), target=0.5).metrics()
        {'loss': 0.400..., 'squared_error': 4.0, 'variance': 2.5}
    """
    if not target >= 0:
        raise ValueError(f"targeted_variance_loss needs target >= 0, got {target}")
    if vocab_group is None and weight.shape[0] == 0:
        raise ValueError("targeted_variance_loss needs at least 1 row, got 0")

    if few(weight) or torch.compiler.is_compiling():  # a compiler fuses it
        total = _as_written(weight, valid_rows)
    else:
        total, _ = cast("tuple[Tensor, Tensor]", _SumOfVariances.apply(weight, valid_rows))
    count = total.new_full((), weight.shape[0]) if valid_rows is None else valid_rows.sum()
    sums = torch.stack([total, count.to(total.dtype)])
    sums = _groups.terminal_sum(sums, vocab_group, 1.0)
    variance = (sums[0] / sums[1]).to(lifted(weight.new_empty(())).dtype)
    squared_error = (variance - target).square()
    # 0 times an infinite error, or its gradient, is NaN.
    loss = coefficient * squared_error if coefficient != 0 else link_to(weight).to(variance.dtype)
    return TargetedVarianceTerms(loss=loss, squared_error=squared_error, variance=variance)


class TargetedVarianceLoss(LossModule):
    """[`targeted_variance_loss`][termwise.lm.targeted_variance_loss] as a module.

    Examples:
        >>> import torch
        >>> from termwise.lm import TargetedVarianceLoss
        >>> embedding = torch.nn.Embedding(10, 4)
        >>> loss_fn = TargetedVarianceLoss(coefficient=0.1)
        >>> loss_fn(embedding.weight).loss.backward()
    """

    coefficient: float = 0.1
    target: float = 1.0

    def __call__(
        self,
        weight: Float[Tensor, "vocab dim"],
        *,
        valid_rows: Bool[Tensor, " vocab"] | None = None,
        vocab_group: ProcessGroup | None = None,
    ) -> TargetedVarianceTerms:
        """Compute the terms of the loss."""
        return targeted_variance_loss(
            weight,
            valid_rows=valid_rows,
            vocab_group=vocab_group,
            **self.hyperparameters(),
        )


def _as_written(weight: Tensor, valid_rows: Tensor | None) -> Tensor:
    rows = lifted(weight)
    if valid_rows is not None:
        rows = rows.where(valid_rows[:, None], 0)
    if rows.shape[1] == 0:
        return rows.sum(dtype=accumulator(rows))
    return rows.var(1, correction=0).sum(dtype=accumulator(rows))


class _SumOfVariances(Function):
    """Outputs the sum of the rows' variances and, for the backward pass, the rows' means."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, valid_rows: Tensor | None) -> tuple[Tensor, Tensor]:
        variances, means = _row_variances(weight)
        if valid_rows is not None:
            variances = variances.where(valid_rows, 0)
        return variances.sum(dtype=accumulator(variances)), means

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        weight, valid_rows, means = ctx.saved_tensors
        factor = gradients[0] * (2.0 / max(weight.shape[1], 1))
        if not torch.is_grad_enabled():
            return _centred_times(weight, means, valid_rows, factor), None
        # The same as a differentiable expression, for second derivatives.
        upcast = lifted(weight)
        gradient = (upcast - upcast.mean(1, keepdim=True)) * factor.to(upcast.dtype)
        if valid_rows is not None:
            gradient = gradient.where(valid_rows[:, None], 0)
        return gradient.to(weight.dtype), None


@torch.library.custom_op("termwise::row_variances", mutates_args=())
def _row_variances(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the biased variance and the mean of each row, in one pass over blocks in cache."""
    weight = weight.detach()
    vocab, dim = weight.shape
    means = torch.zeros(vocab, dtype=lifted(weight[:0]).dtype, device=weight.device)
    variances = torch.zeros_like(means)
    if dim == 0:
        return variances, means
    for rows in blocks(weight):
        block, mean = lifted(weight[rows]), means[rows]
        torch.mean(block, 1, out=mean)
        centred = block - mean[:, None]
        torch.linalg.vecdot(centred, centred, out=variances[rows])
    return variances.div_(dim), means


@_row_variances.register_fake
def _(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = weight.new_empty(weight.shape[0], dtype=lifted(weight.new_empty(())).dtype)
    return rows, torch.empty_like(rows)


_row_variances.register_vmap(looped(_row_variances))


@torch.library.custom_op("termwise::centred_times", mutates_args=())
def _centred_times(
    weight: Tensor, means: Tensor, valid_rows: Tensor | None, factor: Tensor
) -> Tensor:
    """Return (weight - means) * factor, 0 in rows that do not count, allocating one tensor."""
    product = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for rows in blocks(weight):
        block = lifted(weight[rows])
        if block.dtype == weight.dtype:
            out = torch.sub(block, means[rows, None], out=product[rows]).mul_(factor)
        else:
            out = product[rows].copy_((block - means[rows, None]).mul_(factor))
        if valid_rows is not None:
            out.masked_fill_(~valid_rows[rows, None], 0)
    return product


@_centred_times.register_fake
def _(weight: Tensor, means: Tensor, valid_rows: Tensor | None, factor: Tensor) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


_centred_times.register_vmap(looped(_centred_times))
