"""Score matching along the rows of a first layer: the numbers of all axes, from fewer of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from termwise.energy import ScoreMatchingLoss, hessian_trace, score_matching_loss
from termwise.energy import _forward_laplacian as carriers
from termwise.energy._row_space import Directions, ReadOtherwiseError

D, H = 8, 3


class Model(nn.Module):
    """Weights for every energy below: a narrow first layer, another one, and what follows."""

    def __init__(self):
        super().__init__()
        self.first, self.other = nn.Linear(D, H), nn.Linear(D, H)
        self.last = nn.Linear(H, 1)
        self.wide = nn.Linear(D, 6)

    def head(self, z):
        return self.last(F.silu(z)).squeeze(1)


class Named(nn.Module):
    """An energy of the model's, by name: a module, so that its parameters are found."""

    def __init__(self, name):
        super().__init__()
        self.name, self.model = name, Model()

    def forward(self, x):
        return ENERGIES[self.name][0](self.model, x)


def tied(m, x):
    z = F.silu(m.first(x))
    return (x - z @ m.first.weight).square().sum(1)


def in_place(m, x):
    z = m.first(x)
    z.add_(m.first(2 * x))
    return m.head(z)


# The energy, and along how many directions its result is carried; None: x is read once more.
ENERGIES = {
    "layer": (lambda m, x: m.head(m.first(x)), H),
    "flattened": (lambda m, x: m.head(m.first(x.flatten(1))), H),
    "viewed": (lambda m, x: m.head(m.first(x.view(len(x), -1).reshape(len(x), D))), H),
    "matmul": (lambda m, x: m.head(x.flatten(1) @ m.first.weight.mT), H),
    "twice": (lambda m, x: m.head(m.first(x) * F.linear(x, m.first.weight)), H),
    "asked for": (lambda m, x: m.head(m.first(x)) * len(x) / x.shape[0], H),
    "compared": (lambda m, x: m.head(m.first(x)) + (x > 0).sum(1) + x.detach().sum(1), H),
    "x later": (lambda m, x: m.head(m.first(x)) + x.sin().sum(1), None),
    "x before": (lambda m, x: x.sin().sum(1) * m.head(m.first(x)), D),
    "two layers": (lambda m, x: m.head(m.first(x)) * m.head(m.other(x)), None),
    "product with x": (lambda m, x: m.head(m.first(x)) * x.cos().prod(1), None),
    "tied": (tied, None),
    "in place": (in_place, None),
    "scaled first": (lambda m, x: m.head(m.first(x * 2 - 1)), D),
    "joined": (lambda m, x: torch.cat([m.first(x), x], 1).sin().prod(1), None),
    "wide": (lambda m, x: m.wide(x).sin().prod(1), D),
    "permuted": (lambda m, x: m.head(m.first(x.reshape(-1, 2, 4).mT.flatten(1))), D),
    "linear alone": (lambda m, x: m.first(x).sum(1), H),
}


def made(name, batch=4):
    torch.manual_seed(0)
    energy = Named(name).double()
    x = torch.randn(batch, D, dtype=torch.float64, requires_grad=True)
    return energy, x


def terms_and_gradients(energy, x, **options):
    terms = score_matching_loss(energy, x, **options)
    leaves = [*energy.parameters(), x]
    gradients = torch.autograd.grad(terms.loss, leaves, allow_unused=True, materialize_grads=True)
    return [*(terms[name] for name in terms.metrics()), *gradients]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", ENERGIES)
def test_values_and_gradients_are_those_of_all_axes(name, batch):
    energy, x = made(name, batch)
    torch.testing.assert_close(
        terms_and_gradients(energy, x),
        terms_and_gradients(energy, x, trace="reverse"),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("name", ENERGIES)
def test_as_many_directions_as_the_energy_needs(name):
    energy, x = made(name)
    x = carriers.carried(x, Directions(x), True)
    if ENERGIES[name][1] is None:
        with pytest.raises(ReadOtherwiseError):
            energy(x)
    else:
        assert len(carriers.carrier_of(energy(x)).base) == ENERGIES[name][1]


def test_an_energy_that_reads_x_twice_is_called_again_once(recwarn):
    energy, x = made("x later")
    calls = []
    energy.register_forward_pre_hook(lambda *_: calls.append(1))
    for expected in (2, 3, 4):
        score_matching_loss(energy, x)
        assert len(calls) == expected
    assert not recwarn


def test_an_image_is_one_row_of_the_layer():
    torch.manual_seed(0)
    layers = nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0)
    energy = nn.Sequential(nn.Flatten(), *layers).double()
    x = torch.randn(3, 3, 2, 2, dtype=torch.float64).transpose(1, 3).requires_grad_()
    torch.testing.assert_close(
        terms_and_gradients(energy, x), terms_and_gradients(energy, x, trace="reverse")
    )
    torch.testing.assert_close(hessian_trace(energy, x), hessian_trace(energy, x, row_space=False))


