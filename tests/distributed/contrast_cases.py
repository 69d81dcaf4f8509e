"""What each rank runs of the contrastive losses."""

import contextlib

import torch
import torch.distributed as dist
from cases import Numbers, values
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from termwise import _groups
from termwise.joint_embedding import (
    decoupled_contrastive_loss,
    info_nce_loss,
    nt_xent_loss,
    supervised_contrastive_loss,
)


def with_scale(
    group, a: Tensor, b: Tensor, extra: dict, how: str
) -> tuple[Numbers, dict[str, Tensor]]:
    """Terms of InfoNCE, and gradients of embeddings, learnt scale and learnt bias."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, -4.0))
    terms = info_nce_loss(
        a, b, scale=scale, bias=bias, batch_group=group, grad_reduction=how, **extra
    )
    leaves = {"a": a, "b": b, "scale": scale, "bias": bias}
    found = torch.autograd.grad(terms.loss, list(leaves.values()), materialize_grads=True)
    return values(terms), dict(zip(leaves, found, strict=True))


class Clip(torch.nn.Module):
    """Two towers and the logarithm of a scale."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        weights = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
        self.towers = torch.nn.ParameterList([torch.nn.Parameter(w) for w in weights])
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x @ self.towers[0].T, x.sin() @ self.towers[1].T, self.logit_scale.exp()


def trained(group, x: Tensor) -> dict[str, Tensor]:
    """Gradients that DDP leaves, or those of one process."""
    model = Clip()
    wrapped = model if group is None else DistributedDataParallel(model, process_group=group)
    a, b, scale = wrapped(x)
    info_nce_loss(a, b, scale=scale, symmetric=True, batch_group=group).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


RUNS = {
    "clip": lambda a, b, **more: info_nce_loss(a, b, scale=3.0, symmetric=True, **more),
    "one way": lambda a, b, **more: info_nce_loss(a, b, scale=3.0, **more),
    "queue": lambda a, b, **more: info_nce_loss(
        a, b, scale=3.0, negatives=torch.ones(5, 4, dtype=a.dtype), **more
    ),
    "nt_xent": nt_xent_loss,
    "decoupled": lambda a, b, **more: decoupled_contrastive_loss(a, b, sigma=0.5, **more),
    "outside": lambda a, b, **more: of_classes(a, "outside", **more),
    "inside": lambda a, b, **more: of_classes(a, "inside", **more),
}


def of_classes(a: Tensor, positives, **more):
    # The sign of a column: a label that is a function of the row.
    return supervised_contrastive_loss(a, (a[:, 0] > 0).long(), positives=positives, **more)


def pair(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, (x + x.sin()).detach()


def compiled(group, x: Tensor, name: str) -> tuple[Numbers, Tensor]:
    x = x.clone().requires_grad_()
    run = RUNS[name]

    def loss(x):
        return run(*pair(x), batch_group=group)

    terms = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    (gradient,) = torch.autograd.grad(terms.loss, x)
    torch.compiler.reset()
    return values(terms), gradient


def with_gradients_on_some(group, x: Tensor) -> dict[str, Numbers]:
    """Terms where the first rank has no gradients, and so would send less."""
    with torch.set_grad_enabled(group.rank() > 0):
        return {
            name: values(run(*pair(x.clone().requires_grad_()), batch_group=group))
            for name, run in RUNS.items()
        }


def gradient_on_one(group, x: Tensor) -> Tensor | None:
    """Differentiate on the first rank alone: nothing is sent in a backward pass."""
    x = x.clone().requires_grad_()
    loss = RUNS["clip"](*pair(x), batch_group=group).loss
    return torch.autograd.grad(loss, x)[0] if group.rank() == 0 else None


def second_derivatives(group, x: Tensor) -> dict[str, str]:
    said = {}
    for name, run in RUNS.items():
        leaf = x.clone().requires_grad_()
        loss = run(*pair(leaf), batch_group=group).loss
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        try:
            gradient.sum().backward()
            said[name] = ""
        except NotImplementedError as error:
            said[name] = str(error)
    return said


def refusal(group, x: Tensor) -> list[str]:
    said = []
    for run in (RUNS["decoupled"], RUNS["nt_xent"], RUNS["outside"]):
        with contextlib.suppress(AssertionError):
            try:
                run(*pair(x), batch_group=group)
            except ValueError as error:
                said.append(str(error))
    return said


def traffic(group, x: Tensor, name: str) -> dict[str, list[int]]:
    """Count the elements of each collective of a forward and a backward pass."""
    sent: dict[str, list[int]] = {"sums": [], "out": [], "in": []}
    reduce, exchange = _groups.all_reduce, dist.all_to_all_single

    def counted_reduce(x, group_name, how="sum"):
        if group_name is not None and how != "max":  # which is a min, and comes again
            sent["sums"].append(x.numel())
        return reduce(x, group_name, how)

    def counted_exchange(received, x, outs, ins, **kwargs):
        sent["out"].append(x.numel())
        sent["in"].append(received.numel())
        return exchange(received, x, outs, ins, **kwargs)

    x = x.clone().requires_grad_()
    _groups.all_reduce, dist.all_to_all_single = counted_reduce, counted_exchange
    try:
        RUNS[name](*pair(x), batch_group=group).loss.backward()
    finally:
        _groups.all_reduce, dist.all_to_all_single = reduce, exchange
    return sent
