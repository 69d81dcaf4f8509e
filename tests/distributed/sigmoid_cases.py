"""What each rank runs: losses whose rows go around a ring."""

import torch
import torch.distributed as dist
from cases import Numbers, values
from torch import Tensor

from termwise import _groups
from termwise.joint_embedding import gram_anchor_loss, koleo_loss, sigmoid_contrastive_loss


def sigmoid(group, x: Tensor, options) -> tuple[Numbers, Numbers]:
    """Terms, and the gradients of an encoder's weight and of a learnt scale and bias."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(x.shape[1], 3, generator=generator, dtype=torch.float64)
    parameters = {
        "weight": weight,
        "log_scale": torch.tensor(1.2, dtype=torch.float64),
        "bias": torch.tensor(-0.7, dtype=torch.float64),
    }
    parameters = {name: p.requires_grad_() for name, p in parameters.items()}
    compiled = options.pop("compiled", False)

    def loss(x):
        a, b = x @ parameters["weight"], x.flip(1) @ parameters["weight"]
        scale, bias = parameters["log_scale"].exp(), parameters["bias"]
        return sigmoid_contrastive_loss(a, b, scale=scale, bias=bias, batch_group=group, **options)

    run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    terms = run(x)
    gradients = torch.autograd.grad(terms.loss, list(parameters.values()))
    if compiled:
        torch.compiler.reset()
    return values(terms), dict(zip(parameters, gradients, strict=True))


def koleo(group, x: Tensor, options) -> tuple[Numbers, Tensor]:
    x = x.clone().requires_grad_()
    terms = koleo_loss(x, batch_group=group, **options)
    return values(terms), torch.autograd.grad(terms.loss, x)[0]


def gram_anchor(group, x: Tensor, teacher: Tensor, options) -> tuple[Numbers, Tensor]:
    x = x.clone().requires_grad_()
    terms = gram_anchor_loss(x, teacher, batch_group=group, **options)
    return values(terms), torch.autograd.grad(terms.loss, x)[0]


def without_gradients_on_one_rank(group, x: Tensor) -> list[Numbers]:
    maps = x.unsqueeze(1).expand(-1, 3, -1)
    with torch.set_grad_enabled(group.rank() > 0):
        x.requires_grad_()
        every = (
            sigmoid_contrastive_loss(x, x.flip(1), scale=2.0, bias=0.0, batch_group=group),
            koleo_loss(x, batch_group=group),
            gram_anchor_loss(maps, maps.flip(2), level="batch", batch_group=group),
        )
    return [values(terms) for terms in every]


def refusals(group, _) -> list[str]:
    empty, said = torch.zeros(0, 3), []
    for call in (
        lambda: sigmoid_contrastive_loss(empty, empty, scale=1.0, bias=0.0, batch_group=group),
        lambda: koleo_loss(torch.ones(1 - group.rank(), 3), batch_group=group),
        lambda: koleo_loss(torch.ones(2, 3), group_size=3, batch_group=group),
        lambda: gram_anchor_loss(empty[:, None], empty[:, None], batch_group=group),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def second_derivatives(group, x: Tensor) -> list[str]:
    x, said = x.requires_grad_(), []
    for call in (
        lambda: sigmoid_contrastive_loss(x, x + 1, scale=1.0, bias=0.0, batch_group=group),
        lambda: koleo_loss(x, batch_group=group),
        lambda: gram_anchor_loss(x[:, None], x[:, None].flip(2), batch_group=group),
    ):
        (gradient,) = torch.autograd.grad(call().loss, x, create_graph=True)
        try:
            gradient.square().sum().backward()
        except NotImplementedError as error:
            said.append(str(error))
    return said


def traffic(group, x: Tensor, which: str) -> dict[str, int]:
    """Count the elements of each collective, and the messages of the ring."""
    sent = {"sums": 0, "out": 0, "in": 0, "messages": 0}
    reduce, exchange = _groups.all_reduce, dist.all_to_all_single

    def counted_reduce(x, *args):
        sent["sums"] += x.numel()
        return reduce(x, *args)

    def counted_exchange(received, x, *args, **kwargs):
        sent["out"] += x.numel()
        sent["in"] += received.numel()
        sent["messages"] += 1
        return exchange(received, x, *args, **kwargs)

    _groups.all_reduce, dist.all_to_all_single = counted_reduce, counted_exchange
    try:
        if which == "sigmoid":
            sigmoid_contrastive_loss(x, x, scale=1.0, bias=0.0, batch_group=group)
        elif which == "koleo":
            koleo_loss(x, batch_group=group)
        else:
            gram_anchor_loss(x[:, None], x[:, None], batch_group=group, level=which)
    finally:
        _groups.all_reduce, dist.all_to_all_single = reduce, exchange
    return sent
