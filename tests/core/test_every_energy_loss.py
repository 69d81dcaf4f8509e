"""What holds for every loss, of the energy family."""

import torch
from every_loss import *  # noqa: F403
from losses import PAIR, Case
from torch import Tensor

import termwise as tw
from termwise import energy


def bowl(x: Tensor) -> Tensor:
    """An energy that is not quadratic and couples the elements of a row; it pickles by its name."""
    return (x * x.roll(1, 1) + x.pow(4) / 4 - x.sin()).sum(1)


def timed_bowl(x: Tensor, time: Tensor) -> Tensor:
    """What the module of a loss with times holds, where the function takes a closure."""
    return bowl(x)


FAMILY = tw.energy
THREE = ("rows columns", "rows columns", "rows")
NOISES = ("rows columns", "noises rows columns")
CASES = {
    "maximum likelihood": Case(
        energy.maximum_likelihood_loss,
        energy.MaximumLikelihoodLoss(bowl, negative_weight=0.7),
        {"negative_weight": 0.7},
        PAIR,
        named={"weights": "rows"},
        first=(bowl,),
    ),
    "noise contrastive": Case(
        energy.noise_contrastive_loss,
        energy.NoiseContrastiveLoss(bowl, log_z=0.0),
        {"log_z": torch.zeros(())},
        PAIR,
        named={"log_noise_x": "rows", "log_noise_noise": "rows"},
        first=(bowl,),
        of_the_module=("log_z", "learn_log_z"),
    ),
    "ranking noise contrastive": Case(
        energy.ranking_noise_contrastive_loss,
        energy.RankingNoiseContrastiveLoss(bowl),
        {},
        NOISES,
        named={"log_noise_x": "rows", "log_noise_noise": "noises rows"},
        first=(bowl,),
    ),
    "conditional noise contrastive": Case(
        energy.conditional_noise_contrastive_loss,
        energy.ConditionalNoiseContrastiveLoss(bowl),
        {},
        NOISES,
        first=(bowl,),
    ),
    "energy discrepancy": Case(
        energy.energy_discrepancy_loss,
        energy.EnergyDiscrepancyLoss(bowl, t=0.3, copies=1),
        {"t": 0.3, "copies": 1},
        named={"noise": "noises rows columns"},
        first=(bowl,),
    ),
    "energy matching": Case(
        energy.energy_matching_loss,
        energy.EnergyMatchingLoss(bowl, contrastive_weight=0.3),
        {"contrastive_weight": 0.3},
        (*THREE, "rows columns"),
        first=(bowl,),
    ),
    "equilibrium matching": Case(
        energy.equilibrium_matching_loss,
        energy.EquilibriumMatchingLoss(bowl, multiplier=2.0),
        {"multiplier": 2.0},
        THREE,
        first=(bowl,),
    ),
    "flow matching": Case(
        energy.flow_matching_loss,
        energy.FlowMatchingLoss(timed_bowl, sigma_min=0.1),
        {"sigma_min": 0.1},
        THREE,
        first=(bowl,),
    ),
    "score matching": Case(
        energy.score_matching_loss,
        energy.ScoreMatchingLoss(bowl),
        {},
        ("rows columns",),
        named={"weights": "rows"},
        first=(bowl,),
    ),
    "score matching, reverse": Case(
        energy.score_matching_loss,
        energy.ScoreMatchingLoss(bowl, trace="reverse", chunk_size=2),
        {"trace": "reverse", "chunk_size": 2},
        ("rows columns",),
        first=(bowl,),
    ),
    "denoising": Case(
        energy.denoising_score_matching_loss,
        energy.DenoisingScoreMatchingLoss(bowl, sigma=(0.5, 2.0), weighting="sigma2"),
        {"sigma": (0.5, 2.0), "weighting": "sigma2"},
        ("rows columns",),
        named={"noise": "noises rows columns"},
        first=(bowl,),
    ),
    "finite difference": Case(
        energy.finite_difference_score_matching_loss,
        energy.FiniteDifferenceScoreMatchingLoss(bowl, step=0.2),
        {"step": 0.2},
        ("rows columns",),
        named={"projections": "noises rows columns"},
        first=(bowl,),
    ),
    "sliced": Case(
        energy.sliced_score_matching_loss,
        energy.SlicedScoreMatchingLoss(bowl, variance_reduced=False),
        {"variance_reduced": False},
        ("rows columns",),
        named={"projections": "noises rows columns"},
        first=(bowl,),
    ),
    "contrastive divergence": Case(
        energy.contrastive_divergence_loss,
        energy.ContrastiveDivergenceLoss(bowl, energy_square_weight=0.1),
        {"energy_square_weight": 0.1},
        PAIR,
        named={"weights": "rows"},
        first=(bowl,),
    ),
    "contrastive divergence's kl term": Case(
        energy.contrastive_divergence_kl_term,
        energy.ContrastiveDivergenceKLTerm(bowl, entropy_weight=0.5),
        {"entropy_weight": 0.5},
        ("rows columns",),
        first=(bowl,),
    ),
    "energy square": Case(
        energy.energy_square_penalty,
        energy.EnergySquarePenalty(bowl),
        {},
        ("rows columns",),
        named={"weights": "rows"},
        first=(bowl,),
    ),
    "gradient penalty": Case(
        energy.gradient_penalty,
        energy.GradientPenalty(bowl, target=1.0),
        {"target": 1.0},
        ("rows columns",),
        first=(bowl,),
    ),
}
