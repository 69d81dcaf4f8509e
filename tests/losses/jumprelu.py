"""The JumpReLU objective, its latents and their number."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from jaxtyping import Bool, Float
from torch import Tensor

from losses import Variant
from losses._bench import COEFFICIENT, decoder_products, over_latents, two_encoders
from losses._latents import DECODED, SPLIT, counted, mean_count, of_latents, size, squared_error
from termwise.sae import JumpReLU, JumpReLUObjective, jumprelu, jumprelu_l0, jumprelu_loss


class Step(torch.autograd.Function):
    """[h > theta], whose derivative is estimated by a rectangle about theta."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth, input_gradient):
        near = ((pre - threshold) / bandwidth).abs() < 0.5
        ctx.save_for_backward(near.to(pre.dtype) / bandwidth)
        ctx.input_gradient = input_gradient
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, gradient):
        near = gradient * ctx.saved_tensors[0]
        return near if ctx.input_gradient else None, -near.sum(0), None, None


def latents(pre, threshold, *, bandwidth, input_gradient):
    step = Step.apply(pre, threshold, bandwidth, input_gradient)
    jump = step - step.detach()  # nothing, but for its gradient
    return pre * step.detach() + threshold.detach() * jump


def active(pre, threshold, *, bandwidth, input_gradient):
    return Step.apply(pre, threshold, bandwidth, input_gradient).sum(1)


def formula(x, pre, W_dec, b_dec, *, threshold, sparsity_coeff, penalty, dead, mask, **options):
    if threshold is None:
        threshold = options["log_threshold"].exp()
    x, pre = counted(mask, x if options["target"] is None else options["target"], pre)
    estimate = {name: options[name] for name in ("bandwidth", "input_gradient")}
    f = latents(pre, threshold, **estimate)
    l0 = active(pre, threshold, **estimate).mean()
    x_hat = f @ W_dec + (0 if b_dec is None else b_dec)
    mse = squared_error(x, x_hat, options["feature_reduction"])
    norm = W_dec.norm(dim=1)
    if penalty == "l0":
        cost = l0
    elif penalty == "l0_relative":
        cost = (l0 / options["l0_target"] - 1) ** 2
    elif options["threshold_gradient"] == "latents":
        cost = torch.tanh(options["tanh_scale"] * size(f) * norm).sum(1).mean()
    else:  # the height of the jump times the step's gradient
        step = Step.apply(pre, threshold, *estimate.values())
        slopes = torch.tanh(options["tanh_scale"] * size(pre * step.detach()) * norm)
        height = torch.tanh(options["tanh_scale"] * threshold.abs() * norm).detach()
        cost = (slopes + height * (step - step.detach())).sum(1).mean()
    pushed = 0 if dead is None else 1 if isinstance(dead, str) else dead
    gap = (threshold - pre) * (threshold > pre)
    pre_act = (gap * norm * pushed).sum(1).mean()
    sparsity = sparsity_coeff * cost
    return {
        "loss": mse + sparsity + options["pre_act_coeff"] * pre_act,
        "mse": mse,
        "sparsity": sparsity,
        "pre_act": pre_act,
        "l0": mean_count((pre > threshold).to(pre.dtype)),
        "threshold_mean": threshold.mean(),
    }


NUMBERS = {"sparsity_coeff": 0.3, "bandwidth": 0.5}


# What the benches measure.


class Jump(torch.autograd.Function):
    """JumpReLU and its count with the kernel's estimates, line by line."""

    @staticmethod
    def forward(pre: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        active = (pre > threshold).float()
        return pre * active, active

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, of_f: Tensor, of_active: Tensor) -> tuple[Tensor, Tensor]:
        pre, threshold = ctx.saved_tensors
        kernel = ((pre - threshold).abs() < 0.5 / 2).float() / 0.5
        of_threshold = -(threshold * kernel * of_f + kernel * of_active).sum(0)
        return of_f * (pre > threshold).float(), of_threshold


def with_threshold(rows: int, d_sae: int, d_model: int) -> list[Tensor]:
    pre, _, W_dec, x = two_encoders(rows, d_sae, d_model)
    return [pre, torch.full((d_sae,), 0.5, requires_grad=True), W_dec, x]


def plain_jumprelu(pre: Tensor, threshold: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    f, active = Jump.apply(pre, threshold)
    return F.mse_loss(f @ W_dec, x) + COEFFICIENT * active.sum(1).mean()


def our_jumprelu(pre: Tensor, threshold: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    return jumprelu_loss(
        x, pre, W_dec, threshold=threshold, sparsity_coeff=COEFFICIENT, bandwidth=0.5
    ).loss


JUMPRELU_LOSS = of_latents(
    function=jumprelu_loss,
    formula=formula,
    bench={
        "": over_latents(with_threshold, plain_jumprelu, our_jumprelu, products=decoder_products)
    },
    formula_at=(
        {},
        {"penalty": "l0_relative", "l0_target": 1.5, "dead": "all"},
        {"penalty": "tanh", "log_threshold": Float[Tensor, " d_sae"], "threshold": None},
    ),
    variants={
        "": Variant(
            module=JumpReLUObjective(JumpReLU(**NUMBERS)),
            options=NUMBERS,
            shapes=DECODED,
            named={"log_threshold": "latents"},
            masks=("mask",),
        )
    },
    overrides={
        "penalty": st.sampled_from(("l0", "tanh")),
        "l0_target": None,
        "dead": Bool[Tensor, " d_sae"],
        "log_threshold": None,
        "threshold": Float[Tensor, " d_sae"],
        "f": None,  # which have to go together; test_jumprelu.py gives them
        "x_hat": None,
    },
    # Its square comes after the mean over all ranks.
    more={"assert_sharding": {"penalty": "l0_relative", "l0_target": 1.5, "dead": "all"}},
    weights={**SPLIT, "pre_act": "pre_act_coeff"},
    # A kernel estimates those by pre and threshold.
    by={"assert_gradients": ("x", "W_dec", "b_dec", "target")},
)
LATENTS = of_latents(
    function=jumprelu,
    formula=latents,
    shards={},
    second=("right",),
    # Second derivatives are those of the kernel's estimate.
    by={"assert_gradients": ("pre",), "assert_double_backward": ("pre", "threshold")},
    more={"assert_gradients": {"input_gradient": False}, "assert_double_backward": {}},
)
# A count, whose only gradient is the kernel's estimate; here every element is in its window.
ACTIVE = of_latents(
    function=jumprelu_l0,
    formula=active,
    shards={},
    second=("right",),
    more={"assert_gradients": {"bandwidth": 64.0}, "assert_double_backward": {}},
    not_held={"assert_gradients": r"gradient of result with respect to (pre|threshold) is"},
)
