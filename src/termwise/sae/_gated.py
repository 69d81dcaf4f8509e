"""The gated objective: a gate learns which latents are active, separately from their values."""

import dataclasses
from typing import cast

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .._coefficients import weighted
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import means_over_rows
from .._module import LossModule, keyword_fields
from .._numbers import lifted, without_autocast
from .._terms import Terms, terms
from ._latents import SparseLatents, active, check_latents, counted, decode
from ._squared_errors import FeatureReduction, squared_errors


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """Config of the gated objective: the hyperparameters of its loss."""

    sparsity_coeff: float = 4e-4
    """Weight of the penalty on the gate."""
    stop_decoder: bool = True
    """Whether the decoder is detached in the auxiliary term."""
    feature_reduction: FeatureReduction = "mean"
    """Reduction over d_model: "mean" or "sum"."""
    grad_reduction: GradReduction = "mean"
    """How the trainer combines the ranks' gradients."""


@terms
class GatedTerms(Terms):
    """Terms of [`gated_loss`][termwise.sae.gated_loss]."""

    loss: Float[Tensor, ""]
    """mse + sparsity + aux."""
    mse: Float[Tensor, ""]
    """Squared error of the reconstruction: mean (or sum) over features, mean over rows."""
    sparsity: Float[Tensor, ""]
    """The penalty with its coefficient: sparsity_coeff * mean sum_j norm_j relu(f_gate_j)."""
    aux: Float[Tensor, ""]
    """Squared error of the reconstruction from the gate alone, reduced as mse; no coefficient."""
    l0: Float[Tensor, ""]
    """Latents f of a row that are not zero, mean over rows; detached."""


