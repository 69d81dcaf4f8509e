"""Measurements of a reconstruction: errors, explained variance, recovered loss."""

import dataclasses
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .. import _groups
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import means_over_rows
from .._numbers import accumulator, lifted
from ._squared_errors import (
    centred_rows,
    exponents,
    residual,
    rows_that_count,
    scaled,
    squared_norm,
    wide_squared_norm,
)


@contract
def mean_squared_err(
    x_hat: Float[Tensor, "*batch d"], x: Float[Tensor, "*batch d"], norm: bool = False
) -> Float[Tensor, "*batch d"]:
    """Compute the squared error of each element, without a mean.

    The reconstruction is the first argument, unlike in the objectives of this family, as in the
    function of saev that it replaces.

    Args:
        x_hat (Float[Tensor, "*batch d"]): reconstruction.
        x (Float[Tensor, "*batch d"]): what it is compared with.
        norm: whether to divide each row by the squared norm of the row of x, without overflow or
            underflow at any magnitude. A row of zeros then gives inf or NaN.

    Returns:
        Float[Tensor, "*batch d"]: squared errors in float32 (float64 for float64), finite wherever
        float32 can represent them. Nothing is rescaled by a maximum of the batch, so no row depends
        on another.

    References:
        saev's function of this name divides by the norm, not its square; ours is invariant to
        scaling x and x_hat together.

    Examples:
        >>> import torch
        >>> from termwise.sae import mean_squared_err
        >>> mean_squared_err(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]))
        tensor([9., 4.])
    """
    x_hat, x = lifted(x_hat), lifted(x)
    if not norm:
        return (x_hat - x).square()
    exponent = exponents(x)
    x_hat, x = scaled(x_hat, -exponent), scaled(x, -exponent)
    return (x_hat - x).square() / x.square().sum(-1, keepdim=True)


