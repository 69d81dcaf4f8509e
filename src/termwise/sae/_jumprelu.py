"""JumpReLU: latents with a learned threshold, whose gradient is a kernel estimate."""

import dataclasses
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .._autograd import Function, apply_own
from .._coefficients import is_zero, weighted
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import means_over_rows
from .._module import LossModule, keyword_fields
from .._numbers import lifted, lifted_dtype, without_autocast
from .._terms import Terms, terms
from ._latents import counted, decode
from ._penalties import tanh_penalty
from ._squared_errors import FeatureReduction, squared_errors

JumpReLUPenalty = Literal["l0", "l0_relative", "tanh"]
ThresholdGradient = Literal["latents", "gate"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JumpReLU:
    """Config of the JumpReLU objective: the hyperparameters of its loss."""

    sparsity_coeff: float = 1e-3
    """Weight of the penalty."""
    bandwidth: float = 1e-3
    """Width of the kernel around the threshold, in units of the pre-activations."""
    penalty: JumpReLUPenalty = "l0"
    """Penalty on active latents."""
    l0_target: float | None = None
    """Target number of active latents of a row, for "l0_relative"."""
    tanh_scale: float = 4.0
    """c of "tanh"."""
    threshold_gradient: ThresholdGradient = "latents"
    """How "tanh" computes the gradient of the threshold."""
    pre_act_coeff: float = 0.0
    """Weight of the penalty on pre-activations below their threshold; Anthropic's is 3e-6."""
    input_gradient: bool = False
    """Whether the pre-activations get the estimated gradient of the jump too."""
    feature_reduction: FeatureReduction = "mean"
    """Reduction over d_model: "mean" or "sum"."""
    grad_reduction: GradReduction = "mean"
    """How the trainer combines the ranks' gradients."""


@terms
class JumpReLUTerms(Terms):
    """Terms of [`jumprelu_loss`][termwise.sae.jumprelu_loss]."""

    loss: Float[Tensor, ""]
    """mse + sparsity + pre_act_coeff * pre_act."""
    mse: Float[Tensor, ""]
    """Squared error of the reconstruction: mean (or sum) over features, mean over rows."""
    sparsity: Float[Tensor, ""]
    """The penalty with its coefficient: of L0, of (L0 / l0_target - 1)^2, or of tanh."""
    pre_act: Float[Tensor, ""]
    """The penalty on pre-activations below their threshold, before its coefficient: mean over rows
    of sum_j norm_j max(0, threshold_j - pre_j) over the latents of `dead`; 0 without `dead`."""
    l0: Float[Tensor, ""]
    """Latents of a row above their threshold, mean over rows; detached."""
    threshold_mean: Float[Tensor, ""]
    """Mean over latents of the threshold, not of its logarithm; detached."""


@contract
def jumprelu(
    pre: Float[Tensor, "batch d_sae"],
    threshold: Float[Tensor, " d_sae"],
    *,
    bandwidth: float = 1e-3,
    input_gradient: bool = False,
) -> Float[Tensor, "batch d_sae"]:
    r"""Keep latents above their threshold, and estimate the gradient of the jump with a kernel.

    $$f_{ij} = h_{ij} \, [h_{ij} > \theta_j]$$

    The derivative with respect to theta is zero wherever it exists, since it does not see the jump.
    It is replaced by a straight-through estimate of the derivative of the mean over the data, with
    the rectangle kernel K(u) = [|u| < 1/2] of width epsilon:

    $$\frac{\partial f_{ij}}{\partial \theta_j} := -\frac{\theta_j}{\epsilon}
    K\!\left(\frac{h_{ij} - \theta_j}{\epsilon}\right), \qquad
    \frac{\partial f_{ij}}{\partial h_{ij}} := [h_{ij} > \theta_j]$$

    Args:
        pre (Float[Tensor, "batch d_sae"]): h, the encoder's pre-activations, before any activation
            function: values that a ReLU or a gate set to zero would be missing from the kernel.
        threshold (Float[Tensor, " d_sae"]): theta. Positive in the paper, which learns its
            logarithm.
        bandwidth: epsilon, in units of h; 0.001 in the paper, for inputs of unit mean square. A
            larger one reduces the variance of the estimate as 1 / epsilon and increases its bias.
        input_gradient: whether h gets the estimate too: (theta / epsilon) K is added to the second
            derivative above.

    Returns:
        Float[Tensor, "batch d_sae"]: the latents, in the dtype of pre. Saved for the backward pass:
        pre and threshold. Sums over rows are computed in float32 or float64. Second derivatives, in
        eager mode and reverse mode, are those of the formulas above, which are constant in h.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: bandwidth is not positive.
        NotImplementedError: it is compiled within `torch.func.grad` or `torch.vmap`, where PyTorch
            loses its gradient; not under `torch.no_grad()`.

    References:
        Rajamanoharan et al., Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse
        Autoencoders (2024), https://arxiv.org/abs/2407.14435; there the gradient of h has no
        kernel. In Anthropic's update of January 2025 it has: `input_gradient=True`.

    Examples:
        >>> import torch
        >>> from termwise.sae import jumprelu
        >>> threshold = torch.tensor([0.5, 0.5, 0.5], requires_grad=True)
        >>> f = jumprelu(torch.tensor([[0.4, 0.6, 2.0]]), threshold, bandwidth=1.0)
        >>> f
        tensor([[0.0000, 0.6000, 2.0000]], grad_fn=...)
        >>> f.sum().backward()
        >>> threshold.grad
        tensor([-0.5000, -0.5000, -0.0000])
    """
    _check_bandwidth("jumprelu", bandwidth)
    f = apply_own("jumprelu", _JumpReLU, pre, threshold, bandwidth, input_gradient, False)
    return cast("Tensor", f)


@contract
def jumprelu_l0(
    pre: Float[Tensor, "batch d_sae"],
    threshold: Float[Tensor, " d_sae"],
    *,
    bandwidth: float = 1e-3,
    input_gradient: bool = False,
) -> Float[Tensor, " batch"]:
    r"""Count the latents of each row above their threshold, with an estimated gradient.

    $$n_i = \sum_j [h_{ij} > \theta_j], \qquad \frac{\partial n_i}{\partial \theta_j} :=
    -\frac{1}{\epsilon} K\!\left(\frac{h_{ij} - \theta_j}{\epsilon}\right)$$

    with the kernel of [`jumprelu`][termwise.sae.jumprelu]. Averaged over rows, the estimate is
    minus the density of h at theta.

    Args:
        pre (Float[Tensor, "batch d_sae"]): h, the encoder's pre-activations, before any activation
            function.
        threshold (Float[Tensor, " d_sae"]): theta.
        bandwidth: epsilon, in units of h.
        input_gradient: whether h gets the same derivative with the opposite sign. False: none.

    Returns:
        Float[Tensor, " batch"]: the number of active latents of each row, as a float. Saved for the
        backward pass: pre and threshold.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: bandwidth is not positive.
        NotImplementedError: it is compiled within `torch.func.grad` or `torch.vmap`, where PyTorch
            loses its gradient; not under `torch.no_grad()`.

    References:
        Rajamanoharan et al. (2024), https://arxiv.org/abs/2407.14435.

    Examples:
        >>> import torch
        >>> from termwise.sae import jumprelu_l0
        >>> jumprelu_l0(torch.tensor([[0.4, 0.6, 2.0]]), torch.full((3,), 0.5))
        tensor([2.])
    """
    _check_bandwidth("jumprelu_l0", bandwidth)
    l0 = apply_own("jumprelu_l0", _ActiveCount, pre, threshold, bandwidth, input_gradient, True)
    return cast("Tensor", l0)


@contract
def jumprelu_loss(
    x: Float[Tensor, "batch d_model"],
    pre: Float[Tensor, "batch d_sae"],
    W_dec: Float[Tensor, "d_sae d_model"],
    b_dec: Float[Tensor, " d_model"] | None = None,
    *,
    threshold: Float[Tensor, " d_sae"] | None = None,
    log_threshold: Float[Tensor, " d_sae"] | None = None,
    sparsity_coeff: float | Float[Tensor, ""],
    f: Float[Tensor, "batch d_sae"] | None = None,
    x_hat: Float[Tensor, "batch d_model"] | None = None,
    bandwidth: float = 1e-3,
    penalty: JumpReLUPenalty = "l0",
    l0_target: float | None = None,
    tanh_scale: float = 4.0,
    threshold_gradient: ThresholdGradient = "latents",
    pre_act_coeff: float | Float[Tensor, ""] = 0.0,
    dead: Bool[Tensor, " d_sae"] | Literal["all"] | None = None,
    input_gradient: bool = False,
    target: Float[Tensor, "batch d_model"] | None = None,
    mask: Bool[Tensor, " batch"] | None = None,
    feature_reduction: FeatureReduction = "mean",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> JumpReLUTerms:
    r"""Reconstruct activations through JumpReLU, with a penalty on the number of active latents.

    $$\mathrm{loss} = \frac{1}{n} \sum_i \frac{1}{d} \| x_i - f_i W - b \|^2
    + S + \lambda_P P, \qquad
    f_{ij} = h_{ij} \, [h_{ij} > \theta_j]$$

    over the n rows that count. With L0 the mean number of active latents of a row, S is

    $$\lambda \, \mathrm{L0}, \qquad \lambda \left( \frac{\mathrm{L0}}{k} - 1 \right)^2
    \qquad \text{or} \qquad
    \frac{\lambda}{n} \sum_{i,j} \tanh(c \, \left|f_{ij}\right| \, \| W_j \|)$$

    for "l0", "l0_relative" and "tanh", and the penalty on pre-activations below their threshold is

    $$P = \frac{1}{n} \sum_i \sum_{j \in D}
    \max(0, \theta_j - h_{ij}) \, \| W_j \|$$

    The jump's gradients are those of [`jumprelu`][termwise.sae.jumprelu] and
    [`jumprelu_l0`][termwise.sae.jumprelu_l0]. Half precision is converted to float32 before
    anything is decoded or subtracted, with or without autocast.

    Args:
        x (Float[Tensor, "batch d_model"]): activations, a row for each token.
        pre (Float[Tensor, "batch d_sae"]): h, the encoder's pre-activations, before any ReLU.
        W_dec (Float[Tensor, "d_sae d_model"]): W, the decoder, a row for each latent.
        b_dec (Float[Tensor, " d_model"] | None): b, the decoder's bias. None: 0.
        threshold (Float[Tensor, " d_sae"] | None): theta. Pass this or log_threshold.
        log_threshold (Float[Tensor, " d_sae"] | None): the logarithm of theta, as the paper learns
            it.
        sparsity_coeff (float | Float[Tensor, ""]): lambda, the weight of the penalty. It depends on
            `feature_reduction`: with "sum" the squared error is d_model times that of "mean".
            Exactly 0.0 removes the penalty from the loss and the gradient, even if it is infinite.
            A tensor, on the device of x, may change at each step without recompiling; its term is
            always multiplied and added, even if it is 0. The same holds for pre_act_coeff.
        f (Float[Tensor, "batch d_sae"] | None): the latents, already computed by
            [`jumprelu`][termwise.sae.jumprelu] from the same pre, threshold and bandwidth. None:
            computed.
        x_hat (Float[Tensor, "batch d_model"] | None): reconstruction, already decoded from f; W_dec
            and b_dec are then used for norms only. Requires f. None: decoded.
        bandwidth: epsilon, the kernel's width in units of h.
        penalty: "l0" (the paper), "l0_relative" (dictionary_learning and SAEBench), whose square is
            taken after the mean over all rows of all ranks, or "tanh" (Anthropic).
        l0_target: k, the target number of active latents of a row; only for "l0_relative".
        tanh_scale: c; 4 in Anthropic's update. Used only by "tanh".
        threshold_gradient: how "tanh" computes the gradient of the threshold; used only by "tanh".
            "latents": the slope of the penalty at f, where |f| has the derivative 1 at 0, times the
            jump's gradient, as in SAELens and in code for cross-layer transcoders. Its mean is
            -(theta c nu / 2) (1 + sech^2(c theta nu)) times the density of h at theta: the exact
            derivative if c theta nu is small, and about c theta nu / 2 times as much if it is
            large. "gate": minus the height of the step, tanh(c theta nu), times the kernel, whose
            mean is the exact derivative for any theta.
        pre_act_coeff (float | Float[Tensor, ""]): lambda_P; 3e-6 in Anthropic's update, with
            squared errors summed.
        dead (Bool[Tensor, " d_sae"] | Literal["all"] | None): D, the latents in the penalty P:
            "all", as in Anthropic's formula, or those that have not been active for a while, as in
            SAELens. Required if pre_act_coeff is not 0.
        input_gradient: whether h gets the jump's gradient too, as in Anthropic's update.
        target (Float[Tensor, "batch d_model"] | None): what the reconstruction is compared with, if
            that is not x (a transcoder). None: x.
        mask (Bool[Tensor, " batch"] | None): rows that count; the others affect no term and no
            gradient, even if they are NaN. None: all.
        feature_reduction: over d_model, "mean" or "sum" (both sources).
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank. If no row counts they are NaN, except
        threshold_mean. Gradients, combined over ranks as `grad_reduction` says, equal those of one
        process that holds all rows. Communication: one all-reduce of 3 to 5 float64 elements. Does
        not synchronize with the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: both or neither of threshold and log_threshold are given; x_hat is given and f
            is not; bandwidth or tanh_scale is not positive; l0_target is missing, not positive, or
            not used; pre_act_coeff is not 0 and dead is not given.
        NotImplementedError: it is compiled within `torch.func.grad` or `torch.vmap`, where PyTorch
            loses its gradient; not under `torch.no_grad()`.

    References:
        Rajamanoharan et al., Jumping Ahead (2024), https://arxiv.org/abs/2407.14435. We
        side with it on the kernel, 1 / epsilon once, around the pre-activations: the code
        of dictionary_learning (https://github.com/saprmarks/dictionary_learning) counts L0 on the
        output of JumpReLU, and so loses the half of the kernel below the threshold.
        Anthropic, Dictionary Learning Optimization Techniques, update of January 2025,
        https://transformer-circuits.pub/2025/january-update, for "tanh" and the push.

    Examples:
        >>> import torch
        >>> from termwise.sae import jumprelu_loss
        >>> pre, W_dec = torch.tensor([[0.4, 2.0]]), torch.eye(2)
        >>> threshold = torch.full((2,), 0.5)
        >>> terms = jumprelu_loss(pre, pre, W_dec, threshold=threshold, sparsity_coeff=0.25)
        >>> terms.metrics()
        {'loss': 0.33..., 'mse': 0.08..., 'sparsity': 0.25, 'pre_act': 0.0, 'l0': 1.0,
        'threshold_mean': 0.5}
    """
    if threshold is not None and log_threshold is None:
        theta = lifted(threshold)
    elif log_threshold is not None and threshold is None:
        theta = lifted(log_threshold).exp()
    else:
        given = "neither" if threshold is None else "both"
        raise ValueError(f"jumprelu_loss needs one of threshold and log_threshold, got {given}")
    _check_bandwidth("jumprelu_loss", bandwidth)
    if penalty == "tanh" and not tanh_scale > 0:
        raise ValueError(f"jumprelu_loss needs tanh_scale > 0, got {tanh_scale}")
    if penalty == "l0_relative" and (l0_target is None or not l0_target > 0):
        raise ValueError(f'penalty="l0_relative" needs l0_target > 0, got {l0_target}')
    if penalty != "l0_relative" and l0_target is not None:
        raise ValueError(f'l0_target belongs to penalty="l0_relative", got penalty="{penalty}"')
    if x_hat is not None and f is None:
        raise ValueError("jumprelu_loss needs f where x_hat is given, got None: pass its latents")
    if not is_zero(pre_act_coeff) and dead is None:
        raise ValueError(
            "jumprelu_loss needs dead where pre_act_coeff is not 0, got None: "
            'pass a mask of the dead latents, or dead="all" for Anthropic\'s formula'
        )

    name, kernel = "jumprelu_loss", (bandwidth, input_gradient)
    with without_autocast(x):
        pre = cast("Tensor", counted(pre, mask))
        if f is None:
            f = cast("Tensor", apply_own(name, _JumpReLU, pre, theta, *kernel, True))
        else:
            f = lifted(cast("Tensor", counted(f, mask)))
        if x_hat is None:
            x_hat = decode(f, W_dec, b_dec)
        goal = x if target is None else target
        errors = squared_errors(goal, x_hat, mask, feature_reduction, batch_group)
        active = cast("Tensor", apply_own(name, _ActiveCount, pre, theta, *kernel, False))
        if penalty == "tanh":
            active = active.detach()  # only an L0 penalty needs the gradient of L0
        per_row = [errors, active]
        if penalty == "tanh":
            norm = _row_norms(W_dec)
            if threshold_gradient == "latents":
                paid = tanh_penalty(f, scale=tanh_scale, decoder_norm=norm)
            else:
                slopes = norm * tanh_scale
                above = lifted(pre).masked_fill(pre <= theta, 0)
                paid = tanh_penalty(above, scale=tanh_scale, decoder_norm=norm)
                jump = apply_own(name, _TanhJump, pre, theta, slopes, *kernel)
                paid = paid + jump
            per_row.append(paid)
        if dead is not None:
            below = _below_threshold(pre, theta, _row_norms(W_dec), dead)
            per_row.append(below)
        mse, l0, *others = means_over_rows(per_row, mask, batch_group, grad_reduction)

        if penalty == "tanh":
            price = others[0]
        elif l0_target is not None:
            price = (l0 / l0_target - 1).square()
        else:
            price = l0
        sparsity = weighted(sparsity_coeff, price)
        pre_act = torch.zeros_like(l0) if dead is None else others[-1]
        # Comparisons with NaN are false, so the gate would hide a NaN in the threshold.
        mse = mse.masked_fill(theta.isnan().any(), torch.nan)
        loss = mse + sparsity + weighted(pre_act_coeff, pre_act)
        return JumpReLUTerms(
            loss=loss,
            mse=mse,
            sparsity=sparsity,
            pre_act=pre_act,
            l0=l0.detach(),
            threshold_mean=theta.detach().mean(),
        )


class JumpReLUObjective(LossModule):
    """[`jumprelu_loss`][termwise.sae.jumprelu_loss] as a module, from a config.

    Examples:
        >>> import torch
        >>> from termwise.sae import JumpReLU, JumpReLUObjective
        >>> objective = JumpReLUObjective(JumpReLU(penalty="l0_relative", l0_target=4.0))
        >>> pre, W_dec = torch.ones(5, 8), torch.ones(8, 3)
        >>> objective(torch.ones(5, 3), pre, W_dec, threshold=torch.zeros(8)).metrics()["sparsity"]
        0.001...
    """

    cfg: JumpReLU = dataclasses.field(kw_only=False)

    def __call__(
        self,
        x: Float[Tensor, "batch d_model"],
        pre: Float[Tensor, "batch d_sae"],
        W_dec: Float[Tensor, "d_sae d_model"],
        b_dec: Float[Tensor, " d_model"] | None = None,
        *,
        f: Float[Tensor, "batch d_sae"] | None = None,
        x_hat: Float[Tensor, "batch d_model"] | None = None,
        threshold: Float[Tensor, " d_sae"] | None = None,
        log_threshold: Float[Tensor, " d_sae"] | None = None,
        dead: Bool[Tensor, " d_sae"] | Literal["all"] | None = None,
        target: Float[Tensor, "batch d_model"] | None = None,
        mask: Bool[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> JumpReLUTerms:
        """Compute the terms of the objective."""
        return jumprelu_loss(
            x,
            pre,
            W_dec,
            b_dec,
            threshold=threshold,
            log_threshold=log_threshold,
            f=f,
            x_hat=x_hat,
            dead=dead,
            target=target,
            mask=mask,
            batch_group=batch_group,
            **keyword_fields(self.cfg),
        )


def _check_bandwidth(caller: str, bandwidth: float) -> None:
    if not bandwidth > 0:
        raise ValueError(f"{caller} needs bandwidth > 0, got {bandwidth}")


def _row_norms(W_dec: Tensor) -> Tensor:
    return cast("Tensor", torch.linalg.vector_norm(lifted(W_dec), dim=1))


def _below_threshold(
    pre: Tensor, theta: Tensor, norm: Tensor, dead: Tensor | Literal["all"]
) -> Tensor:
    """Return sum_j norm_j max(0, theta_j - pre_j) of each row, over the dead latents."""
    gap = F.relu(theta - lifted(pre))
    if isinstance(dead, Tensor):
        gap = gap.where(dead, 0)
    return (gap * norm).sum(1)


def _near(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """Return the kernel, 1 or 0."""
    distance = (lifted(pre) - lifted(threshold)).abs_()
    return (bandwidth / 2 - distance).sign_().relu_()


def _above(pre: Tensor, threshold: Tensor) -> Tensor:
    """Return the gate, 1 or 0, as floats, computed in place: booleans are several times slower."""
    return (pre - threshold).sign_().relu_()


class _JumpReLU(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        pre: Tensor, threshold: Tensor, bandwidth: float, input_gradient: bool, lift: bool
    ) -> Tensor:
        # Not pre times the gate, since -inf times 0 is NaN; but NaN must remain NaN.
        clamped = torch.maximum(pre, threshold.clamp(max=torch.finfo(threshold.dtype).max))
        return (clamped * _above(pre, threshold)).to(lifted_dtype(pre) if lift else pre.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pre, threshold, ctx.bandwidth, ctx.input_gradient, _ = inputs
        ctx.save_for_backward(pre, threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        felt = lifted(gradients[0])
        through = felt * _above(pre, threshold)
        slope = lifted(threshold) * (1 / ctx.bandwidth)
        felt = felt * _near(pre, threshold, ctx.bandwidth)
        if ctx.input_gradient:
            through = through + felt * slope
        for_threshold = -slope * felt.sum(0)
        return through.to(pre.dtype), for_threshold.to(threshold.dtype), None, None, None


class _ActiveCount(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        pre: Tensor, threshold: Tensor, bandwidth: float, input_gradient: bool, look_for_nan: bool
    ) -> Tensor:
        count = _above(pre, threshold).sum(1, dtype=lifted_dtype(pre))
        if look_for_nan:
            count.masked_fill_((pre.isnan() | threshold.isnan()).any(1), torch.nan)
        return count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pre, threshold, ctx.bandwidth, ctx.input_gradient, _ = inputs
        ctx.save_for_backward(pre, threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold = ctx.saved_tensors
        density = gradients[0][:, None] * (1 / ctx.bandwidth)
        felt = density * _near(pre, threshold, ctx.bandwidth)
        for_pre = felt.to(pre.dtype) if ctx.input_gradient else None
        return for_pre, -felt.sum(0).to(threshold.dtype), None, None, None


class _TanhJump(Function):
    """Add 0 to a row's tanh penalty, with the gradient of its steps for the threshold.

    The gradient is estimated by minus the height of a step, tanh(c theta nu), times the kernel; its
    mean is the derivative of the mean penalty.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        pre: Tensor, threshold: Tensor, slopes: Tensor, bandwidth: float, input_gradient: bool
    ) -> Tensor:
        return lifted(pre).new_zeros(pre.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pre, threshold, slopes, ctx.bandwidth, ctx.input_gradient = inputs
        ctx.save_for_backward(pre, threshold, slopes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        pre, threshold, slopes = ctx.saved_tensors
        density = gradients[0][:, None] * (1 / ctx.bandwidth)
        felt = density * _near(pre, threshold, ctx.bandwidth)
        height = torch.tanh(lifted(threshold).abs() * slopes)
        for_pre = (felt * height).to(pre.dtype) if ctx.input_gradient else None
        return for_pre, (-felt.sum(0) * height).to(threshold.dtype), None, None, None
