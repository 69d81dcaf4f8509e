"""SIGReg, LeJEPA and VISReg, forward and backward, against their formulas as written.

Run it as `python tests/bench/bench_slices.py`. The formulas and sizes are those of formulas.py;
SIGReg's is that of lejepa and lightly, which hold a cosine and a sine for each row, slice and knot.
The thresholds are what we hold ourselves to: the share of the formula's time and of its peak.
"""

import argparse
import functools

import measure
import torch
from formulas import CASES, Loss
from torch import Tensor

# At most this share of the time, and of the peak memory, at the largest size of the case.
ASKED = {"sigreg": (0.2, 0.1), "lejepa": (0.25, 0.1), "visreg": (0.8, 0.25)}
# Small, and yet of the path that many elements take.
WARM_UP = (64, 16, 1024)


def step(loss: Loss, inputs: list[Tensor]) -> Tensor:
    (gradient,) = torch.autograd.grad(loss(*inputs), inputs[:1])
    return gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peak", nargs=2, metavar=("NAME", "LOSS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.peak:
        name, which = options.peak
        case = CASES[f"joint_embedding.{name}_loss"]
        loss = getattr(case, which)
        warm, inputs = case.inputs(*WARM_UP), case.inputs(*case.sizes[-1])
        print(measure.peak_growth(lambda: step(loss, warm), lambda: step(loss, inputs)))
        return

    print(f"torch {torch.__version__}, one thread, forward and backward, float32")
    print(
        "loss, batch x dim x slices | as written s | termwise s | share (asked) | MiB | MiB | share"
    )
    for name, (of_time, of_memory) in ASKED.items():
        case = CASES[f"joint_embedding.{name}_loss"]
        inputs = case.inputs(*case.sizes[-1])
        torch.testing.assert_close(
            step(case.ours, inputs), step(case.plain, inputs), rtol=1e-3, atol=1e-7
        )
        losses = {"plain": case.plain, "ours": case.ours}
        slow, fast = measure.seconds(
            {which: functools.partial(step, loss, inputs) for which, loss in losses.items()},
            repeats=7,
        ).values()
        large, small = (
            measure.peak_in_fresh_processes(__file__, name, which, times=3) for which in losses
        )
        print(
            f"{name} {' x '.join(map(str, case.sizes[-1]))} | {slow:.3f} | {fast:.3f} | "
            f"{fast / slow:.3f} ({of_time}) | {large / 2**20:.0f} | {small / 2**20:.0f} | "
            f"{small / large:.3f} ({of_memory})",
            flush=True,
        )


if __name__ == "__main__":
    main()
