"""Kernels that each loss launches on an accelerator, counted on meta tensors of real sizes.

`python tests/bench/launches.py`; names after it choose some. Each loss runs forward and backward,
next to its plain formula, without memory or a device: every operator that is not a view is one
kernel, with the bytes it reads and writes and the floating-point operations of its matrix products.
Custom operators are run by their own bodies. `--large` takes sizes 16 times as large.
"""

import argparse
import collections
from collections.abc import Callable, Sequence

import torch
from formulas import CASES, Case
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Operators that launch nothing, besides views.
FREE = {
    "alias", "detach", "empty", "empty_like", "empty_strided", "is_same_size", "lift_fresh",
    "new_empty", "new_empty_strided", "promote_types", "_unsafe_view",
}  # fmt: skip


class Count(TorchDispatchMode):
    """Count what runs within it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: collections.Counter[str] = collections.Counter()
        self.bytes = 0
        self.flops: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "termwise":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        # Where autograd is off, as in a custom operator's body, `matmul` comes here whole.
        if func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            with self:
                return func.decompose(*args, **kwargs)
        found = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if func.is_view or name in FREE:
            return found
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        self.kernels[name] += 1
        self.bytes += sum(map(moved, inputs)) + sum(map(moved, outputs))
        product = getattr(torch.ops.aten, name.rstrip("_"), None)  # addmm_ is an addmm
        if (flops := flop_registry.get(product)) is not None:
            dtype = str(inputs[0].dtype).removeprefix("torch.")
            kwargs.pop("out", None)
            self.flops[dtype] += flops(*args, **kwargs, out_val=found)
        return found


def moved(x: Tensor) -> int:
    """Return the bytes of a tensor, without axes that repeat one element."""
    sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return torch.Size(sizes).numel() * x.element_size()


def counted(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Count:
    with Count() as count:
        torch.autograd.grad(loss(), leaves, allow_unused=True)
    return count


def built(case: Case, rows: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]:
    """Return a loss and its plain formula on so many rows, and what they are differentiated by."""
    with torch.device("meta"):
        made = case.inputs(*case.size_of(rows))
    inputs = [
        x.detach().to(case.dtype).requires_grad_()
        if x.is_leaf and x.requires_grad and not isinstance(x, nn.Parameter)
        else x
        for x in made
    ]
    leaves = [x for x in inputs if x.requires_grad]
    return lambda: case.ours(*inputs), lambda: case.plain(*inputs), leaves


COUNTED = {name: case for name, case in CASES.items() if case.rows is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=", ".join(COUNTED))
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    print("| loss | rows | kernels | GiB moved | matrix products, TFLOP |\n|---|---|---|---|---|")
    for name in options.names or COUNTED:
        rows = COUNTED[name].rows * (16 if options.large else 1)
        ours, plain, leaves = built(COUNTED[name], rows)
        pair = [counted(loss, leaves) for loss in (ours, plain)]
        kernels = " of ".join(str(count.kernels.total()) for count in pair)
        gib = " of ".join(f"{count.bytes / 2**30:.2f}" for count in pair)
        flops = " of ".join(
            ", ".join(f"{n / 1e12:.2f} {dtype}" for dtype, n in count.flops.items()) or "0"
            for count in pair
        )
        print(f"| {name} | {rows} | {kernels} | {gib} | {flops} |", flush=True)


if __name__ == "__main__":
    main()
