"""The TopK objective: a fixed number of active latents, and a loss that revives dead ones."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from .. import _groups
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._numbers import lifted
from .._terms import Terms, terms
from ._shared import (
    FeatureReduction,
    SparseLatents,
    active,
    centred_rows,
    check_latents,
    counted,
    decode,
    means_over_rows,
    residual,
    squared_norm,
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """Numbers of the TopK objective."""

    aux_coeff: float = 1 / 32
    """Weight of the auxiliary loss; 1/32 in the paper."""
    feature_reduction: FeatureReduction = "mean"
    """Over d_model."""
    grad_reduction: GradReduction = "mean"
    """How the trainer combines the ranks' gradients."""


@terms
class TopKTerms(Terms):
    """Terms of [`topk_loss`][termwise.sae.topk_loss]."""

    loss: Float[Tensor, ""]
    """mse + aux_coeff * aux."""
    mse: Float[Tensor, ""]
    """Squared error of the reconstruction: mean (or sum) over features, mean over rows."""
    aux: Float[Tensor, ""]
    """The auxiliary loss that was given, before its coefficient; 0 where none was."""
    l0: Float[Tensor, ""]
    """Latents of a row that are not zero, mean over rows; detached."""
    n_dead: Float[Tensor, ""]
    """How many latents are dead; NaN where `dead` was not given; detached."""


