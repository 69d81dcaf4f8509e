"""Matryoshka, forward and backward, against its formula as written.

Run it as `python tests/bench/bench_matryoshka.py`; `--small` takes a size of seconds. *Stacked*
decodes block by block and holds the cumulative sum "batch prefixes d_model"; *sliced* is the same
with slices of f and W_dec in place of `torch.split`, each of which has a whole gradient of its own
in the backward pass. *Each* decodes every prefix by itself. The figure beside each ratio is what we
hold ourselves to, at the full size.

Kept is what autograd saves beyond the inputs. Peak is how far a step lifts a fresh process over its
inputs, with and without the gradients of f, W_dec and b_dec that any step must return.
"""

import argparse
import functools

import measure
import torch
from torch import Tensor

from termwise.sae import matryoshka_loss

FULL = (4096, 768, 16384)  # batch, d_model, d_sae
SMALL = (512, 192, 2048)
COEFFICIENT = 4e-4


def prefixes(d_sae: int) -> tuple[int, ...]:
    """Double ten times over, up to d_sae."""
    return tuple(d_sae // 2**halvings for halvings in range(9, -1, -1))


def stacked(x: Tensor, f: Tensor, W_dec: Tensor, b_dec: Tensor, *, split: bool = True) -> Tensor:
    cuts = prefixes(f.shape[1])
    bounds = list(zip((0, *cuts), cuts, strict=False))
    widths = [high - low for low, high in bounds]
    if split:
        blocks = zip(f.split(widths, 1), W_dec.split(widths), strict=True)
    else:
        blocks = ((f[:, low:high], W_dec[low:high]) for low, high in bounds)
    outputs = [columns @ rows for columns, rows in blocks]
    reconstructions = torch.stack(outputs, 1).cumsum(1) + b_dec
    return (x[:, None] - reconstructions).square().mean()


def each(x: Tensor, f: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    errors = [
        (x - (f[:, :cut] @ W_dec[:cut] + b_dec)).square().mean() for cut in prefixes(f.shape[1])
    ]
    return torch.stack(errors).mean()


def ours(x: Tensor, f: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return matryoshka_loss(x, f, W_dec, b_dec, prefixes=prefixes(f.shape[1])).loss


def penalised(loss, x: Tensor, f: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    if loss is ours:
        cuts = prefixes(f.shape[1])
        return matryoshka_loss(x, f, W_dec, b_dec, prefixes=cuts, sparsity_coeff=COEFFICIENT).loss
    return loss(x, f, W_dec, b_dec) + COEFFICIENT * f.abs().sum(1).mean()


LOSSES = {"stacked": stacked, "each": each, "termwise": ours}
LOSSES["sliced"] = functools.partial(stacked, split=False)
LOSSES |= {
    f"{name}+penalty": functools.partial(penalised, loss) for name, loss in tuple(LOSSES.items())
}


def inputs(batch: int, d_model: int, d_sae: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, d_model, generator=generator)
    f = torch.empty(batch, d_sae).normal_(generator=generator).relu_()
    W_dec = torch.randn(d_sae, d_model, generator=generator).mul_(d_sae**-0.5)
    b_dec = torch.randn(d_model, generator=generator)
    return [x, *(leaf.requires_grad_() for leaf in (f, W_dec, b_dec))]


def step(loss, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*tensors), tensors[1:])


def kept(loss, tensors: list[Tensor]) -> int:
    """Return the bytes that autograd saves for the backward pass beyond the inputs."""
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(*tensors)
    del value
    return sum(saved.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--peak", nargs=4, metavar=("LOSS", "B", "D", "S"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        loss, tensors = LOSSES[options.peak[0]], inputs(*map(int, options.peak[1:]))
        little = inputs(8, 4, 512)
        print(measure.peak_growth(lambda: step(loss, little), lambda: step(loss, tensors)))
        return

    size = SMALL if options.small else FULL
    tensors = inputs(*size)
    unavoidable = sum(tensor.nbytes for tensor in tensors[1:])
    print(
        f"torch {torch.__version__}, one thread, forward and backward, float32; batch {size[0]}, "
        f"d_model {size[1]}, d_sae {size[2]}, prefixes {prefixes(size[2])}"
    )
    for suffix in ("", "+penalty"):
        names = [name + suffix for name in ("stacked", "each", "termwise")]
        if not suffix:
            expected = step(ours, tensors)
            for name in ("stacked", "each"):
                torch.testing.assert_close(
                    expected, step(LOSSES[name], tensors), rtol=1e-3, atol=1e-8
                )
            del expected
        steps = {name: functools.partial(step, LOSSES[name], tensors) for name in names}
        if suffix:
            del steps[names[1]]
        seconds = measure.seconds(steps, repeats=7 if options.small else 3)
        saved = {name: kept(LOSSES[name], tensors) for name in names}
        peaks = {
            name: measure.peak_in_fresh_processes(__file__, name, *size, times=3)
            for name in (names[0], "sliced" + suffix, names[2])
        }
        print("mse alone" if not suffix else "mse and penalty", flush=True)
        mine, stack = seconds[names[2]], seconds[names[0]]
        print(f"  time, of stacked: {mine:.3f} s of {stack:.3f} s: {mine / stack:.2f} (asked 1.1)")
        if not suffix:
            many = seconds[names[1]]
            print(f"  time, of each: {mine:.3f} s of {many:.3f} s: {many / mine:.2f} faster (1.5)")
        large, small = saved[names[0]], saved[names[2]]
        print(
            f"  kept: {small / 2**20:.1f} MiB of {large / 2**20:.1f} MiB: "
            f"{large / small:.1f} smaller (asked 8)"
        )
        small = peaks.pop(names[2])
        for name, large in peaks.items():
            print(
                f"  peak, of {name}: {small / 2**20:.0f} MiB of {large / 2**20:.0f} MiB: "
                f"{large / small:.1f} smaller (asked 2); without the gradients' "
                f"{unavoidable / 2**20:.0f} MiB {(small - unavoidable) / 2**20:.0f} of "
                f"{(large - unavoidable) / 2**20:.0f}: "
                f"{(large - unavoidable) / (small - unavoidable):.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
