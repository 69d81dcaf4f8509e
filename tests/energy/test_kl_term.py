"""The KL term: laws of the entropy, close samples, whom the gradient reaches."""

import copy
import math
import re

import pytest
import torch
from losses.kl_term import KL_TERM
from torch import Tensor, nn

import termwise as tw
from termwise.energy import (
    ContrastiveDivergenceKLTerm,
    contrastive_divergence_kl_term,
    langevin,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(x: Tensor) -> Tensor:
    return x.sum(list(range(1, x.ndim)))


def entropy_of(samples: Tensor, neighbours: Tensor | None = None) -> Tensor:
    return contrastive_divergence_kl_term(flat, samples, neighbours=neighbours).entropy


@pytest.mark.parametrize("d", [1, 2, 4])
def test_the_entropy_of_a_gaussian(d):
    root = normal(d, d, seed=1) + 2 * torch.eye(d)
    n = 3000
    samples, others = (normal(n, d, seed=seed) @ root.T for seed in (2, 3))
    exact = 0.5 * torch.logdet(2 * math.pi * math.e * root @ root.T)
    # Its variance is that of log q and of the log of an exponential number: d / 2 + pi^2 / 6.
    spread = ((d / 2 + math.pi**2 / 6) / n) ** 0.5
    bias = 0.02 * d
    for neighbours in (None, others):
        ours = entropy_of(samples, neighbours)
        assert abs(ours - exact).item() < 4 * spread + bias
    # Neighbours of another law give the cross-entropy, which is larger.
    wider = 0.5 * torch.logdet(2 * math.pi * 4 * root @ root.T) + d / 8
    assert abs(entropy_of(samples, 2 * others) - wider).item() < 4 * spread + 2 * bias


@pytest.mark.parametrize("others", [None, 7])
def test_laws_of_the_entropy(others):
    x, d = normal(9, 2, 3), 6
    neighbours = None if others is None else normal(others, 2, 3, seed=1)

    def moved(by):
        return entropy_of(by(x), None if neighbours is None else by(neighbours))

    plain = entropy_of(x, neighbours)
    for c in (1e-6, 0.3, 2.0, 1e8):
        torch.testing.assert_close(moved(lambda x: c * x), plain + d * math.log(c), **EXACT)  # noqa: B023
    torch.testing.assert_close(moved(lambda x: x + 5), plain, **EXACT)
    torch.testing.assert_close(moved(lambda x: x.flip(0)), plain, **EXACT)
    turn = torch.linalg.qr(normal(6, 6, seed=2)).Q
    torch.testing.assert_close(moved(lambda x: (x.flatten(1) @ turn).view_as(x)), plain, **EXACT)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("at_the_truth", [False, True])
def test_the_term_balances_where_samples_have_the_models_size(make_gaussian, at_the_truth, weight):
    # Blown up about m by s, samples of moment M have the loss s^2 tr(PM) / 2 - weight * d log s.
    problem = make_gaussian(3, 3, at_the_truth=at_the_truth)
    samples = problem.x.clone().requires_grad_()
    terms = contrastive_divergence_kl_term(problem.energy, samples, entropy_weight=weight)
    (slope,) = torch.autograd.grad(terms.loss, samples)
    precision = (problem.precision + problem.precision.T) / 2
    expected = (precision @ problem.moment).trace().item() - weight * 3
    torch.testing.assert_close((slope * (samples - problem.mean)).sum().item(), expected, **EXACT)
    assert (abs(expected) < 1e-12) == (at_the_truth and weight == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_close_samples_far_from_the_origin(dtype):
    gap = 2.0**-12 if dtype == torch.float32 else 2.0**-30
    samples = torch.tensor([[900.0, 7.0], [-500.0, 3.0]], dtype=dtype)
    samples = torch.cat([samples, samples + gap * torch.tensor([[1.0, 0.0], [0.0, -2.0]])])
    samples = samples.to(dtype).requires_grad_()
    entropy = entropy_of(samples)
    expected = math.log(gap) * 2 + math.log(2) + math.log(math.pi) + 1 + 1 / 2 + 1 / 3
    assert entropy.item() == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-12)
    (slope,) = torch.autograd.grad(entropy, samples)
    # d / n, twice, for each of a pair is the other's neighbour, over the distance.
    ours = slope * gap
    expected = torch.tensor([[-1.0, 0.0], [0.0, 0.5], [1.0, 0.0], [0.0, -0.5]], dtype=dtype)
    torch.testing.assert_close(ours, expected)


def test_the_nearest_of_a_cluster_far_from_the_origin_is_found():
    steps = torch.tensor([7.0, 0.0, 3.0, 1.0], dtype=torch.float64)
    samples = 900 + 2.0**-30 * steps[:, None]
    expected = entropy_of(steps[:, None]) - 30 * math.log(2)
    torch.testing.assert_close(entropy_of(samples), expected, **EXACT)
    distances = math.log(4) + math.log(1) + math.log(2) + math.log(1)
    assert entropy_of(steps[:, None]).item() == pytest.approx(
        distances / 4 + math.log(2) + 1 + 1 / 2 + 1 / 3, rel=1e-12
    )


def test_samples_that_are_the_same_are_not_repaired():
    samples = torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]]).requires_grad_()
    terms = contrastive_divergence_kl_term(flat, samples)
    assert terms.entropy.item() == -math.inf
    assert terms.loss.item() == math.inf
    terms = contrastive_divergence_kl_term(flat, samples, entropy_weight=0)
    assert terms.loss.isfinite()
    terms.loss.backward()
    assert torch.equal(samples.grad, torch.full((3, 2), 1 / 3))
    apart = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert entropy_of(apart, apart[:1]).item() == -math.inf
    assert entropy_of(torch.tensor([[math.nan], [1.0], [2.0]])).isnan()


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))


