"""What the ranks of a test run."""

import torch
import torch.distributed as dist

from termwise.joint_embedding import vicreg_loss


def lightly_over_ranks(group, z_a, z_b, weight, gather):
    """Return this rank's value and the ranks' mean gradient, of lightly's loss and of ours."""
    import installed  # noqa: F401  so that lightly can be imported here
    from lightly.loss import VICRegLoss

    def theirs(z1, z2):
        return VICRegLoss(gather_distributed=gather)(z1, z2)

    def ours(z1, z2):
        return vicreg_loss(z1, z2, variance_views="mean", batch_group=group).loss

    found = []
    for loss_fn in (theirs, ours):
        parameter = weight.clone().requires_grad_()
        loss = loss_fn(z_a @ parameter, z_b @ parameter)
        (gradient,) = torch.autograd.grad(loss, parameter)
        dist.all_reduce(gradient, group=group)
        found.append((loss.detach(), gradient / dist.get_world_size(group)))
    return found
