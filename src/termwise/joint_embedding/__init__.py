"""Losses on two embedded views of each sample."""

from ._vicreg import VICRegLoss as VICRegLoss
from ._vicreg import VICRegTerms as VICRegTerms
from ._vicreg import vicreg_loss as vicreg_loss
