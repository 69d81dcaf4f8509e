"""Losses on embedded views of each sample."""

from ._lejepa import LeJEPALoss as LeJEPALoss
from ._lejepa import LeJEPATerms as LeJEPATerms
from ._lejepa import lejepa_loss as lejepa_loss
from ._sigreg import SIGRegLoss as SIGRegLoss
from ._sigreg import SIGRegTerms as SIGRegTerms
from ._sigreg import sigreg_loss as sigreg_loss
from ._vicreg import VICRegLoss as VICRegLoss
from ._vicreg import VICRegTerms as VICRegTerms
from ._vicreg import vicreg_loss as vicreg_loss
from ._visreg import VISRegLoss as VISRegLoss
from ._visreg import VISRegTerms as VISRegTerms
from ._visreg import visreg_loss as visreg_loss
