"""Kernels that each loss launches on an accelerator, counted on meta tensors of real sizes.

`python tests/bench/launches.py`; names after it choose some. Each loss runs forward and backward,
next to its plain formula, without memory or a device: every operator that is not a view is one
kernel, with the bytes it reads and writes and the floating-point operations of its matrix products.
`termwise.testing.assert_launches` has the counter. `--large` takes sizes 16 times as large.
"""

import argparse
from collections.abc import Callable

import torch
from formulas import CASES, Case
from torch import Tensor, nn

from termwise.testing._launches import launches


def made(case: Case, rows: int) -> list[Tensor]:
    """Return inputs of so many rows, which require a gradient where the case says so."""
    with torch.device("meta"):
        inputs = case.inputs(*case.size_of(rows))
    return [
        x.detach().to(case.dtype).requires_grad_()
        if x.is_leaf and x.requires_grad and not isinstance(x, nn.Parameter)
        else x
        for x in inputs
    ]


def ours_and_plain(case: Case) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return a loss and its plain formula, both as functions of a list of inputs."""
    return lambda inputs: case.ours(*inputs), lambda inputs: case.plain(*inputs)


COUNTED = {name: case for name, case in CASES.items() if case.rows is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=", ".join(COUNTED))
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    print("| loss | rows | kernels | GiB moved | matrix products, TFLOP |\n|---|---|---|---|---|")
    for name in options.names or COUNTED:
        rows = COUNTED[name].rows * (16 if options.large else 1)
        inputs = {"inputs": made(COUNTED[name], rows)}
        pair = [launches(loss, inputs) for loss in ours_and_plain(COUNTED[name])]
        kernels = " of ".join(str(count.kernels.total()) for count in pair)
        gib = " of ".join(f"{count.bytes / 2**30:.2f}" for count in pair)
        flops = " of ".join(
            ", ".join(f"{n / 1e12:.2f} {dtype}" for dtype, n in count.flops.items()) or "0"
            for count in pair
        )
        print(f"| {name} | {rows} | {kernels} | {gib} | {flops} |", flush=True)


if __name__ == "__main__":
    main()
