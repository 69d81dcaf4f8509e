"""What every loss says of an energy that is none: another shape, or rows that are coupled."""

import functools
import inspect
import re

import pytest
import torch
from declared import CASES
from torch import nn

import termwise as tw
from termwise import energy

X, Y = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
CALLS = {
    energy.hessian_trace: functools.partial(energy.hessian_trace, x=X),
    energy.langevin: functools.partial(energy.langevin, x=X, steps=1, step_size=0.1),
    **{
        case.loss: lambda energy, case=case: case.changed(4, energy=energy)
        for case in CASES.values()
        if "energy" in inspect.signature(case.loss).parameters
    },
}
"""Each function of an energy: the losses as they are declared, on four rows of three numbers."""

every = pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)


def test_no_function_of_an_energy_is_left_out():
    takers = {
        value
        for name, value in vars(energy).items()
        if inspect.isfunction(value)
        and "energy" in inspect.signature(value).parameters
        and name != "create_loss"
    }
    assert takers == CALLS.keys()


def cubic(x):
    return x.pow(3).sum(1)


SHAPES = {
    "squeeze": (lambda x: cubic(x)[:, None], "float32[4, 1]: write energy(x).squeeze(-1)"),
    "flatten": (lambda x: cubic(x)[:, None, None], "float32[4, 1, 1]: write energy(x).flatten()"),
    "field": (
        lambda x: 3 * x.square(),
        "float32[4, 3]: that is a vector field (a velocity, a score or a denoiser), which is no "
        "energy: an energy is one number for each sample, and its field is its gradient",
    ),
    "sum": (
        lambda x: cubic(x).sum(),
        "float32[]: give the energy of each sample, not their sum or mean over the batch",
    ),
    "parts": (
        lambda x: x.pow(3)[:, :2],
        "float32[4, 2]: give one number for each sample, such as a sum over the other axes, where "
        "these are the parts of one energy",
    ),
}


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_another_shape_is_refused_with_what_to_write(function, shape):
    model, said = SHAPES[shape]
    said = re.escape(f'needs Float[Tensor, " batch"] with batch 4, got {said}')
    with pytest.raises(tw.ContractError, match=rf"^{function.__name__}: energy\(.*\) {said}$"):
        CALLS[function](energy=model)


def test_an_event_of_one_number_is_squeezed():
    with pytest.raises(tw.ContractError, match=r"squeeze\(-1\)$"):
        energy.energy_square_penalty(lambda x: x.square(), X[:, :1])


class Held:
    """An energy that is no module and holds one."""

    def __init__(self, model):
        self.models = [model]

    def __call__(self, x):
        return sum(model(x) for model in self.models)

    def method(self, x, scale=1.0):
        return scale * self(x)


def coupled():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)
    )


FORMS = {
    "module": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "closure": lambda model: lambda x: model(x),
    "closure of a closure": lambda model: lambda x: FORMS["closure"](model)(x),
    "partial": lambda model: functools.partial(Held(model).method, scale=2.0),
    "list": lambda model: lambda x, models=[model]: models[0](x),
    "dict": lambda model: (lambda models: lambda x: models["energy"](x))({"energy": model}),
    "object": lambda model: Held(model),
    "method": lambda model: Held(model).method,
    "method of a module": lambda model: model.forward,
}


def said_of(function):
    return (
        f"^{function.__name__} needs energies of each row alone, got BatchNorm1d in training mode, "
        r"which couples the rows of a batch: call eval\(\) on it, or use a normalization of each "
        "row$"
    )


@every
def test_batch_normalisation_in_training_mode_is_refused(function):
    model = coupled()
    with pytest.raises(ValueError, match=said_of(function)):
        CALLS[function](energy=model)
    CALLS[function](energy=model.eval())


@pytest.mark.parametrize("form", FORMS)
def test_it_is_found_wherever_it_is_held(form):
    model = coupled()
    held = FORMS[form](model)
    with pytest.raises(ValueError, match=said_of(energy.maximum_likelihood_loss)):
        energy.maximum_likelihood_loss(held, X, Y)
    model.eval()
    energy.maximum_likelihood_loss(held, X, Y)


def test_a_model_that_the_energy_does_not_use_is_not_held_against_it():
    class Trainer:
        def __init__(self):
            self.generator, self.energy = coupled(), coupled().eval()

        def step(self):
            return energy.maximum_likelihood_loss(lambda x: self.energy(x), X, Y)

    assert Trainer().step().loss.isfinite()
