"""Score matching: closed forms of a Gaussian, its optimum, and three ways that are one."""

import pytest
import torch
from torch import nn

from termwise.energy import ScoreMatchingLoss, score_matching_loss

WAYS = ("forward_laplacian", "reverse", "forward_over_reverse")


@pytest.mark.parametrize("trace", WAYS)
@pytest.mark.parametrize("d", [1, 3, 6])
def test_a_gaussians_terms_and_gradients_are_the_closed_form(make_gaussian, trace, d):
    g = make_gaussian(d, seed=d)
    terms = score_matching_loss(g.energy, g.x, trace=trace)
    precision = (g.precision + g.precision.T) / 2
    score_square = torch.trace(precision @ g.moment @ precision)
    laplacian = torch.trace(precision)
    expected = 0.5 * score_square - laplacian
    torch.testing.assert_close(terms.score_square, score_square, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.laplacian, laplacian, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(terms.loss, g.leaves),
        torch.autograd.grad(expected, g.leaves),
        rtol=1e-11,
        atol=1e-12,
    )


@pytest.mark.parametrize("trace", WAYS)
def test_the_truth_is_stationary_and_the_least_nearby(make_gaussian, trace):
    g = make_gaussian(4, seed=0, at_the_truth=True)
    loss = score_matching_loss(g.energy, g.x, trace=trace).loss
    for gradient in torch.autograd.grad(loss, g.leaves):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, -0.5 * torch.trace(g.precision), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for leaf in g.leaves:
            step = 0.1 * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
            for sign in (1, -1):
                leaf += sign * step
                assert score_matching_loss(g.energy, g.x, trace=trace).loss > loss
                leaf -= sign * step


def model_of(*shape):
    torch.manual_seed(0)
    d = torch.Size(shape).numel()
    layers = [nn.Flatten(), nn.Linear(d, 7), nn.SiLU(), nn.Linear(7, 6), nn.Softplus()]
    return nn.Sequential(*layers, nn.Linear(6, 1), nn.Flatten(0)).double()


@pytest.mark.parametrize("event", [(3,), (2, 2, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_all_ways_are_the_formula_by_loops(event, weighted):
    model = model_of(*event)
    parameters = [*model.parameters()]
    x = torch.randn(5, *event, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0], dtype=torch.float64) if weighted else None
    (score,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    flat = score.flatten(1)
    laplacian = sum(
        torch.autograd.grad(flat[:, i].sum(), x, create_graph=True)[0].flatten(1)[:, i]
        for i in range(flat.shape[1])
    )
    shares = torch.full((5,), 0.2, dtype=x.dtype) if weights is None else weights / weights.sum()
    expected = {
        "score_square": (shares * flat.square().sum(1)).sum(),
        "laplacian": (shares * laplacian).sum(),
    }
    expected["loss"] = 0.5 * expected["score_square"] - expected["laplacian"]
    for trace in WAYS:
        for chunk_size in (None, 2):
            terms = score_matching_loss(
                model, x, trace=trace, chunk_size=chunk_size, weights=weights
            )
            for name, value in expected.items():
                torch.testing.assert_close(getattr(terms, name), value, rtol=1e-10, atol=1e-10)
                ours, theirs = (
                    torch.autograd.grad(
                        y,
                        [x, *parameters],
                        retain_graph=True,
                        materialize_grads=True,
                        allow_unused=True,
                    )
                    for y in (getattr(terms, name), value)
                )
                torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("trace", WAYS)
def test_every_parameter_gets_a_gradient(trace):
    model = model_of(3)
    score_matching_loss(model, torch.randn(4, 3, dtype=torch.float64), trace=trace).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # the last bias too, whose gradient is 0


@pytest.mark.parametrize("trace", WAYS)
def test_it_vmaps(trace):
    model = model_of(3)
    x = torch.randn(2, 4, 3, dtype=torch.float64)

    def loss_of(x):
        return score_matching_loss(model, x, trace=trace).loss

    expected = torch.stack([loss_of(part) for part in x])
    torch.testing.assert_close(torch.vmap(loss_of)(x), expected)


def test_third_derivatives_pass_gradcheck():
    model = model_of(3)
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    weight = model[1].weight

    def loss_of(x, weight):
        return score_matching_loss(
            lambda x: torch.func.functional_call(model, {"1.weight": weight}, (x,)), x
        ).loss

    assert torch.autograd.gradcheck(loss_of, (x, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss_of, (x, weight), fast_mode=True)


def test_an_energy_that_does_not_depend_on_x_is_refused():
    with pytest.raises(ValueError, match="needs an energy that can be differentiated by x"):
        score_matching_loss(lambda x: torch.ones(len(x)), torch.ones(3, 2))


@pytest.mark.parametrize("trace", WAYS)
def test_the_module_is_the_function(trace):
    model = model_of(3)
    x, weights = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    loss_fn = ScoreMatchingLoss(model, trace=trace, chunk_size=2)
    expected = score_matching_loss(model, x, trace=trace, chunk_size=2, weights=weights)
    assert loss_fn(x, weights=weights).metrics() == expected.metrics()
    assert f"trace='{trace}', chunk_size=2" in repr(loss_fn)
