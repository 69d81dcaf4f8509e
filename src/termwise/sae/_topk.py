"""The TopK objective: a fixed number of active latents, and a loss that revives dead ones."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .. import _groups
from .._coefficients import attached, weighted
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule, keyword_fields
from .._numbers import accumulator, lifted
from .._terms import Terms, terms
from ._prefixes import check_prefixes
from ._shared import (
    Latents,
    SparseLatents,
    active,
    check_latents,
    counted,
    decode,
    means_over_rows,
)
from ._squared_errors import (
    FeatureReduction,
    centred_rows,
    residual,
    rows_that_count,
    squared_norm,
    wide_squared_norm,
)

Activation = Literal["relu", "none", "abs"]
AuxNormalization = Literal["residual", "target", "none"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """Config of the TopK objective: the hyperparameters of its loss."""

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
    """The auxiliary loss that was given, before its coefficient; 0 where none was. Detached if its
    coefficient is exactly 0.0."""
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
    aux_coeff: float | Float[Tensor, ""] = 1 / 32,
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
        aux_coeff (float | Float[Tensor, ""]): alpha; 1/32 in the paper, for a normalised auxiliary
            loss. Exactly 0.0 leaves aux out of the loss and of the gradient, even if it is
            infinite. A tensor, on the device of x, may change at each step without recompiling; it
            is never read, and multiplies.
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
    check_latents("topk_loss", f, x.shape[0], mask=mask)
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
    aux = torch.zeros_like(mse) if aux is None else attached(aux, aux_coeff).to(mse.dtype)
    n_dead = torch.full_like(mse, torch.nan) if dead is None else dead.sum().to(mse.dtype)
    loss = mse + weighted(aux_coeff, aux)
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
    r"""Let dead latents explain what the living ones leave over.

    $$\mathrm{aux} = \frac{s}{n} \sum_i \| r_i - \hat{r}_i \|^2 \Big/
    \frac{1}{n} \sum_i \| r_i - \bar{r} \|^2$$

    The residual is r = x - x_hat. Its reconstruction is that of the k_aux dead latents that are
    largest in the row, after the activation, through the decoder without its bias. The factor s is
    1, or min(n_dead / k_aux, 1) with `scale_by_count`.

    Args:
        x (Float[Tensor, "batch d_model"]): activations, a row for each token.
        x_hat (Float[Tensor, "batch d_model"]): reconstruction of x.
        pre (Float[Tensor, "batch d_sae"]): latents before any selection, dense.
        W_dec (Float[Tensor, "d_sae d_model"]): decoder, a row for each latent.
        dead (Bool[Tensor, " d_sae"]): which latents are dead, the same on every rank.
        k_aux: how many of them each row uses; d_model / 2 in the paper. If fewer are dead, all.
        activation: what dead latents are ranked by and decoded with: "relu", max(0, pre) for both
            (the paper, dictionary_learning, sparsify); "none", pre for both (SAELens, saev);
            "abs", ranked by |pre| and decoded with pre (AbsTopK).
        normalize: what the squared error is divided by: "residual", the variance of the residual;
            "target", that of the target (sparsify); or "none", nothing (SAELens, BatchTopK's
            code). The ratio is right for rows of any size. Where the variance is zero but for
            rounding (one row, constant rows) the loss is 0.
        scale_by_count: multiply by min(n_dead / k_aux, 1), so that few dead latents are not asked
            to explain all of the residual (SAELens, sparsify).
        detach_residual: hold the residual and the variance constant: no gradient reaches x, x_hat
            or target. False: the gradient is that of the formula, in them too (BatchTopK's code).
        target (Float[Tensor, "batch d_model"] | None): what x_hat reconstructs, where that is not
            x: a transcoder. None: x.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others enter neither value nor
            gradient. None: all.
        feature_reduction: over d_model, "mean" or "sum"; normalised, it cancels.
        batch_group: ranks that hold other rows. None: this rank alone, nothing is sent.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" or "sum".

    Returns:
        Float[Tensor, ""]: the loss of all rows, the same on every rank; 0, with zero gradients,
        where no latent is dead. Gradient, for pre and W_dec (and the residual where it is not
        detached): as `grad_reduction` says. Second derivatives are right on one rank and refused
        over a group (`NotImplementedError`). Sent by each rank: sums of d_model + 1 (normalised)
        and 3 elements. Nothing waits for the device.

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
    score = _ranked_by(pre.detach(), activation).masked_fill(~dead, -torch.inf)
    chosen = topk(pre, k=min(k_aux, pre.shape[1]), score=score, activation=activation)
    # Where fewer than k_aux are dead, living ones are among the chosen.
    is_dead = dead.index_select(0, chosen.indices.flatten()).view_as(chosen.indices)
    explained = decode(SparseLatents(chosen.values.where(is_dead, 0), chosen.indices), W_dec)
    unexplained = left - explained
    if normalize == "none":
        error = squared_norm(unexplained, feature_reduction)
        (aux,) = means_over_rows([error], mask, batch_group, grad_reduction)
        defined = dead.any()
    else:
        rows = left if normalize == "residual" else rows_that_count(goal, mask)
        # In the wider type, which holds squares of all that the narrow one holds. The reduction of
        # features cancels.
        parts = (unexplained, centred_rows(rows, mask, batch_group), rows.detach())
        aux, variance, size = means_over_rows(
            [wide_squared_norm(part) for part in parts], mask, batch_group, grad_reduction
        )
        rounding = (8 * torch.finfo(rows.dtype).eps) ** 2 * size
        # Not `variance <= rounding`: a variance that is NaN stays one.
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
    r"""Let the dead latents of each Matryoshka level explain what its prefix leaves over.

    $$\mathrm{aux} = \sum_m \mathrm{AuxK}(x - \hat{x}^m, \; \{ j \text{ dead}, \;
    m' \le j < m \})$$

    over the prefixes m, each after m': the sum of
    [`auxiliary_k_loss`][termwise.sae.auxiliary_k_loss] for each level's residual and the latents
    that the level adds. A level without a dead latent adds 0. Every residual is detached.

    Args:
        x (Float[Tensor, "batch d_model"]): activations, a row for each token.
        f (Float[Tensor, "batch d_sae"] | SparseLatents): latents, as
            [`matryoshka_loss`][termwise.sae.matryoshka_loss] takes them. No gradient flows to them.
        pre (Float[Tensor, "batch d_sae"]): latents before any selection, dense.
        W_dec (Float[Tensor, "d_sae d_model"]): decoder, a row for each latent.
        b_dec (Float[Tensor, " d_model"] | None): bias of every prefix's reconstruction. None: 0.
        prefixes: strictly increasing lengths in 0..d_sae, as in `matryoshka_loss`; 0 adds nothing.
        dead (Bool[Tensor, " d_sae"]): which latents are dead, the same on every rank.
        k_aux: how many of a level's dead latents each row uses.
        activation: as in `auxiliary_k_loss`.
        normalize: as in `auxiliary_k_loss`, level by level.
        scale_by_count: multiply each level by min(n_dead / k_aux, 1), n_dead counted in the level.
        target (Float[Tensor, "batch d_model"] | None): what is reconstructed, where that is not x.
        mask (Bool[Tensor, " batch"] | None): rows that count. None: all.
        feature_reduction: over d_model, "mean" or "sum"; normalised, it cancels.
        batch_group: ranks that hold other rows. None: this rank alone, nothing is sent.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" or "sum".

    Returns:
        Float[Tensor, ""]: the sum over levels, for `matryoshka_loss(aux=...)`. Gradient, for pre
        and W_dec, and what is sent: as in `auxiliary_k_loss`, once for each level.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: k_aux is less than 1, or prefixes do not increase strictly within 0..d_sae.

    References:
        SAELens 6.54, https://github.com/decoderesearch/SAELens, `use_matryoshka_aux_loss`: with
        `activation="none"`, `normalize="none"`, `scale_by_count=True` and features summed.

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
    """Return what some of the latents add to a reconstruction, without a gradient."""
    if not isinstance(f, SparseLatents):
        return decode(f[:, low:high].detach(), W_dec[low:high].detach())
    within = (f.indices >= low) & (f.indices < high)
    return decode(SparseLatents(f.values.detach().where(within, 0), f.indices), W_dec.detach())


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
        k: how many to keep, at most d_sae.
        score (Float[Tensor, "batch d_sae"] | None): what latents are ranked by, where that is not
            what the activation says: latents times the norms of their decoder rows, for one. It
            gets no gradient; NaN ranks first.
        activation: "relu": rank and keep max(0, pre); "none": rank and keep pre; "abs": rank by
            |pre| and keep pre.

    Returns:
        The kept latents, the one of the largest score first. The gradient reaches those that are
        kept, and with "relu" are positive.

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
        ranked = _ranked_by(pre.detach(), activation) if score is None else score.detach()
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

    A row may keep more than k or fewer. The batch is that of all ranks, without the rows that do
    not count; exactly k of its latents are kept for each of its rows, ties included: they go to
    the lower rank and the earlier place. A k that is not whole keeps floor(k * batch).

    Args:
        pre (Float[Tensor, "batch d_sae"]): latents before any selection.
        k: how many to keep, on average over rows; at most d_sae. k * batch is computed in float64
            and rounded down, as SAELens does.
        score (Float[Tensor, "batch d_sae"] | None): what latents are ranked by, where that is not
            what the activation says: latents times the norms of their decoder rows, for one. It
            gets no gradient; NaN ranks first.
        activation: "relu": rank and keep max(0, pre); "none": rank and keep pre; "abs": rank by
            |pre| and keep pre.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others keep nothing. None: all.
        batch_group: ranks that hold other rows, in any numbers, 0 included. None: this rank alone,
            nothing is sent.

    Returns:
        Float[Tensor, "batch d_sae"]: the latents, with zeros where they are not kept. With "relu"
        fewer than k * batch are not zero where fewer are positive. A NaN is kept. Sent by each
        rank: sums of 2048 integers, 3 of them for float32 (6 for float64), and the rank's number
        of ties and rows. Nothing waits for the device.

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
    ranked = _ranked_by(pre.detach(), activation) if score is None else score.detach()
    places = _in_order(ranked)
    if mask is not None:
        places = places.masked_fill(~mask[:, None], torch.iinfo(places.dtype).min)
    places = places.flatten()
    n_here = k * pre.shape[0] if isinstance(k, int) else math.floor(k * pre.shape[0])
    if mask is None and batch_group is None and n_here:
        largest = places.topk(n_here).values
        last = largest[-1]
        ties_wanted = (largest == last).sum()
    else:
        rows = places.new_full((), pre.shape[0]) if mask is None else mask.sum()
        rows = over_ranks(rows.to(torch.int64))
        wide = rows if isinstance(k, int) else rows.to(accumulator(pre))
        wanted = (wide * k).floor().to(torch.int64)
        last, ties_wanted = _last_kept(places, wanted, over_ranks)
    tied = places == last
    before: Tensor | int = 0
    if batch_group is not None:
        ties = _groups.each_rank(tied.sum(), batch_group)
        before = ties.cumsum(0)[batch_group.rank()] - ties[batch_group.rank()]
    kept_ties = tied & (tied.cumsum(0) + before <= ties_wanted)
    return latents.where(((places > last) | kept_ties).view(pre.shape), 0)


@contract
def threshold_gate(
    pre: Float[Tensor, "batch d_sae"],
    threshold: float | Float[Tensor, ""] | Float[Tensor, " d_sae"],
) -> Float[Tensor, "batch d_sae"]:
    r"""Keep positive latents above a threshold: what BatchTopK becomes at inference.

    $$f_{ij} = \max(0, h_{ij}) \, [h_{ij} > \theta]$$

    A row's latents then do not depend on the other rows of its batch. With a threshold of 0 or
    less nothing is gated, and this is a ReLU.

    Args:
        pre (Float[Tensor, "batch d_sae"]): h, latents before any selection.
        threshold (float | Float[Tensor, ""] | Float[Tensor, " d_sae"]): theta, one for all latents,
            as [`ActivationThreshold.value`][termwise.sae.ActivationThreshold], or one for each.
            It gets no gradient: [`jumprelu`][termwise.sae.jumprelu] learns one.

    Returns:
        Float[Tensor, "batch d_sae"]: the latents. The gradient reaches those that are kept. A
        threshold of NaN gives NaN. Nothing waits for the device.

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
    # Not `pre > gate`, which is false for a NaN and would make a 0 of it.
    return pre.relu().masked_fill(pre.detach() <= gate, 0).masked_fill(gate.isnan(), torch.nan)


def _ranked_by(pre: Tensor, activation: Activation) -> Tensor:
    """Return what an activation ranks latents by."""
    if activation == "relu":
        return pre.relu()
    return pre.abs() if activation == "abs" else pre


def _in_order(score: Tensor) -> Tensor:
    """Return integers that are in the order of floats: NaN, of either sign, above all others."""
    wide = lifted(score)
    kind = torch.int64 if wide.dtype == torch.float64 else torch.int32
    greatest = torch.iinfo(kind).max
    bits = wide.where(wide != 0, 0).view(kind)  # 0 and -0 are equal
    # The bits of a negative float are in the opposite order, all but the sign.
    bits = bits ^ ((bits >> (bits.itemsize * 8 - 1)) & greatest)
    return bits.masked_fill(wide.isnan(), greatest)


def _last_kept(
    numbers: Tensor, wanted: Tensor, over_ranks: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Find the wanted-th largest of all ranks' integers by a radix search, from counts of digits.

    Returns that number, and how many of its equals are wanted.
    """
    widths = (11, 11, 10) if numbers.dtype == torch.int32 else (11, 11, 11, 11, 10, 10)
    found = numbers.new_zeros(())
    shift = sum(widths)
    for place, width in enumerate(widths):
        shift -= width
        lowest = -(2 ** (width - 1)) if place == 0 else 0  # the first digit has the sign
        counts = torch.zeros(2**width, dtype=torch.int64, device=numbers.device)
        # In parts, for the digits of all at once would take eight bytes each.
        size = max(1, len(numbers)) if torch.compiler.is_compiling() else 2**20
        for part in cast("tuple[Tensor, ...]", numbers.split(size)):
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
        digit = (2**width - 1 - whole).to(numbers.dtype)
        found = digit + lowest if place == 0 else (found << width) | digit
    return found, wanted


class TopKObjective(LossModule):
    """[`topk_loss`][termwise.sae.topk_loss] as a module, from a config."""

    cfg: TopK = dataclasses.field(kw_only=False)

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
        return topk_loss(
            x,
            f,
            x_hat,
            aux=aux,
            dead=dead,
            target=target,
            mask=mask,
            batch_group=batch_group,
            **keyword_fields(self.cfg),
        )
