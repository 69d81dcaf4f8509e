"""What a type checker knows of the energy family. Never run: pyright and mypy read it."""

from typing import assert_type

from torch import Tensor, nn

from termwise import energy


def bowl(x: Tensor) -> Tensor:
    return x.square().sum(1)


def functions(model: nn.Module, x: Tensor, rows: Tensor, log_z: Tensor) -> None:
    assert_type(energy.maximum_likelihood_loss(bowl, x, x), energy.MaximumLikelihoodTerms)
    assert_type(energy.maximum_likelihood_loss(model, x, x), energy.MaximumLikelihoodTerms)
    assert_type(energy.contrastive_divergence_loss(bowl, x, x), energy.ContrastiveDivergenceTerms)
    assert_type(energy.contrastive_divergence_kl_term(bowl, x), energy.ContrastiveDivergenceKLTerms)
    assert_type(
        energy.noise_contrastive_loss(
            bowl, x, x, log_noise_x=rows, log_noise_noise=rows, log_z=log_z
        ),
        energy.NoiseContrastiveTerms,
    )
    assert_type(
        energy.ranking_noise_contrastive_loss(bowl, x, x, log_noise_x=rows, log_noise_noise=rows),
        energy.RankingNoiseContrastiveTerms,
    )
    assert_type(
        energy.conditional_noise_contrastive_loss(bowl, x, x),
        energy.ConditionalNoiseContrastiveTerms,
    )
    assert_type(energy.energy_discrepancy_loss(bowl, x, t=0.1), energy.EnergyDiscrepancyTerms)
    assert_type(energy.score_matching_loss(bowl, x), energy.ScoreMatchingTerms)
    assert_type(energy.sliced_score_matching_loss(bowl, x), energy.SlicedScoreMatchingTerms)
    assert_type(
        energy.finite_difference_score_matching_loss(bowl, x),
        energy.FiniteDifferenceScoreMatchingTerms,
    )
    assert_type(
        energy.denoising_score_matching_loss(bowl, x, sigma=[0.1, 1]),
        energy.DenoisingScoreMatchingTerms,
    )
    assert_type(energy.flow_matching_loss(bowl, x, x, rows), energy.FlowMatchingTerms)
    assert_type(energy.equilibrium_matching_loss(bowl, x, x, rows), energy.EquilibriumMatchingTerms)
    assert_type(energy.energy_matching_loss(bowl, x, x, rows), energy.EnergyMatchingTerms)
    assert_type(energy.hessian_trace(bowl, x), Tensor)
    assert_type(energy.langevin(bowl, x, steps=3, step_size=0.1), Tensor)


def modules(model: nn.Module, x: Tensor, rows: Tensor) -> None:
    assert_type(energy.MaximumLikelihoodLoss(model)(x, x), energy.MaximumLikelihoodTerms)
    assert_type(energy.ScoreMatchingLoss(bowl)(x), energy.ScoreMatchingTerms)
    assert_type(energy.create_loss("dsm", bowl, sigma=1.0), energy.DenoisingScoreMatchingLoss)
    assert_type(energy.create_loss("mle", bowl)(x, x), energy.MaximumLikelihoodTerms)
