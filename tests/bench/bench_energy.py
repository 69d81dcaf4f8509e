"""Energy losses: the exact trace, sliced against tiling the batch, and antithetic noise.

`python tests/bench/bench_energy.py`. Baselines are the formulas as written. The first part, which
is `bench_laplacian.py`, runs for minutes; `--quick` leaves it out.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import measure
import torch
from torch import Tensor, nn

from termwise.energy import denoising_score_matching_loss, sliced_score_matching_loss

BATCH, DIMENSIONS, PROJECTIONS = 128, 784, 16


def tiled(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """Take the batch through the model once for each projection."""
    rows = x.repeat(len(v), 1).requires_grad_()
    along = v.flatten(0, 1)
    (score,) = torch.autograd.grad(model(rows).sum(), rows, create_graph=True)
    (product,) = torch.autograd.grad((score * along).sum(), rows, create_graph=True)
    return 0.5 * score.square().sum(1).mean() - (product * along).sum(1).mean()


def looped(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """Share the score, and differentiate it once for each projection."""
    x = x.detach().requires_grad_()
    (score,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    loss = 0.5 * score.square().sum(1).mean()
    for along in v:
        (product,) = torch.autograd.grad((score * along).sum(), x, create_graph=True)
        loss = loss - (product * along).sum(1).mean() / len(v)
    return loss


def ours(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    return sliced_score_matching_loss(model, x, projections=v).loss


def backward(model: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    return sliced_score_matching_loss(model, x, projections=v, differentiation="autograd").loss


WAYS = {"tiled": tiled, "looped": looped, "backward": backward, "ours": ours}


def step(name: str, batch: int, projections: int) -> Callable[[], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layers = [nn.Linear(DIMENSIONS, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU()]
    model = nn.Sequential(*layers, nn.Linear(256, 1), nn.Flatten(0))
    x = torch.randn(batch, DIMENSIONS, generator=generator)
    v = torch.empty(projections, batch, DIMENSIONS).bernoulli_(0.5, generator=generator) * 2 - 1

    def run() -> tuple[Tensor, ...]:
        loss = WAYS[name](model, x, v)
        return loss.detach(), *torch.autograd.grad(
            loss, list(model.parameters()), allow_unused=True, materialize_grads=True
        )

    return run


def sliced(repeats: int) -> None:
    print(
        f"sliced, {PROJECTIONS} projections, MLP {DIMENSIONS}-256-256-1, SiLU, batch {BATCH}, "
        "forward and backward to parameters"
    )
    runs = {name: step(name, BATCH, PROJECTIONS) for name in WAYS}
    for name in WAYS:
        torch.testing.assert_close(
            runs[name](), runs["tiled"](), rtol=1e-3, atol=1e-6, msg=f"{name} is not the formula"
        )
    seconds = measure.seconds(runs, repeats)
    peaks = {name: measure.peak_in_fresh_processes(__file__, name) for name in WAYS}
    for name in WAYS:
        asked = " (asked 2x, 2.5x)" if name == "tiled" else ""
        print(
            f"{name:9} {1e3 * seconds[name]:7.1f} ms {peaks[name] / 2**20:7.1f} MiB: ours "
            f"{seconds[name] / seconds['ours']:5.2f}x faster, {peaks[name] / peaks['ours']:5.2f}x "
            f"smaller{asked}",
            flush=True,
        )


def spread(sigma: float, *, antithetic: bool) -> float:
    """Return the standard deviation of a gradient made of 2 gradients of the energy a row."""
    d, batch = 16, 64
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    precision = (root @ root.T + 0.5 * torch.eye(d, dtype=torch.float64)).requires_grad_()
    mean = torch.zeros(d, dtype=torch.float64, requires_grad=True)
    x = torch.randn(batch, d, generator=generator, dtype=torch.float64)

    def energy(x: Tensor) -> Tensor:
        centred = x - mean
        return 0.5 * (centred @ precision * centred).sum(1)

    gradients: list[Tensor] = []
    for _ in range(200):
        loss = denoising_score_matching_loss(
            energy,
            x if antithetic else x.repeat(2, 1),
            sigma=sigma,
            antithetic=antithetic,
            generator=generator,
        ).loss
        parts = torch.autograd.grad(loss, [mean, precision])
        gradients.append(torch.cat([part.flatten() for part in parts]))
    return float(torch.stack(gradients).var(0).sum().sqrt())


def antithetic() -> None:
    print("denoising, Gaussian energy, 16 dimensions: standard deviation of the gradient")
    for sigma in (1.0, 0.1, 0.01, 0.001):
        plain, pairs = (spread(sigma, antithetic=choice) for choice in (False, True))
        asked = " (asked 20x)" if sigma == 0.01 else ""
        print(
            f"sigma {sigma:<5}: plain {plain:9.4f}, antithetic {pairs:7.4f}: "
            f"{plain / pairs:7.1f}x smaller{asked}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--peak", metavar="WAY", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print(measure.peak_growth(step(options.peak, 2, 1), step(options.peak, BATCH, PROJECTIONS)))
        return
    if not options.quick:
        script = Path(__file__).with_name("bench_laplacian.py")
        subprocess.run([sys.executable, script], check=True)
    print(f"torch {torch.__version__}, one thread, float32")
    sliced(options.repeats)
    antithetic()


if __name__ == "__main__":
    main()
