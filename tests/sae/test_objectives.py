"""From a config to its objective."""

import dataclasses

import pytest
import torch

from termwise import sae


@pytest.mark.parametrize(
    "name",
    ["Vanilla", "TopK", "JumpReLU", "Gated", "Matryoshka", "Crosscoder", "EndToEnd"],
)
def test_a_config_gives_the_objective_of_its_name(name):
    cfg = getattr(sae, name)()
    objective = sae.get_objective(cfg)
    assert type(objective).__name__ == f"{name}Objective"
    assert objective.cfg is cfg
    with pytest.raises(AttributeError):
        setattr(cfg, dataclasses.fields(cfg)[0].name, 1.0)


def test_anything_else_is_refused():
    with pytest.raises(TypeError, match=r"^get_objective needs a config of termwise.sae, got str$"):
        sae.get_objective("vanilla")


def test_one_prefix_of_full_width_is_vanilla():
    x, f, W_dec, b_dec = torch.randn(6, 4), torch.rand(6, 9), torch.randn(9, 4), torch.randn(4)
    whole = sae.matryoshka_loss(x, f, W_dec, b_dec, prefixes=(9,), sparsity_coeff=0.1)
    vanilla = sae.vanilla_loss(x, f, f @ W_dec + b_dec, sparsity_coeff=0.1)
    for name in ("loss", "mse", "sparsity", "l0", "l1"):
        torch.testing.assert_close(getattr(whole, name), getattr(vanilla, name))
