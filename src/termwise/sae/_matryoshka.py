"""The Matryoshka objective: every prefix of the latents reconstructs the activations."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .._coefficients import weighted, with_auxiliary
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import means_over_rows
from .._module import LossModule, keyword_fields
from .._terms import Terms, terms
from ._latents import SparseLatents, active, check_latents, counted
from ._penalties import penalty
from ._prefix_errors import errors_and_l1
from ._prefixes import PrefixLaw, check_prefixes, sample_prefixes
from ._squared_errors import FeatureReduction, residual, squared_norm


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Matryoshka:
    """Config of the Matryoshka objective: the hyperparameters of its loss."""

    n_prefixes: int = 10
    """Number of prefixes drawn for a step, including all of d_sae."""
    sparsity_coeff: float = 4e-4
    """Weight of the penalty."""
    aux_coeff: float = 1 / 32
    """Weight of the auxiliary loss that is passed."""
    law: PrefixLaw = "nabeshima"
    """Distribution that [`sample_prefixes`][termwise.sae.sample_prefixes] draws from."""
    p: float = 1.0
    """Exponent of the penalty."""
    feature_reduction: FeatureReduction = "mean"
    """Reduction over d_model: "mean" or "sum"."""
    grad_reduction: GradReduction = "mean"
    """How the trainer combines the ranks' gradients."""


@terms
class MatryoshkaTerms(Terms):
    """Terms of [`matryoshka_loss`][termwise.sae.matryoshka_loss]."""

    loss: Float[Tensor, ""]
    """mse + sparsity + aux_coeff * aux."""
    mse: Float[Tensor, ""]
    """Weighted mean of mse_per_prefix over the prefixes."""
    mse_per_prefix: Float[Tensor, " prefixes"]
    """Float[Tensor, " prefixes"]: squared error of each prefix's reconstruction: mean (or sum) over
    features, mean over rows. In the graph."""
    sparsity: Float[Tensor, ""]
    """The penalty with its coefficient: sparsity_coeff * mean sum_j norm_j |f_j|^p."""
    aux: Float[Tensor, ""]
    """The auxiliary loss that was passed, before its coefficient; 0 if none was passed."""
    l0: Float[Tensor, ""]
    """Latents of a row that are not zero, mean over rows; detached."""
    l1: Float[Tensor, ""]
    """sum_j |f_j|, mean over rows, for any p and decoder_norm; detached if these are set."""


