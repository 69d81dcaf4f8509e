"""Losses for language models: embeddings and distillation."""

from ._targeted_variance import TargetedVarianceLoss as TargetedVarianceLoss
from ._targeted_variance import TargetedVarianceTerms as TargetedVarianceTerms
from ._targeted_variance import targeted_variance_loss as targeted_variance_loss
