"""Losses give the same in every path: few elements, blocks on the CPU, blocks elsewhere."""

import sys

import pytest
import torch
from declared import CASES

from termwise import _moments, _numbers
from termwise.joint_embedding import _contrast
from termwise.sae import SparseLatents, matryoshka_loss, vanilla_loss

FAMILIES = ("sae.", "joint_embedding.", "lm.targeted")
ROWS = 33


def choose(monkeypatch, name, value):
    """Set a constant or a function in every module that has imported it."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("termwise") and name in vars(module):
            monkeypatch.setattr(module, name, value)


def cut(monkeypatch, device):
    """Cut into small blocks, as on the CPU or elsewhere, what few elements are."""
    for name, value in (("FEW", 0), ("_SMALL", 0), ("_STRIP", 2)):
        choose(monkeypatch, name, value)
    for module in (_numbers, _contrast):
        monkeypatch.setattr(module, "IN_CACHE", 20)
        monkeypatch.setattr(module, "ON_DEVICE", 20)
    for name, value in (("_ON_DEVICE", 4), ("_MOST_STRIPS", 2)):
        monkeypatch.setattr(_moments, name, value)
    if device == "elsewhere":
        choose(monkeypatch, "on_host", lambda x: False)


def check(monkeypatch, device, call, inputs):
    def found():
        terms = call()
        gradients = torch.autograd.grad(terms.loss, inputs, materialize_grads=True)
        return dict(terms.items()), gradients

    expected = found()
    cut(monkeypatch, device)
    torch.testing.assert_close(found(), expected)


@pytest.mark.parametrize("device", ["cpu", "elsewhere"])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(FAMILIES)])
def test_blocks_give_what_few_calls_give(monkeypatch, name, device):
    case = CASES[name]
    inputs = [x.requires_grad_() for x in case.tensors(ROWS)]
    check(monkeypatch, device, lambda: case.function(*inputs, **case.extra(ROWS)), inputs)


@pytest.mark.parametrize("device", ["cpu", "elsewhere"])
@pytest.mark.parametrize("loss", ["vanilla", "matryoshka"])
def test_blocks_of_half_and_sparse_latents(monkeypatch, loss, device):
    x, W_dec = torch.randn(ROWS, 3), torch.randn(9, 3, requires_grad=True)
    values = torch.randn(ROWS, 4).bfloat16().requires_grad_()
    indices = torch.stack([torch.randperm(9)[:4] for _ in range(ROWS)])
    f = SparseLatents(values, indices)
    if loss == "vanilla":
        check(monkeypatch, device, lambda: vanilla_loss(x, f, x, sparsity_coeff=1.0), [values])
    else:
        check(
            monkeypatch,
            device,
            lambda: matryoshka_loss(x, f, W_dec, None, prefixes=(2, 5), sparsity_coeff=1.0),
            [values, W_dec],
        )
