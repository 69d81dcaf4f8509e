"""Losses of a linear head, forward and backward, against logits and the plain loss of them.

`python tests/bench/bench_linear.py`. Where Liger is installed its chunked losses in torch stand
beside; its Triton kernels run on no CPU.
"""

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from termwise.lm import linear_distillation_loss, linear_next_token_loss

SIZES = {
    "small": (2, 32, 64, 1000),
    "middle": (2, 256, 256, 32_000),
    "large": (1, 512, 256, 128_256),
}
ASKED = 0.9, 0.45


@dataclasses.dataclass(frozen=True)
class Batch:
    hidden: Tensor
    weight: Tensor
    teacher: tuple[Tensor, Tensor]
    tokens: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    @property
    def targets(self) -> Tensor:
        return self.tokens[:, 1:].flatten()


def batch_of(size: tuple[int, int, int, int]) -> Batch:
    batch, time, d_model, vocab = size
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        (
            torch.randn(batch, time, d_model, generator=generator),
            torch.randn(vocab, d_model, generator=generator) / d_model**0.5,
        )
        for _ in range(2)
    )
    tokens = torch.randint(vocab, (batch, time), generator=generator)
    return Batch(student[0].requires_grad_(), student[1].requires_grad_(), teacher, tokens)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return F.linear(hidden[:, :-1].flatten(0, 1), weight)


def plain_next_token(batch: Batch) -> Tensor:
    return F.cross_entropy(logits(*batch.inputs), batch.targets)


def next_token(batch: Batch) -> Tensor:
    return linear_next_token_loss(*batch.inputs, batch.tokens).loss


def plain_kl(batch: Batch) -> Tensor:
    q = logits(*batch.inputs).log_softmax(1)
    with torch.no_grad():
        p = logits(*batch.teacher).log_softmax(1)
    return F.kl_div(q, p, log_target=True, reduction="batchmean")


def plain_jensen_shannon(batch: Batch) -> Tensor:
    q = logits(*batch.inputs).log_softmax(1)
    with torch.no_grad():
        p = logits(*batch.teacher).log_softmax(1)
    mixed = torch.logsumexp(torch.stack([p, q]), 0) - torch.tensor(2.0).log()
    parts = [F.kl_div(mixed, x, log_target=True, reduction="batchmean") for x in (p, q)]
    return (parts[0] + parts[1]) / 2


def distillation(batch: Batch, divergence: str) -> Tensor:
    return linear_distillation_loss(*batch.inputs, *batch.teacher, divergence=divergence).loss


Loss = Callable[[Batch], Tensor]
ROWS: dict[str, tuple[Loss, Loss]] = {
    "next_token": (plain_next_token, next_token),
    "forward": (plain_kl, functools.partial(distillation, divergence="forward")),
    "jensen_shannon": (
        plain_jensen_shannon,
        functools.partial(distillation, divergence="jensen_shannon"),
    ),
}


def losses_of(row: str) -> dict[str, Loss]:
    losses = dict(zip(("plain", "termwise"), ROWS[row], strict=True))
    with contextlib.suppress(ImportError):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        liger = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.5, compiled=False)
        if row == "jensen_shannon":
            losses["liger"] = lambda batch: liger(
                batch.hidden[:, :-1].flatten(0, 1),
                batch.weight,
                batch.teacher[0][:, :-1].flatten(0, 1),
                batch.teacher[1],
                batch.targets,
            )
    return losses


def step(loss: Loss, batch: Batch) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(batch), batch.inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", default=list(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), help=f"of {', '.join(SIZES)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        name, row, size = options.peak
        run = functools.partial(step, losses_of(row)[name])
        tiny, batch = batch_of((1, 4, 4, 16)), batch_of(SIZES[size])
        print(measure.peak_growth(lambda: run(tiny), lambda: run(batch)))
        return

    print(f"torch {torch.__version__}, one thread, float32; ratios to logits and the plain loss")
    for row in options.rows:
        losses = losses_of(row)
        for size in options.sizes:
            batch = batch_of(SIZES[size])
            expected = step(losses["plain"], batch)
            for ours, theirs in zip(step(losses["termwise"], batch), expected, strict=True):
                assert (ours - theirs).norm() < 1e-4 * theirs.norm()
            times = measure.seconds(
                {name: functools.partial(step, loss, batch) for name, loss in losses.items()},
                repeats=options.repeats,
            )
            peaks = {
                name: measure.peak_in_fresh_processes(
                    __file__, name, row, size, times=options.processes
                )
                for name in losses
            }
            asked = f" (asked {ASKED[0]}, {ASKED[1]})" if size == "middle" else ""
            for name in list(losses)[1:]:
                print(
                    f"{row} {SIZES[size]} {name}: time {times[name]:.4f} s of "
                    f"{times['plain']:.4f} s: {times[name] / times['plain']:.2f}; "
                    f"peak {peaks[name] / 2**20:.0f} MiB of {peaks['plain'] / 2**20:.0f} MiB: "
                    f"{peaks[name] / max(peaks['plain'], 1):.2f}{asked}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
