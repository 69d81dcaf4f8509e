"""Sparse autoencoders: decoding few latents, the vanilla objective's memory, and Matryoshka.

`python tests/bench/bench_sae.py`. Baselines are the formulas as written. The last part, which is
`bench_matryoshka.py`, runs for minutes; `--quick` leaves it out.
"""

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import measure
import torch
from torch import Tensor

from termwise.sae import SparseLatents, vanilla_loss
from termwise.sae._latents import decode


def decode_dense(f: Tensor, W_dec: Tensor) -> Tensor:
    return f @ W_dec


def decode_sparse(f: SparseLatents, W_dec: Tensor) -> Tensor:
    return decode(f, W_dec, None)


def decoding() -> None:
    batch, d_model, d_sae, k = 1024, 1024, 131_072, 64
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(d_sae, d_model, generator=generator)
    indices = torch.stack([torch.randperm(d_sae, generator=generator)[:k] for _ in range(batch)])
    values = torch.rand(batch, k, generator=generator)
    dense = torch.zeros(batch, d_sae).scatter_(1, indices, values)
    few = SparseLatents(values, indices)
    torch.testing.assert_close(decode_sparse(few, W_dec), decode_dense(dense, W_dec))
    slow = measure.seconds({"dense": functools.partial(decode_dense, dense, W_dec)}, repeats=1)
    fast = measure.seconds({"sparse": functools.partial(decode_sparse, few, W_dec)}, repeats=5)
    ratio = slow["dense"] / fast["sparse"]
    print(
        f"decode, {k} of {d_sae} latents, d_model {d_model}, batch {batch}: dense "
        f"{slow['dense']:.2f} s, sparse {fast['sparse']:.3f} s: {ratio:.0f}x (asked 20x)"
    )


def vanilla_step(batch: int, d_sae: int) -> Callable[[], object]:
    x = torch.zeros(batch, 64)
    f = torch.rand(batch, d_sae).requires_grad_()
    return lambda: torch.autograd.grad(vanilla_loss(x, f, x, sparsity_coeff=1e-3).loss, f)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batch, d_sae = 8192, 32_768
    if options.peak:
        print(measure.peak_growth(vanilla_step(8, 32), vanilla_step(batch, d_sae)))
        return
    print(f"torch {torch.__version__}, one thread, float32")
    decoding()
    size = batch * d_sae * 4
    extra = measure.peak_in_fresh_processes(__file__, "vanilla", times=1) - size
    print(
        f"vanilla, batch {batch}, d_sae {d_sae}, forward and backward: peak {extra / size:.2f} "
        "[batch, d_sae] beyond the gradient (asked 1)",
        flush=True,
    )
    if not options.quick:
        script = Path(__file__).with_name("bench_matryoshka.py")
        subprocess.run([sys.executable, script], check=True)


if __name__ == "__main__":
    main()
