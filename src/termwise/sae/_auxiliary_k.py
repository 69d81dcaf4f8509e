"""AuxK: train dead latents to reconstruct the residual, so that they become active again."""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import means_over_rows
from .._numbers import lifted
from ._latents import Latents, SparseLatents, check_latents, counted, decode
from ._prefixes import check_prefixes
from ._selection import Activation, ranked_by, topk
from ._squared_errors import (
    FeatureReduction,
    centred_rows,
    residual,
    rows_that_count,
    squared_norm,
    wide_squared_norm,
)

AuxNormalization = Literal["residual", "target", "none"]


@contract
def auxiliary_k_loss(
    x: Float[Tensor, "batch d_model"],
    x_hat: Float[Tensor, "batch d_model"],
    pre: Float[Tensor, "batch d_sae"],
    W_dec: Float[Tensor, "d_sae d_model"],
    *,
    dead: Bool[Tensor, " d_sae"],
    k_aux: int,
    activation: Activation = "relu",
    normalize: AuxNormalization = "residual",
    scale_by_count: bool = False,
    detach_residual: bool = True,
    target: Float[Tensor, "batch d_model"] | None = None,
    mask: Bool[Tensor, " batch"] | None = None,
    feature_reduction: FeatureReduction = "mean",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> Float[Tensor, ""]:
    r"""Compute the error of reconstructing the residual from dead latents.

    $$\mathrm{aux} = \frac{s}{n} \sum_i \| r_i - \hat{r}_i \|^2 \Big/
    \frac{1}{n} \sum_i \| r_i - \bar{r} \|^2$$

    Training with this term makes dead latents active again. The residual is r = x - x_hat. Its
    reconstruction uses the k_aux dead latents that are largest in the row, after the activation,
    and the decoder without its bias. The factor s is 1, or min(n_dead / k_aux, 1) with
    `scale_by_count`.

    Args:
        x (Float[Tensor, "batch d_model"]): activations, a row for each token.
        x_hat (Float[Tensor, "batch d_model"]): reconstruction of x.
        pre (Float[Tensor, "batch d_sae"]): latents before any selection, dense.
        W_dec (Float[Tensor, "d_sae d_model"]): decoder, a row for each latent.
        dead (Bool[Tensor, " d_sae"]): which latents are dead, the same on every rank.
        k_aux: number of dead latents that each row uses; d_model / 2 in the paper. If fewer are
            dead, all are used.
        activation: "relu" ranks dead latents by max(0, pre) and decodes these values (the paper,
            dictionary_learning, sparsify); "none" ranks and decodes pre (SAELens, saev); "abs"
            ranks by |pre| and decodes pre (AbsTopK).
        normalize: divide the squared error by the variance of the residual ("residual"), by that of
            the target ("target", sparsify), or by nothing ("none", SAELens, BatchTopK's code). The
            ratio neither overflows nor underflows. If the variance is zero up to rounding (one row,
            constant rows) the loss is 0.
        scale_by_count: whether to multiply by min(n_dead / k_aux, 1), so that a few dead latents
            are not trained to reconstruct the whole residual (SAELens, sparsify).
        detach_residual: whether to detach the residual and the variance, so that x, x_hat and
            target get no gradient. False: they get the gradient of the formula (BatchTopK's code).
        target (Float[Tensor, "batch d_model"] | None): what x_hat reconstructs, if that is not x (a
            transcoder). None: x.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others affect no term and no
            gradient, even if they are NaN. None: all.
        feature_reduction: over d_model, "mean" or "sum"; if normalized, it cancels.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        Float[Tensor, ""]: the loss of all rows, the same on every rank; 0, with zero gradients, if
        no latent is dead. Gradients with respect to pre and W_dec (and the residual if it is not
        detached), combined over ranks as `grad_reduction` says, equal those of one process. Second
        derivatives are correct without a group and raise NotImplementedError with one.
        Communication: one all-reduce of 2 elements; if normalized, one of d_model + 1 and one of 4.
        Does not synchronize with the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: k_aux is less than 1.

    References:
        Gao et al., https://arxiv.org/abs/2406.04093, section A.2. We side with the paper: the
        reconstruction of the residual has no bias. Their code replaces NaN by 0 after the division;
        here no division by zero occurs.

    Examples:
        >>> import torch
        >>> from termwise.sae import auxiliary_k_loss
        >>> x, x_hat = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
        >>> pre, dead = torch.tensor([[-2.0, -1.0]]), torch.tensor([True, True])
        >>> for activation in ("relu", "none", "abs"):
        ...     auxiliary_k_loss(
        ...         x,
        ...         x_hat,
        ...         pre,
        ...         torch.eye(2),
        ...         dead=dead,
        ...         k_aux=1,
        ...         activation=activation,
        ...         normalize="none",
        ...         feature_reduction="sum",
        ...     )
        tensor(1.)
        tensor(2.)
        tensor(1.)
    """
    if k_aux < 1:
        raise ValueError(f"auxiliary_k_loss needs k_aux >= 1, got {k_aux}")
    goal = x if target is None else target
    left = residual(goal, x_hat, mask)
    if detach_residual:
        goal, left = goal.detach(), left.detach()
    pre = cast("Tensor", counted(pre, mask))
    score = ranked_by(pre.detach(), activation).masked_fill(~dead, -torch.inf)
    chosen = topk(pre, k=min(k_aux, pre.shape[1]), score=score, activation=activation)
    # If fewer than k_aux are dead, live latents are among those chosen.
    is_dead = dead.index_select(0, chosen.indices.flatten()).view_as(chosen.indices)
    explained = decode(SparseLatents(chosen.values.where(is_dead, 0), chosen.indices), W_dec)
    unexplained = left - explained
    if normalize == "none":
        error = squared_norm(unexplained, feature_reduction)
        (aux,) = means_over_rows([error], mask, batch_group, grad_reduction)
        defined = dead.any()
    else:
        rows = left if normalize == "residual" else rows_that_count(goal, mask)
        # In the wider dtype, squares of values of the narrower one cannot overflow. The reduction
        # over features cancels.
        parts = (unexplained, centred_rows(rows, mask, batch_group), rows.detach())
        aux, variance, size = means_over_rows(
            [wide_squared_norm(part) for part in parts], mask, batch_group, grad_reduction
        )
        rounding = (8 * torch.finfo(rows.dtype).eps) ** 2 * size
        # Not `variance <= rounding`, so that a variance of NaN remains NaN.
        defined = dead.any() & ~(variance.detach() <= rounding.detach())
        aux = (aux / variance.where(defined, 1)).to(unexplained.dtype)
    if scale_by_count:
        aux = aux * (dead.sum().to(aux.dtype) / k_aux).clamp(max=1)
    return aux.where(defined, 0)


@contract
def matryoshka_auxiliary_k_loss(
    x: Float[Tensor, "batch d_model"],
    f: Float[Tensor, "batch d_sae"] | SparseLatents,
    pre: Float[Tensor, "batch d_sae"],
    W_dec: Float[Tensor, "d_sae d_model"],
    b_dec: Float[Tensor, " d_model"] | None,
    *,
    prefixes: Sequence[int],
    dead: Bool[Tensor, " d_sae"],
    k_aux: int,
    activation: Activation = "relu",
    normalize: AuxNormalization = "residual",
    scale_by_count: bool = False,
    target: Float[Tensor, "batch d_model"] | None = None,
    mask: Bool[Tensor, " batch"] | None = None,
    feature_reduction: FeatureReduction = "mean",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> Float[Tensor, ""]:
    r"""Compute AuxK for each Matryoshka level, from its dead latents and its prefix's residual.

    $$\mathrm{aux} = \sum_m \mathrm{AuxK}(x - \hat{x}^m, \; \{ j \text{ dead}, \;
    m' \le j < m \})$$

    over the prefixes m, each after m': the sum of
    [`auxiliary_k_loss`][termwise.sae.auxiliary_k_loss] for each level's residual and the latents
    that the level adds. A level without dead latents adds 0. Every residual is detached.

    Args:
        x (Float[Tensor, "batch d_model"]): activations, a row for each token.
        f (Float[Tensor, "batch d_sae"] | SparseLatents): latents, as
            [`matryoshka_loss`][termwise.sae.matryoshka_loss] takes them. No gradient flows to them.
        pre (Float[Tensor, "batch d_sae"]): latents before any selection, dense.
        W_dec (Float[Tensor, "d_sae d_model"]): decoder, a row for each latent.
        b_dec (Float[Tensor, " d_model"] | None): bias of every prefix's reconstruction. None: 0.
        prefixes: strictly increasing lengths in 0..d_sae, as in `matryoshka_loss`; 0 adds nothing.
        dead (Bool[Tensor, " d_sae"]): which latents are dead, the same on every rank.
        k_aux: number of a level's dead latents that each row uses.
        activation: as in `auxiliary_k_loss`.
        normalize: as in `auxiliary_k_loss`, for each level separately.
        scale_by_count: whether to multiply each level by min(n_dead / k_aux, 1), with the dead
            latents of the level.
        target (Float[Tensor, "batch d_model"] | None): what is reconstructed, if that is not x.
            None: x.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others affect no term and no
            gradient, even if they are NaN. None: all.
        feature_reduction: over d_model, "mean" or "sum"; if normalized, it cancels.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        Float[Tensor, ""]: the sum over levels, for `matryoshka_loss(aux=...)`. Gradients with
        respect to pre and W_dec, and communication, are those of `auxiliary_k_loss`, once for each
        level.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: k_aux is less than 1, or prefixes do not increase strictly within 0..d_sae.

    References:
        SAELens 6.54, https://github.com/decoderesearch/SAELens, `use_matryoshka_aux_loss`: with
        `activation="none"`, `normalize="none"`, `scale_by_count=True` and
        `feature_reduction="sum"`.

    Examples:
        >>> import torch
        >>> from termwise.sae import matryoshka_auxiliary_k_loss
        >>> x, f = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> matryoshka_auxiliary_k_loss(
        ...     x,
        ...     f,
        ...     torch.tensor([[1.0, 0.5]]),
        ...     torch.eye(2),
        ...     None,
        ...     prefixes=(1, 2),
        ...     dead=torch.tensor([False, True]),
        ...     k_aux=1,
        ...     normalize="none",
        ...     feature_reduction="sum",
        ... )
        tensor(4.2500)
    """
    cuts = check_prefixes("matryoshka_auxiliary_k_loss", prefixes, W_dec.shape[0])
    check_latents("matryoshka_auxiliary_k_loss", f, x.shape[0], mask=mask, d_sae=W_dec.shape[0])
    f = counted(f, mask)
    start = torch.zeros_like(x[:1]) if b_dec is None else b_dec.detach()[None]
    x_hat = lifted(start).expand(x.shape)
    aux: Tensor | None = None
    for low, high in zip((0, *cuts[:-1]), cuts, strict=True):
        if low == high:
            continue
        x_hat = x_hat + _decoded_block(f, W_dec, low, high)
        level = auxiliary_k_loss(
            x,
            x_hat,
            pre[:, low:high],
            W_dec[low:high],
            dead=dead[low:high],
            k_aux=k_aux,
            activation=activation,
            normalize=normalize,
            scale_by_count=scale_by_count,
            target=target,
            mask=mask,
            feature_reduction=feature_reduction,
            batch_group=batch_group,
            grad_reduction=grad_reduction,
        )
        aux = level if aux is None else aux + level
    return x_hat.new_zeros(()) if aux is None else aux


def _decoded_block(f: Latents, W_dec: Tensor, low: int, high: int) -> Tensor:
    """Return the contribution of some of the latents to a reconstruction, without a gradient."""
    if not isinstance(f, SparseLatents):
        return decode(f[:, low:high].detach(), W_dec[low:high].detach())
    within = (f.indices >= low) & (f.indices < high)
    return decode(SparseLatents(f.values.detach().where(within, 0), f.indices), W_dec.detach())
