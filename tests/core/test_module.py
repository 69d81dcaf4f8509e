"""`LossModule`: what a module of fields is at run time, for any fields."""

import copy
import dataclasses
import pickle

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

import termwise as tw


@tw.terms
class ErrorTerms(tw.Terms):
    error: Float[Tensor, ""]


@tw.contract
def error_loss(
    model: nn.Module, x: Float[Tensor, "n d"], *, scale: float = 1.0, power: int = 2
) -> ErrorTerms:
    error = model(x).abs().pow(power).sum()
    return ErrorTerms(loss=scale * error, error=error)


class ErrorLoss(tw.LossModule):
    """The fields, a model by position, and a parameter of its own."""

    model: nn.Module = dataclasses.field(kw_only=False)
    scale: float = 1.0
    power: int = 2

    def __post_init__(self) -> None:
        self.log_scale = nn.Parameter(torch.zeros(()))

    def __call__(self, x: Float[Tensor, "n d"]) -> ErrorTerms:
        """Compute the terms."""
        return error_loss(self.model, x * self.log_scale.exp(), **self.hyperparameters())


class ShiftedErrorLoss(ErrorLoss):
    shift: float = 1.0

    def __call__(self, x: Float[Tensor, "n d"]) -> ErrorTerms:
        """Compute the terms of shifted samples."""
        return error_loss(self.model, x + self.shift, scale=self.scale, power=self.power)


@pytest.fixture
def loss_fn():
    return ErrorLoss(nn.Linear(3, 2), power=3)


def test_a_call_is_the_function(loss_fn):
    x = torch.randn(4, 3)
    torch.testing.assert_close(loss_fn(x).loss, error_loss(loss_fn.model, x, power=3).loss)
    assert loss_fn.hyperparameters() == {"scale": 1.0, "power": 3}
    assert {name for name, _ in loss_fn.named_parameters()} == {
        "log_scale",
        "model.weight",
        "model.bias",
    }


def test_it_prints_its_fields(loss_fn):
    assert loss_fn.extra_repr() == "scale=1.0, power=3"
    assert "(model): Linear(in_features=3" in repr(loss_fn)


class SampledLoss(tw.LossModule):
    sampler: nn.Module | None = None


def test_a_module_in_a_field_with_a_default_is_the_field():
    sampler = nn.Linear(2, 2)
    assert SampledLoss(sampler=sampler).sampler is sampler
    assert SampledLoss().sampler is None


def test_construction_is_checked():
    model = nn.Linear(3, 2)
    with pytest.raises(tw.ContractError, match=r"ErrorLoss\.__init__: power needs int, got"):
        ErrorLoss(model, power="2")
    with pytest.raises(tw.ContractError, match=r"model needs .*Module"):
        ErrorLoss(3)
    with pytest.raises(TypeError, match="positional"):
        ErrorLoss(model, 2.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'scal'"):
        ErrorLoss(model, scal=2.0)


def test_a_subclass_adds_fields_and_replaces_the_call():
    loss_fn = ShiftedErrorLoss(nn.Identity(), scale=2.0, shift=3.0)
    assert loss_fn.extra_repr() == "scale=2.0, power=2, shift=3.0"
    assert loss_fn(torch.zeros(1, 2)).loss.item() == 2 * 2 * 9
    assert isinstance(loss_fn, ErrorLoss)


def test_hooks_see_the_call(loss_fn):
    seen = []
    loss_fn.register_forward_hook(lambda module, inputs, terms: seen.append(terms))
    terms = loss_fn(torch.ones(1, 3))
    assert seen == [terms]
    assert loss_fn.forward.__name__ == "forward"


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_it_copies_with_its_parameters(loss_fn, copier):
    again, x = copier(loss_fn), torch.randn(2, 3)
    torch.testing.assert_close(again(x).loss, loss_fn(x).loss)
    assert again.model.weight is not loss_fn.model.weight
    assert again.hyperparameters() == loss_fn.hyperparameters()


def test_it_compiles_whole_and_exports(loss_fn):
    x = torch.randn(4, 3)
    expected = loss_fn(x)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x).loss, expected.loss)
    exported = torch.export.export(loss_fn, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x).loss, expected.loss)


def test_state_is_that_of_its_parameters(loss_fn):
    other = ErrorLoss(nn.Linear(3, 2), power=3)
    other.load_state_dict(loss_fn.state_dict())
    x = torch.randn(2, 3)
    torch.testing.assert_close(other(x).loss, loss_fn(x).loss)
