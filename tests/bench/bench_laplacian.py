"""The exact trace of the Hessian: score matching of an MLP, forward and backward to parameters.

`python tests/bench/bench_laplacian.py`. The baselines are the formulas as written: one
`autograd.grad` for each dimension, and `torch.func`'s Hessian of each sample, vmapped.
"""

import argparse
import functools
from collections.abc import Callable, Iterable

import measure
import torch
from torch import Tensor, nn

from termwise.energy import score_matching_loss

BATCH = 128
ASKED = {64: (2.0, 3.0), 256: (2.5, 3.0), 784: (4.0, 3.0)}
"""Times faster, and times less memory, than one call for each dimension."""


def double_loop(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (score,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    trace = x.new_zeros(len(x))
    for i in range(x.shape[1]):
        (row,) = torch.autograd.grad(score[:, i].sum(), x, create_graph=True)
        trace = trace + row[:, i]
    return (0.5 * score.square().sum(1) - trace).mean()


def vmap_hessian(model: nn.Module, x: Tensor) -> Tensor:
    def of_one(point: Tensor) -> Tensor:
        return model(point[None])[0]

    score = torch.func.vmap(torch.func.grad(of_one))(x)
    hessian = torch.func.vmap(torch.func.hessian(of_one))(x)
    return (0.5 * score.square().sum(1) - hessian.diagonal(dim1=1, dim2=2).sum(1)).mean()


def vmap_jacrev(model: nn.Module, x: Tensor) -> Tensor:
    def score_of_one(point: Tensor) -> tuple[Tensor, Tensor]:
        score = torch.func.grad(lambda point: model(point[None])[0])(point)
        return score, score

    hessian, score = torch.func.vmap(torch.func.jacrev(score_of_one, has_aux=True))(x)
    return (0.5 * score.square().sum(1) - hessian.diagonal(dim1=1, dim2=2).sum(1)).mean()


def ours(model: nn.Module, x: Tensor) -> Tensor:
    return score_matching_loss(model, x).loss


WAYS = {"loop": double_loop, "hessian": vmap_hessian, "jacrev": vmap_jacrev, "ours": ours}


def step(way: Callable[[nn.Module, Tensor], Tensor], d: int, batch: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Linear(d, 256),
        nn.SiLU(),
        nn.Linear(256, 256),
        nn.SiLU(),
        nn.Linear(256, 1),
        nn.Flatten(0),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 16)
    x = torch.randn(batch, d, generator=generator)
    parameters = [*model.parameters()]

    def run() -> tuple[Tensor, ...]:
        loss = way(model, x)
        return loss.detach(), *torch.autograd.grad(
            loss, parameters, allow_unused=True, materialize_grads=True
        )

    return run


def table(dimensions: Iterable[int], repeats: int) -> None:
    print("MLP d-256-256-1, SiLU, batch 128: score matching, forward and backward to parameters")
    for d in dimensions:
        names = [name for name in WAYS if d < 784 or name in ("loop", "ours")]  # minutes otherwise
        runs = {name: step(WAYS[name], d, BATCH) for name in names}
        expected = runs["loop"]()
        for name, run in runs.items():
            for theirs, result in zip(expected, run(), strict=True):
                torch.testing.assert_close(
                    result, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()), msg=name
                )
        seconds = measure.seconds(runs, repeats)
        peaks = {
            name: measure.peak_in_fresh_processes(__file__, name, d, times=3) for name in names
        }
        faster, smaller = ASKED[d]
        for name in names:
            times = seconds[name] / seconds["ours"]
            memory = peaks[name] / peaks["ours"]
            asked = {"loop": f" (asked {faster:g}x, {smaller:g}x)", "ours": ""}.get(
                name, " (asked 1x in time)"
            )
            print(
                f"d {d:3}  {name:8} {1e3 * seconds[name]:8.1f} ms {peaks[name] / 2**20:8.1f} MiB: "
                f"ours {times:5.2f}x faster, {memory:5.2f}x smaller{asked}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dimensions", type=int, nargs="+", default=[*ASKED])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak", nargs=2, metavar=("WAY", "D"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        name, d = options.peak
        small = functools.partial(step, WAYS[name], 8, 4)
        print(measure.peak_growth(small(), step(WAYS[name], int(d), BATCH)))
        return
    print(f"torch {torch.__version__}, one thread, float32")
    table(options.dimensions, options.repeats)


if __name__ == "__main__":
    main()
