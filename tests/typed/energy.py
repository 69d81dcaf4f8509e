"""What a type checker knows of `termwise.energy` that calls.py cannot write. Never run."""

from typing import assert_type

import torch
from torch import Tensor, nn

from termwise import energy


def bowl(x: Tensor) -> Tensor:
    return x.square().sum(1)


def timed(x: Tensor, t: Tensor) -> Tensor:
    return t * x.square().sum(1)


def started(n: int, generator: torch.Generator | None) -> Tensor:
    return torch.randn(n, 2, generator=generator)


def overloads() -> None:
    assert_type(energy.create_loss("mle", bowl), energy.MaximumLikelihoodLoss)
    assert_type(energy.create_loss("cd", bowl), energy.ContrastiveDivergenceLoss)
    assert_type(energy.create_loss("nce", bowl), energy.NoiseContrastiveLoss)
    assert_type(energy.create_loss("sm", bowl), energy.ScoreMatchingLoss)
    assert_type(energy.create_loss("dsm", bowl, sigma=1.0), energy.DenoisingScoreMatchingLoss)
    assert_type(energy.create_loss("ssm", bowl), energy.SlicedScoreMatchingLoss)
    assert_type(energy.create_loss("cd_kl_term", bowl), energy.ContrastiveDivergenceKLTerm)
    assert_type(energy.create_loss("ranking_nce", bowl), energy.RankingNoiseContrastiveLoss)
    assert_type(energy.create_loss("conditional_nce", bowl), energy.ConditionalNoiseContrastiveLoss)
    assert_type(energy.create_loss("energy_discrepancy", bowl, t=1.0), energy.EnergyDiscrepancyLoss)
    assert_type(
        energy.create_loss("finite_difference_sm", bowl), energy.FiniteDifferenceScoreMatchingLoss
    )
    assert_type(energy.create_loss("flow_matching", timed), energy.FlowMatchingLoss)
    assert_type(energy.create_loss("equilibrium_matching", bowl), energy.EquilibriumMatchingLoss)
    assert_type(energy.create_loss("energy_matching", bowl), energy.EnergyMatchingLoss)
    assert_type(energy.create_loss("energy_square", bowl), energy.EnergySquarePenalty)
    assert_type(energy.create_loss("gradient_penalty", bowl), energy.GradientPenalty)
    assert_type(energy.create_loss(str(bowl), bowl), nn.Module)


def an_energy_is_a_module_or_a_function(model: nn.Module, x: Tensor) -> None:
    assert_type(energy.maximum_likelihood_loss(bowl, x, x), energy.MaximumLikelihoodTerms)
    assert_type(energy.maximum_likelihood_loss(model, x, x), energy.MaximumLikelihoodTerms)
    assert_type(energy.MaximumLikelihoodLoss(model)(x, x), energy.MaximumLikelihoodTerms)
    assert_type(energy.create_loss("mle", bowl)(x, x), energy.MaximumLikelihoodTerms)
    assert_type(
        energy.denoising_score_matching_loss(bowl, x, sigma=[0.1, 1]),
        energy.DenoisingScoreMatchingTerms,
    )


def members_of_replay_buffer(one: energy.ReplayBuffer, x: Tensor) -> None:
    assert_type(energy.ReplayBuffer.start(started, 8), energy.ReplayBuffer)
    assert_type(one.samples, Tensor)
    assert_type(one.draw(2), tuple[Tensor, Tensor])
    assert_type(one.write(x, x), Tensor)


def aliases(
    one: energy.Energy, other: energy.TimedEnergy, sampler: energy.Sampler, x: Tensor
) -> None:
    assert_type(one(x), Tensor)
    assert_type(other(x, x), Tensor)
    assert_type(sampler(bowl, x), Tensor)
