"""What declarations of losses over tokens and chunks share."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from losses import Declaration
from termwise import lm

PROJECTION = lm.VocabProjection.from_pairs(
    {(0, 0): 1.0, (1, 1): 1.0, (2, 1): 0.5, (2, 2): 0.5, (3, 3): 1.0, (4, 4): 1.0},
    student_vocab=5,
    teacher_vocab=5,
)
CHUNKS = {
    "chunks": 2,
    "student_time": st.integers(2, 3),
    "teacher_time": st.integers(2, 3),
    "student_vocab": 5,
    "teacher_vocab": 5,
    "batch": st.integers(1, 3),
}
CHUNK_IDS = {
    "alignment.student_chunk_id": st.integers(-1, 1),
    "alignment.teacher_chunk_id": st.integers(-1, 1),
}
NORMALIZER = {"normalizer": st.sampled_from((None, 2.0))}
LOGITS_GROUPS = {
    "batch_group": ("batch", {}),
    "vocab_group": ("vocab", {"grad_reduction": "sum"}),
    "sequence_group": ("time", {"grad_reduction": "sum"}),
}
TEXT = {"time": st.integers(2, 3), "vocab": st.integers(2, 4)}
LOGITS = ("rows time columns", "rows time columns")
# Few logits are taken whole, more in blocks.
SMALL_AND_LARGE = ({}, {"termwise._numbers.FEW": 0, "termwise.lm._rows.FUSED": 0})
ELSEWHERE = {"termwise.lm._chunk_blocks.on_host": lambda x: False}
# On the CPU blocks of chunks; on other devices of all samples, and of one.
BLOCKS = (
    {},
    {"termwise.lm._chunk_blocks.BLOCK": 1},
    {"termwise.lm._chunk_blocks.BLOCK": 20},
    ELSEWHERE,
    {**ELSEWHERE, "termwise._numbers.IN_CACHE": 1},
)


def some_tokens(axis: str) -> Callable[[dict[str, Any]], st.SearchStrategy[int]]:
    return lambda sizes: st.integers(-1, sizes[axis] - 1)


def predicting(mask: Tensor) -> Tensor:
    """Return which positions predict a token that counts."""
    return F.pad(mask[:, 1:], (0, 1))


def masks(*arguments: str) -> dict[str, dict[str, Any]]:
    """Declare the masks of tokens and of samples, for what has a row for each position."""
    of_tokens = {"arguments": dict.fromkeys(arguments, predicting), "nothing": 0.0}
    return {"mask": of_tokens, "sample_mask": {"nothing": 0.0}}


def zeros(sizes: dict[str, Any]) -> Tensor:
    return torch.zeros(sizes["batch"], sizes["time"]).long()


def squared_temperature(call: Mapping[str, Any]) -> float:
    return call["temperature"] ** 2


def all_aligned(sizes: dict[str, Any]) -> lm.Alignment:
    """One chunk to a sample, of all its tokens."""
    batch = sizes["batch"]
    ids = (torch.zeros(batch, sizes[axis]).long() for axis in ("student_time", "teacher_time"))
    valid = torch.ones(batch, 1, dtype=torch.bool)
    return lm.Alignment(*ids, valid, valid)


# --- for variants ---------------------------------------------------------------------------

NARROW = lm.VocabProjection.from_pairs(
    {(0, 0): 1.0, (1, 1): 1.0, (2, 1): 0.5, (2, 2): 0.5}, student_vocab=3, teacher_vocab=3
)


def tokens(rows: int) -> dict[str, Any]:
    return {"tokens": torch.arange(rows * 4).reshape(rows, 4) % 4 - 1}


def marked(rows: int) -> dict[str, Any]:
    return {"mask": torch.arange(rows * 4).reshape(rows, 4) % 3 != 1}


def aligned(rows: int) -> dict[str, Any]:
    ids = torch.tensor([0, 0, 1, 2]).expand(rows, 4).clone()
    valid = torch.arange(rows * 3).reshape(rows, 3) % 5 != 1
    return {"alignment": lm.Alignment(ids, ids.clamp(max=1), valid, valid)}


def of_chunks(
    *,
    overrides: Mapping[str, Any] | None = None,
    vocab: Any = None,
    by: tuple[str, ...] = ("student_logits",),
    **others: Any,
) -> Declaration:
    known = {
        "projection": PROJECTION,
        "partition": lm.vocab_partition(PROJECTION, rule="strict"),
        "teacher_columns": None,
        "student_vocab": None,
        "columns_top_k": None,
        **NORMALIZER,
    }
    return Declaration(
        sizes=CHUNKS,
        elements=CHUNK_IDS,
        overrides={**known, **(overrides or {})},
        shards={
            "batch_group": ("batch", {}),
            "vocab_group": vocab,
            "sequence_group": (("student_time", "teacher_time"), {"grad_reduction": "sum"}),
        },
        more={
            "assert_finite": {
                "alignment": all_aligned,
                "temperature": st.sampled_from((1.0, 2.0)),
            }
        },
        by={"assert_gradients": by},  # the teacher has no gradient
        ignores=("projection.student_weights",),  # of columns that are left out
        # The reverse divergence from a probability that is 0 in float32 is infinite, as it is of
        # larger logits, or at a lower temperature.
        large=5,
        paths=BLOCKS,
        second=("refused",),
        masked=masks(by[0]),
        **others,
    )


# --- parts of formulas ----------------------------------------------------------------------


def of_samples(mask, sample_mask, logits):
    """Return the mask of tokens in samples that count."""
    mask = torch.ones(logits.shape[:2], dtype=torch.bool) if mask is None else mask
    return mask if sample_mask is None else mask & sample_mask[:, None]


def counted_tokens(tokens: Tensor, mask: Tensor | None):
    """Yield the sample and the position of each logit whose token counts, and the token."""
    for b in range(tokens.shape[0]):
        for t in range(tokens.shape[1] - 1):
            if tokens[b, t + 1] >= 0 and (mask is None or mask[b, t + 1]):
                yield b, t, int(tokens[b, t + 1])


def counted_chunks(
    alignment: lm.Alignment,
    mask: Tensor | None = None,
    sample_mask: Tensor | None = None,
    exact_only: bool = False,
):
    """Yield the sample of each chunk that counts, and the positions that predict its tokens.

    A chunk with a token that does not count is left out.
    """
    batch, chunks = alignment.pair_valid.shape
    for b in range(batch):
        for c in range(chunks):
            ids = alignment.student_chunk_id[b], alignment.teacher_chunk_id[b]
            sides = [[t for t in range(len(i) - 1) if i[t + 1] == c] for i in ids]
            counts = all(sides) and alignment.pair_valid[b, c]
            counts = counts and (sample_mask is None or sample_mask[b])
            counts = counts and (mask is None or mask[b][ids[0] == c].all())
            if counts and (not exact_only or alignment.pair_exact[b, c]):
                yield b, *sides


def share(values: list[float], student: Tensor) -> Tensor:
    return student.new_tensor(sum(values) / max(len(values), 1))


def divided(total: Tensor, normalizer: Any, count: int) -> Tensor:
    return total / (normalizer if normalizer is not None else max(count, 1))


def nothing(student: Tensor) -> Tensor:
    """0, in the graph."""
    return 0 * student.sum()


def relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.log()), 0).sum()
