"""Chunks of tokens: their means, their validity and their number."""

import torch
from hypothesis import strategies as st

from losses import Declaration
from losses._chunks import CHUNK_IDS, CHUNKS, counted_chunks, zeros
from termwise import lm

DIFFERENTIATED = ("assert_gradients", "assert_double_backward", "assert_forward_mode")
NO_GRADIENT = dict.fromkeys(DIFFERENTIATED, "no part of the result")
NO_NUMBERS = {**NO_GRADIENT, "assert_vmaps": "no floating tensor"}


def means(log_probs, chunk_id, max_chunks, **_):
    sizes = (chunk_id[:, :, None] == torch.arange(max_chunks)).to(log_probs.dtype)
    each = sizes.sum(1)
    sums = torch.einsum("btv,btc->bcv", log_probs, sizes)
    return sums / each.clamp(min=1)[..., None], each


def count(alignment, *, mask=None, sample_mask=None, exact_only=False, **_):
    return torch.tensor(len(list(counted_chunks(alignment, mask, sample_mask, exact_only))))


MEANS = Declaration(
    function=lm.chunk_average_log_probs,
    formula=means,
    elements={"chunk_id": st.integers(-1, 1)},
    overrides={"max_chunks": 2},
    second=("right",),
    shards={"sequence_group": ("time", {"grad_reduction": "sum"})},
    more={"assert_finite": {"chunk_id": zeros}},
)
VALID = Declaration(
    function=lm.valid_chunk_mask,
    formula=lambda student_sizes, teacher_sizes, pair_valid: (
        (student_sizes > 0) & (teacher_sizes > 0) & pair_valid
    ),
    ignores=("student_sizes", "teacher_sizes"),  # only compared with 0
    not_held=NO_GRADIENT,
)
IN_ORDER = Declaration(function=lm.align_in_order, not_held=NO_NUMBERS)
COUNT = Declaration(
    function=lm.count_valid_chunks,
    formula=count,
    sizes=CHUNKS,
    elements=CHUNK_IDS,
    not_held=NO_NUMBERS,
    shards={
        "batch_group": ("batch", {}),
        "sequence_group": (("student_time", "teacher_time"), {}),
    },
)