@contract
def topk_loss(
    x: Float[Tensor, "batch d_model"],
    f: Float[Tensor, "batch d_sae"] | SparseLatents,
    x_hat: Float[Tensor, "batch d_model"],
    *,
    aux: Float[Tensor, ""] | None = None,
    aux_coeff: float = 1 / 32,
    dead: Bool[Tensor, " d_sae"] | None = None,
    target: Float[Tensor, "batch d_model"] | None = None,
    mask: Bool[Tensor, " batch"] | None = None,
    feature_reduction: FeatureReduction = "mean",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> TopKTerms:
    r"""Reconstruct activations from few latents, which needs no penalty on them.

    $$\mathrm{loss} = \frac{1}{n} \sum_i \| x_i - \hat{x}_i \|^2 + \alpha \, \mathrm{aux}$$

    over the n rows that count, with the squared norm averaged (or summed) over features.

    Args:
        x (Float[Tensor, "batch d_model"]): activations, a row for each token.
        f (Float[Tensor, "batch d_sae"] | SparseLatents): latents, dense or
            [`SparseLatents`][termwise.sae.SparseLatents], as [`topk`][termwise.sae.topk] and
            [`batch_topk`][termwise.sae.batch_topk] return them.
        x_hat (Float[Tensor, "batch d_model"]): reconstruction of x from f.
        aux (Float[Tensor, ""] | None): what [`auxiliary_k_loss`][termwise.sae.auxiliary_k_loss]
            gave for the same rows and with the same `mask`, `batch_group` and reductions. None: 0.
        aux_coeff: alpha; 1/32 in the paper, for a normalised auxiliary loss.
        dead (Bool[Tensor, " d_sae"] | None): which latents are dead, for `n_dead` alone, the same
            on every rank. Required with aux. None: not known, and `n_dead` is NaN.
        target (Float[Tensor, "batch d_model"] | None): what x_hat is compared with, where that is
            not x: a transcoder. None: x.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others enter no term and no
            gradient. None: all.
        feature_reduction: over d_model, "mean" or "sum".
        batch_group: ranks that hold other rows, in any numbers, 0 included. None: this rank alone,
            nothing is sent.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" or "sum".

    Returns:
        The terms of all rows, the same on every rank. Gradient: combined over ranks as
        `grad_reduction` says, it is the gradient of one process that holds all rows. Sent by each
        rank: one sum of 3 float64 elements. Nothing waits for the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: f has another number of rows than x, or aux is given without dead.

    References:
        Gao et al., Scaling and evaluating sparse autoencoders (2024),
        https://arxiv.org/abs/2406.04093, sections 2.3 and A.2. Their mse is normalised by that of
        predicting the mean: divide by it where their coefficients are to carry over.

    Examples:
        >>> import torch
        >>> from termwise.sae import topk_loss
        >>> x, f = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0]])
        >>> topk_loss(x, f, torch.tensor([[1.0, 0.0]])).metrics()
        {'loss': 2.0, 'mse': 2.0, 'aux': 0.0, 'l0': 2.0, 'n_dead': nan}
    """
    check_latents("topk_loss", f, x.shape[0])
    if aux is not None and dead is None:
        raise ValueError(
            "topk_loss needs dead where aux is given, got None: give the mask of dead latents that "
            "auxiliary_k_loss took"
        )
    error = residual(x if target is None else target, x_hat, mask)
    mse, l0 = means_over_rows(
        [squared_norm(error, feature_reduction), active(counted(f, mask))],
        mask,
        batch_group,
        grad_reduction,
    )
    aux = torch.zeros_like(mse) if aux is None else aux.to(mse.dtype)
    n_dead = torch.full_like(mse, torch.nan) if dead is None else dead.sum().to(mse.dtype)
    loss = mse + aux_coeff * aux
    return TopKTerms(loss=loss, mse=mse, aux=aux, l0=l0.detach(), n_dead=n_dead.detach())


@contract
def auxiliary_k_loss(
    x: Float[Tensor, "batch d_model"],
    x_hat: Float[Tensor, "batch d_model"],
    pre: Float[Tensor, "batch d_sae"],
    W_dec: Float[Tensor, "d_sae d_model"],
    *,
    dead: Bool[Tensor, " d_sae"],
    k_aux: int,
    normalize: bool = True,
    mask: Bool[Tensor, " batch"] | None = None,
    feature_reduction: FeatureReduction = "mean",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> Float[Tensor, ""]:
    r"""Let dead latents explain what the living ones leave over.

    $$\mathrm{aux} = \frac{1}{n} \sum_i \| r_i - \hat{r}_i \|^2 \Big/
    \frac{1}{n} \sum_i \| r_i - \bar{r} \|^2$$

    The residual r = x - x_hat is detached. Its reconstruction is that of the k_aux dead latents
    that are largest in the row, after a ReLU, through the decoder without its bias.

    Args:
        x (Float[Tensor, "batch d_model"]): activations, a row for each token.
        x_hat (Float[Tensor, "batch d_model"]): reconstruction of x. No gradient flows to it.
        pre (Float[Tensor, "batch d_sae"]): latents before any selection, dense.
        W_dec (Float[Tensor, "d_sae d_model"]): decoder, a row for each latent.
        dead (Bool[Tensor, " d_sae"]): which latents are dead, the same on every rank.
        k_aux: how many of them each row uses; d_model / 2 in the paper. If fewer are dead, all.
        normalize: divide by the variance of the residual. Where that is zero but for rounding (one
            row, a constant or no residual) the loss is 0.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others enter neither value nor
            gradient. None: all.
        feature_reduction: over d_model, "mean" or "sum"; normalised, it cancels.
        batch_group: ranks that hold other rows. None: this rank alone, nothing is sent.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" or "sum".

    Returns:
        Float[Tensor, ""]: the loss of all rows, the same on every rank; 0, with zero gradients,
        where no latent is dead. Gradient, for pre and W_dec: as `grad_reduction` says. Sent by each
        rank: sums of d_model + 1 (normalised) and 3 elements. Nothing waits for the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: k_aux is less than 1.

    References:
        Gao et al., https://arxiv.org/abs/2406.04093, section A.2. We side with the paper: the
        reconstruction of the residual has no bias. Their code replaces a NaN by 0 after the
        division; here nothing is divided by zero.

    Examples:
        >>> import torch
        >>> from termwise.sae import auxiliary_k_loss
        >>> x, pre = torch.tensor([[2.0], [0.0]]), torch.tensor([[9.0, 1.0], [9.0, 0.0]])
        >>> W_dec, dead = torch.tensor([[1.0], [2.0]]), torch.tensor([False, True])
        >>> auxiliary_k_loss(x, torch.zeros(2, 1), pre, W_dec, dead=dead, k_aux=1)
        tensor(0.)
    """
    if k_aux < 1:
        raise ValueError(f"auxiliary_k_loss needs k_aux >= 1, got {k_aux}")
    left = residual(x, x_hat, mask).detach()
    pre = cast("Tensor", counted(pre, mask))
    chosen = topk(pre.masked_fill(~dead, -torch.inf), k=min(k_aux, pre.shape[1]))
    explained = decode(chosen, W_dec)
    error = squared_norm(left - explained, feature_reduction)
    if not normalize:
        (aux,) = means_over_rows([error], mask, batch_group, grad_reduction)
        return aux.where(dead.any(), 0)
    spread = squared_norm(centred_rows(left, mask, batch_group), feature_reduction)
    size = squared_norm(left, feature_reduction)
    aux, variance, square = means_over_rows(
        [error, spread, size], mask, batch_group, grad_reduction
    )
    rounding = (8 * torch.finfo(variance.dtype).eps) ** 2 * square
    # Not `variance <= rounding`: a variance that is NaN stays one.
    defined = dead.any() & ~(variance.detach() <= rounding.detach())
    return (aux / variance.detach().where(defined, 1)).where(defined, 0)


@contract
def topk(pre: Float[Tensor, "batch d_sae"], *, k: int) -> SparseLatents:
    """Keep the k largest latents of each row, after a ReLU.

    Args:
        pre (Float[Tensor, "batch d_sae"]): latents before any selection.
        k: how many to keep, at most d_sae.

    Returns:
        The kept latents, largest first. The gradient reaches those that are positive.

    Raises:
        ValueError: k is not in 1..d_sae.

    References:
        Gao et al., https://arxiv.org/abs/2406.04093, with the ReLU of their code.

    Examples:
        >>> import torch
        >>> from termwise.sae import topk
        >>> topk(torch.tensor([[3.0, -1.0, 5.0]]), k=2).indices
        tensor([[2, 0]])
    """
    if not 1 <= k <= pre.shape[1]:
        raise ValueError(f"topk needs k from 1 to {pre.shape[1]}, got {k}")
    values, indices = pre.topk(k, dim=1)
    return SparseLatents(values.relu(), indices)


@contract
def batch_topk(
    pre: Float[Tensor, "batch d_sae"],
    *,
    k: int,
    mask: Bool[Tensor, " batch"] | None = None,
    batch_group: ProcessGroup | None = None,
) -> Float[Tensor, "batch d_sae"]:
    """Keep the k * batch largest latents of the whole batch, after a ReLU.

    A row may keep more than k or fewer. The batch is that of all ranks, without the rows that do
    not count; exactly k of its latents are kept for each of its rows, ties included: they go to
    the lower rank and the earlier place.

    Args:
        pre (Float[Tensor, "batch d_sae"]): latents before any selection.
        k: how many to keep, on average over rows; at most d_sae.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others keep nothing. None: all.
        batch_group: ranks that hold other rows, in any numbers, 0 included. None: this rank alone,
            nothing is sent.

    Returns:
        Float[Tensor, "batch d_sae"]: the latents, with zeros where they are not kept. Fewer than k
        * batch are not zero where fewer are positive. Sent by each rank: sums of 2048 integers, 3
        of them for float32 (6 for float64), and the rank's number of ties and rows. Nothing waits
        for the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: k is not in 1..d_sae.

    References:
        Bussmann et al., BatchTopK Sparse Autoencoders (2024), https://arxiv.org/abs/2412.06410.

    Examples:
        >>> import torch
        >>> from termwise.sae import batch_topk
        >>> batch_topk(torch.tensor([[3.0, 4.0], [1.0, 2.0]]), k=1)
        tensor([[3., 4.],
                [0., 0.]])
    """
    if not 1 <= k <= pre.shape[1]:
        raise ValueError(f"batch_topk needs k from 1 to {pre.shape[1]}, got {k}")

    def over_ranks(counts: Tensor) -> Tensor:
        return counts if batch_group is None else _groups.all_reduce(counts, batch_group.group_name)

    # The bits of a float that is not negative, read as an integer, are in the float's order. A
    # radix search over them finds the last value to be kept from counts alone.
    latents = pre.relu()
    bits = lifted(latents.detach()).view(torch.int64 if pre.dtype == torch.float64 else torch.int32)
    if mask is not None:
        bits = bits.masked_fill(~mask[:, None], -1)
    bits = bits.flatten()
    if mask is None and batch_group is None and len(bits):
        largest = bits.topk(k * pre.shape[0]).values
        last = largest[-1]
        ties_wanted = (largest == last).sum()
    else:
        rows = bits.new_full((), pre.shape[0]) if mask is None else mask.sum()
        wanted = over_ranks(rows.to(torch.int64)) * k
        last, ties_wanted = _last_kept(bits, wanted, over_ranks)
    tied = bits == last
    before: Tensor | int = 0
    if batch_group is not None:
        ties = _groups.each_rank(tied.sum(), batch_group)
        before = ties.cumsum(0)[batch_group.rank()] - ties[batch_group.rank()]
    kept_ties = tied & (tied.cumsum(0) + before <= ties_wanted)
    return latents.where(((bits > last) | kept_ties).view(pre.shape), 0)


def _last_kept(
    bits: Tensor, wanted: Tensor, over_ranks: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Find the wanted-th largest of all ranks' numbers, digit by digit, from counts of digits.

    Returns that number, and how many of its equals are wanted. Negative numbers do not count.
    """
    widths = (11, 10, 10) if bits.dtype == torch.int32 else (11, 11, 11, 10, 10, 10)
    found = bits.new_zeros(())
    shift = sum(widths)
    for width in widths:
        shift -= width
        counts = torch.zeros(2**width, dtype=torch.int64, device=bits.device)
        # In parts, for the digits of all at once would take eight bytes each.
        size = max(1, len(bits)) if torch.compiler.is_compiling() else 2**20
        for part in cast("tuple[Tensor, ...]", bits.split(size)):
            digits = (part >> shift) & (2**width - 1)
            alike = (part >> (shift + width)) == found
            counts = counts.scatter_add(0, digits.long(), alike.long())
        at_least = over_ranks(counts).flip(0).cumsum(0)
        whole = (at_least < wanted).sum().clamp(max=2**width - 1)  # digits kept whole, from the top
        above = at_least.gather(0, (whole - 1).clamp(min=0)[None])[0]
        wanted = wanted - above.where(whole > 0, 0)
        found = (found << width) | (2**width - 1 - whole).to(bits.dtype)
    return found, wanted


class TopKObjective(nn.Module):
    """[`topk_loss`][termwise.sae.topk_loss] with its numbers held, as a frozen config."""

    @contract
    def __init__(self, cfg: TopK) -> None:
        super().__init__()
        self.cfg = cfg

    def forward(
        self,
        x: Float[Tensor, "batch d_model"],
        f: Float[Tensor, "batch d_sae"] | SparseLatents,
        x_hat: Float[Tensor, "batch d_model"],
        *,
        aux: Float[Tensor, ""] | None = None,
        dead: Bool[Tensor, " d_sae"] | None = None,
        target: Float[Tensor, "batch d_model"] | None = None,
        mask: Bool[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> TopKTerms:
        """Compute the terms of the objective."""
        return topk_loss(
            x,
            f,
            x_hat,
            aux=aux,
            aux_coeff=self.cfg.aux_coeff,
            dead=dead,
            target=target,
            mask=mask,
            feature_reduction=self.cfg.feature_reduction,
            batch_group=batch_group,
            grad_reduction=self.cfg.grad_reduction,
        )

    if TYPE_CHECKING:  # nn.Module's own says that a call gives Any

        def __call__(
            self,
            x: Float[Tensor, "batch d_model"],
            f: Float[Tensor, "batch d_sae"] | SparseLatents,
            x_hat: Float[Tensor, "batch d_model"],
            *,
            aux: Float[Tensor, ""] | None = None,
            dead: Bool[Tensor, " d_sae"] | None = None,
            target: Float[Tensor, "batch d_model"] | None = None,
            mask: Bool[Tensor, " batch"] | None = None,
            batch_group: ProcessGroup | None = None,
        ) -> TopKTerms:
            """Compute the terms of the objective."""
            ...

    def extra_repr(self) -> str:
        """Show the numbers in `print(module)`."""
        return repr(self.cfg)
