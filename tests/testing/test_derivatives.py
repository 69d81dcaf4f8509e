"""`assert_double_backward` and `assert_forward_mode`: right, or refused, and never wrong."""

import re

import pytest
import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

import termwise as tw
from termwise import testing


class Cube(torch.autograd.Function):
    """x^3, whose derivative is a constant to its second backward pass."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x.detach() ** 2 * grad


class Once(Cube):
    """The same: the error of once_differentiable comes only where `grad` has a gradient itself."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Refused(Cube):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return Refusing.apply(3 * x**2 * grad)


class Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("a cube has no second derivative")


class Crashing(Refusing):
    @staticmethod
    def backward(ctx, grad):
        return grad[None] @ grad[:1, None, None]  # sizes that do not fit


class Crashes(Cube):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return Crashing.apply(3 * x**2 * grad)


class HalfMixed(torch.autograd.Function):
    """x y^2, whose mixed derivative is lost on one way."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y**2

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return grad * y.detach() ** 2, 2 * x * y * grad


class HalfRefused(HalfMixed):
    """One gradient is refused, and the other lacks a part."""

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return Refusing.apply(grad * y**2), 2 * x.detach() * y * grad


def of(function):
    def cube(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        return function.apply(x).sum()

    return cube


def mixed(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    return HalfMixed.apply(x, y).sum()


def half_refused(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    return HalfRefused.apply(x, y).sum()


def smooth(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    return (x @ y.T).logsumexp(1).sum() + (x - y).abs().mean()


def kinks(x: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    return (x.relu() + (1000 * x).frac().square()).sum()


def linear(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    return 3 * x.sum()


def spectral(x: Complex[Tensor, " n"]) -> Float[Tensor, ""]:
    return (x.abs().square() * x.real.exp()).sum()


def failure(law, fn, **options):
    with pytest.raises(AssertionError) as broken:
        getattr(testing, law)(fn, **options)
    text = str(broken.value)
    assert text.startswith(f"{law}: {fn.__name__}: ")
    assert f"\n{fn.__name__}(\n" in text
    return text.partition("\n")[0].removeprefix(f"{law}: {fn.__name__}: ")


# --- second derivatives ---------------------------------------------------------------------


def test_right_second_derivatives_pass():
    for fn in (smooth, linear, spectral):
        testing.assert_double_backward(fn, refused=False, max_examples=10)
    testing.assert_double_backward(kinks, max_examples=10)
    at_a_kink = torch.rand(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at_a_kink[1, 2] = 0.946
    testing.assert_double_backward(kinks, overrides={"x": at_a_kink})


def test_refusals_pass():
    testing.assert_double_backward(of(Refused), refused=True)
    testing.assert_double_backward(of(Refused))
    text = failure("assert_double_backward", of(Refused), refused=False)
    says = (
        "the second derivative of result is refused with NotImplementedError: a cube has no second "
    )
    assert text.startswith(says)
    assert failure("assert_double_backward", smooth, refused=True) == (
        "the second derivative of result is not refused"
    )


def test_wrong_second_derivatives_are_found():
    for function in (Cube, Once):
        text = failure("assert_double_backward", of(function))
        assert re.match(
            r"the second derivative of result with respect to x is 0, but finite diff", text
        )
    text = failure("assert_double_backward", mixed)
    assert re.match(r"the second derivative of result with respect to y is ", text)
    text = failure("assert_double_backward", half_refused)
    assert re.match(
        r"the second derivative of result with respect to x is 0, but finite diff", text
    )
    testing.assert_double_backward(mixed, arguments=["x"])  # which it lacks no part of
    text = failure("assert_double_backward", of(Crashes), sizes={"n": 3})
    assert text.startswith("the second derivative of result fails with RuntimeError: ")


@tw.terms
class TwoTerms(tw.Terms):
    held: Float[Tensor, ""]
    free: Float[Tensor, ""]
    seen: Float[Tensor, ""]


def two(x: Float[Tensor, " n"]) -> TwoTerms:
    held, free = Refused.apply(x).sum(), x.square().sum()
    return TwoTerms(loss=held + free, held=held, free=free, seen=x.detach().sum())


def partly_wrong(x: Float[Tensor, " n"]) -> TwoTerms:
    held, free = Refused.apply(x).sum(), Cube.apply(x).sum()
    return TwoTerms(loss=held + free, held=held, free=free, seen=x.detach().sum())


def test_each_term_is_looked_at():
    testing.assert_double_backward(two)
    testing.assert_double_backward(two, refused=True)  # of the loss
    text = failure("assert_double_backward", partly_wrong)
    assert text.startswith("the second derivative of free with respect to x is 0, but finite")


def count(x: Int[Tensor, " n"]) -> Int[Tensor, ""]:
    return x.sum()


@pytest.mark.parametrize("law", ["assert_double_backward", "assert_forward_mode"])
def test_what_has_no_gradient_is_refused(law):
    says = f"{law}: no part of the result of count has a gradient with respect to an argument"
    with pytest.raises(ValueError, match=f"^{says}$"):
        getattr(testing, law)(count)
    with pytest.raises(ValueError, match=f"^{law}: smooth takes no z, only x, y$"):
        getattr(testing, law)(smooth, arguments=["z"])


# --- forward mode ---------------------------------------------------------------------------


class Forward(torch.autograd.Function):
    """x^3, with a derivative for forward mode that is half of it."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return 1.5 * x**2 * tangent


class BackwardOnly(Forward):
    jvp = torch.autograd.Function.jvp


def target_without_grad(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    with torch.no_grad():
        target = y.softmax(1)
    return -(target * x.log_softmax(1)).sum()


def target_detached(x: Float[Tensor, "n d"], y: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    return -(y.softmax(1).detach() * x.log_softmax(1)).sum()


def counted(x: Float[Tensor, " n"]) -> TwoTerms:
    held = x.square().sum()
    return TwoTerms(loss=held, held=held, free=held, seen=(x > 0).sum().to(x.dtype))


def rows(x: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], float]:
    return x.square().sum(1), 1.0


def test_right_forward_mode_passes():
    for fn in (smooth, linear, spectral, kinks, target_detached, counted, rows):
        testing.assert_forward_mode(fn, refused=False, max_examples=10)


def test_refused_forward_mode_passes():
    testing.assert_forward_mode(of(BackwardOnly))
    testing.assert_forward_mode(of(BackwardOnly), refused=True)
    text = failure("assert_forward_mode", of(BackwardOnly), refused=False)
    assert text.startswith("forward mode is refused with NotImplementedError: ")
    assert failure("assert_forward_mode", smooth, refused=True) == "forward mode is not refused"


def test_wrong_forward_mode_is_found():
    for fn in (of(Forward), target_without_grad):
        text = failure("assert_forward_mode", fn)
        assert re.match(r"the directional derivative of result is .* in forward mode, but ", text)
    # Only the other argument is detached.
    testing.assert_forward_mode(target_without_grad, arguments=["x"])

    def crashing(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError("sizes do not fit")
        return x.sum()

    text = failure("assert_forward_mode", crashing)
    assert text == "forward mode fails with RuntimeError: sizes do not fit"
