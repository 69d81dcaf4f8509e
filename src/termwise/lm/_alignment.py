"""Alignment of two tokenizations of one text: which tokens of each side make up which chunk."""

import dataclasses
from collections.abc import Mapping
from typing import Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """Chunks of a batch: spans of text that both tokenizers cut at the same two places.

    A chunk is a pair: the student's tokens of a span of text, and the teacher's. The ids name the
    chunk of each *token*. Logit t predicts token t + 1, so a loss on logits shifts them by one
    itself; a chunk that holds only token 0 becomes empty by that and does not count.

    Construction compares shapes, dtypes and devices, and never waits for the device; what the
    tensors hold is looked at by [`check`][termwise.lm.Alignment.check] alone.
    """

    student_chunk_id: Int[Tensor, "batch student_time"]
    """The chunk of each token of the student, int64, -1 for none."""
    teacher_chunk_id: Int[Tensor, "batch teacher_time"]
    """The chunk of each token of the teacher, int64, -1 for none."""
    pair_valid: Bool[Tensor, "batch chunks"]
    """Whether the chunk is one. Samples with fewer are padded with False."""
    pair_exact: Bool[Tensor, "batch chunks"]
    """Whether the texts of the two sides are equal, which a fuzzy aligner cannot promise."""

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            value: object = getattr(self, name)
            if not isinstance(value, Tensor) or value.ndim != 2 or value.dtype != dtype:
                raise ValueError(f"Alignment needs {name} of 2 axes in {dtype}, got {_show(value)}")
        shapes = {name: list(getattr(self, name).shape) for name in _DTYPES}
        if (
            self.pair_valid.shape != self.pair_exact.shape
            or len({s[0] for s in shapes.values()}) > 1
        ):
            raise ValueError(
                "Alignment needs one batch size, and pair_valid and pair_exact of one shape, got "
                + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            )
        if len({getattr(self, name).device for name in _DTYPES}) > 1:
            raise ValueError("Alignment needs its tensors on one device")

    @property
    def max_chunks(self) -> int:
        """Number of chunks that a sample has room for."""
        return self.pair_valid.shape[1]

    def to(self, device: torch.device | str) -> Self:
        """Give the same alignment on a device."""
        return dataclasses.replace(
            self, **{name: getattr(self, name).to(device) for name in _DTYPES}
        )

    def check(self) -> Self:
        """Refuse ids below -1 or from `max_chunks` up; give the alignment itself back.

        This waits for the device: call it where batches are made, not in the training step.

        Raises:
            ValueError: an id is out of range.
        """
        for name in ("student_chunk_id", "teacher_chunk_id"):
            ids: Tensor = getattr(self, name)
            if ids.numel() and (int(ids.min()) < -1 or int(ids.max()) >= self.max_chunks):
                raise ValueError(
                    f"Alignment needs {name} from -1 to {self.max_chunks - 1}, "
                    f"got {int(ids.min())} to {int(ids.max())}"
                )
        return self

    @classmethod
    def from_flat(cls, mapping: Mapping[str, object], prefix: str = "alignment_") -> Self:
        """Take an alignment out of a flat batch, such as NeMo-RL's collator makes.

        Args:
            mapping: a batch that holds, each under `prefix` and its name, the tensors
                `student_chunk_id`, `teacher_chunk_id`, `pair_valid` and `pair_is_correct`. Other
                keys are left alone.
            prefix: what the keys begin with.

        Raises:
            ValueError: a key is missing, or a tensor does not fit.
        """
        keys = {
            "student_chunk_id": f"{prefix}student_chunk_id",
            "teacher_chunk_id": f"{prefix}teacher_chunk_id",
            "pair_valid": f"{prefix}pair_valid",
            "pair_exact": f"{prefix}pair_is_correct",
        }
        missing = [key for key in keys.values() if key not in mapping]
        if missing:
            raise ValueError(f"Alignment.from_flat needs the keys {', '.join(missing)}")
        found: dict[str, object] = {name: mapping[key] for name, key in keys.items()}
        return cls(**found)  # pyright: ignore[reportArgumentType]  (what they are is checked there)


_DTYPES = {
    "student_chunk_id": torch.int64,
    "teacher_chunk_id": torch.int64,
    "pair_valid": torch.bool,
    "pair_exact": torch.bool,
}

torch.export.register_dataclass(Alignment, serialized_type_name="termwise.lm.Alignment")


def _show(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} in {value.dtype}"
    return type(value).__name__
