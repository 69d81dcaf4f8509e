"""Targeted variance at 50k x 1024, forward and backward, against its formula as written.

`python tests/bench/bench_targeted_variance.py`
"""

import argparse
import functools

import measure
import torch
from torch import Tensor

from termwise.lm import targeted_variance_loss

VOCAB, DIM = 50_000, 1024
ASKED = 0.55  # of the time and of the extra memory


class AsWritten(torch.autograd.Function):
    """The formula and its hand-written gradient, line by line."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        mean = weight.mean(dim=1, keepdim=True)
        variance = ((weight - mean) ** 2).mean(dim=1).mean()
        ctx.save_for_backward(weight, mean, variance)
        return 0.1 * (variance - 1.0) ** 2

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        weight, mean, variance = ctx.saved_tensors
        scale = gradient * 0.2 * (variance - 1.0) / weight.shape[0] * (2.0 / weight.shape[1])
        return scale * (weight - mean)


LOSSES = {
    "as written": AsWritten.apply,
    "termwise": lambda weight: targeted_variance_loss(weight).loss,
}


def step(loss, weight: Tensor) -> Tensor:
    return torch.autograd.grad(loss(weight), weight)[0]


def embedding(vocab: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (1.1 * torch.randn(vocab, DIM, generator=generator)).requires_grad_()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    weight = embedding(VOCAB)
    if options.peak:
        loss = LOSSES[options.peak]
        print(measure.peak_growth(lambda: step(loss, embedding(8)), lambda: step(loss, weight)))
        return

    torch.testing.assert_close(*[step(loss, weight) for loss in LOSSES.values()])
    slow, fast = measure.seconds(
        {name: functools.partial(step, loss, weight) for name, loss in LOSSES.items()}, repeats=7
    ).values()
    large, small = (measure.peak_in_fresh_processes(__file__, name) for name in LOSSES)
    print(f"torch {torch.__version__}, one thread, {VOCAB} x {DIM}, float32")
    print(f"time: {fast:.3f} s of {slow:.3f} s: {fast / slow:.2f} (asked {ASKED})")
    print(
        f"extra memory: {small / 2**20:.0f} MiB of {large / 2**20:.0f} MiB: "
        f"{small / large:.2f} (asked {ASKED}); the gradient alone is {VOCAB * DIM * 4 / 2**20:.0f}"
    )


if __name__ == "__main__":
    main()