def test_rows_that_depend_on_each_other_and_none_but_zeros():
    energy, x = made("layer")
    first = energy.model.first.weight
    for rows in ([0, 0, 1], [2, 2, 2]):
        with torch.no_grad():
            first.copy_(first[rows])
        torch.testing.assert_close(
            terms_and_gradients(energy, x), terms_and_gradients(energy, x, trace="reverse")
        )
    with torch.no_grad():
        first.zero_()
    torch.testing.assert_close(
        terms_and_gradients(energy, x), terms_and_gradients(energy, x, trace="reverse")
    )


def test_a_weight_that_is_no_number_shows():
    energy, x = made("layer")
    with torch.no_grad():
        energy.model.first.weight[0, 0] = torch.nan
    assert score_matching_loss(energy, x).loss.isnan()


def test_half_precision_and_chunks_go_along_all_axes():
    energy, x = made("layer")
    expected = score_matching_loss(energy, x, row_space=False).loss
    torch.testing.assert_close(score_matching_loss(energy, x, chunk_size=3).loss, expected)
    half = copy.deepcopy(energy).bfloat16()
    carried = carriers.carried(x.bfloat16(), Directions(x.bfloat16()), True)
    assert len(carriers.carrier_of(half(carried)).base) == D


def test_float32_loses_nothing():
    energy, x = made("layer", 64)
    exact = terms_and_gradients(energy, x)
    single, y = copy.deepcopy(energy).float(), x.detach().float().requires_grad_()
    for ours, whole, true in zip(
        terms_and_gradients(single, y),
        terms_and_gradients(single, y, row_space=False),
        exact,
        strict=True,
    ):
        error, of_all = (ours - true).norm(), (whole - true).norm()
        assert error <= 2 * of_all + 1e-6 * true.norm()


def test_a_second_derivative_is_refused_and_right_without():
    energy, x = made("layer")
    weight = energy.model.first.weight

    def penalty(**options):
        loss = score_matching_loss(energy, x, **options).loss
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), weight)

    with pytest.raises(NotImplementedError, match="row_space=False"):
        penalty()
    torch.testing.assert_close(penalty(row_space=False), penalty(trace="reverse"))
    energy, x = made("wide")
    weight = energy.model.wide.weight
    torch.testing.assert_close(penalty(), penalty(trace="reverse"))


def test_an_ensemble_under_vmap_and_torch_func():
    energies = [made("layer")[0] for _ in range(3)]
    for shift, energy in enumerate(energies):
        with torch.no_grad():
            energy.model.first.weight.add_(0.1 * shift)
    x = made("layer")[1].detach()
    stacked, buffers = torch.func.stack_module_state(energies)
    base = energies[0]

    def loss(parameters, row_space):
        def energy(x):
            return torch.func.functional_call(base, (parameters, buffers), (x,))

        return score_matching_loss(energy, x, row_space=row_space).loss

    gradients = [
        torch.vmap(torch.func.grad(lambda p: loss(p, row_space)))(stacked)  # noqa: B023
        for row_space in (True, False)
    ]
    torch.testing.assert_close(*gradients)


def test_the_module_holds_it():
    energy, x = made("layer")
    loss_fn = ScoreMatchingLoss(energy, row_space=False)
    assert "row_space=False" in repr(loss_fn)
    loss = loss_fn(x).loss
    (gradient,) = torch.autograd.grad(loss, energy.model.first.weight, create_graph=True)
    gradient.square().sum().backward()  # which a row space refuses
