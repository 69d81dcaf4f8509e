"""The TopK objective: a fixed number of active latents, and an optional auxiliary loss."""

import dataclasses

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .._coefficients import with_auxiliary
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import means_over_rows
from .._module import LossModule, keyword_fields
from .._terms import Terms, terms
from ._latents import SparseLatents, active, check_latents, counted
from ._squared_errors import FeatureReduction, squared_errors


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """Config of the TopK objective: the hyperparameters of its loss."""

    aux_coeff: float = 1 / 32
    """Weight of the auxiliary loss; 1/32 in the paper."""
    feature_reduction: FeatureReduction = "mean"
    """Reduction over d_model: "mean" or "sum"."""
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
    """The auxiliary loss that was passed, before its coefficient; 0 if none was passed."""
    l0: Float[Tensor, ""]
    """Latents of a row that are not zero, mean over rows; detached."""
    n_dead: Float[Tensor, ""]
    """Number of dead latents; NaN if `dead` was not passed; detached."""


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
    r"""Reconstruct activations from a fixed number of latents, without a penalty.

    $$\mathrm{loss} = \frac{1}{n} \sum_i \| x_i - \hat{x}_i \|^2 + \alpha \, \mathrm{aux}$$

    over the n rows that count, with the squared norm averaged (or summed) over features.

    Args:
        x (Float[Tensor, "batch d_model"]): activations, a row for each token.
        f (Float[Tensor, "batch d_sae"] | SparseLatents): latents, dense or
            [`SparseLatents`][termwise.sae.SparseLatents], as [`topk`][termwise.sae.topk] and
            [`batch_topk`][termwise.sae.batch_topk] return them.
        x_hat (Float[Tensor, "batch d_model"]): reconstruction of x from f.
        aux (Float[Tensor, ""] | None): result of
            [`auxiliary_k_loss`][termwise.sae.auxiliary_k_loss] for the same rows, with the same
            `mask`, `batch_group` and reductions. None: 0.
        aux_coeff (float | Float[Tensor, ""]): alpha; 1/32 in the paper, for a normalized auxiliary
            loss. Exactly 0.0 removes aux from the loss and the gradient, even if it is infinite. A
            tensor, on the device of x, may change at each step without recompiling; its term is
            always multiplied and added, even if it is 0.
        dead (Bool[Tensor, " d_sae"] | None): which latents are dead, the same on every rank; used
            only for `n_dead`. Required with aux. None: `n_dead` is NaN.
        target (Float[Tensor, "batch d_model"] | None): what x_hat is compared with, if that is not
            x (a transcoder). None: x.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others affect no term and no
            gradient, even if they are NaN. None: all.
        feature_reduction: over d_model, "mean" or "sum".
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank. Gradients, combined over ranks as
        `grad_reduction` says, equal those of one process that holds all rows. Communication: one
        all-reduce of 3 float64 elements. Does not synchronize with the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: f has another number of rows than x, or aux is given without dead.

    References:
        Gao et al., Scaling and evaluating sparse autoencoders (2024),
        https://arxiv.org/abs/2406.04093, sections 2.3 and A.2. Their mse is divided by that of
        predicting the mean: divide by it to use their coefficients.

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
            "topk_loss needs dead where aux is given, got None: pass the mask of dead latents that "
            "auxiliary_k_loss took"
        )
    goal = x if target is None else target
    errors = squared_errors(goal, x_hat, mask, feature_reduction, batch_group)
    l0 = active(counted(f, mask), mask, batch_group)
    mse, l0 = means_over_rows([errors, l0], mask, batch_group, grad_reduction)
    n_dead = torch.full_like(mse, torch.nan) if dead is None else dead.sum().to(mse.dtype)
    loss, aux = with_auxiliary(mse, aux_coeff, aux)
    return TopKTerms(loss=loss, mse=mse, aux=aux, l0=l0.detach(), n_dead=n_dead.detach())


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
