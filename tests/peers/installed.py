"""The peers as they are installed: imported before any of them, in a test and in its ranks."""

import importlib.metadata
import os
from pathlib import Path

import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRITON_INTERPRET"] = "1"  # Liger's kernels, in the interpreter: on CPU tensors

try:
    import torchvision
except RuntimeError:
    # PyPI's is built for CUDA: beside a CPU torch its operators are not loaded, and its import ends
    # at those that it names all the same. lightly imports it; its losses here call none of them.
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor d, Tensor s, float iou) -> Tensor")
    import torchvision  # noqa: F401

PEERS = [
    "lightly",
    "liger-kernel",
    "open-clip-torch",
    "pytorch-metric-learning",
    "sae-lens",
    "stable-pretraining",
    "sentence-transformers",
    "torchcfm",
    "torchebm",
    "transformers",
    "trl",
]


def pins() -> dict[str, str]:
    """Return the version of each package in constraints.txt."""
    lines = (Path(__file__).parent / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
