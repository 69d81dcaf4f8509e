"""Losses for language models: embeddings and distillation."""

from ._alignment import Alignment as Alignment
from ._alignment import align_spans as align_spans
from ._chunks import chunk_average_log_probs as chunk_average_log_probs
from ._chunks import valid_chunk_mask as valid_chunk_mask
from ._distillation import DistillationLoss as DistillationLoss
from ._distillation import DistillationTerms as DistillationTerms
from ._distillation import distillation_loss as distillation_loss
from ._next_token import NextTokenLoss as NextTokenLoss
from ._next_token import NextTokenTerms as NextTokenTerms
from ._next_token import next_token_loss as next_token_loss
from ._partition import VocabPartition as VocabPartition
from ._partition import vocab_partition as vocab_partition
from ._partitioned import PartitionedLoss as PartitionedLoss
from ._partitioned import PartitionedTerms as PartitionedTerms
from ._partitioned import partitioned_loss as partitioned_loss
from ._projected_kl import ProjectedKLLoss as ProjectedKLLoss
from ._projected_kl import ProjectedKLTerms as ProjectedKLTerms
from ._projected_kl import count_valid_chunks as count_valid_chunks
from ._projected_kl import projected_kl_loss as projected_kl_loss
from ._projection import VocabProjection as VocabProjection
from ._shared_logits import SharedLogits as SharedLogits
from ._shared_logits import SharedLogitsHandle as SharedLogitsHandle
from ._targeted_variance import TargetedVarianceLoss as TargetedVarianceLoss
from ._targeted_variance import TargetedVarianceTerms as TargetedVarianceTerms
from ._targeted_variance import targeted_variance_loss as targeted_variance_loss
