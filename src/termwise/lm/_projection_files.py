"""Projections on disk: our own files, in safetensors, and NeMo-RL's, which are pickles."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

Entries = tuple[Tensor, Tensor, Tensor]  # student tokens, teacher tokens, weights

_FORMAT = "termwise.lm.VocabProjection 1"


def write(path: str | os.PathLike[str], entries: Entries, vocabularies: tuple[int, int]) -> None:
    """Write a projection: its entries in the order of student tokens, and the two sizes."""
    rows, columns, weights = (part.cpu().contiguous() for part in entries)
    sizes = {
        "student_vocab": str(vocabularies[0]),
        "teacher_vocab": str(vocabularies[1]),
    }
    tensors = {"student": rows, "teacher": columns, "weight": weights}
    _safetensors("save").torch.save_file(tensors, path, metadata={"format": _FORMAT, **sizes})


def read(path: str | os.PathLike[str]) -> tuple[Entries, tuple[int, int]]:
    """Read what `write` wrote, and compare its shapes and dtypes."""
    safetensors = _safetensors("load")
    if not Path(path).exists():
        raise FileNotFoundError(f"VocabProjection.load needs a file, and there is none at {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about: dict[str, str] = file.metadata() or {}
            if about.get("format") != _FORMAT:
                raise ValueError(f"its format is {about.get('format')!r}, not {_FORMAT!r}")
            parts = [cast("Tensor", file.get_tensor(n)) for n in ("student", "teacher", "weight")]
        sizes = int(about["student_vocab"]), int(about["teacher_vocab"])
        if [part.dtype for part in parts] != [torch.int64, torch.int64, torch.float32]:
            raise ValueError(f"its dtypes are {[part.dtype for part in parts]}")
        if any(part.shape != parts[0].shape or part.ndim != 1 for part in parts):
            raise ValueError(f"its shapes are {[list(part.shape) for part in parts]}")
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"VocabProjection.load needs a file that save wrote, got {path}: {error}"
        ) from error
    return (parts[0], parts[1], parts[2]), sizes


def read_nemo(path: str | os.PathLike[str]) -> Entries:
    """Read either of NeMo-RL's formats, as entries, those of -1 left out where they weigh nothing.

    No code in the file is run: it may hold tensors, numbers and containers of them.
    """
    name = "VocabProjection.load_nemo"
    if not Path(path).exists():
        raise FileNotFoundError(f"{name} needs a file, and there is none at {path}")
    try:
        data: object = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the restricted unpickler fails in any way on what is no pickle
        raise ValueError(
            f"{name} needs a file of tensors and numbers alone, and runs no code from it, got "
            f"{path}: {str(error).partition(chr(10))[0]}"
        ) from error
    if not isinstance(data, dict):
        raise ValueError(f"{name} needs a dict in {path}, got {type(data).__name__}")
    if "indices" in data and "likelihoods" in data:
        arrays = cast("dict[str, object]", data)
        indices, weights = arrays["indices"], arrays["likelihoods"]
        if not (
            isinstance(indices, Tensor)
            and isinstance(weights, Tensor)
            and indices.ndim == 2
            and indices.shape == weights.shape
            and not indices.is_floating_point()
            and weights.is_floating_point()
        ):
            raise ValueError(
                f"{name} needs indices and likelihoods of one shape [rows, k] in {path}"
            )
        if bool(((indices == -1) & (weights != 0)).any()):
            raise ValueError(f"{name} needs weight 0 where the index is -1, in {path}")
        rows = torch.arange(len(indices))[:, None].expand_as(indices)
        kept = indices != -1
        return rows[kept], indices[kept].long(), weights[kept].double()
    return entries_of(name, cast("Mapping[Any, Any]", data))


def entries_of(name: str, pairs: Mapping[Any, Any]) -> Entries:
    """Give {(student token, teacher token): weight} as entries."""
    for pair, weight in pairs.items():
        parts: Sequence[Any] = cast("Any", pair) if isinstance(pair, tuple) else ()
        if not (
            len(parts) == 2
            and all(type(part) is int for part in parts)
            and isinstance(weight, int | float)
        ):
            raise ValueError(
                f"{name} needs (student token, teacher token): weight, got {pair!r}: {weight!r}"
            )
    ids = torch.tensor(list(pairs), dtype=torch.int64).reshape(-1, 2)
    return ids[:, 0], ids[:, 1], torch.tensor(list(pairs.values()), dtype=torch.float64)


def _safetensors(verb: str) -> Any:
    try:
        import safetensors.torch  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ImportError(
            f'VocabProjection.{verb} needs the package safetensors: pip install "termwise[distill]"'
        ) from error
    return safetensors