@contract
def normalized_mse(
    x: Float[Tensor, "batch d_model"],
    x_hat: Float[Tensor, "batch d_model"],
    *,
    mask: Bool[Tensor, " batch"] | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> Float[Tensor, ""]:
    r"""Compute the squared error of each row divided by its squared norm, averaged over rows.

    $$\frac{1}{n} \sum_i \| x_i - \hat{x}_i \|^2 / \| x_i \|^2$$

    A row of zeros that counts makes the result inf or NaN. Nothing overflows or underflows, since
    each row is first scaled by a power of two.

    Args:
        x (Float[Tensor, "batch d_model"]): activations.
        x_hat (Float[Tensor, "batch d_model"]): their reconstruction.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others affect no term and no
            gradient, even if they are NaN. None: all.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        Float[Tensor, ""]: the mean over the rows that count, on all ranks.

    Examples:
        >>> import torch
        >>> from termwise.sae import normalized_mse
        >>> normalized_mse(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, -1.0]]))
        tensor(1.)
    """
    x, x_hat = rows_that_count(x, mask), rows_that_count(x_hat, mask)
    exponent = exponents(x)
    x, x_hat = scaled(x, -exponent), scaled(x_hat, -exponent)
    size = squared_norm(x, "sum")
    if mask is not None:
        size = size.where(mask, 1)
    ratio = squared_norm(x - x_hat, "sum") / size
    return means_over_rows([ratio], mask, batch_group, grad_reduction)[0]


@contract
def fraction_of_variance_unexplained(
    x: Float[Tensor, "batch d_model"],
    x_hat: Float[Tensor, "batch d_model"],
    *,
    reduction: Literal["ratio_of_sums", "mean_of_ratios"] = "ratio_of_sums",
    mask: Bool[Tensor, " batch"] | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> Float[Tensor, ""]:
    r"""Compute the error of a reconstruction divided by that of predicting the mean.

    $$\mathrm{FVU} = \frac{\sum_i \| x_i - \hat{x}_i \|^2}{\sum_i \| x_i - \bar{x} \|^2}
    \quad \mathrm{or} \quad
    \frac{1}{n} \sum_i \frac{\| x_i - \hat{x}_i \|^2}{\| x_i - \bar{x} \|^2}$$

    over the n rows that count, on all ranks. The numerator is the squared error, not the variance
    of the error, so a constant offset counts. For many batches, add up
    [`VarianceStatistics`][termwise.sae.VarianceStatistics] instead of averaging.

    Args:
        x (Float[Tensor, "batch d_model"]): activations.
        x_hat (Float[Tensor, "batch d_model"]): their reconstruction.
        reduction: "ratio_of_sums", or "mean_of_ratios" over rows, where rows near the mean have a
            large weight.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others affect no term and no
            gradient, even if they are NaN. None: all.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        Float[Tensor, ""]: the fraction, 1 for predicting the mean; the same on every rank. x_hat
        gets a gradient, and x one through the error only: the mean and the variance of x are
        detached. NaN or inf if x has no variance.

    Examples:
        >>> import torch
        >>> from termwise.sae import fraction_of_variance_unexplained
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> fraction_of_variance_unexplained(x, x + 2)
        tensor(4.)
    """
    error = wide_squared_norm(residual(x, x_hat, mask))
    spread = wide_squared_norm(centred_rows(rows_that_count(x.detach(), mask), mask, batch_group))
    narrow = lifted(x[:0]).dtype
    if reduction == "mean_of_ratios":
        spread = spread if mask is None else spread.where(mask, 1)
        (ratio,) = means_over_rows([error / spread], mask, batch_group, grad_reduction)
        return ratio.to(narrow)
    error, spread = means_over_rows([error, spread], mask, batch_group, grad_reduction)
    return (error / spread).to(narrow)


@contract
def explained_variance(
    x: Float[Tensor, "batch d_model"],
    x_hat: Float[Tensor, "batch d_model"],
    *,
    reduction: Literal["ratio_of_sums", "mean_of_ratios"] = "ratio_of_sums",
    mask: Bool[Tensor, " batch"] | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> Float[Tensor, ""]:
    """Compute the fraction of variance that a reconstruction explains.

    This is 1 - [`fraction_of_variance_unexplained`][termwise.sae.fraction_of_variance_unexplained].

    Args:
        x (Float[Tensor, "batch d_model"]): activations.
        x_hat (Float[Tensor, "batch d_model"]): their reconstruction.
        reduction: "ratio_of_sums" or "mean_of_ratios" over rows.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others affect no term and no
            gradient, even if they are NaN. None: all.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        Float[Tensor, ""]: the fraction, 1 for a perfect reconstruction, 0 for predicting the mean,
        without a lower bound.

    Examples:
        >>> import torch
        >>> from termwise.sae import explained_variance
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> explained_variance(x, x.mean(0).expand(2, 1))
        tensor(0.)
    """
    return 1 - fraction_of_variance_unexplained(
        x,
        x_hat,
        reduction=reduction,
        mask=mask,
        batch_group=batch_group,
        grad_reduction=grad_reduction,
    )


@contract
def cosine_similarity(
    x: Float[Tensor, "batch d_model"],
    x_hat: Float[Tensor, "batch d_model"],
    *,
    mask: Bool[Tensor, " batch"] | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> Float[Tensor, ""]:
    """Compute the cosine similarity of each row and its reconstruction, averaged over rows.

    Args:
        x (Float[Tensor, "batch d_model"]): activations.
        x_hat (Float[Tensor, "batch d_model"]): their reconstruction. A row of zeros has cosine 0.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others affect no term and no
            gradient, even if they are NaN. None: all.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        Float[Tensor, ""]: the mean over the rows that count, on all ranks.

    Examples:
        >>> import torch
        >>> from termwise.sae import cosine_similarity
        >>> cosine_similarity(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor(0.6000)
    """
    left, right = (rows_that_count(rows, mask) for rows in (x, x_hat))
    left, right = (scaled(rows, -exponents(rows)) for rows in (left, right))
    cosine = F.cosine_similarity(left, right, dim=1)
    return means_over_rows([cosine], mask, batch_group, grad_reduction)[0]


@contract
def loss_recovered(
    loss: Float[Tensor, "*batch"],
    original_loss: Float[Tensor, "*batch"],
    ablated_loss: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """Return the fraction of a model's loss that is recovered with the reconstruction patched in.

    (ablated_loss - loss) / (ablated_loss - original_loss): 1 if patching does not change the loss,
    0 if it is as bad as ablating. Average the losses first: a mean of fractions is a different
    number.

    Args:
        loss (Float[Tensor, "*batch"]): loss of the model with the reconstruction patched in.
        original_loss (Float[Tensor, "*batch"]): loss of the original model.
        ablated_loss (Float[Tensor, "*batch"]): loss of the model with the activations set to zero,
            or to their mean.

    Returns:
        Float[Tensor, "*batch"]: the fraction; inf or NaN if ablating does not change the loss.

    Examples:
        >>> import torch
        >>> from termwise.sae import loss_recovered
        >>> loss_recovered(torch.tensor(3.5), torch.tensor(3.0), torch.tensor(5.0))
        tensor(0.7500)
    """
    ablated = lifted(ablated_loss)
    return (ablated - lifted(loss)) / (ablated - lifted(original_loss))


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class VarianceStatistics:
    """Count, sum and sum of squares of rows, in float64; they add up over batches.

    Examples:
        >>> import torch
        >>> from termwise.sae import VarianceStatistics
        >>> x, x_hat = torch.tensor([[1.0], [3.0], [8.0]]), torch.tensor([[1.0], [3.0], [5.0]])
        >>> seen = VarianceStatistics.of(x[:2]) + VarianceStatistics.of(x[2:])
        >>> errors = VarianceStatistics.of(x - x_hat)
        >>> seen.fraction_unexplained(errors)
        tensor(0.3462, dtype=torch.float64)
    """

    count: Float[Tensor, ""]
    """Number of rows."""
    sum: Float[Tensor, " d"]
    """Float[Tensor, " d"]: sum of the rows."""
    sum_of_squares: Float[Tensor, " d"]
    """Float[Tensor, " d"]: sum of their squares."""

    @classmethod
    @contract
    def of(cls, x: Float[Tensor, "batch d"], *, mask: Bool[Tensor, " batch"] | None = None) -> Self:
        """Return the statistics of the rows that count, detached."""
        rows = x.detach().to(accumulator(x))
        rows = rows if mask is None else rows.where(mask[:, None], 0)
        count = rows.new_full((), x.shape[0]) if mask is None else mask.sum().to(rows.dtype)
        return cls(count=count, sum=rows.sum(0), sum_of_squares=rows.square().sum(0))

    def __add__(self, other: Self) -> Self:
        return dataclasses.replace(
            self,
            count=self.count + other.count,
            sum=self.sum + other.sum,
            sum_of_squares=self.sum_of_squares + other.sum_of_squares,
        )

    def over_ranks(self, batch_group: ProcessGroup | None) -> Self:
        """Return the sum of the statistics over ranks, the same on every rank."""
        if batch_group is None:
            return self
        flat = torch.cat([self.count[None], self.sum, self.sum_of_squares])
        flat = _groups.all_reduce(flat, batch_group.group_name)
        d = len(self.sum)
        return dataclasses.replace(
            self, count=flat[0], sum=flat[1 : d + 1], sum_of_squares=flat[d + 1 :]
        )

    @property
    def variance(self) -> Float[Tensor, " d"]:
        """Biased variance of each column."""
        return self.sum_of_squares / self.count - (self.sum / self.count).square()

    def fraction_unexplained(self, errors: Self) -> Float[Tensor, ""]:
        """Return the FVU from the statistics of x (these) and of x - x_hat."""
        return (errors.sum_of_squares.sum() / errors.count) / self.variance.sum()
