"""Losses on two embedded views of each sample."""

from ._assignments import centered_softmax as centered_softmax
from ._assignments import sinkhorn as sinkhorn
from ._assignments import updated_center as updated_center
from ._dino import DINOLoss as DINOLoss
from ._dino import DINOTerms as DINOTerms
from ._dino import dino_loss as dino_loss
from ._ibot import IBOTLoss as IBOTLoss
from ._ibot import IBOTTerms as IBOTTerms
from ._ibot import ibot_loss as ibot_loss
from ._swapped_prediction import SwappedPredictionLoss as SwappedPredictionLoss
from ._swapped_prediction import SwappedPredictionTerms as SwappedPredictionTerms
from ._swapped_prediction import swapped_prediction_loss as swapped_prediction_loss
from ._vicreg import VICRegLoss as VICRegLoss
from ._vicreg import VICRegTerms as VICRegTerms
from ._vicreg import vicreg_loss as vicreg_loss
