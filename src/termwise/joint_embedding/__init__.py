"""Losses on two embedded views of each sample."""

from ._barlow_twins import BarlowTwinsLoss as BarlowTwinsLoss
from ._barlow_twins import BarlowTwinsTerms as BarlowTwinsTerms
from ._barlow_twins import barlow_twins_loss as barlow_twins_loss
from ._mmcr import MMCRLoss as MMCRLoss
from ._mmcr import MMCRTerms as MMCRTerms
from ._mmcr import mmcr_loss as mmcr_loss
from ._multi_view_vicreg import MultiViewVICRegLoss as MultiViewVICRegLoss
from ._multi_view_vicreg import MultiViewVICRegTerms as MultiViewVICRegTerms
from ._multi_view_vicreg import multi_view_vicreg_loss as multi_view_vicreg_loss
from ._predictive_cosine import PredictiveCosineLoss as PredictiveCosineLoss
from ._predictive_cosine import PredictiveCosineTerms as PredictiveCosineTerms
from ._predictive_cosine import predictive_cosine_loss as predictive_cosine_loss
from ._variance_covariance import VarianceCovarianceLoss as VarianceCovarianceLoss
from ._variance_covariance import VarianceCovarianceTerms as VarianceCovarianceTerms
from ._variance_covariance import variance_covariance_loss as variance_covariance_loss
from ._vicreg import VICRegLoss as VICRegLoss
from ._vicreg import VICRegTerms as VICRegTerms
from ._vicreg import vicreg_loss as vicreg_loss
