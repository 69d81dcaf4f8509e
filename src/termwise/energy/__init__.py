"""Losses of energy-based models, p(x) proportional to exp(-E(x))."""

from ._maximum_likelihood import MaximumLikelihoodLoss as MaximumLikelihoodLoss
from ._maximum_likelihood import MaximumLikelihoodTerms as MaximumLikelihoodTerms
from ._maximum_likelihood import maximum_likelihood_loss as maximum_likelihood_loss
from ._shared import Energy as Energy
