"""Objectives of sparse autoencoders, crosscoders and transcoders, and their measurements."""

from ._metrics import VarianceStatistics as VarianceStatistics
from ._metrics import cosine_similarity as cosine_similarity
from ._metrics import explained_variance as explained_variance
from ._metrics import fraction_of_variance_unexplained as fraction_of_variance_unexplained
from ._metrics import loss_recovered as loss_recovered
from ._metrics import mean_squared_err as mean_squared_err
from ._metrics import normalized_mse as normalized_mse
from ._shared import SparseLatents as SparseLatents
from ._state import ActivationThreshold as ActivationThreshold
from ._state import DeadLatents as DeadLatents
from ._topk import TopK as TopK
from ._topk import TopKObjective as TopKObjective
from ._topk import TopKTerms as TopKTerms
from ._topk import auxiliary_k_loss as auxiliary_k_loss
from ._topk import batch_topk as batch_topk
from ._topk import topk as topk
from ._topk import topk_loss as topk_loss
from ._vanilla import Vanilla as Vanilla
from ._vanilla import VanillaObjective as VanillaObjective
from ._vanilla import VanillaTerms as VanillaTerms
from ._vanilla import vanilla_loss as vanilla_loss
