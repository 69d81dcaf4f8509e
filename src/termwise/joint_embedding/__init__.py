"""Losses on two embedded views of each sample."""

from ._gram_anchor import GramAnchorLoss as GramAnchorLoss
from ._gram_anchor import GramAnchorTerms as GramAnchorTerms
from ._gram_anchor import gram_anchor_loss as gram_anchor_loss
from ._koleo import KoLeoLoss as KoLeoLoss
from ._koleo import KoLeoTerms as KoLeoTerms
from ._koleo import koleo_loss as koleo_loss
from ._sigmoid_contrastive import SigmoidContrastiveLoss as SigmoidContrastiveLoss
from ._sigmoid_contrastive import SigmoidContrastiveTerms as SigmoidContrastiveTerms
from ._sigmoid_contrastive import sigmoid_contrastive_loss as sigmoid_contrastive_loss
from ._vicreg import VICRegLoss as VICRegLoss
from ._vicreg import VICRegTerms as VICRegTerms
from ._vicreg import vicreg_loss as vicreg_loss
