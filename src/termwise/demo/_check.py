"""`python -m termwise check`: whether the library works on this machine, and how fast.

What to run first on a new machine, and to paste into a report of a bug. Needs no extra.
"""

import dataclasses
import importlib.metadata
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import __version__, energy, joint_embedding, lm, sae

_PACKAGES = ("jaxtyping", "beartype", "einops", "hypothesis", "numpy")
_SECONDS = 0.5  # for the timing of a loss


@dataclasses.dataclass(frozen=True)
class _Case:
    """A loss beside the same formula in plain PyTorch; inputs that require a gradient get one."""

    name: str
    inputs: list[Tensor]
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]


def check(device: torch.device) -> int:
    """Print what is there and what works, and return 1 if a loss does not."""
    print(f"termwise   {__version__}")
    print(f"python     {platform.python_version()}, {platform.platform()}")
    print(f"torch      {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    print(f"packages   {', '.join(f'{name} {_version(name)}' for name in _PACKAGES)}")
    print(f"device     {_device_name(device)}, {torch.get_num_threads()} threads of the CPU")
    for name in ("JAXTYPING_DISABLE", "OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE"):
        if name in os.environ:
            print(f"setting    {name}={os.environ[name]}")
    print(f"groups     {_groups(device)}")
    print(f"compile    {_compiled(device)}")
    print(f"\n{'loss, forward and backward':42} {'ms':>8} {'plain ms':>9} {'ratio':>6}  gradient")
    agree = [_measured(case, device) for case in _cases(device)]
    return int(not all(agree))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"{device} {platform.processor() or platform.machine()}"


def _groups(device: torch.device) -> str:
    """Call a loss over a group of this process alone, unless it is one of several already."""
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    if dist.is_initialized() or "RANK" in os.environ:
        return "not tried under torchrun: run check alone"
    with tempfile.TemporaryDirectory() as folder:
        there = (Path(folder) / "store").as_uri()
        try:
            dist.init_process_group(backend, init_method=there, rank=0, world_size=1)
            z = torch.randn(8, 4, device=device, requires_grad=True)
            loss = joint_embedding.vicreg_loss(z, z + 1, batch_group=dist.group.WORLD).loss
            loss.backward()
        except Exception as error:  # of any class: it is what is to be reported
            return f"{backend} does not work: {_first_line(error)}"
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return f"{backend} works"


def _compiled(device: torch.device) -> str:
    start = time.perf_counter()
    x, f = torch.randn(2, 8, 8, device=device)
    f.requires_grad_()
    try:
        compiled = torch.compile(sae.vanilla_loss, fullgraph=True)
        ours = compiled(x, f, x + f, sparsity_coeff=0.1).loss
        ours.backward()
        torch.testing.assert_close(ours, sae.vanilla_loss(x, f, x + f, sparsity_coeff=0.1).loss)
    except Exception as error:  # of any class, such as a missing C++ compiler
        return f"does not work: {_first_line(error)}"
    return f"works, {time.perf_counter() - start:.0f} s for a first loss"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _measured(case: _Case, device: torch.device) -> bool:
    """Print a line of the table; whether values and gradients are finite and agree."""
    try:
        results = [_run(loss, case.inputs) for loss in (case.ours, case.plain)]
    except Exception as error:  # of any class: it is what is to be reported
        print(f"{case.name:42} {_first_line(error)}")
        return False
    agree = True
    for ours, theirs in zip(*results, strict=True):
        off = (ours - theirs).norm() / theirs.norm()
        agree = agree and bool(off < 1e-4)  # and so not for a NaN
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + _SECONDS
    while len(times[0]) < 3 or time.perf_counter() < end:
        for loss, of in zip((case.ours, case.plain), times, strict=True):
            start = time.perf_counter()
            _run(loss, case.inputs)
            _wait(device)
            of.append(time.perf_counter() - start)
    ours_ms, plain_ms = (1e3 * min(of) for of in times)  # of a machine with other work
    said = "agrees" if agree else "DIFFERS"
    print(f"{case.name:42} {ours_ms:8.2f} {plain_ms:9.2f} {ours_ms / plain_ms:6.2f}  {said}")
    return agree


def _run(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    value = loss(*inputs)
    trained = [x for x in inputs if x.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, trained)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _cases(device: torch.device) -> list[_Case]:
    """Return a loss of each family, at sizes that a CPU takes milliseconds for."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int, trained: bool = True) -> Tensor:
        drawn = torch.randn(sizes, generator=generator).to(device)
        return drawn.requires_grad_(trained)

    tokens = torch.randint(8000, (2, 64), generator=generator).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 1)).to(device)

    def of_rows(x: Tensor) -> Tensor:
        return cast("Tensor", model(x)).squeeze(1)

    def our_vicreg(z1: Tensor, z2: Tensor) -> Tensor:
        return joint_embedding.vicreg_loss(z1, z2).loss

    def plain_vicreg(z1: Tensor, z2: Tensor) -> Tensor:
        loss = 25 * F.mse_loss(z1, z2)
        for z in (z1, z2):
            centred = z - z.mean(0)
            covariance = centred.T @ centred / (len(z) - 1)
            variance = covariance.diagonal()
            off = covariance.square().sum() - variance.square().sum()
            loss = loss + 25 * F.relu(1 - (variance + 1e-4).sqrt()).mean() + off / z.shape[1]
        return loss

    def our_vanilla(x: Tensor, f: Tensor, x_hat: Tensor) -> Tensor:
        return sae.vanilla_loss(x, f, x_hat, sparsity_coeff=0.1).loss

    def plain_vanilla(x: Tensor, f: Tensor, x_hat: Tensor) -> Tensor:
        return F.mse_loss(x_hat, x) + 0.1 * f.abs().sum(1).mean()

    def our_next_token(logits: Tensor, tokens: Tensor) -> Tensor:
        return lm.next_token_loss(logits, tokens).loss

    def plain_next_token(logits: Tensor, tokens: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def plain_denoising(x: Tensor, noise: Tensor) -> Tensor:
        moved = (x + 0.1 * noise).requires_grad_()
        (slope,) = torch.autograd.grad(of_rows(moved).sum(), moved, create_graph=True)
        return (slope - noise / 0.1).square().sum(1).mean() / 2

    def our_denoising(x: Tensor, noise: Tensor) -> Tensor:
        return energy.denoising_score_matching_loss(of_rows, x, sigma=0.1, noise=noise).loss

    return [
        _Case(
            "joint_embedding.vicreg_loss 256 x 512",
            [normal(256, 512), normal(256, 512)],
            our_vicreg,
            plain_vicreg,
        ),
        _Case(
            "sae.vanilla_loss 256 x 4096",
            [normal(256, 512, trained=False), normal(256, 4096), normal(256, 512)],
            our_vanilla,
            plain_vanilla,
        ),
        _Case(
            "energy.denoising_score_matching_loss 256",
            [normal(256, 64), normal(256, 64, trained=False)],
            our_denoising,
            plain_denoising,
        ),
        _Case(
            "lm.next_token_loss 2 x 64 x 8000",
            [normal(2, 64, 8000), tokens],
            our_next_token,
            plain_next_token,
        ),
    ]
