"""Losses on two embedded views of each sample."""

from ._decoupled_contrastive import DecoupledContrastiveLoss as DecoupledContrastiveLoss
from ._decoupled_contrastive import DecoupledContrastiveTerms as DecoupledContrastiveTerms
from ._decoupled_contrastive import decoupled_contrastive_loss as decoupled_contrastive_loss
from ._info_nce import InfoNCELoss as InfoNCELoss
from ._info_nce import InfoNCETerms as InfoNCETerms
from ._info_nce import info_nce_loss as info_nce_loss
from ._nt_xent import NTXentLoss as NTXentLoss
from ._nt_xent import NTXentTerms as NTXentTerms
from ._nt_xent import nt_xent_loss as nt_xent_loss
from ._supervised_contrastive import SupervisedContrastiveLoss as SupervisedContrastiveLoss
from ._supervised_contrastive import SupervisedContrastiveTerms as SupervisedContrastiveTerms
from ._supervised_contrastive import supervised_contrastive_loss as supervised_contrastive_loss
from ._vicreg import VICRegLoss as VICRegLoss
from ._vicreg import VICRegTerms as VICRegTerms
from ._vicreg import vicreg_loss as vicreg_loss
