"""Losses by their short names, and errors that list what there is."""

import pytest
import torch

import termwise as tw
from termwise import energy
from termwise.energy import create_loss


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
    ],
)
def test_a_name_is_its_module_with_its_numbers(name, kind, numbers):
    loss_fn = create_loss(name.upper(), bowl, **numbers)
    assert type(loss_fn) is kind
    assert loss_fn.energy is bowl
    ((number, value),) = numbers.items()
    assert getattr(loss_fn, number) == value


def test_its_terms_are_the_functions():
    x = torch.randn(5, 3)
    ours = create_loss("sm", bowl)(x)
    assert ours.metrics() == energy.score_matching_loss(bowl, x).metrics()


def test_what_there_is_not_is_answered_by_what_there_is():
    with pytest.raises(
        ValueError, match="^create_loss needs one of mle, cd, nce, sm, dsm, ssm, got 'kl'$"
    ):
        create_loss("kl", bowl)
    with pytest.raises(TypeError, match=r'^create_loss\("dsm"\) takes sigma, .*, got alpha$'):
        create_loss("dsm", bowl, alpha=1.0)
    with pytest.raises(TypeError, match=r'^create_loss\("dsm"\) needs sigma, got no such number$'):
        create_loss("dsm", bowl)
    with pytest.raises(tw.ContractError, match="sigma needs .* got str"):
        create_loss("dsm", bowl, sigma="small")
