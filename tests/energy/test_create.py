"""Losses by their short names, and errors that list what there is."""

import inspect

import pytest
import torch
from torch import nn

import termwise as tw
from termwise import energy
from termwise.energy import _create, create_loss


def bowl(x):
    return 0.5 * x.square().sum(1)


@pytest.mark.parametrize(
    ("name", "kind", "numbers"),
    [
        ("mle", energy.MaximumLikelihoodLoss, {"negative_weight": 0.5}),
        ("cd", energy.ContrastiveDivergenceLoss, {"steps": 3}),
        ("nce", energy.NoiseContrastiveLoss, {"log_z": 1.5}),
        ("sm", energy.ScoreMatchingLoss, {"trace": "reverse"}),
        ("dsm", energy.DenoisingScoreMatchingLoss, {"sigma": 0.5}),
        ("ssm", energy.SlicedScoreMatchingLoss, {"projections": 3}),
        ("cd_kl_term", energy.ContrastiveDivergenceKLTerm, {"entropy_weight": 0.3}),
        ("ranking_nce", energy.RankingNoiseContrastiveLoss, {"grad_reduction": "sum"}),
        ("conditional_nce", energy.ConditionalNoiseContrastiveLoss, {"grad_reduction": "sum"}),
        ("energy_discrepancy", energy.EnergyDiscrepancyLoss, {"t": 0.3}),
        ("finite_difference_sm", energy.FiniteDifferenceScoreMatchingLoss, {"step": 0.1}),
        ("flow_matching", energy.FlowMatchingLoss, {"sigma_min": 0.1}),
        ("equilibrium_matching", energy.EquilibriumMatchingLoss, {"multiplier": 1.0}),
        ("energy_matching", energy.EnergyMatchingLoss, {"contrastive_weight": 0.1}),
        ("energy_square", energy.EnergySquarePenalty, {"grad_reduction": "sum"}),
        ("gradient_penalty", energy.GradientPenalty, {"target": 1.0}),
    ],
)
def test_a_name_is_its_module_with_its_numbers(name, kind, numbers):
    loss_fn = create_loss(name.upper(), bowl, **numbers)
    assert type(loss_fn) is kind
    assert loss_fn.energy is bowl
    ((number, value),) = numbers.items()
    assert getattr(loss_fn, number) == value


def test_every_module_has_one_name():
    modules = {m for m in vars(energy).values() if inspect.isclass(m) and issubclass(m, nn.Module)}
    needed = {"dsm": {"sigma": 1.0}, "energy_discrepancy": {"t": 1.0}}
    made = [type(create_loss(name, bowl, **needed.get(name, {}))) for name in _create._LOSSES]
    assert set(made) == modules
    assert len(made) == len(modules)


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("mle", {"alpha": 0.5}, {"negative_weight": 0.5}),
        ("mle", {"alpha": 2}, {"negative_weight": 2}),
        ("cd", {"n_steps": 3, "alpha": 0.5}, {"steps": 3, "negative_weight": 0.5}),
        ("nce", {"log_partition": 1.5}, {"log_z": 1.5}),
        ("nce", {"learn_partition": False}, {"learn_log_z": False}),
        ("ssm", {"n_projections": 3}, {"projections": 3}),
        ("sm", {"implicit": False}, {}),
        ("dsm", {"sigma": [0.1, 0.5]}, {"sigma": [0.1, 0.5]}),
    ],
)
def test_keywords_of_the_guide_are_ours(name, theirs, ours):
    assert repr(create_loss(name, bowl, **theirs)) == repr(create_loss(name, bowl, **ours))


def test_the_guides_maximum_likelihood_is_ours():
    """Its formula with its keywords, the penalty without a half included."""
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double()
    x, y = torch.randn(2, 5, 3, dtype=torch.float64)
    loss_fn = create_loss("mle", model, alpha=0.7, regularization="l2", reg_strength=0.1)
    penalty = sum(p.square().sum() for p in model.parameters())
    expected = model(x).mean() - 0.7 * model(y).mean() + 0.1 * penalty
    torch.testing.assert_close(loss_fn(x, y).loss, expected)


class Chains(nn.Module):
    """A sampler as TorchEBM has it."""

    def sample(self, x, n_steps):
        return x


def test_keywords_of_the_guide_that_are_another_thing_are_refused_with_ours():
    with pytest.raises(TypeError, match=r'write create_loss\("dsm", energy, sigma=0\.01\)$'):
        create_loss("sm", bowl, implicit=True)
    with pytest.raises(TypeError, match=r"calls sampler\(energy, x\), got Chains: write sampler="):
        create_loss("cd", bowl, sampler=Chains())
    with pytest.raises(TypeError, match="takes negative_weight once, got alpha too$"):
        create_loss("mle", bowl, alpha=1.0, negative_weight=1.0)
    with pytest.raises(TypeError, match="takes negative_weight once, got alpha too$"):
        create_loss("mle", bowl, negative_weight=1.0, alpha=1.0)
    with pytest.raises(TypeError, match=r"takes trace, .*, got alpha$"):
        create_loss("sm", bowl, alpha=1.0)


def test_its_terms_are_the_functions():
    x = torch.randn(5, 3)
    ours = create_loss("sm", bowl)(x)
    assert ours.metrics() == energy.score_matching_loss(bowl, x).metrics()


def test_what_there_is_not_is_answered_by_what_there_is():
    with pytest.raises(
        ValueError, match="^create_loss needs one of mle, cd, nce, sm, dsm, ssm, .*, got 'kl'$"
    ):
        create_loss("kl", bowl)
    with pytest.raises(TypeError, match=r'^create_loss\("dsm"\) takes sigma, .*, got alpha$'):
        create_loss("dsm", bowl, alpha=1.0)
    said = r'^create_loss\("dsm"\) needs sigma, got no such number; .* guide is 0\.01$'
    with pytest.raises(TypeError, match=said):
        create_loss("dsm", bowl)
    with pytest.raises(tw.ContractError, match="sigma needs .* got str"):
        create_loss("dsm", bowl, sigma="small")
