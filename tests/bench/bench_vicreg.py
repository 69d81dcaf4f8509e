"""VICReg, forward and backward, against its formula as written.

Run it as `python tests/bench/bench_vicreg.py`. The baseline forms both covariance matrices and
flattens their off-diagonals. The threshold beside each ratio is what we hold ourselves to.
`--quick` leaves out the sizes that take a minute.
"""

import argparse
import functools

import measure
import torch
from torch import Tensor

from termwise.joint_embedding import vicreg_loss

# batch, dim: at least this much faster, peak memory at least this much smaller
SIZES = {
    (256, 8192): (40, 20),
    (2048, 8192): (5, 4),
    (2048, 2048): (1.7, 2),
    (4096, 512): (1.6, 1.8),
}


def as_written(z1: Tensor, z2: Tensor) -> Tensor:
    """Compute VICReg with the weights 25, 25, 1, line by line."""
    batch, dim = z1.shape
    similarity = torch.nn.functional.mse_loss(z1, z2)
    variance = covariance = torch.zeros(())
    for z in (z1, z2):
        deviation = torch.sqrt(z.var(dim=0) + 1e-4)
        variance = variance + torch.relu(1 - deviation).mean()
    matrices = [(z - z.mean(dim=0)).T @ (z - z.mean(dim=0)) / (batch - 1) for z in (z1, z2)]
    for matrix in matrices:
        off_diagonal = matrix.flatten()[:-1].view(dim - 1, dim + 1)[:, 1:].flatten()
        covariance = covariance + off_diagonal.pow(2).sum() / dim
    return 25 * similarity + 25 * variance + covariance


def ours(z1: Tensor, z2: Tensor) -> Tensor:
    return vicreg_loss(z1, z2).loss


LOSSES = {"as written": as_written, "termwise": ours}


def inputs(batch: int, dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, dim, generator=generator).requires_grad_() for _ in range(2)]


def step(loss, views: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*views), views)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peak", nargs=3, metavar=("LOSS", "BATCH", "DIM"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        loss, views = LOSSES[options.peak[0]], inputs(*map(int, options.peak[1:]))
        print(measure.peak_growth(lambda: step(loss, inputs(8, 32)), lambda: step(loss, views)))
        return

    print(f"torch {torch.__version__}, one thread, forward and backward, float32")
    print("batch x dim | as written s | termwise s | faster (asked) | MiB | MiB | smaller (asked)")
    for (batch, dim), (faster, smaller) in SIZES.items():
        if options.quick and batch * dim > 3_000_000:
            continue
        views = inputs(batch, dim)
        torch.testing.assert_close(step(ours, views), step(as_written, views), rtol=1e-3, atol=1e-6)
        slow, fast = measure.seconds(
            {name: functools.partial(step, loss, views) for name, loss in LOSSES.items()},
            repeats=3 if batch * dim > 2**20 else 7,
        ).values()
        times = 3 if batch * dim > 2**22 else 9
        large, small = (
            measure.peak_in_fresh_processes(__file__, name, batch, dim, times=times)
            for name in LOSSES
        )
        print(
            f"{batch} x {dim} | {slow:.3f} | {fast:.3f} | {slow / fast:.2f} ({faster}) | "
            f"{large / 2**20:.0f} | {small / 2**20:.0f} | {large / small:.1f} ({smaller})",
            flush=True,
        )


if __name__ == "__main__":
    main()
