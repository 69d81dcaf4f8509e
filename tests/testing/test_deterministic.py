"""`assert_deterministic`: the same call twice, and with deterministic algorithms."""

import re

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from termwise import testing


def right(
    x: Float[Tensor, "n d"], places: Int[Tensor, " n"], generator: torch.Generator | None = None
) -> Float[Tensor, ""]:
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return torch.zeros(4, x.shape[1], dtype=x.dtype).index_add(0, places, x + noise).square().sum()


def put(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    return torch.zeros_like(x).put_(torch.zeros(len(x), dtype=torch.int64), x).sum()


def global_noise(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    return (x * torch.randn_like(x)).sum()


class NoisyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + 1e-12 * torch.rand_like(grad)


def noisy_gradient(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    return NoisyGradient.apply(x).sum()


def uninitialized(x: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    memory = torch.empty_like(x)
    return (x + 0 * (memory if deterministic() else memory.nan_to_num(0, 0, 0))).sum()


def deterministic():
    return torch.are_deterministic_algorithms_enabled()


FOUND = {
    put: r"with deterministic algorithms: put_ does not have a deterministic implementation",
    global_noise: r"(result|the gradient with respect to x) is .*, then .* for the same call",
    noisy_gradient: r"the gradient with respect to x is .*, then .* for the same call",
    uninitialized: r"result is .*, but nan with deterministic algorithms",
}


def test_a_right_loss_passes():
    testing.assert_deterministic(right, max_examples=20)
    testing.assert_deterministic(right, device=torch.device("cpu"))


@pytest.mark.parametrize("fn", FOUND)
def test_faults_are_found(fn):
    with pytest.raises(AssertionError) as broken:
        testing.assert_deterministic(fn)
    text = str(broken.value)
    assert re.match(f"assert_deterministic: {fn.__name__}: {FOUND[fn]}", text)
    assert f"\n{fn.__name__}(\n" in text
    assert not deterministic()


def test_settings_stay_as_they_were():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        testing.assert_deterministic(right, max_examples=1)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
