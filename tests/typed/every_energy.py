"""What a type checker knows of `termwise.energy`. Never run: pyright and mypy read it."""

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


def functions(x: Tensor) -> None:
    assert_type(
        energy.conditional_noise_contrastive_loss(bowl, x, x),
        energy.ConditionalNoiseContrastiveTerms,
    )
    assert_type(energy.contrastive_divergence_loss(bowl, x), energy.ContrastiveDivergenceTerms)
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
    assert_type(
        energy.denoising_score_matching_loss(bowl, x, sigma=1.0), energy.DenoisingScoreMatchingTerms
    )
    assert_type(energy.energy_discrepancy_loss(bowl, x, t=1.0), energy.EnergyDiscrepancyTerms)
    assert_type(energy.energy_matching_loss(bowl, x, x, x), energy.EnergyMatchingTerms)
    assert_type(energy.equilibrium_matching_loss(bowl, x, x, x), energy.EquilibriumMatchingTerms)
    assert_type(
        energy.finite_difference_score_matching_loss(bowl, x),
        energy.FiniteDifferenceScoreMatchingTerms,
    )
    assert_type(energy.flow_matching_loss(bowl, x, x, x), energy.FlowMatchingTerms)
    assert_type(energy.contrastive_divergence_kl_term(bowl, x), energy.ContrastiveDivergenceKLTerms)
    assert_type(energy.langevin(bowl, x, steps=2, step_size=1.0), Tensor)
    assert_type(energy.maximum_likelihood_loss(bowl, x, x), energy.MaximumLikelihoodTerms)
    assert_type(
        energy.noise_contrastive_loss(bowl, x, x, log_noise_x=x, log_noise_noise=x, log_z=x),
        energy.NoiseContrastiveTerms,
    )
    assert_type(energy.energy_square_penalty(bowl, x), energy.EnergySquareTerms)
    assert_type(energy.gradient_penalty(bowl, x), energy.GradientPenaltyTerms)
    assert_type(
        energy.ranking_noise_contrastive_loss(bowl, x, x, log_noise_x=x, log_noise_noise=x),
        energy.RankingNoiseContrastiveTerms,
    )
    assert_type(energy.hessian_trace(bowl, x), Tensor)
    assert_type(energy.score_matching_loss(bowl, x), energy.ScoreMatchingTerms)
    assert_type(energy.sliced_score_matching_loss(bowl, x), energy.SlicedScoreMatchingTerms)


def modules(x: Tensor) -> None:
    assert_type(
        energy.ConditionalNoiseContrastiveLoss(bowl)(x, x), energy.ConditionalNoiseContrastiveTerms
    )
    assert_type(energy.ContrastiveDivergenceLoss(bowl)(x), energy.ContrastiveDivergenceTerms)
    assert_type(
        energy.DenoisingScoreMatchingLoss(bowl, sigma=1.0)(x), energy.DenoisingScoreMatchingTerms
    )
    assert_type(energy.EnergyDiscrepancyLoss(bowl, t=1.0)(x), energy.EnergyDiscrepancyTerms)
    assert_type(energy.EnergyMatchingLoss(bowl)(x, x, x), energy.EnergyMatchingTerms)
    assert_type(energy.EquilibriumMatchingLoss(bowl)(x, x, x), energy.EquilibriumMatchingTerms)
    assert_type(
        energy.FiniteDifferenceScoreMatchingLoss(bowl)(x), energy.FiniteDifferenceScoreMatchingTerms
    )
    assert_type(energy.FlowMatchingLoss(timed)(x, x, x), energy.FlowMatchingTerms)
    assert_type(energy.ContrastiveDivergenceKLTerm(bowl)(x), energy.ContrastiveDivergenceKLTerms)
    assert_type(energy.MaximumLikelihoodLoss(bowl)(x, x), energy.MaximumLikelihoodTerms)
    assert_type(
        energy.NoiseContrastiveLoss(bowl)(x, x, log_noise_x=x, log_noise_noise=x),
        energy.NoiseContrastiveTerms,
    )
    assert_type(energy.EnergySquarePenalty(bowl)(x), energy.EnergySquareTerms)
    assert_type(energy.GradientPenalty(bowl)(x), energy.GradientPenaltyTerms)
    assert_type(
        energy.RankingNoiseContrastiveLoss(bowl)(x, x, log_noise_x=x, log_noise_noise=x),
        energy.RankingNoiseContrastiveTerms,
    )
    assert_type(energy.ScoreMatchingLoss(bowl)(x), energy.ScoreMatchingTerms)
    assert_type(energy.SlicedScoreMatchingLoss(bowl)(x), energy.SlicedScoreMatchingTerms)


