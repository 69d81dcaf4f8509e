"""Objectives of sparse autoencoders, crosscoders and transcoders, and their measurements."""

from ._shared import SparseLatents as SparseLatents
from ._vanilla import Vanilla as Vanilla
from ._vanilla import VanillaObjective as VanillaObjective
from ._vanilla import VanillaTerms as VanillaTerms
from ._vanilla import vanilla_loss as vanilla_loss
