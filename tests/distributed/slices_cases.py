"""What each rank runs of losses along slices."""

import torch
import torch.distributed as dist
from cases import values

from termwise import _groups
from termwise.joint_embedding import lejepa_loss, sigreg_loss, visreg_loss

LOSSES = {"sigreg": sigreg_loss, "lejepa": lejepa_loss, "visreg": visreg_loss}


def seeded(group, name, z, seed, num_slices=5):
    """Terms and the gradient with slices that each rank draws itself, or what was said."""
    z = z.clone().requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    try:
        terms = LOSSES[name](z, num_slices=num_slices, generator=generator, batch_group=group)
    except ValueError as error:
        return str(error)
    return values(terms), torch.autograd.grad(terms.loss, z)[0]


def refusal(group, name, z, slices):
    try:
        LOSSES[name](z, slices=slices, batch_group=group)
    except ValueError as error:
        return str(error)


def compiled(group, name, z, slices):
    z = z.clone().requires_grad_()
    loss = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    terms = loss(z, slices=slices, batch_group=group)
    (gradient,) = torch.autograd.grad(terms.loss, z)
    torch.compiler.reset()
    return values(terms), gradient


def without_gradients_on_one_rank(group, name, z, slices):
    with torch.set_grad_enabled(group.rank() > 0):
        terms = LOSSES[name](z.requires_grad_(), slices=slices, batch_group=group)
    return values(terms)


def second_derivative(group, name, z, slices):
    z = z.clone().requires_grad_()
    terms = LOSSES[name](z, slices=slices, batch_group=group)
    (gradient,) = torch.autograd.grad(terms.loss, z, create_graph=True)
    try:
        gradient.square().sum().backward()
    except NotImplementedError as error:
        return str(error)


def traffic(group, name, z, slices):
    """Count the elements of each collective, by dtype."""
    sent = {"out": 0, "in": 0}
    reduce, exchange = _groups.all_reduce, dist.all_to_all_single

    def counted_reduce(x, group_name):
        sent[str(x.dtype)] = sent.get(str(x.dtype), 0) + x.numel()
        return reduce(x, group_name)

    def counted_exchange(received, x, *args, **kwargs):
        sent["out"] += x.numel()
        sent["in"] += received.numel()
        return exchange(received, x, *args, **kwargs)

    _groups.all_reduce, dist.all_to_all_single = counted_reduce, counted_exchange
    try:
        z = z.requires_grad_()
        LOSSES[name](z, slices=slices, batch_group=group).loss.backward()
    finally:
        _groups.all_reduce, dist.all_to_all_single = reduce, exchange
    return sent
