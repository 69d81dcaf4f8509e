"""Checks for losses of one's own, as this library's are checked."""

from ._recovers import GaussianEnergy as GaussianEnergy
from ._recovers import check_recovers as check_recovers
from ._recovers import exact_noise as exact_noise
from ._recovers import exact_projections as exact_projections
from ._recovers import sigma_points as sigma_points