@contract
def gated_loss(
    x: Float[Tensor, "batch d_model"],
    f: Float[Tensor, "batch d_sae"] | SparseLatents,
    x_hat: Float[Tensor, "batch d_model"],
    f_gate: Float[Tensor, "batch d_sae"],
    W_dec: Float[Tensor, "d_sae d_model"],
    b_dec: Float[Tensor, " d_model"] | None = None,
    *,
    sparsity_coeff: float | Float[Tensor, ""],
    stop_decoder: bool = True,
    decoder_norm: Float[Tensor, " d_sae"] | None = None,
    target: Float[Tensor, "batch d_model"] | None = None,
    mask: Bool[Tensor, " batch"] | None = None,
    feature_reduction: FeatureReduction = "mean",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> GatedTerms:
    r"""Reconstruct activations from the latents and from the gate, with a penalty on the gate.

    $$\begin{align*} \mathrm{loss} = \frac{1}{n} \sum_i \Big( & \frac{1}{d}
    \| x_i - \hat{x}_i \|^2 + \lambda \sum_j \nu_j \max(0, \pi_{ij}) \\
    &+ \frac{1}{d} \| x_i - \max(0, \pi_i) W - b \|^2 \Big) \end{align*}$$

    over the n rows that count, with W and b detached in the last term, which trains the gate: its
    step function has no gradient. Since the penalty is on the gate, it does not shrink f. Half
    precision is converted to float32 before anything is decoded or subtracted, with or without
    autocast.

    Args:
        x (Float[Tensor, "batch d_model"]): activations, a row for each token.
        f (Float[Tensor, "batch d_sae"] | SparseLatents): latents, [pi > 0] times their magnitudes,
            dense or [`SparseLatents`][termwise.sae.SparseLatents]. Used for `l0` only; gradients
            reach them through x_hat.
        x_hat (Float[Tensor, "batch d_model"]): reconstruction of x from f.
        f_gate (Float[Tensor, "batch d_sae"]): pi, the gate's pre-activations, before any ReLU.
        W_dec (Float[Tensor, "d_sae d_model"]): W, the decoder, a row for each latent.
        b_dec (Float[Tensor, " d_model"] | None): b, the decoder's bias. None: 0.
        sparsity_coeff (float | Float[Tensor, ""]): lambda, the weight of the penalty. It depends on
            `feature_reduction`: with "sum" the squared errors are d_model times those of "mean".
            Exactly 0.0 removes the penalty from the loss and the gradient, even if it is infinite.
            A tensor, on the device of x, may change at each step without recompiling; its term is
            always multiplied and added, even if it is 0.
        stop_decoder: whether W and b are detached in the auxiliary term, as in the paper.
        decoder_norm (Float[Tensor, " d_sae"] | None): nu, the norms of the decoder's rows;
            gradients reach them if they require one. None: 1, as in the paper, which keeps the rows
            at unit norm. The authors advise detaching the decoder in both terms or in neither: pass
            `decoder_norm.detach()`, or `stop_decoder=False`.
        target (Float[Tensor, "batch d_model"] | None): what both reconstructions are compared with,
            if that is not x (a transcoder). None: x.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others affect no term and no
            gradient, even if they are NaN. None: all.
        feature_reduction: over d_model, "mean" or "sum" (the paper), in both mse and aux.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank. If no row counts they are NaN. Gradients,
        combined over ranks as `grad_reduction` says, equal those of one process that holds all
        rows. Communication: one all-reduce of 5 float64 elements. Does not synchronize with the
        device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: f has another number of rows than x.

    References:
        Rajamanoharan et al., Improving Dictionary Learning with Gated Sparse Autoencoders (2024),
        https://arxiv.org/abs/2404.16014. We side with it, as dictionary_learning does; newer
        versions of SAELens weight the penalty by the decoder's norms and train the decoder with the
        auxiliary term: `decoder_norm` with `stop_decoder=False`.

    Examples:
        >>> import torch
        >>> from termwise.sae import gated_loss
        >>> x, f_gate = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -1.0]])
        >>> f = torch.tensor([[1.0, 0.0]])
        >>> gated_loss(x, f, f, f_gate, torch.eye(2), sparsity_coeff=0.5).metrics()
        {'loss': 4.375, 'mse': 2.0, 'sparsity': 0.25, 'aux': 2.125, 'l0': 1.0}
    """
    check_latents("gated_loss", f, x.shape[0], mask=mask, d_sae=W_dec.shape[0])
    with without_autocast(x):
        goal = x if target is None else target
        gate = F.relu(lifted(cast("Tensor", counted(f_gate, mask))))
        if stop_decoder:
            W_dec = W_dec.detach()
            b_dec = None if b_dec is None else b_dec.detach()
        by_gate = decode(gate, W_dec, b_dec)
        paid = gate.sum(1) if decoder_norm is None else decode(gate, decoder_norm[:, None])[:, 0]
        mse, aux, price, l0 = means_over_rows(
            [
                squared_errors(goal, x_hat, mask, feature_reduction, batch_group),
                squared_errors(goal, by_gate, mask, feature_reduction, batch_group),
                paid,
                active(f, mask, batch_group),
            ],
            mask,
            batch_group,
            grad_reduction,
        )
        sparsity = weighted(sparsity_coeff, price)
        loss = mse + sparsity + aux
        return GatedTerms(loss=loss, mse=mse, sparsity=sparsity, aux=aux, l0=l0.detach())


class GatedObjective(LossModule):
    """[`gated_loss`][termwise.sae.gated_loss] as a module, from a config.

    Examples:
        >>> import torch
        >>> from termwise.sae import Gated, GatedObjective
        >>> objective = GatedObjective(Gated(sparsity_coeff=4e-4))
        >>> x, f, W_dec = torch.ones(4, 3), torch.ones(4, 8), torch.zeros(8, 3)
        >>> objective(x, f, x, f, W_dec).metrics()["aux"]
        1.0
    """

    cfg: Gated = dataclasses.field(kw_only=False)

    def __call__(
        self,
        x: Float[Tensor, "batch d_model"],
        f: Float[Tensor, "batch d_sae"] | SparseLatents,
        x_hat: Float[Tensor, "batch d_model"],
        f_gate: Float[Tensor, "batch d_sae"],
        W_dec: Float[Tensor, "d_sae d_model"],
        b_dec: Float[Tensor, " d_model"] | None = None,
        *,
        decoder_norm: Float[Tensor, " d_sae"] | None = None,
        target: Float[Tensor, "batch d_model"] | None = None,
        mask: Bool[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> GatedTerms:
        """Compute the terms of the objective."""
        return gated_loss(
            x,
            f,
            x_hat,
            f_gate,
            W_dec,
            b_dec,
            decoder_norm=decoder_norm,
            target=target,
            mask=mask,
            batch_group=batch_group,
            **keyword_fields(self.cfg),
        )
