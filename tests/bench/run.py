"""Losses beside the best plain formula and the peer: small, middle, large, eager, compiled.

`python tests/bench/run.py --out docs/pages/api` measures all and writes a table into the page of
each loss, at the end of its section *Cost*; names choose some, `--device cuda` another device (no
GPU has run it yet). The plain formula is the fastest that a few lines of PyTorch give. The floor is
one pass that reads each input and writes each gradient, with the matrix products that cannot be
left out.
"""

import argparse
import collections
import contextlib
import functools
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import measure
import torch
from formulas import CASES, PATHS, Case, Loss
from torch import Tensor, nn

BEGIN = "<!-- measured by tests/bench/run.py -->"
HEAD = (
    "| | size | eager | of plain | of the peer | of the floor | compiled, of plain compiled | peak "
    "| of plain |\n|---|---|---|---|---|---|---|---|---|"
)


def step(loss: Loss, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    value = loss(*tensors)
    leaves = [x for x in tensors if x.requires_grad]
    found = torch.autograd.grad(value, leaves, allow_unused=True) if leaves else ()
    return value.detach(), *found


def floor(case: Case, tensors: list[Tensor]) -> None:
    for x in tensors:
        x.detach().sum()
        if x.requires_grad:
            torch.empty_like(x).fill_(1)
    if case.products is not None:
        case.products(*tensors)


def made(case: Case, size: tuple[int, ...], device: str) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = []
    for x in case.inputs(*size):
        if isinstance(x, nn.Parameter):  # of the model, which is there once
            tensors.append(x)
        else:
            moved = x.detach().to(device, case.dtype if x.is_floating_point() else None)
            tensors.append(moved.requires_grad_(x.requires_grad))
    return tensors


def seconds(functions: dict[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """Time functions in turn, for a budget of seconds each and at least three times."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    rounds = 3.0
    while len(next(iter(taken.values()))) < rounds:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            taken[name].append(time.perf_counter() - start)
        if len(next(iter(taken.values()))) == 3:
            longest = max(statistics.median(times) for times in taken.values())
            rounds = max(3.0, min(200.0, budget / longest))
    return {name: statistics.median(times) for name, times in taken.items()}


def peak(name: str, which: str, size: tuple[int, ...], device: str) -> int:
    case = CASES[name]
    loss = getattr(case, which)
    # An eighth of the rows warms up, on each path, for another one may load less.
    rows = max(range(2), key=lambda axis: size[axis] if len(size) == 3 else -axis)
    eighth = [-(-n // 8) if axis == rows else n for axis, n in enumerate(size)]
    little, tensors = made(case, tuple(eighth), device), made(case, size, device)
    if device != "cpu":
        step(loss, little)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, tensors)
        return torch.cuda.max_memory_allocated() - before

    def warm_up() -> None:
        for path in PATHS[name]:
            with contextlib.ExitStack() as patched:
                for where, value in path.items():
                    patched.enter_context(mock.patch(where, value))
                step(loss, little)

    return measure.peak_growth(warm_up, lambda: step(loss, tensors))


def compared(case: Case, tensors: list[Tensor], peer: Loss | None) -> dict[str, Loss]:
    """Return what is timed, once values and gradients were seen to agree."""
    losses = {"plain": case.plain, "ours": case.ours} | ({"peer": peer} if peer else {})
    expected = step(case.plain, tensors)
    for name, loss in losses.items():
        for one, other in zip(expected, step(loss, tensors), strict=True):
            if one is None or other is None:
                continue
            scale = float(one.abs().max()) + 1e-12
            rough = case.dtype == torch.bfloat16
            apart = (other.double() - one.double()).abs() / scale > (0.02 if rough else 1e-3)
            # Where values tie, the gradient of one order is that of another.
            few = apart.numel() // 1000 if case.ties else 0
            assert bool(other.isfinite().all()), f"{name} is not finite"
            assert int(apart.sum()) <= few, f"{name} differs"
    return losses


def rows_of(
    name: str, case: Case, options: argparse.Namespace, script: str = __file__
) -> Iterator[str]:
    peer = None
    if case.peer is not None:
        try:
            peer = case.peer[1]()
        except ImportError:
            print(f"{case.peer[0]} is not installed: no column of it", flush=True)
    for index, size in enumerate(case.sizes[: options.sizes]):
        tensors = made(case, size, options.device)
        losses = compared(case, tensors, peer)
        steps: dict[str, Callable[[], object]] = {
            label: functools.partial(step, loss, tensors) for label, loss in losses.items()
        }
        steps["floor"] = functools.partial(floor, case, tensors)
        eager = seconds(steps, options.budget)
        ours = eager["ours"]
        cells = [f"{1e3 * ours:.3g} ms", f"{ours / eager['plain']:.2f}"]
        cells += [f"{ours / eager['peer']:.2f} ({case.peer[0]})" if peer and case.peer else ""]
        cells += [f"{ours / eager['floor']:.1f}"]
        if case.compiled and not options.eager:
            torch.compiler.reset()
            compiled = {
                label: torch.compile(losses[label], fullgraph=True, dynamic=False)
                for label in ("plain", "ours")
            }
            steps = {k: functools.partial(step, loss, tensors) for k, loss in compiled.items()}
            for run in steps.values():
                run()
            taken = seconds(steps, options.budget)
            cells += [f"{taken['ours'] / taken['plain']:.2f}"]
        else:
            cells += [""]
        if index and not options.no_memory:
            of_plain, of_ours = (
                measure.peak_in_fresh_processes(script, name, which, index, options.device, times=3)
                for which in ("plain", "ours")
            )
            share = f"{of_ours / of_plain:.2f}" if of_plain > 2**20 else ""  # else it is noise
            cells += [f"{of_ours / 2**20:.3g} MiB", share]
        else:
            cells += ["", ""]
        row = f"| {name.partition(', ')[2]} | {' x '.join(map(str, size))} | {' | '.join(cells)} |"
        print(row, flush=True)
        yield row


def machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"one thread of {found[1] if found else 'this processor'}"


def main() -> None:
    timed = [name for name, case in CASES.items() if case.sizes]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(timed))
    parser.add_argument("--out", type=Path, help="folder of the pages to write tables into")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=int, default=3, help="1: small, 2: middle too, 3: all")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each function")
    parser.add_argument("--eager", action="store_true", help="nothing compiled")
    parser.add_argument("--no-memory", action="store_true", help="no processes for peaks")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        name, which, index, device = options.peak
        print(peak(name, which, CASES[name].sizes[int(index)], device))
        return
    unknown = [name for name in options.names if name not in timed]
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(timed)}")
    print(
        f"PyTorch {torch.__version__}, {machine(options.device)}; forward and backward, medians of "
        f"alternating runs.\n\n{HEAD}"
    )
    measured = collections.defaultdict[str, list[str]](list)
    for name in options.names or timed:
        print(name, flush=True)
        measured[name.partition(",")[0]] += rows_of(name, CASES[name], options)
    for loss, rows in measured.items() if options.out else ():
        page = options.out / f"{loss.replace('.', '/').removesuffix('_loss')}.md"
        page.write_text(with_table(page.read_text(), rows))


def with_table(page: str, rows: list[str]) -> str:
    """Put rows at the end of the section *Cost*, in place of those that are there."""
    before, cost, rest = page.partition("\n## Cost\n")
    text, heading, after = rest.partition("\n## ")
    table = "\n".join([BEGIN, "", HEAD, *rows])
    return f"{before}{cost}{text.partition(BEGIN)[0].rstrip()}\n\n{table}\n{heading}{after}"


if __name__ == "__main__":
    main()