def fields_of_conditional_noise_contrastive_terms(
    terms: energy.ConditionalNoiseContrastiveTerms,
) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.classification, Tensor)
    assert_type(terms.accuracy, Tensor)
    assert_type(terms.log_odds, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), energy.ConditionalNoiseContrastiveTerms)


def fields_of_contrastive_divergence_terms(terms: energy.ContrastiveDivergenceTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.energy_data, Tensor)
    assert_type(terms.energy_model, Tensor)
    assert_type(terms.gap, Tensor)
    assert_type(terms.regularization, Tensor)
    assert_type(terms.energy_squares, Tensor)
    assert_type(terms.negatives, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), energy.ContrastiveDivergenceTerms)


def fields_of_denoising_score_matching_terms(terms: energy.DenoisingScoreMatchingTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.score_square, Tensor)
    assert_type(terms.cross, Tensor)
    assert_type(terms.noise_square, Tensor)
    assert_type(terms.per_sigma, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), energy.DenoisingScoreMatchingTerms)


def fields_of_energy_discrepancy_terms(terms: energy.EnergyDiscrepancyTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.gap, Tensor)
    assert_type(terms.stabilization, Tensor)
    assert_type(terms.effective_copies, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), energy.EnergyDiscrepancyTerms)


def fields_of_energy_matching_terms(terms: energy.EnergyMatchingTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.flow, Tensor)
    assert_type(terms.contrast, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), energy.EnergyMatchingTerms)


def fields_of_equilibrium_matching_terms(terms: energy.EquilibriumMatchingTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.gradient_square, Tensor)
    assert_type(terms.cross, Tensor)
    assert_type(terms.target_square, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), energy.EquilibriumMatchingTerms)


def fields_of_finite_difference_score_matching_terms(
    terms: energy.FiniteDifferenceScoreMatchingTerms,
) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.score_square, Tensor)
    assert_type(terms.curvature, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), energy.FiniteDifferenceScoreMatchingTerms)


def fields_of_flow_matching_terms(terms: energy.FlowMatchingTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.velocity_square, Tensor)
    assert_type(terms.cross, Tensor)
    assert_type(terms.target_square, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), energy.FlowMatchingTerms)


def fields_of_contrastive_divergence_klterms(terms: energy.ContrastiveDivergenceKLTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.energy, Tensor)
    assert_type(terms.entropy, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), energy.ContrastiveDivergenceKLTerms)


def fields_of_maximum_likelihood_terms(terms: energy.MaximumLikelihoodTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.energy_data, Tensor)
    assert_type(terms.energy_model, Tensor)
    assert_type(terms.gap, Tensor)
    assert_type(terms.regularization, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), energy.MaximumLikelihoodTerms)


def fields_of_noise_contrastive_terms(terms: energy.NoiseContrastiveTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.data, Tensor)
    assert_type(terms.noise, Tensor)
    assert_type(terms.accuracy, Tensor)
    assert_type(terms.log_z, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), energy.NoiseContrastiveTerms)


def fields_of_energy_square_terms(terms: energy.EnergySquareTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.energy, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), energy.EnergySquareTerms)


def fields_of_gradient_penalty_terms(terms: energy.GradientPenaltyTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.gradient_norm, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), energy.GradientPenaltyTerms)


def fields_of_ranking_noise_contrastive_terms(terms: energy.RankingNoiseContrastiveTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.data, Tensor)
    assert_type(terms.normalizer, Tensor)
    assert_type(terms.accuracy, Tensor)
    assert_type(terms.effective_candidates, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), energy.RankingNoiseContrastiveTerms)


def fields_of_score_matching_terms(terms: energy.ScoreMatchingTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.score_square, Tensor)
    assert_type(terms.laplacian, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), energy.ScoreMatchingTerms)


def fields_of_sliced_score_matching_terms(terms: energy.SlicedScoreMatchingTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.score_square, Tensor)
    assert_type(terms.curvature, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), energy.SlicedScoreMatchingTerms)


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
