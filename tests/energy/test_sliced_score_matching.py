"""Sliced score matching: Gaussian closed forms, other ways to the same numbers, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import termwise as tw
from termwise.energy import (
    SlicedScoreMatchingLoss,
    _sliced_score_matching,
    sliced_score_matching_loss,
)
from termwise.energy._projections import projections_of

EXACT = {"rtol": 1e-12, "atol": 1e-12}
WAYS = ["auto", "autograd", "func"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def axes(x: Tensor) -> Tensor:
    """sqrt(d) e_i for every row: the mean of v v^T over them is exactly I."""
    d = x.shape[1]
    return (d**0.5 * torch.eye(d, dtype=x.dtype))[:, None].expand(d, *x.shape)


class Normed(nn.Module):
    """Layers that have wrong third derivatives in torch, or no second ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.norm(self.first(x)))
        tokens = hidden.view(-1, 2, 4)
        attended = F.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.last(attended.flatten(1)).squeeze(1)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)]
    return nn.Sequential(*layers, nn.Flatten(0)).double()


@pytest.mark.parametrize("variance_reduced", [True, False])
@pytest.mark.parametrize("differentiation", WAYS)
@pytest.mark.parametrize("at_the_truth", [True, False])
def test_it_is_score_matching_of_a_gaussian(
    make_gaussian, variance_reduced, differentiation, at_the_truth
):
    problem = make_gaussian(3, 1, at_the_truth=at_the_truth)
    precision = (problem.precision + problem.precision.T) / 2
    square = (precision @ problem.moment @ precision).trace()
    expected = {"score_square": square, "curvature": precision.trace()}
    expected["loss"] = 0.5 * square - precision.trace()
    terms = sliced_score_matching_loss(
        problem.energy,
        problem.x,
        projections=axes(problem.x),
        variance_reduced=variance_reduced,
        differentiation=differentiation,
    )
    for name, value in expected.items():
        ours = getattr(terms, name)
        torch.testing.assert_close(ours, value, **EXACT)
        torch.testing.assert_close(
            torch.autograd.grad(
                ours, problem.leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            ),
            torch.autograd.grad(
                value, problem.leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            ),
            rtol=1e-11,
            atol=1e-11,
        )
    if at_the_truth:
        for gradient in torch.autograd.grad(terms.loss, problem.leaves):
            assert gradient.abs().max() < 1e-12


def test_unit_vectors_would_weigh_the_curvature_by_one_over_d(make_gaussian):
    problem = make_gaussian(3, 1)
    unit = axes(problem.x) / 3**0.5
    terms = sliced_score_matching_loss(problem.energy, problem.x, projections=unit)
    torch.testing.assert_close(terms.curvature, problem.precision.trace() / 3, **EXACT)


@pytest.mark.parametrize("differentiation", WAYS)
def test_gradients_of_norms_and_attention_are_right(differentiation):
    """Against differences of first-order values, which torch has right."""
    torch.manual_seed(0)
    model = Normed().double()
    x, v = normal(3, 4), normal(2, 3, 4, seed=1)
    parameters = [model.first.weight, model.norm.weight]

    def loss():
        return sliced_score_matching_loss(
            model, x, projections=v, differentiation=differentiation
        ).loss

    ours = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, ours, strict=True):
        direction = normal(*parameter.shape, seed=2)
        with torch.no_grad():
            values = []
            for step in (1e-5, -1e-5):
                parameter += step * direction
                values.append(loss())
                parameter -= step * direction
        slope = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("distribution", ["rademacher", "sphere", "gaussian"])
def test_directions_have_the_identity_for_their_second_moment(distribution):
    x = torch.zeros(400, 2, 2)
    generator = torch.Generator().manual_seed(0)
    v = projections_of("some_loss", x, 50, distribution, generator).reshape(-1, 4)
    moment = v.T @ v / len(v)
    torch.testing.assert_close(moment, torch.eye(4), rtol=0, atol=0.03)
    if distribution == "rademacher":
        assert set(v.unique().tolist()) == {-1.0, 1.0}
    if distribution == "sphere":
        torch.testing.assert_close(v.square().sum(1), torch.full((len(v),), 4.0))


