"""What each rank runs of losses on second moments."""

import torch
import torch.distributed as dist
from cases import Numbers, values
from torch import Tensor

from termwise import _groups
from termwise.joint_embedding import barlow_twins_loss, mmcr_loss, multi_view_vicreg_loss


def loss_of(name, x, group, options):
    """Call a loss on rows of two or three views, "batch dim"."""
    others = (x.flip(1) + 0.3 * x, 2 * x - x.roll(1, 1) ** 2, x.roll(2, 1) - 0.5 * x)
    if name == "barlow":
        return barlow_twins_loss(x, others[0], batch_group=group, **options)
    loss = {"mmcr": mmcr_loss, "multi_view": multi_view_vicreg_loss}[name]
    return loss(torch.stack((x, *others)), batch_group=group, **options)


def terms_and_gradient(group, name, x, options) -> tuple[Numbers, Tensor]:
    x = x.clone().requires_grad_()
    terms = loss_of(name, x, group, options)
    (gradient,) = torch.autograd.grad(terms.loss, x)
    return values(terms), gradient


def without_gradients_on_one_rank(group, name, x, options) -> Numbers:
    with torch.set_grad_enabled(group.rank() > 0):
        return values(loss_of(name, x.clone().requires_grad_(), group, options))


def second_derivative(group, name, x, options) -> str:
    x = x.clone().requires_grad_()
    terms = loss_of(name, x, group, options)
    (gradient,) = torch.autograd.grad(terms.loss, x, create_graph=True)
    try:
        gradient.square().sum().backward()
    except NotImplementedError as error:
        return str(error)
    return ""


def refusal(group, x) -> str:
    try:
        barlow_twins_loss(x, x, batch_group=group)
    except ValueError as error:
        return str(error)
    return ""


def traffic(group, name, x, options) -> dict[str, int]:
    """Count the elements of sums and exchanges."""
    sent = {"sums": 0, "out": 0}
    reduce, exchange = _groups.all_reduce, dist.all_to_all_single

    def counted_reduce(x, group_name):
        sent["sums"] += x.numel()
        return reduce(x, group_name)

    def counted_exchange(received, x, *args, **kwargs):
        sent["out"] += x.numel()
        return exchange(received, x, *args, **kwargs)

    _groups.all_reduce, dist.all_to_all_single = counted_reduce, counted_exchange
    try:
        terms_and_gradient(group, name, x, options)
    finally:
        _groups.all_reduce, dist.all_to_all_single = reduce, exchange
    return sent
