"""The vanilla objective: squared error and an Lp penalty on the latents."""

import dataclasses

from jaxtyping import Bool, Float
from torch import Tensor

from .._coefficients import weighted
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import means_over_rows
from .._module import LossModule, keyword_fields
from .._terms import Terms, terms
from ._latents import SparseLatents, active, check_latents, counted
from ._penalties import penalty
from ._squared_errors import FeatureReduction, squared_errors


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Vanilla:
    """Config of the vanilla objective: the hyperparameters of its loss."""

    sparsity_coeff: float = 4e-4
    """Weight of the penalty."""
    p: float = 1.0
    """Exponent of the penalty."""
    feature_reduction: FeatureReduction = "mean"
    """Reduction over d_model: "mean" or "sum"."""
    grad_reduction: GradReduction = "mean"
    """How the trainer combines the ranks' gradients."""


@terms
class VanillaTerms(Terms):
    """Terms of [`vanilla_loss`][termwise.sae.vanilla_loss]."""

    loss: Float[Tensor, ""]
    """mse + sparsity."""
    mse: Float[Tensor, ""]
    """Squared error of the reconstruction: mean (or sum) over features, mean over rows."""
    sparsity: Float[Tensor, ""]
    """The penalty with its coefficient: sparsity_coeff * mean sum_j norm_j |f_j|^p."""
    l0: Float[Tensor, ""]
    """Latents of a row that are not zero, mean over rows; detached."""
    l1: Float[Tensor, ""]
    """sum_j |f_j|, mean over rows, for any p and decoder_norm; detached if these are set."""


@contract
def vanilla_loss(
    x: Float[Tensor, "batch d_model"],
    f: Float[Tensor, "batch d_sae"] | SparseLatents,
    x_hat: Float[Tensor, "batch d_model"],
    *,
    sparsity_coeff: float | Float[Tensor, ""],
    decoder_norm: Float[Tensor, " d_sae"] | None = None,
    p: float = 1.0,
    target: Float[Tensor, "batch d_model"] | None = None,
    mask: Bool[Tensor, " batch"] | None = None,
    feature_reduction: FeatureReduction = "mean",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> VanillaTerms:
    r"""Reconstruct activations, with a penalty on the latents.

    $$\mathrm{loss} = \frac{1}{n} \sum_i \left( \frac{1}{d} \| x_i - \hat{x}_i \|^2
    + \lambda \sum_j \nu_j \left|f_{ij}\right|^p \right)$$

    over the n rows that count. Half precision is converted to float32 before anything is
    subtracted.

    Args:
        x (Float[Tensor, "batch d_model"]): activations, a row for each token.
        f (Float[Tensor, "batch d_sae"] | SparseLatents): latents, dense or
            [`SparseLatents`][termwise.sae.SparseLatents]. They may be negative.
        x_hat (Float[Tensor, "batch d_model"]): reconstruction of x from f.
        sparsity_coeff (float | Float[Tensor, ""]): lambda, the weight of the penalty. It depends on
            `feature_reduction`: with "sum" the squared error is d_model times that of "mean", so
            the same trade-off needs d_model times the coefficient. Exactly 0.0 removes the penalty
            from the loss and the gradient, even if it is infinite. A tensor, on the device of x,
            may change at each step without recompiling; its term is always multiplied and added,
            even if it is 0.
        decoder_norm (Float[Tensor, " d_sae"] | None): nu, the norms of the decoder's rows, so that
            small latents with large rows cannot avoid the penalty (Anthropic, April 2024). They get
            a gradient if they require one. None: 1.
        p: exponent of the penalty; 1 for L1, whose derivative at a latent of 0 is 1. For p < 1 that
            derivative is set to 0, as in `torch.norm`.
        target (Float[Tensor, "batch d_model"] | None): what x_hat is compared with, if that is not
            x (a transcoder). None: x.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others affect no term and no
            gradient, even if they are NaN. None: all.
        feature_reduction: over d_model, "mean" (saev) or "sum" (SAELens, dictionary_learning).
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank. If no row counts they are NaN. Gradients,
        combined over ranks as `grad_reduction` says, equal those of one process that holds all
        rows. Communication: one all-reduce of 4 or 5 float64 elements. Does not synchronize with
        the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: p is not positive, or f has another number of rows than x.

    References:
        Bricken et al., Towards Monosemanticity (2023),
        https://transformer-circuits.pub/2023/monosemantic-features, and the update of April 2024,
        https://transformer-circuits.pub/2024/april-update: there the squared error is summed over
        features. saev, whose names we use, averages it; it also counts f > 0 and sums f without its
        absolute value, which is wrong for signed latents and equal for ReLU.

    Examples:
        >>> import torch
        >>> from termwise.sae import vanilla_loss
        >>> x, f = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0, -3.0]])
        >>> vanilla_loss(x, f, torch.tensor([[1.0, 0.0]]), sparsity_coeff=0.5).metrics()
        {'loss': 4.0, 'mse': 2.0, 'sparsity': 2.0, 'l0': 2.0, 'l1': 4.0}
    """
    if not p > 0:
        raise ValueError(f"vanilla_loss needs p > 0, got {p}")
    d_sae = None if decoder_norm is None else len(decoder_norm)
    check_latents("vanilla_loss", f, x.shape[0], mask=mask, d_sae=d_sae)
    f = counted(f, mask)
    paid = penalty(f, decoder_norm, p)
    plain = paid if decoder_norm is None and p == 1.0 else penalty(f, None, 1.0).detach()
    goal = x if target is None else target
    errors = squared_errors(goal, x_hat, mask, feature_reduction, batch_group)
    per_row = [errors, paid, active(f, mask, batch_group)]
    if plain is not paid:
        per_row.append(plain)
    mse, price, l0, *others = means_over_rows(per_row, mask, batch_group, grad_reduction)
    sparsity = weighted(sparsity_coeff, price)
    return VanillaTerms(
        loss=mse + sparsity,
        mse=mse,
        sparsity=sparsity,
        l0=l0.detach(),
        l1=others[0].detach() if others else price,
    )


class VanillaObjective(LossModule):
    """[`vanilla_loss`][termwise.sae.vanilla_loss] as a module, from a config.

    Examples:
        >>> import torch
        >>> from termwise.sae import Vanilla, VanillaObjective
        >>> objective = VanillaObjective(Vanilla(sparsity_coeff=4e-4))
        >>> x, f = torch.ones(4, 3), torch.ones(4, 8)
        >>> objective(x, f, x).metrics()["l0"]
        8.0
    """

    cfg: Vanilla = dataclasses.field(kw_only=False)

    def __call__(
        self,
        x: Float[Tensor, "batch d_model"],
        f: Float[Tensor, "batch d_sae"] | SparseLatents,
        x_hat: Float[Tensor, "batch d_model"],
        *,
        decoder_norm: Float[Tensor, " d_sae"] | None = None,
        target: Float[Tensor, "batch d_model"] | None = None,
        mask: Bool[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> VanillaTerms:
        """Compute the terms of the objective."""
        return vanilla_loss(
            x,
            f,
            x_hat,
            decoder_norm=decoder_norm,
            target=target,
            mask=mask,
            batch_group=batch_group,
            **keyword_fields(self.cfg),
        )