def test_the_energy_is_called_once_and_nothing_of_the_callers_is_touched():
    model, x, calls = network(), normal(3, 4), []

    def energy(point):
        calls.append(1)
        return model(point)

    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    terms = sliced_score_matching_loss(energy, x, projections=5, generator=generator)
    assert len(calls) == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert not x.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    terms.loss.backward()
    assert model[-2].bias.grad.item() == 0  # it has no say, and a reducer waits for it
    again = sliced_score_matching_loss(
        model, x, projections=5, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(dict(again.items()), dict(terms.items()))
    other = sliced_score_matching_loss(
        model, x, projections=5, generator=torch.Generator().manual_seed(1)
    )
    assert not torch.equal(other.curvature, terms.curvature)


FEWEST = _sliced_score_matching.FEWEST_PROJECTIONS, _sliced_score_matching.FEWEST_CARRIED


@pytest.mark.parametrize(
    ("projections", "rows", "forward"), [(1, 256, False), (2, 127, False), (2, 128, True)]
)
def test_auto_goes_forward_where_many_directions_share_its_cost(
    monkeypatch, projections, rows, forward
):
    monkeypatch.setattr(_sliced_score_matching, "FEWEST_PROJECTIONS", FEWEST[0])
    monkeypatch.setattr(_sliced_score_matching, "FEWEST_CARRIED", FEWEST[1])
    other = "_by_autograd" if forward else "_forward_or_backward"
    monkeypatch.setattr(_sliced_score_matching, other, None)
    v = normal(projections, rows, 4)
    sliced_score_matching_loss(network(), normal(rows, 4), projections=v).loss.backward()


@pytest.mark.parametrize("make", [network, lambda: Normed().double()])
def test_networks_carry_derivatives_forward(make, monkeypatch):
    monkeypatch.setattr(_sliced_score_matching, "_by_autograd", None)
    sliced_score_matching_loss(make(), normal(3, 4)).loss.backward()


class Foreign(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x.pow(4)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * 4 * x.pow(3)


def test_an_energy_that_carries_nothing_forward_is_differentiated_backward():
    x, v = normal(3, 4), normal(2, 3, 4, seed=1)
    with pytest.warns(UserWarning, match="under no_grad"):
        ours = sliced_score_matching_loss(lambda x: Foreign.apply(x).sum(1), x, projections=v)
    theirs = sliced_score_matching_loss(lambda x: x.pow(4).sum(1), x, projections=v)
    torch.testing.assert_close(dict(ours.items()), dict(theirs.items()))


def test_dropout_is_the_same_for_the_gradient_and_its_products():
    torch.manual_seed(0)
    weight = torch.ones((), requires_grad=True, dtype=torch.float64)
    x = normal(3, 4)
    v = torch.ones(1, 3, 4).double()
    mask = nn.Dropout()
    with pytest.warns(UserWarning, match="dropout in training mode"):
        terms = sliced_score_matching_loss(
            lambda x: weight * mask(x).square().sum(1) / 4, x, projections=v
        )
    # Each kept element is doubled: its curvature is 2 and its score 2 x.
    kept = (terms.curvature * 3 / 2).round()
    torch.testing.assert_close(terms.curvature, 2 * kept / 3)
    assert 0 < kept < 12


@pytest.mark.parametrize("differentiation", WAYS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_mode_the_terms_are_the_same(mode, differentiation):
    model, options = network(), {"differentiation": differentiation}
    x, v = normal(3, 4), normal(2, 3, 4, seed=1)
    expected = sliced_score_matching_loss(model, x, projections=v, **options).detach()
    with mode():
        quiet = sliced_score_matching_loss(model, x.clone(), projections=v.clone(), **options)
        assert not quiet.loss.requires_grad
        torch.testing.assert_close(dict(quiet.items()), dict(expected.items()))


@pytest.mark.parametrize("differentiation", ["auto", "autograd"])
def test_frozen_and_linear_energies_and_events_of_any_shape(differentiation):
    options = {"differentiation": differentiation}
    linear = sliced_score_matching_loss(lambda x: 2 * x.sum(1), torch.zeros(2, 3), **options)
    assert linear.metrics() == {"loss": 6.0, "score_square": 12.0, "curvature": 0.0}
    one = sliced_score_matching_loss(lambda x: x.square(), torch.ones(2), **options)
    assert one.metrics() == {"loss": 0.0, "score_square": 4.0, "curvature": 2.0}
    image = sliced_score_matching_loss(
        lambda x: x.square().sum((1, 2)), torch.ones(2, 3, 2), projections=3, **options
    )
    assert image.metrics() == {"loss": 0.0, "score_square": 24.0, "curvature": 12.0}
    nothing = sliced_score_matching_loss(
        lambda x: x.square().sum(1), torch.ones(0, 3), distribution="sphere", **options
    )
    assert nothing.loss.isnan()


def test_halves_keep_their_type_in_the_energy():
    model = network().bfloat16()
    x = torch.ones(3, 4, dtype=torch.bfloat16)
    for distribution in ("rademacher", "sphere"):
        terms = sliced_score_matching_loss(model, x, distribution=distribution)
        assert terms.loss.dtype == torch.float32
        terms.loss.backward()


def test_refusals():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="^sliced_score_matching_loss needs at least one proj"):
        sliced_score_matching_loss(lambda x: x.square().sum(1), x, projections=0)
    with pytest.raises(tw.ContractError, match="projections needs .* batch is 3, but it is 2 in x"):
        sliced_score_matching_loss(lambda x: x.sum(1), x, projections=torch.zeros(1, 3, 3))
    with pytest.raises(tw.ContractError, match=r"energy\(x\) needs .* got float32\[2, 1\]"):
        sliced_score_matching_loss(lambda x: x.sum(1, keepdim=True), x)
    with pytest.raises(ValueError, match="^sliced_score_matching_loss needs an energy that can be"):
        sliced_score_matching_loss(lambda x: torch.ones(2), x)
    with pytest.raises(ValueError, match="^sliced_score_matching_loss needs energies of each row"):
        sliced_score_matching_loss(lambda x: F.batch_norm(x, None, None, training=True).sum(1), x)
    with pytest.raises(ValueError, match="got BatchNorm1d in training mode"):
        sliced_score_matching_loss(nn.Sequential(nn.BatchNorm1d(3), nn.Flatten(0)), x)


def test_the_module_is_the_function():
    model, x, v = network(), normal(3, 4), normal(2, 3, 4)
    loss_fn = SlicedScoreMatchingLoss(model, projections=3, variance_reduced=False)
    ours = loss_fn(x, projections=v)
    theirs = sliced_score_matching_loss(model, x, projections=v, variance_reduced=False)
    assert ours.metrics() == theirs.metrics()
    generator = torch.Generator().manual_seed(3)
    drawn = loss_fn(x, generator=generator)
    theirs = sliced_score_matching_loss(
        model, x, projections=3, variance_reduced=False, generator=generator.manual_seed(3)
    )
    assert drawn.metrics() == theirs.metrics()
    assert "projections=3, distribution='rademacher', variance_reduced=False" in repr(loss_fn)