def test_parameters_are_reached_through_the_samples_alone():
    model, x, noise = network().double(), normal(5, 4), normal(2, 5, 4, seed=1)
    samples = langevin(
        model, x, steps=2, step_size=0.3, noise_scale=0.5, noise=noise, differentiable_steps=1
    )
    contrastive_divergence_kl_term(model, samples, entropy_weight=0.7).loss.backward()
    # The same by hand, with a frozen copy for the energy that is held.
    frozen = copy.deepcopy(model).requires_grad_(False)
    point = langevin(model, x, steps=1, step_size=0.3, noise_scale=0.5, noise=noise[:1])
    point.requires_grad_()
    (slope,) = torch.autograd.grad(model(point).sum(), point, create_graph=True)
    moved = point.detach() - 0.3 * slope + 0.5 * noise[1]
    loss = frozen(moved).mean() - 0.7 * KL_TERM.expected(frozen, moved)["entropy"]
    expected = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected), **EXACT)
    assert any(slope.abs().max() > 1e-3 for slope in expected)


def test_detached_samples_send_nothing():
    model = network()
    for mode in (torch.enable_grad(), torch.no_grad(), torch.inference_mode()):
        with mode:
            terms = contrastive_divergence_kl_term(model, normal(5, 4).float())
        assert not terms.loss.requires_grad
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_second_derivative_is_refused():
    samples = normal(4, 2).requires_grad_()
    terms = contrastive_divergence_kl_term(lambda x: x.square().sum(1), samples)
    (slope,) = torch.autograd.grad(terms.loss, samples, create_graph=True)
    with pytest.raises(NotImplementedError, match="^contrastive_divergence_kl_term has no second"):
        slope.sum().backward()


def test_module_is_the_function_in_every_dtype_and_mode():
    loss_fn = ContrastiveDivergenceKLTerm(network(), entropy_weight=0.3)
    assert "entropy_weight=0.3" in repr(loss_fn)
    samples, neighbours = normal(5, 2, 2).float(), normal(6, 2, 2, seed=1).float()
    for options in ({}, {"neighbours": neighbours}):
        function = contrastive_divergence_kl_term(
            loss_fn.energy, samples, entropy_weight=0.3, **options
        )
        metrics = function.metrics()
        assert loss_fn(samples, **options).metrics() == metrics
        assert copy.deepcopy(loss_fn)(samples, **options).metrics() == metrics
        for mode in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
            with mode:
                assert loss_fn(samples, **options).metrics() == metrics
        for differentiation in ("autograd", "func"):
            loss_fn.differentiation = differentiation
            terms = loss_fn(samples, **options)
            assert terms.metrics() == pytest.approx(metrics)
    half = copy.deepcopy(loss_fn).bfloat16()
    leaf = samples.bfloat16().requires_grad_()
    terms = half(leaf)
    assert {value.dtype for _, value in terms.items()} == {torch.float32}
    assert terms.entropy.item() == pytest.approx(entropy_of(samples).item(), abs=0.05)
    terms.loss.backward()
    assert leaf.grad.dtype == torch.bfloat16


def refused(error: type[Exception], text: str):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def test_refusals():
    x = torch.ones(5, 4)
    with refused(
        ValueError,
        "contrastive_divergence_kl_term needs neighbours where it has a batch_group: the nearest "
        "sample may be on another rank",
    ):
        contrastive_divergence_kl_term(flat, x, batch_group=torch.distributed.ProcessGroup(0, 2))
    with refused(
        ValueError,
        "contrastive_divergence_kl_term needs at least 2 samples, each other's neighbours, got 1",
    ):
        contrastive_divergence_kl_term(flat, x[:1])
    with refused(
        ValueError, "contrastive_divergence_kl_term needs at least 1 of neighbours, got 0"
    ):
        contrastive_divergence_kl_term(flat, x, neighbours=x[:0])
    with refused(
        tw.ContractError,
        'contrastive_divergence_kl_term: energy(samples) needs Float[Tensor, " batch"] with batch '
        "5, got float32[5, 1]: write energy(x).squeeze(-1)",
    ):
        contrastive_divergence_kl_term(lambda x: x.sum(1, keepdim=True), x)
    with pytest.raises(tw.ContractError, match=r"axis event is \[2\], but it is \[4\] in samples"):
        contrastive_divergence_kl_term(flat, x, neighbours=x[:, :2])
    with pytest.raises(ValueError, match=r"^contrastive_divergence_kl_term needs an energy that"):
        contrastive_divergence_kl_term(lambda x: x.detach().sum(1), x)
    with pytest.raises(ValueError, match=r"needs energies of each row alone, got BatchNorm1d in"):
        contrastive_divergence_kl_term(nn.Sequential(nn.BatchNorm1d(4), nn.Flatten(0)), x)


def test_exported_the_number_of_samples_may_differ():
    class Entropy(torch.nn.Module):
        def forward(self, x):
            return contrastive_divergence_kl_term(lambda y: y.square().sum(1), x).loss

    rows = {"x": {0: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        exported = torch.export.export(Entropy(), (torch.randn(7, 3),), dynamic_shapes=rows)
        x = torch.randn(11, 3)
        torch.testing.assert_close(exported.module()(x), Entropy()(x))
