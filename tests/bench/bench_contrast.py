"""Contrastive losses, forward and backward, against the formulas as peers write them.

Run it as `python tests/bench/bench_contrast.py`. First the errors of value and gradients in
float32, relative to float64, near convergence and at other scales, beside those that the float32
product of the embeddings causes alone; then time and peak memory. CLIP is that of open_clip, two
products and two cross-entropies; NT-Xent that of lightly, four products. The thresholds beside the
ratios are what we hold ourselves to. `--quick` leaves out the size that takes a minute.
"""

import argparse
import functools

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from termwise.joint_embedding import info_nce_loss, nt_xent_loss

# batch, dim: at most this share of the time and of the peak memory
SIZES = {
    ("clip", 4096, 512): (0.7, 0.2),
    ("nt-xent", 2048, 256): (0.35, 0.25),
    ("clip", 16_384, 256): (0.65, 0.03),
}
# scale, and how far a pair is apart
NEAR = {"near convergence": (20.0, 0.7), "at a scale of 100": (100.0, 2.0), "start": (14.3, 3.0)}


def open_clip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(len(a))
    of_a, of_b = F.cross_entropy(scale * a @ b.T, labels), F.cross_entropy(scale * b @ a.T, labels)
    return (of_a + of_b) / 2


def float32_logits(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Compute CLIP in float64, from logits that are rounded as a float32 product rounds them."""
    logits = scale * a @ b.T
    rounded = (scale.float() * a.float()) @ b.float().T
    logits = logits + (rounded - logits).detach()
    labels = torch.arange(len(a))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def our_clip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return info_nce_loss(a, b, scale=scale, symmetric=True, normalize=False).loss


def lightly(z1: Tensor, z2: Tensor, _: Tensor, temperature: float = 0.5) -> Tensor:
    n = len(z1)
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    others = ~torch.eye(n, dtype=torch.bool)
    within = [(z @ z.T / temperature)[others].view(n, -1) for z in (z1, z2)]
    between = [z1 @ z2.T / temperature, z2 @ z1.T / temperature]
    logits = torch.cat([torch.cat(pair, 1) for pair in zip(between, within, strict=True)])
    return F.cross_entropy(logits, torch.arange(n).repeat(2))


def our_nt_xent(z1: Tensor, z2: Tensor, _: Tensor) -> Tensor:
    return nt_xent_loss(z1, z2, temperature=0.5).loss


LOSSES = {
    "clip": {"as written": open_clip, "termwise": our_clip},
    "nt-xent": {"as written": lightly, "termwise": our_nt_xent},
}


def inputs(batch: int, dim: int, scale: float = 14.3, apart: float = 3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = F.normalize(torch.randn(batch, dim, generator=generator), dim=1)
    noise = torch.randn(batch, dim, generator=generator) / dim**0.5
    b = F.normalize(a + apart * noise, dim=1)
    return [x.requires_grad_() for x in (a, b, torch.tensor(scale))]


def step(loss, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    value = loss(*tensors)
    return value, *torch.autograd.grad(value, tensors, materialize_grads=True, allow_unused=True)


def errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> str:
    """Return the relative errors of the value and, the largest, of the gradients, as two cells."""
    pairs = zip(found, exact, strict=True)
    value, *gradients = (((x.double() - y).norm() / y.norm()).item() for x, y in pairs)
    return f"{value:.1e} | {max(gradients):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        kind, name, batch, dim = options.peak
        loss, size = LOSSES[kind][name], (int(batch), int(dim))
        little, tensors = inputs(512, size[1]), inputs(*size)  # little takes the path of strips too
        print(measure.peak_growth(lambda: step(loss, little), lambda: step(loss, tensors)))
        return
    heads = ("as written", "ours", "of the product alone")
    print(f"| CLIP, 2048 x 256 | loss | {' | '.join(f'{x}: value | gradients' for x in heads)} |")
    print("|---|---|---|---|---|---|---|---|")
    for where, (scale, apart) in NEAR.items():
        tensors = inputs(2048, 256, scale, apart)
        wide = [x.detach().double().requires_grad_() for x in tensors]
        exact = step(open_clip, wide)
        found = [step(loss, tensors) for loss in LOSSES["clip"].values()]
        cells = [errors(one, exact) for one in (*found, step(float32_logits, wide))]
        print(f"| {where} | {exact[0].item():.3g} | {' | '.join(cells)} |", flush=True)
    print("\n| loss | size | as written | ours | share of time | share of memory |")
    print("|---|---|---|---|---|---|")
    for (kind, *size), (time, memory) in SIZES.items():
        large = size[0] > 10_000
        if large and options.quick:
            continue
        tensors, losses = inputs(*size), LOSSES[kind]
        functions = {name: functools.partial(step, loss, tensors) for name, loss in losses.items()}
        taken = measure.seconds(functions, 1 if large else 7)
        peaks = [
            measure.peak_in_fresh_processes(__file__, kind, name, *size, times=1 if large else 3)
            for name in losses
        ]
        written, ours = taken.values()
        of_written, of_ours = (f"{peak / 2**20:.0f} MiB" for peak in peaks)
        cells = [
            kind,
            " x ".join(map(str, size)),
            f"{written:.3g} s, {of_written}",
            f"{ours:.3g} s, {of_ours}",
            f"{ours / written:.2f} (at most {time})",
            f"{peaks[1] / peaks[0]:.3f} (at most {memory})",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
