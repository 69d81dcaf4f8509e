"""Losses of energy-based models, p(x) proportional to exp(-E(x))."""

from ._conditional_noise_contrastive import (
    ConditionalNoiseContrastiveLoss as ConditionalNoiseContrastiveLoss,
)
from ._conditional_noise_contrastive import (
    ConditionalNoiseContrastiveTerms as ConditionalNoiseContrastiveTerms,
)
from ._conditional_noise_contrastive import (
    conditional_noise_contrastive_loss as conditional_noise_contrastive_loss,
)
from ._contrastive_divergence import ContrastiveDivergenceLoss as ContrastiveDivergenceLoss
from ._contrastive_divergence import ContrastiveDivergenceTerms as ContrastiveDivergenceTerms
from ._contrastive_divergence import Sampler as Sampler
from ._contrastive_divergence import contrastive_divergence_loss as contrastive_divergence_loss
from ._create import create_loss as create_loss
from ._denoising_score_matching import DenoisingScoreMatchingLoss as DenoisingScoreMatchingLoss
from ._denoising_score_matching import DenoisingScoreMatchingTerms as DenoisingScoreMatchingTerms
from ._denoising_score_matching import (
    denoising_score_matching_loss as denoising_score_matching_loss,
)
from ._energies import Energy as Energy
from ._energy_discrepancy import EnergyDiscrepancyLoss as EnergyDiscrepancyLoss
from ._energy_discrepancy import EnergyDiscrepancyTerms as EnergyDiscrepancyTerms
from ._energy_discrepancy import energy_discrepancy_loss as energy_discrepancy_loss
from ._energy_matching import EnergyMatchingLoss as EnergyMatchingLoss
from ._energy_matching import EnergyMatchingTerms as EnergyMatchingTerms
from ._energy_matching import energy_matching_loss as energy_matching_loss
from ._equilibrium_matching import EquilibriumMatchingLoss as EquilibriumMatchingLoss
from ._equilibrium_matching import EquilibriumMatchingTerms as EquilibriumMatchingTerms
from ._equilibrium_matching import equilibrium_matching_loss as equilibrium_matching_loss
from ._finite_difference_score_matching import (
    FiniteDifferenceScoreMatchingLoss as FiniteDifferenceScoreMatchingLoss,
)
from ._finite_difference_score_matching import (
    FiniteDifferenceScoreMatchingTerms as FiniteDifferenceScoreMatchingTerms,
)
from ._finite_difference_score_matching import (
    finite_difference_score_matching_loss as finite_difference_score_matching_loss,
)
from ._flow_matching import FlowMatchingLoss as FlowMatchingLoss
from ._flow_matching import FlowMatchingTerms as FlowMatchingTerms
from ._flow_matching import TimedEnergy as TimedEnergy
from ._flow_matching import flow_matching_loss as flow_matching_loss
from ._kl_term import ContrastiveDivergenceKLTerm as ContrastiveDivergenceKLTerm
from ._kl_term import ContrastiveDivergenceKLTerms as ContrastiveDivergenceKLTerms
from ._kl_term import contrastive_divergence_kl_term as contrastive_divergence_kl_term
from ._langevin import langevin as langevin
from ._maximum_likelihood import MaximumLikelihoodLoss as MaximumLikelihoodLoss
from ._maximum_likelihood import MaximumLikelihoodTerms as MaximumLikelihoodTerms
from ._maximum_likelihood import maximum_likelihood_loss as maximum_likelihood_loss
from ._noise_contrastive import NoiseContrastiveLoss as NoiseContrastiveLoss
from ._noise_contrastive import NoiseContrastiveTerms as NoiseContrastiveTerms
from ._noise_contrastive import noise_contrastive_loss as noise_contrastive_loss
from ._penalties import EnergySquarePenalty as EnergySquarePenalty
from ._penalties import EnergySquareTerms as EnergySquareTerms
from ._penalties import GradientPenalty as GradientPenalty
from ._penalties import GradientPenaltyTerms as GradientPenaltyTerms
from ._penalties import energy_square_penalty as energy_square_penalty
from ._penalties import gradient_penalty as gradient_penalty
from ._ranking_noise_contrastive import RankingNoiseContrastiveLoss as RankingNoiseContrastiveLoss
from ._ranking_noise_contrastive import RankingNoiseContrastiveTerms as RankingNoiseContrastiveTerms
from ._ranking_noise_contrastive import (
    ranking_noise_contrastive_loss as ranking_noise_contrastive_loss,
)
from ._replay_buffer import ReplayBuffer as ReplayBuffer
from ._score_matching import ScoreMatchingLoss as ScoreMatchingLoss
from ._score_matching import ScoreMatchingTerms as ScoreMatchingTerms
from ._score_matching import hessian_trace as hessian_trace
from ._score_matching import score_matching_loss as score_matching_loss
from ._sliced_score_matching import SlicedScoreMatchingLoss as SlicedScoreMatchingLoss
from ._sliced_score_matching import SlicedScoreMatchingTerms as SlicedScoreMatchingTerms
from ._sliced_score_matching import sliced_score_matching_loss as sliced_score_matching_loss
