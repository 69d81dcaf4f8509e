"""Projection files: our own format, in safetensors, and NeMo-RL's, which are pickles."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

Entries = tuple[Tensor, Tensor, Tensor]  # student tokens, teacher tokens, weights

_FORMAT = "termwise.lm.VocabProjection 1"
# Larger than any vocabulary or file: a larger size in a file would exhaust the memory.
_TOKENS = 2**24
_ELEMENTS = 2**30


def write(path: str | os.PathLike[str], entries: Entries, vocabularies: tuple[int, int]) -> None:
    """Write a projection: its entries in the order of student tokens, and the two sizes."""
    rows, columns, weights = (part.cpu().contiguous() for part in entries)
    sizes = {
        "student_vocab": str(vocabularies[0]),
        "teacher_vocab": str(vocabularies[1]),
    }
    tensors = {"student": rows, "teacher": columns, "weight": weights}
    if Path(path).is_dir():
        raise ValueError(f"VocabProjection.save needs the path of a file, got a directory: {path}")
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
        if not all(0 <= size <= _TOKENS for size in sizes):
            raise ValueError(f"its vocabularies are {_short(sizes[0])} and {_short(sizes[1])}")
        if [part.dtype for part in parts] != [torch.int64, torch.int64, torch.float32]:
            raise ValueError(f"its dtypes are {[part.dtype for part in parts]}")
        if any(part.shape != parts[0].shape or part.ndim != 1 for part in parts):
            raise ValueError(f"its shapes are {[list(part.shape) for part in parts]}")
    except (safetensors.SafetensorError, ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"VocabProjection.load needs a file that save wrote, got {path}: {error}"
        ) from error
    return (parts[0], parts[1], parts[2]), sizes


def read_nemo(path: str | os.PathLike[str]) -> Entries:
    """Read either of NeMo-RL's formats as entries, without those of index -1 and weight 0.

    No code in the file is run: it may contain tensors, numbers and containers of them.
    """
    name = "VocabProjection.load_nemo"
    if not Path(path).exists():
        raise FileNotFoundError(f"{name} needs a file, and there is none at {path}")
    if Path(path).is_dir():
        raise ValueError(f"{name} needs a file, got a directory: {path}")
    try:
        data: object = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the restricted unpickler may raise any error for other files
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
            and indices.dtype in _INTEGERS
            and weights.is_floating_point()
            and indices.layout == weights.layout == torch.strided
        ):
            raise ValueError(
                f"{name} needs indices, integers, and likelihoods, floats, of one shape [rows, k] "
                f"in {path}"
            )
        if len(indices) > _TOKENS or indices.numel() > _ELEMENTS:
            raise ValueError(
                f"{name} needs at most {_TOKENS} rows, got {list(indices.shape)} in {path}"
            )
        weights = weights.double()
        if bool(((indices == -1) & (weights != 0)).any()):
            raise ValueError(f"{name} needs weight 0 where the index is -1, in {path}")
        rows = torch.arange(len(indices))[:, None].expand_as(indices)
        valid = indices != -1
        entries = rows[valid], indices[valid].long(), weights[valid]
    else:
        entries = entries_of(name, cast("Mapping[Any, Any]", data), f", in {path}")
    for ids in entries[:2]:
        if ids.numel() and int(ids.max()) >= _TOKENS:
            raise ValueError(
                f"{name} needs tokens below {_TOKENS}, got {int(ids.max())}, in {path}"
            )
    return entries


def entries_of(name: str, pairs: Mapping[Any, Any], source: str = "") -> Entries:
    """Return {(student token, teacher token): weight} as entries."""
    weights: list[float] = []
    for pair, weight in pairs.items():
        parts: Sequence[Any] = cast("Any", pair) if isinstance(pair, tuple) else ()
        if not (
            len(parts) == 2
            and all(type(part) is int for part in parts)
            and isinstance(weight, int | float)
        ):
            raise ValueError(
                f"{name} needs (student token, teacher token): weight, got {pair!r}: {weight!r}"
                f"{source}"
            )
        if not all(-(2**63) <= part < 2**63 for part in parts):
            raise ValueError(
                f"{name} needs tokens that fit int64, got ({_short(parts[0])}, "
                f"{_short(parts[1])}){source}"
            )
        try:
            weights.append(float(weight))
        except OverflowError as error:
            raise ValueError(
                f"{name} needs weights that fit float64, got {_short(weight)} for {pair}{source}"
            ) from error
    ids = torch.tensor(list(pairs), dtype=torch.int64).reshape(-1, 2)
    return ids[:, 0], ids[:, 1], torch.tensor(weights, dtype=torch.float64)


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _short(number: float) -> str:
    """Write a number of any size, which Python may refuse to write in digits."""
    if isinstance(number, int) and abs(number) >= 10**30:
        return f"{'-' if number < 0 else ''}2**{abs(number).bit_length() - 1} or more"
    return str(number)


def _safetensors(verb: str) -> Any:
    try:
        import safetensors.torch  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ImportError(
            f'VocabProjection.{verb} needs the package safetensors: pip install "termwise[distill]"'
        ) from error
    return safetensors
