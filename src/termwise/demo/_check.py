"""`python -m termwise check`: test the library on this machine, and time one loss per family.

Run it first on a new machine, and paste its output into bug reports. Requires no extra.
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
_SECONDS = 0.5  # to time a loss


@dataclasses.dataclass(frozen=True)
class _Case:
    """A loss and the same formula in plain PyTorch, with inputs for both."""

    name: str
    inputs: list[Tensor]
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]


def check(device: torch.device) -> int:
    """Print versions, what works and the time of each loss; return 1 if a loss is wrong."""
    print(f"termwise     {__version__}")
    print(f"python       {platform.python_version()}, {platform.platform()}")
    print(f"torch        {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    print(f"packages     {', '.join(f'{name} {_version(name)}' for name in _PACKAGES)}")
    print(f"device       {_device_name(device)}, {torch.get_num_threads()} CPU threads")
    for name in ("JAXTYPING_DISABLE", "OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE"):
        if name in os.environ:
            print(f"environment  {name}={os.environ[name]}")
    print(f"distributed  {_test_group(device)}")
    print(f"compile      {_test_compile(device)}")
    print("\nTime of forward and backward pass, and of the same formula in plain PyTorch:\n")
    print(f"{'loss':42} {'ms':>8} {'plain ms':>9} {'ratio':>6}  value and gradient")
    equal = [_test_loss(case, device) for case in _cases(device)]
    return int(not all(equal))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} {torch.cuda.get_device_name(device)}"
    return f"{device} {platform.processor() or platform.machine()}"


def _test_group(device: torch.device) -> str:
    """Call a loss with a process group of this process alone, and describe what happened."""
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    if dist.is_initialized() or "RANK" in os.environ:
        return "not tested under torchrun: run check without it"
    with tempfile.TemporaryDirectory() as folder:
        store = (Path(folder) / "store").as_uri()
        try:
            dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
            z = torch.randn(8, 4, device=device, requires_grad=True)
            loss = joint_embedding.vicreg_loss(z, z + 1, batch_group=dist.group.WORLD).loss
            loss.backward()
        except Exception as error:  # any error is reported
            return f"{backend} does not work: {_first_line(error)}"
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    return f"{backend} works"


def _test_compile(device: torch.device) -> str:
    """Compile a loss, compare it with eager mode, and describe what happened."""
    start = time.perf_counter()
    x, f = torch.randn(2, 8, 8, device=device)
    f.requires_grad_()
    try:
        compiled = torch.compile(sae.vanilla_loss, fullgraph=True)
        ours = compiled(x, f, x + f, sparsity_coeff=0.1).loss
        ours.backward()
        torch.testing.assert_close(ours, sae.vanilla_loss(x, f, x + f, sparsity_coeff=0.1).loss)
    except Exception as error:  # any error is reported, such as a missing C++ compiler
        return f"does not work: {_first_line(error)}"
    return f"works, {time.perf_counter() - start:.0f} s to compile and run a first loss"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _test_loss(case: _Case, device: torch.device) -> bool:
    """Print the row of a loss, and return whether its value and gradient equal plain PyTorch's."""
    try:
        results = [_run(loss, case.inputs) for loss in (case.ours, case.plain)]
    except Exception as error:  # any error is reported
        print(f"{case.name:42} {_first_line(error)}")
        return False
    equal = True
    for ours, plain in zip(*results, strict=True):
        difference = (ours - plain).norm() / plain.norm()
        equal = equal and bool(difference < 1e-4)  # False for a NaN
    times: list[list[float]] = [[], []]
    end = time.perf_counter() + _SECONDS
    while len(times[0]) < 3 or time.perf_counter() < end:
        for loss, seconds in zip((case.ours, case.plain), times, strict=True):
            start = time.perf_counter()
            _run(loss, case.inputs)
            _synchronize(device)
            seconds.append(time.perf_counter() - start)
    # The minimum, because other programs may slow down some of the calls.
    ours_ms, plain_ms = (1e3 * min(seconds) for seconds in times)
    verdict = "agree" if equal else "DIFFER"
    print(f"{case.name:42} {ours_ms:8.2f} {plain_ms:9.2f} {ours_ms / plain_ms:6.2f}  {verdict}")
    return equal


def _run(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    value = loss(*inputs)
    leaves = [x for x in inputs if x.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _cases(device: torch.device) -> list[_Case]:
    """Return a loss of each family, with inputs that take milliseconds on a CPU."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int, requires_grad: bool = True) -> Tensor:
        drawn = torch.randn(sizes, generator=generator).to(device)
        return drawn.requires_grad_(requires_grad)

    tokens = torch.randint(8000, (2, 64), generator=generator).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 1)).to(device)

    def row_energies(x: Tensor) -> Tensor:
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
        noisy = (x + 0.1 * noise).requires_grad_()
        (gradient,) = torch.autograd.grad(row_energies(noisy).sum(), noisy, create_graph=True)
        return (gradient - noise / 0.1).square().sum(1).mean() / 2

    def our_denoising(x: Tensor, noise: Tensor) -> Tensor:
        return energy.denoising_score_matching_loss(row_energies, x, sigma=0.1, noise=noise).loss

    return [
        _Case(
            "joint_embedding.vicreg_loss 256 x 512",
            [normal(256, 512), normal(256, 512)],
            our_vicreg,
            plain_vicreg,
        ),
        _Case(
            "sae.vanilla_loss 256 x 4096",
            [normal(256, 512, requires_grad=False), normal(256, 4096), normal(256, 512)],
            our_vanilla,
            plain_vanilla,
        ),
        _Case(
            "energy.denoising_score_matching_loss 256",
            [normal(256, 64), normal(256, 64, requires_grad=False)],
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
