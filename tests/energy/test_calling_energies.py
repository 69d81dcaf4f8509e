"""How an energy is called and differentiated: modes, flags, refusals, weighted means."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import termwise as tw
from termwise._means import weighted_means
from termwise.energy import _energies


def network(*, norm: nn.Module | None = None) -> nn.Module:
    layers = [nn.Linear(3, 5), norm or nn.Identity(), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)]
    return nn.Sequential(*layers).double()


def rows(n: int = 4, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, generator=generator, dtype=torch.float64).requires_grad_(
        options.get("grad", False)
    )


def gradients(energy, x, differentiation="auto"):
    return _energies.energies_and_gradients("some_loss", energy, x, differentiation)


@pytest.mark.parametrize("differentiation", ["auto", "autograd", "func"])
def test_gradients_by_x_are_in_the_graph_of_the_parameters(differentiation):
    model, x = network(), rows()
    values, gradient = gradients(model, x, differentiation)
    first, last = model[0], model[3]
    hidden = torch.tanh(first(x))
    expected = ((1 - hidden**2) * last.weight) @ first.weight
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(values, (hidden @ last.weight.T + last.bias)[:, 0])
    weights = [first.weight, first.bias, last.weight]
    torch.testing.assert_close(
        torch.autograd.grad(gradient.square().sum(), weights),
        torch.autograd.grad(expected.square().sum(), weights),
    )


@pytest.mark.parametrize("differentiation", ["autograd", "func"])
def test_an_x_in_a_graph_gets_its_gradient(differentiation):
    model, x = network(), rows(grad=True)
    _, gradient = gradients(model, x, differentiation)
    (ours,) = torch.autograd.grad(gradient.square().sum(), x)
    again = x.detach().requires_grad_()
    (score,) = torch.autograd.grad(model(again).sum(), again, create_graph=True)
    (theirs,) = torch.autograd.grad(score.square().sum(), again)
    torch.testing.assert_close(ours, theirs)


def test_nothing_of_the_callers_is_touched():
    model, x = network(), rows()
    before = torch.get_rng_state()
    gradients(model, x)
    assert not x.requires_grad
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    leaf = rows(grad=True)
    gradients(model, leaf)
    assert leaf.grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("differentiation", ["autograd", "func"])
def test_without_grad_mode_there_is_no_graph(mode, differentiation):
    model, x = network(), rows()
    expected = gradients(model, x)
    with mode():
        quiet = gradients(model, x, differentiation)
    assert not any(value.requires_grad for value in quiet)
    torch.testing.assert_close(quiet, tuple(value.detach() for value in expected))


def test_an_inference_tensor_is_differentiated_by():
    with torch.inference_mode():
        x = rows()
    model = network()
    torch.testing.assert_close(gradients(model, x), gradients(model, rows()))


def test_frozen_energies_and_eval_mode_work():
    model = network(norm=nn.BatchNorm1d(5)).eval().requires_grad_(False)
    _energies.refuse_batch_statistics("some_loss", model)
    _, gradient = gradients(model, rows())
    assert gradient.shape == (4, 3)
    assert not any(p.requires_grad for p in model.parameters())


def test_halves_come_back_lifted():
    model, x = network().bfloat16(), rows().bfloat16()
    values, gradient = gradients(model, x)
    assert (values.dtype, gradient.dtype) == (torch.float32, torch.float32)


def test_a_result_that_is_not_one_number_a_row_is_refused():
    x = rows()
    said = r'^some_loss: energy\(x\) needs Float\[Tensor, " batch"\] with batch 4, got '
    for energy, got in [
        (lambda x: x.sum(1, keepdim=True), r"float64\[4, 1\]: write energy\(x\)\.squeeze\(-1\)$"),
        (lambda x: x.sum(), r"float64\[\]: give the energy of each sample, .*$"),
        (lambda x: x.sum(1).long(), r"int64\[4\]$"),
        (lambda x: None, "None$"),
    ]:
        with pytest.raises(tw.ContractError, match=said + got):
            _energies.energies_of("some_loss", energy, x)


@pytest.mark.parametrize(
    "energy",
    [lambda x: x.detach().sum(1), torch.no_grad()(lambda x: x.sum(1)), lambda x: torch.ones(4)],
)
def test_an_energy_without_a_gradient_is_refused(energy):
    with pytest.raises(ValueError, match="^some_loss needs an energy that can be differentiated"):
        gradients(energy, rows(), "autograd")


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = network(norm=nn.BatchNorm1d(5))

    def given(self, x, condition=None):
        return self.model(x)


def test_batch_normalisation_in_training_mode_is_refused_wherever_it_is_held():
    holder, condition = Conditional(), torch.ones(1)
    for energy in (
        holder.model,
        holder.given,
        functools.partial(holder.given, condition=condition),
        lambda x: holder.given(x) + condition,
    ):
        holder.train()
        with pytest.raises(
            ValueError, match="^some_loss needs energies of each row alone, got BatchNorm1d in"
        ):
            _energies.refuse_batch_statistics("some_loss", energy)
        holder.eval()
        _energies.refuse_batch_statistics("some_loss", energy)


def test_a_compiled_energy_gives_its_gradient_to_its_parameters():
    model, x = network(), rows()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ours, theirs = gradients(compiled, x), gradients(model, x)
    torch.testing.assert_close(ours, theirs)
    weights = [model[0].weight, model[0].bias, model[3].weight]
    torch.testing.assert_close(
        *(torch.autograd.grad(value[1].square().sum(), weights) for value in (ours, theirs))
    )


def test_an_anchor_adds_a_parameter_to_the_graph_and_nothing_else():
    model, x = network(), rows()
    values, gradient = gradients(model, x)
    per_row = gradient.square().sum(1)
    anchored = _energies.anchored(per_row, values)
    assert torch.equal(anchored, per_row)
    bias = model[3].bias
    (ours,) = torch.autograd.grad(anchored.sum(), bias, retain_graph=True)
    assert torch.equal(ours, torch.zeros_like(bias))
    assert torch.autograd.grad(per_row.sum(), bias, allow_unused=True) == (None,)
    infinite = torch.full_like(values, torch.inf)
    assert torch.equal(_energies.anchored(per_row, infinite), per_row)


@given(n=st.integers(1, 6), m=st.integers(1, 6), seed=st.integers(0, 2**30), weighted=st.booleans())
def test_means_are_over_the_rows_of_each_sample(n, m, seed, weighted):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(n, 2, generator=generator), torch.randn(n, generator=generator).double()
    c = torch.randn(m, generator=generator).double()
    w = torch.rand(n, generator=generator).double() + 0.1 if weighted else torch.ones(n).double()
    ours = weighted_means(
        ([a.double(), b], w if weighted else None),
        ([c], None),
        batch_group=None,
        grad_reduction="mean",
    )
    expected = [sum(w[i] * v[i] for i in range(n)) / sum(w) for v in (a.double(), b)]
    torch.testing.assert_close(ours, [*expected, sum(c) / m])


def test_weights_that_add_to_nothing_give_no_number():
    (mean,) = weighted_means(
        ([torch.ones(3)], torch.zeros(3)), batch_group=None, grad_reduction="mean"
    )
    assert mean.isnan()


def test_a_step_too_small_for_a_half_is_the_step_that_was_made():
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    moved, made = _energies.displaced(x, torch.full((2, 3), 1e-3))
    assert torch.equal(moved, x)
    assert torch.equal(made, torch.zeros(2, 3))
    step = torch.full((2, 3), 1e-3).double()
    moved, made = _energies.displaced(x.double(), step)
    assert torch.equal(moved, 1 + step)
    assert made is step


def test_noise_follows_its_generator():
    half = torch.zeros(2, 3, dtype=torch.bfloat16)
    draws = [
        _energies.normal_like(half, torch.Generator().manual_seed(seed), copies=4)
        for seed in (0, 0, 1)
    ]
    assert draws[0].shape == (4, 2, 3)
    assert draws[0].dtype == torch.float32
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
