"""The crosscoder objective: one set of latents for several layers, or several models."""

import dataclasses
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .._coefficients import weighted, with_auxiliary
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import means_over_rows
from .._module import LossModule, keyword_fields
from .._numbers import lifted, without_autocast
from .._terms import Terms, terms
from ._latents import SparseLatents, active, check_latents, counted
from ._penalties import penalty
from ._squared_errors import FeatureReduction, squared_errors

LayerNorm = Literal["l1", "l2"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Crosscoder:
    """Config of the crosscoder objective: the hyperparameters of its loss."""

    sparsity_coeff: float = 4e-4
    """Weight of the penalty."""
    aux_coeff: float = 1 / 32
    """Weight of the auxiliary loss that is passed."""
    decoder_norm: LayerNorm = "l1"
    """"l1": sum of the norms of a latent's rows in each layer; "l2": root of their squares' sum."""
    feature_reduction: FeatureReduction = "mean"
    """Reduction over d_model: "mean" or "sum"."""
    grad_reduction: GradReduction = "mean"
    """How the trainer combines the ranks' gradients."""


@terms
class CrosscoderTerms(Terms):
    """Terms of [`crosscoder_loss`][termwise.sae.crosscoder_loss]."""

    loss: Float[Tensor, ""]
    """mse + sparsity + aux_coeff * aux."""
    mse_per_layer: Float[Tensor, " layers"]
    """Float[Tensor, " layers"]: squared error of each layer: mean (or sum) over features, mean over
    rows."""
    mse: Float[Tensor, ""]
    """Sum of mse_per_layer."""
    sparsity: Float[Tensor, ""]
    """The penalty with its coefficient: sparsity_coeff * mean sum_j norm_j |f_j|."""
    aux: Float[Tensor, ""]
    """The auxiliary loss that was passed, before its coefficient; 0 if none was passed."""
    l0: Float[Tensor, ""]
    """Latents of a row that are not zero, mean over rows; detached."""


@contract
def crosscoder_loss(
    x: Float[Tensor, "batch layers d_model"],
    f: Float[Tensor, "batch d_sae"] | SparseLatents,
    x_hat: Float[Tensor, "batch layers d_model"],
    W_dec: Float[Tensor, "d_sae layers d_model"],
    *,
    sparsity_coeff: float | Float[Tensor, ""],
    aux: Float[Tensor, ""] | None = None,
    aux_coeff: float | Float[Tensor, ""] = 1 / 32,
    decoder_norm: LayerNorm = "l1",
    target: Float[Tensor, "batch layers d_model"] | None = None,
    mask: Bool[Tensor, " batch"] | None = None,
    feature_reduction: FeatureReduction = "mean",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> CrosscoderTerms:
    r"""Reconstruct each layer from shared latents, with a penalty for every layer they write to.

    $$\mathrm{loss} = \frac{1}{n} \sum_i \left(
    \sum_l \frac{1}{d} \| x_{il} - \hat{x}_{il} \|^2
    + \lambda \sum_j \left|f_{ij}\right| \, \nu_j \right) + \alpha \, \mathrm{aux}, \qquad
    \nu_j = \sum_l \| W_{jl} \| \;\; \text{or} \;\; \sqrt{\sum_l \| W_{jl} \|^2}$$

    over the n rows that count, with the first nu for "l1" and the second for "l2". Half precision
    is converted to float32 before anything is subtracted, with or without autocast.

    Args:
        x (Float[Tensor, "batch layers d_model"]): activations of each layer (or each model) at the
            same token.
        f (Float[Tensor, "batch d_sae"] | SparseLatents): latents, dense or
            [`SparseLatents`][termwise.sae.SparseLatents]. They may be negative.
        x_hat (Float[Tensor, "batch layers d_model"]): reconstruction of x from f.
        W_dec (Float[Tensor, "d_sae layers d_model"]): W, the decoder, for each latent a row in each
            layer. Only its norms are used, with their gradient, so that small latents with large
            rows cannot avoid the penalty.
        sparsity_coeff (float | Float[Tensor, ""]): lambda, the weight of the penalty. It depends on
            `feature_reduction`: with "sum" the squared error is d_model times that of "mean".
            Exactly 0.0 removes the penalty from the loss and the gradient, even if it is infinite.
            A tensor, on the device of x, may change at each step without recompiling; its term is
            always multiplied and added, even if it is 0. The same holds for aux_coeff.
        aux (Float[Tensor, ""] | None): an auxiliary loss of the same rows, with the same `mask`,
            `batch_group` and reductions: [`auxiliary_k_loss`][termwise.sae.auxiliary_k_loss] of
            `x.flatten(1)`, `x_hat.flatten(1)` and `W_dec.flatten(1)`. Its "mean" is over layers and
            features, but that of `mse` is over features only: multiply it by the number of layers
            to have the same unit. None: 0.
        aux_coeff (float | Float[Tensor, ""]): alpha, the weight of aux.
        decoder_norm: "l1" penalizes a latent for each layer it writes to, and so favors latents of
            few layers; its value is comparable to the sum of the losses of separate autoencoders.
            "l2" is the norm of all rows of a latent as one vector, and favors latents shared by all
            layers.
        target (Float[Tensor, "batch layers d_model"] | None): what x_hat is compared with, if that
            is not x (a cross-layer transcoder). None: x.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others affect no term and no
            gradient, even if they are NaN. None: all.
        feature_reduction: over d_model, "mean" or "sum" (the source). Over layers the errors are
            summed with either.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank. If no row counts they are NaN. Gradients,
        combined over ranks as `grad_reduction` says, equal those of one process that holds all
        rows. Communication: one all-reduce of layers + 3 float64 elements. Does not synchronize
        with the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: f has another number of rows than x.

    References:
        Lindsey et al., Sparse Crosscoders for Cross-Layer Features and Model Diffing (2024),
        https://transformer-circuits.pub/2024/crosscoders: squared errors summed over layers and
        features, and the sum of the layers' norms, "l1", which it prefers to "l2".

    Examples:
        >>> import torch
        >>> from termwise.sae import crosscoder_loss
        >>> x, x_hat = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.zeros(1, 2, 2)
        >>> f, W_dec = torch.tensor([[2.0]]), torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
        >>> terms = crosscoder_loss(x, f, x_hat, W_dec, sparsity_coeff=0.5)
        >>> terms.mse_per_layer
        tensor([ 2.5000, 12.5000])
        >>> terms.mse, terms.sparsity
        (tensor(15.), tensor(7.))
        >>> crosscoder_loss(x, f, x_hat, W_dec, sparsity_coeff=0.5, decoder_norm="l2").sparsity
        tensor(5.)
    """
    check_latents("crosscoder_loss", f, x.shape[0], mask=mask, d_sae=W_dec.shape[0])
    with without_autocast(x):
        goal = x if target is None else target
        errors = squared_errors(goal, x_hat, mask, feature_reduction, batch_group)
        f = counted(f, mask)
        decoder = lifted(W_dec)
        if decoder_norm == "l1":
            norm = cast("Tensor", torch.linalg.vector_norm(decoder, dim=2)).sum(1)
        else:
            norm = cast("Tensor", torch.linalg.vector_norm(decoder.flatten(1), dim=1))
        paid = penalty(f, norm, 1.0)
        mse_per_layer, price, l0 = means_over_rows(
            [errors, paid, active(f, mask, batch_group)], mask, batch_group, grad_reduction
        )
        mse = mse_per_layer.sum()
        sparsity = weighted(sparsity_coeff, price)
        loss, aux = with_auxiliary(mse + sparsity, aux_coeff, aux)
        return CrosscoderTerms(
            loss=loss,
            mse_per_layer=mse_per_layer,
            mse=mse,
            sparsity=sparsity,
            aux=aux,
            l0=l0.detach(),
        )


class CrosscoderObjective(LossModule):
    """[`crosscoder_loss`][termwise.sae.crosscoder_loss] as a module, from a config.

    Examples:
        >>> import torch
        >>> from termwise.sae import Crosscoder, CrosscoderObjective
        >>> objective = CrosscoderObjective(Crosscoder(sparsity_coeff=0.25))
        >>> x, f, W_dec = torch.ones(4, 2, 3), torch.ones(4, 8), torch.ones(8, 2, 3)
        >>> objective(x, f, torch.zeros(4, 2, 3), W_dec).metrics()["mse"]
        2.0
    """

    cfg: Crosscoder = dataclasses.field(kw_only=False)

    def __call__(
        self,
        x: Float[Tensor, "batch layers d_model"],
        f: Float[Tensor, "batch d_sae"] | SparseLatents,
        x_hat: Float[Tensor, "batch layers d_model"],
        W_dec: Float[Tensor, "d_sae layers d_model"],
        *,
        aux: Float[Tensor, ""] | None = None,
        target: Float[Tensor, "batch layers d_model"] | None = None,
        mask: Bool[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> CrosscoderTerms:
        """Compute the terms of the objective."""
        return crosscoder_loss(
            x,
            f,
            x_hat,
            W_dec,
            aux=aux,
            target=target,
            mask=mask,
            batch_group=batch_group,
            **keyword_fields(self.cfg),
        )
