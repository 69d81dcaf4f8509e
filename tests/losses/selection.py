"""Choices of latents."""

from hypothesis import strategies as st

from losses._latents import of_latents
from termwise.sae import batch_topk, threshold_gate, topk

BATCH_TOPK = of_latents(
    function=batch_topk,
    overrides={"k": 1},
    ignores=("score",),
    # The latents are each rank's own part, whose gradient a sum over parts cannot compare.
    shards={"batch_group": None},
    masked={"mask": {}},
)
TOPK = of_latents(function=topk, overrides={"k": st.integers(1, 2)}, shards={}, ignores=("score",))
GATE = of_latents(
    function=threshold_gate,
    formula=lambda pre, threshold: pre.relu() * (pre > threshold),
    shards={},
    by={"assert_gradients": ("pre",)},
)