@contract
def matryoshka_loss(
    x: Float[Tensor, "batch d_model"],
    f: Float[Tensor, "batch d_sae"] | SparseLatents,
    W_dec: Float[Tensor, "d_sae d_model"],
    b_dec: Float[Tensor, " d_model"] | None,
    *,
    prefixes: Sequence[int],
    weights: Sequence[float] | None = None,
    sparsity_coeff: float | Float[Tensor, ""] = 0.0,
    x_hat: Float[Tensor, "batch d_model"] | None = None,
    aux: Float[Tensor, ""] | None = None,
    aux_coeff: float | Float[Tensor, ""] = 1 / 32,
    target: Float[Tensor, "batch d_model"] | None = None,
    decoder_norm: Float[Tensor, " d_sae"] | None = None,
    p: float = 1.0,
    mask: Bool[Tensor, " batch"] | None = None,
    feature_reduction: FeatureReduction = "mean",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> MatryoshkaTerms:
    r"""Reconstruct activations from each prefix of the latents, with a penalty on the latents.

    $$\hat{x}^m_i = b + \sum_{j < m} f_{ij} W_j, \qquad
    \mathrm{mse}_m = \frac{1}{n} \sum_i \frac{1}{d} \| x_i - \hat{x}^m_i \|^2$$

    $$\mathrm{loss} = \sum_m w_m \mathrm{mse}_m
    + \frac{\lambda}{n} \sum_i \sum_j \nu_j \left|f_{ij}\right|^p + \alpha \, \mathrm{aux}$$

    over the n rows that count and the prefixes m, with weights w that sum to 1. Early latents have
    to reconstruct without later ones, so they learn general features, which later latents do not
    absorb. With one prefix of all latents this is [`vanilla_loss`][termwise.sae.vanilla_loss].

    The latents are decoded once, one block between prefixes after the other, not once for each
    prefix. One residual, "batch d_model", is saved for the backward pass (none with sparse
    latents). The backward pass decodes all blocks but the last again, a few rows at a time, so
    memory does not grow with the number of prefixes. All arithmetic is in float32 or float64, with
    or without autocast.

    Args:
        x (Float[Tensor, "batch d_model"]): activations, a row for each token.
        f (Float[Tensor, "batch d_sae"] | SparseLatents): latents, dense or
            [`SparseLatents`][termwise.sae.SparseLatents]. They may be negative.
        W_dec (Float[Tensor, "d_sae d_model"]): decoder, a row for each latent, in the order of the
            prefixes.
        b_dec (Float[Tensor, " d_model"] | None): bias of every prefix's reconstruction. None: 0.
        prefixes: strictly increasing lengths in 0..d_sae, as Python integers, such as
            [`sample_prefixes`][termwise.sae.sample_prefixes] draws; the same on every rank. If the
            last is less than d_sae, the latents beyond it only enter the penalty, l0 and l1. Prefix
            0 is the reconstruction by b_dec alone, which the authors' code averages with the
            others.
        weights: w up to a factor, one for each prefix. A prefix of weight 0 does not enter the
            loss. None: equal weights.
        sparsity_coeff (float | Float[Tensor, ""]): lambda, the weight of the penalty, which counts
            every latent once. It depends on `feature_reduction`: with "sum" the same trade-off
            needs a coefficient d_model times as large. Exactly 0.0 removes the penalty from the
            loss and the gradient, even if it is infinite. A tensor, on the device of x, may change
            at each step without recompiling; its term is always multiplied and added, even if it is
            0. The same holds for aux_coeff.
        x_hat (Float[Tensor, "batch d_model"] | None): reconstruction from the last prefix, if the
            caller has already decoded it: the last block of latents is then not decoded again, and
            the gradient of the last error flows through x_hat. None: it is decoded here.
        aux (Float[Tensor, ""] | None): result of
            [`matryoshka_auxiliary_k_loss`][termwise.sae.matryoshka_auxiliary_k_loss] or
            [`auxiliary_k_loss`][termwise.sae.auxiliary_k_loss] for the same rows, with the same
            `mask`, `batch_group` and reductions. None: 0.
        aux_coeff (float | Float[Tensor, ""]): alpha, the weight of aux.
        target (Float[Tensor, "batch d_model"] | None): what is reconstructed, if that is not x (a
            transcoder). None: x.
        decoder_norm (Float[Tensor, " d_sae"] | None): nu, the norms of the decoder's rows.
            Gradients reach them if they require one. None: 1.
        p: exponent of the penalty; 1 for L1, whose derivative at a latent of 0 is 1. For p < 1 that
            derivative is set to 0, as in `torch.norm`.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others affect no term and no
            gradient, even if they are NaN. None: all.
        feature_reduction: over d_model, "mean" (saev) or "sum" (the authors' code).
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank. If no row counts they are NaN. Gradients,
        combined over ranks as `grad_reduction` says, equal those of one process that holds all
        rows. Second derivatives, in reverse mode, are correct without a group (and need memory for
        a residual for each prefix), and raise NotImplementedError with one. Communication: one
        all-reduce of 4 + len(prefixes) float64 elements. Does not synchronize with the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: prefixes are empty, do not increase strictly or are not in 0..d_sae; weights are
            not one for each prefix, are negative or sum to 0; p is not positive; or f has another
            number of rows than x.

    References:
        Nabeshima, Matryoshka Sparse Autoencoders (2024), https://sparselatents.com/matryoshka.html;
        Bussmann, Nabeshima, Karvonen, Nanda, Learning Multi-Level Features with Matryoshka Sparse
        Autoencoders (2025), https://arxiv.org/abs/2503.17547, which sums over prefixes where the
        authors' code and saev average, as we do. The penalty follows saev: all latents once. The
        authors' code averages the penalties of the prefixes, so that early latents are penalized
        more often.

    Examples:
        >>> import torch
        >>> from termwise.sae import matryoshka_loss
        >>> x, f = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 1.0]])
        >>> W_dec = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> terms = matryoshka_loss(x, f, W_dec, None, prefixes=(1, 2), feature_reduction="sum")
        >>> terms.mse_per_prefix.tolist(), terms.mse.item()
        ([1.0, 0.0], 0.5)
    """
    if not p > 0:
        raise ValueError(f"matryoshka_loss needs p > 0, got {p}")
    cuts = check_prefixes("matryoshka_loss", prefixes, W_dec.shape[0])
    shares = _shares(weights, len(cuts))
    check_latents("matryoshka_loss", f, x.shape[0], mask=mask, d_sae=W_dec.shape[0])
    f = counted(f, mask)

    goal = x if target is None else target
    reduced = feature_reduction, batch_group
    if x_hat is None:
        errors, plain = errors_and_l1(goal, f, W_dec, b_dec, mask, cuts, *reduced)
    else:
        last = squared_norm(residual(goal, x_hat, mask), feature_reduction)[:, None]
        if len(cuts) == 1:
            errors, plain = last, penalty(f, None, 1.0)
        else:
            errors, plain = errors_and_l1(goal, f, W_dec, b_dec, mask, cuts[:-1], *reduced)
            errors = torch.cat([errors.expand(len(last), -1), last.to(errors.dtype)], 1)
    paid = plain
    if decoder_norm is not None or p != 1.0:
        paid, plain = penalty(f, decoder_norm, p), plain.detach()
    mse_per_prefix, price, l0, l1 = means_over_rows(
        [errors, paid, active(f, mask, batch_group), plain], mask, batch_group, grad_reduction
    )
    sparsity = weighted(sparsity_coeff, price)
    if shares is None:
        mse = mse_per_prefix.mean()
    else:
        parts = mse_per_prefix.unbind()
        mse = torch.stack([weighted(*pair) for pair in zip(shares, parts, strict=True)]).sum()
    loss, aux = with_auxiliary(mse + sparsity, aux_coeff, aux)
    return MatryoshkaTerms(
        loss=loss,
        mse=mse,
        mse_per_prefix=mse_per_prefix,
        sparsity=sparsity,
        aux=aux,
        l0=l0.detach(),
        l1=l1 if decoder_norm is None and p == 1.0 else l1.detach(),
    )


class MatryoshkaObjective(LossModule):
    """[`matryoshka_loss`][termwise.sae.matryoshka_loss] as a module, from a config.

    Without `prefixes`, each call draws them with [`sample_prefixes`][termwise.sae.sample_prefixes],
    which `torch.compile` cannot trace.

    Examples:
        >>> import torch
        >>> from termwise.sae import Matryoshka, MatryoshkaObjective
        >>> objective = MatryoshkaObjective(Matryoshka(n_prefixes=3))
        >>> x, f, W_dec = torch.ones(4, 3), torch.ones(4, 8), torch.ones(8, 3)
        >>> objective(x, f, W_dec, None).mse_per_prefix.shape
        torch.Size([3])
    """

    cfg: Matryoshka = dataclasses.field(kw_only=False)

    def __call__(
        self,
        x: Float[Tensor, "batch d_model"],
        f: Float[Tensor, "batch d_sae"] | SparseLatents,
        W_dec: Float[Tensor, "d_sae d_model"],
        b_dec: Float[Tensor, " d_model"] | None,
        *,
        prefixes: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        x_hat: Float[Tensor, "batch d_model"] | None = None,
        aux: Float[Tensor, ""] | None = None,
        target: Float[Tensor, "batch d_model"] | None = None,
        decoder_norm: Float[Tensor, " d_sae"] | None = None,
        mask: Bool[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> MatryoshkaTerms:
        """Compute the terms of the objective; draws prefixes if none are passed."""
        weighed = keyword_fields(self.cfg)
        n, law = weighed.pop("n_prefixes"), weighed.pop("law")  # what prefixes are drawn by
        if prefixes is None:
            prefixes = sample_prefixes(W_dec.shape[0], n, law=law, generator=generator)
        return matryoshka_loss(
            x,
            f,
            W_dec,
            b_dec,
            prefixes=prefixes,
            x_hat=x_hat,
            aux=aux,
            target=target,
            decoder_norm=decoder_norm,
            mask=mask,
            batch_group=batch_group,
            **weighed,
        )


def _shares(weights: Sequence[float] | None, n: int) -> list[float] | None:
    """Return weights that sum to 1, or raise an error; None: equal weights."""
    if weights is None:
        return None
    if len(weights) != n:
        raise ValueError(f"matryoshka_loss needs a weight for each of {n} prefixes, got {weights}")
    total = sum(weights)
    if not (all(weight >= 0 for weight in weights) and 0 < total < math.inf):
        raise ValueError(
            f"matryoshka_loss needs weights of at least 0 with a positive sum, got {list(weights)}"
        )
    return [weight / total for weight in weights]
