"""Maximum likelihood: the gradient of a Gaussian's likelihood, regularization, refusals."""

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn

import termwise as tw
from termwise.energy import MaximumLikelihoodLoss, maximum_likelihood_loss

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def samples_of(problem) -> Tensor:
    """Rows whose mean and covariance are exactly the model's."""
    with torch.no_grad():
        d = len(problem.mean)
        covariance = torch.linalg.inv(symmetric(problem.precision))
        steps = d**0.5 * torch.linalg.cholesky(covariance).T
        return torch.cat([problem.mean + steps, problem.mean - steps])


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("at_the_truth", [False, True])
def test_the_gradient_is_that_of_the_likelihood(make_gaussian, d, at_the_truth):
    problem = make_gaussian(d, 3, at_the_truth=at_the_truth)
    terms = maximum_likelihood_loss(problem.energy, problem.x, samples_of(problem))
    precision = symmetric(problem.precision)
    trace = (precision @ problem.moment).trace()
    torch.testing.assert_close(terms.loss, (trace - d) / 2, **EXACT)
    torch.testing.assert_close(terms.gap, (trace.detach() - d) / 2, **EXACT)
    # Mean -log p is 1/2 tr(PM) - 1/2 log|P| and a constant.
    slopes = torch.autograd.grad(terms.loss, problem.leaves)
    likelihood = (trace - torch.logdet(precision)) / 2
    torch.testing.assert_close(slopes, torch.autograd.grad(likelihood, problem.leaves), **EXACT)
    largest = max(slope.abs().max().item() for slope in slopes)
    assert largest < 1e-12 if at_the_truth else largest > 1e-2


@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.3])
def test_any_other_alpha_is_biased_at_the_truth(make_gaussian, alpha):
    problem = make_gaussian(3, 3, at_the_truth=True)
    terms = maximum_likelihood_loss(
        problem.energy, problem.x, samples_of(problem), negative_weight=alpha
    )
    torch.testing.assert_close(terms.loss.item(), (1 - alpha) * 3 / 2, **EXACT)
    for_mean, for_precision = torch.autograd.grad(terms.loss, problem.leaves)
    torch.testing.assert_close(for_mean, torch.zeros(3).double(), **EXACT)
    torch.testing.assert_close(for_precision, (1 - alpha) / 2 * problem.covariance, **EXACT)


def test_an_alpha_below_one_makes_the_model_too_wide(make_gaussian):
    problem = make_gaussian(2, 3, at_the_truth=True)
    with torch.no_grad():  # M = alpha / P is where data and weighted samples balance
        problem.precision.mul_(0.8)
    terms = maximum_likelihood_loss(
        problem.energy, problem.x, samples_of(problem), negative_weight=0.8
    )
    for slope in torch.autograd.grad(terms.loss, problem.leaves):
        torch.testing.assert_close(slope, torch.zeros_like(slope), **EXACT)


def test_a_constant_in_the_energy_changes_nothing():
    x, negatives, energy = normal(4, 2), normal(3, 2, seed=1), torch.nn.Bilinear(2, 2, 1).double()
    plain, shifted = (
        maximum_likelihood_loss(lambda x: energy(x, x)[:, 0] + constant, x, negatives)  # noqa: B023
        for constant in (0.0, 7.0)
    )
    torch.testing.assert_close(shifted.loss, plain.loss, **EXACT)
    torch.testing.assert_close(shifted.energy_data, plain.energy_data + 7, **EXACT)


def test_a_penalty_without_weight_is_reported_however_large():
    large = torch.full((2,), 1e30, requires_grad=True)
    terms = maximum_likelihood_loss(
        lambda x: x.sum(1), torch.ones(2, 2), torch.zeros(1, 2),
        regularization="l2", parameters=[large],
    )  # fmt: skip
    assert terms.regularization.item() == math.inf
    assert terms.loss.item() == 2


