"""Energies that torch cannot differentiate twice: a path that works, or our own words."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from termwise.energy import (
    _fallback,
    denoising_score_matching_loss,
    gradient_penalty,
    hessian_trace,
    score_matching_loss,
    sliced_score_matching_loss,
)

OTHER = torch.randn(5, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
CLASSES = torch.tensor([0, 3, 1])


@pytest.fixture(autouse=True)
def no_energy_is_known():
    _fallback._warned.clear()
    _fallback._failed.clear()


OF_NORMS = {
    "cdist": lambda h: torch.cdist(h, OTHER),
    "linalg.norm": lambda h: torch.linalg.norm(h, dim=1),
    "norm 3": lambda h: torch.norm(h, 3, 1),
    "matrix_norm": lambda h: torch.linalg.matrix_norm(h.reshape(-1, 2, 2)),
    "normalize": lambda h: F.normalize(h, dim=1),
    "std": lambda h: h.std(1),
    "pairwise_distance": lambda h: F.pairwise_distance(h, OTHER[0]),
    "cosine_similarity": lambda h: F.cosine_similarity(h, OTHER[:1]),
    "renorm": lambda h: torch.renorm(h, 2, 0, 0.5),
}


def of(function):
    weight = torch.eye(4, dtype=X.dtype) + 0.3 * OTHER[:4]
    weight.requires_grad_()

    def energy(x):
        out = function(x @ weight).reshape(len(x), -1)
        return (out * torch.linspace(0.5, 1.5, out.shape[1], dtype=x.dtype)).sum(1)

    return energy, weight


@pytest.mark.parametrize("name", OF_NORMS)
def test_norms_forward_over_reverse_have_a_backward_pass(name):
    energy, weight = of(OF_NORMS[name])
    expected = score_matching_loss(energy, X, trace="reverse").loss
    for said in (pytest.warns(UserWarning, match="inplace"), contextlib.nullcontext()):
        with said:
            loss = score_matching_loss(energy, X, trace="forward_over_reverse").loss
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            torch.autograd.grad(loss, weight),
            torch.autograd.grad(expected, weight, retain_graph=True),
        )


def test_a_graph_that_is_whole_goes_forward_over_reverse_as_asked():
    energy, _ = of(torch.sin)
    score_matching_loss(energy, X, trace="forward_over_reverse")  # a warning would be an error
    with torch.no_grad():  # where nothing goes backward, a norm may be so too
        score_matching_loss(of(OF_NORMS["std"])[0], X, trace="forward_over_reverse")


LOSSES = {
    "score_matching_loss": lambda energy: score_matching_loss(energy, X).loss,
    "hessian_trace": lambda energy: hessian_trace(energy, X).sum(),
    "sliced_score_matching_loss": lambda energy: sliced_score_matching_loss(energy, X).loss,
    "denoising_score_matching_loss": lambda energy: (
        denoising_score_matching_loss(energy, X, sigma=0.5).loss
    ),
    "gradient_penalty": lambda energy: gradient_penalty(energy, X).loss,
}


def test_pdist_has_the_derivatives_of_its_differences():
    def pairs(h):
        return torch.stack([torch.pdist(row.reshape(2, 2)).sum() for row in h.unbind(0)])

    def differences(h):
        points = h.reshape(-1, 2, 2)
        return (points[:, 0] - points[:, 1]).square().sum(1).sqrt()

    for loss in (LOSSES["score_matching_loss"], LOSSES["gradient_penalty"]):
        grads = []
        for function in (pairs, differences):
            energy, weight = of(function)
            value = loss(energy)
            grads.append((value.detach(), *torch.autograd.grad(value, weight)))
        torch.testing.assert_close(*grads)


REFUSED = {
    "ctc_loss": lambda h: F.ctc_loss(
        h.log_softmax(1).expand(4, -1, -1),
        torch.ones(3, 2, dtype=torch.long),
        torch.full((3,), 4),
        torch.full((3,), 2),
        reduction="none",
    ),
    "multi_margin_loss": lambda h: F.multi_margin_loss(h, CLASSES, reduction="none"),
    "multilabel_margin_loss": lambda h: F.multilabel_margin_loss(
        h, torch.tensor([[0, 1, -1, -1]] * 3), reduction="none"
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("loss", LOSSES)
def test_what_has_no_second_derivative_is_refused_by_name(name, loss):
    energy, _ = of(REFUSED[name])
    with pytest.raises(
        NotImplementedError, match=f"^{loss} needs a second .*{name} has not: write"
    ):
        LOSSES[loss](energy)


def test_it_is_taken_where_no_second_derivative_is_needed():
    energy, _ = of(REFUSED["multi_margin_loss"])
    with torch.no_grad():
        denoising_score_matching_loss(energy, X, sigma=0.5)
    constant = REFUSED["multi_margin_loss"](X).sum()
    energy, _ = of(lambda h: h.square() * REFUSED["multi_margin_loss"](X).sum())
    torch.testing.assert_close(
        score_matching_loss(energy, X, trace="reverse").laplacian,
        score_matching_loss(of(lambda h: h.square() * constant)[0], X).laplacian,
    )


@pytest.mark.parametrize("loss", ["score_matching_loss", "sliced_score_matching_loss"])
@pytest.mark.parametrize("differentiation", ["autograd", "func"])
def test_without_the_swap_the_name_is_that_of_torchs_backward(loss, differentiation):
    energy, _ = of(REFUSED["multi_margin_loss"])
    options = {"differentiation": differentiation, "higher_order_safe": False}
    function = {"score_matching_loss": score_matching_loss}.get(loss, sliced_score_matching_loss)
    with pytest.raises(NotImplementedError, match=f"^{loss} needs a derivative.*multi_margin"):
        function(energy, X, **options)


def reentrant(x):
    return checkpoint(torch.sin, x, use_reentrant=True).sum(1)


@pytest.mark.parametrize("loss", LOSSES)
def test_reentrant_checkpoints_are_refused_in_our_words(loss):
    with pytest.raises(NotImplementedError, match=f"^{loss} needs .* with use_reentrant=False"):
        LOSSES[loss](reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("function", [score_matching_loss, sliced_score_matching_loss])
def test_checkpoints_under_func_are_refused_in_our_words(function, use_reentrant):
    def energy(x):
        return checkpoint(torch.sin, x, use_reentrant=use_reentrant).sum(1)

    way = {"trace": "reverse"} if function is score_matching_loss else {}
    with pytest.raises(NotImplementedError, match='differentiation="func" .*"autograd"'):
        function(energy, X, differentiation="func", **way)
    with pytest.raises(NotImplementedError, match='differentiation="func" .*"autograd"'):
        gradient_penalty(energy, X, differentiation="func")


@pytest.mark.parametrize("loss", LOSSES)
def test_what_has_no_derivative_at_all_is_said(loss):
    with pytest.raises(ValueError, match="or by a function without a derivative"):
        LOSSES[loss](lambda x: torch.special.bessel_j0(x).sum(1))