def test_without_rows_there_is_no_number():
    x, none = torch.ones(2, 2), torch.ones(0, 2)
    for data, negatives in ((none, x), (x, none)):
        terms = maximum_likelihood_loss(lambda x: x.sum(1), data, negatives)
        assert terms.loss.isnan()


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


def test_module_is_the_function_in_every_dtype_and_mode():
    options = {"negative_weight": 0.7, "regularization": "l1", "regularization_weight": 0.1}
    loss_fn = MaximumLikelihoodLoss(network(), **options)
    said = "negative_weight=0.7, regularization='l1', regularization_weight=0.1"
    assert said in repr(loss_fn)
    x, negatives = normal(5, 2, 2).float(), normal(3, 2, 2, seed=1).float()
    weights = normal(5, seed=2).abs().float()
    terms = loss_fn(x, negatives, weights=weights)
    terms.loss.backward()
    assert all(p.grad is not None for p in loss_fn.parameters())
    function = maximum_likelihood_loss(
        loss_fn.energy, x, negatives, weights=weights, parameters=list(loss_fn.parameters()),
        **options,
    )  # fmt: skip
    assert terms.metrics() == function.metrics()
    assert copy.deepcopy(loss_fn)(x, negatives, weights=weights).metrics() == function.metrics()
    for mode in (torch.autocast("cpu", torch.bfloat16), torch.no_grad(), torch.inference_mode()):
        with mode:
            assert loss_fn(x, negatives, weights=weights).metrics() == function.metrics()
    assert not x.requires_grad
    half = loss_fn.bfloat16()
    terms = half(x.bfloat16(), negatives.bfloat16())
    assert {value.dtype for _, value in terms.items()} == {torch.float32}
    assert terms.energy_model.item() == pytest.approx(function.energy_model.item(), rel=0.1)


def refused(error: type[Exception], text: str):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def test_refusals():
    x, negatives = torch.ones(5, 4), torch.ones(3, 4)
    with refused(
        tw.ContractError,
        'maximum_likelihood_loss: energy(x) needs Float[Tensor, " batch"] with batch 5, got '
        "float32[5, 1]: write energy(x).squeeze(-1)",
    ):
        maximum_likelihood_loss(lambda x: x.sum(1, keepdim=True), x, negatives)
    with refused(
        tw.ContractError,
        'maximum_likelihood_loss: energy(negatives) needs Float[Tensor, " batch"] with batch 3, '
        "got float32[]: give the energy of each sample, not their sum or mean over the batch",
    ):
        maximum_likelihood_loss(lambda x: x.sum(1) if len(x) == 5 else x.sum(), x, negatives)
    with refused(
        tw.ContractError,
        'maximum_likelihood_loss: negatives needs Float[Tensor, "negatives *event"], got '
        "float32[3, 2]: axis event is [2], but it is [4] in x",
    ):
        maximum_likelihood_loss(lambda x: x.sum(1), x, negatives[:, :2])
    with refused(
        tw.ContractError,
        'maximum_likelihood_loss: weights needs Float[Tensor, " batch"] | None, got float32[3]: '
        "axis batch is 3, but it is 5 in x",
    ):
        maximum_likelihood_loss(lambda x: x.sum(1), x, negatives, weights=torch.ones(3))
    with refused(
        ValueError,
        'maximum_likelihood_loss needs parameters for regularization="l2", got none',
    ):
        maximum_likelihood_loss(lambda x: x.sum(1), x, negatives, regularization="l2")
    with refused(
        tw.ContractError,
        'maximum_likelihood_loss: regularization needs Literal["l1", "l2"] | None, got str "l3"',
    ):
        maximum_likelihood_loss(lambda x: x.sum(1), x, negatives, regularization="l3")
    with refused(
        ValueError,
        "MaximumLikelihoodLoss needs a module to regularize, got function: pass parameters to "
        "maximum_likelihood_loss",
    ):
        MaximumLikelihoodLoss(lambda x: x.sum(1), regularization="l1")
