"""What the ranks of a test run."""

import torch
import torch.distributed as dist

from termwise.joint_embedding import (
    barlow_twins_loss,
    koleo_loss,
    nt_xent_loss,
    sigreg_loss,
    sinkhorn,
    updated_center,
    vicreg_loss,
)


def trained(group, losses, weight):
    """Return of each loss of a parameter this rank's value and the ranks' mean gradient."""
    found = []
    for loss_fn in losses:
        parameter = weight.clone().requires_grad_()
        loss = loss_fn(parameter)
        (gradient,) = torch.autograd.grad(loss, parameter)
        dist.all_reduce(gradient, group=group)
        found.append((loss.detach(), gradient / dist.get_world_size(group)))
    return found


def lightly_over_ranks(group, z_a, z_b, weight, gather):
    """Train with lightly's loss and with ours."""
    import installed  # noqa: F401  so that lightly can be imported here
    from lightly.loss import VICRegLoss

    def theirs(parameter):
        return VICRegLoss(gather_distributed=gather)(z_a @ parameter, z_b @ parameter)

    def ours(parameter):
        z = z_a @ parameter, z_b @ parameter
        return vicreg_loss(*z, variance_views="mean", batch_group=group).loss

    return trained(group, (theirs, ours), weight)


def solo_learn_over_ranks(group, z1, z2, weight):
    """Train with VICReg, NT-Xent and Barlow Twins, of solo-learn first and then ours."""
    import checkouts
    import installed  # noqa: F401  so that solo-learn can be imported here

    solo = checkouts.load("solo.losses")
    indexes = torch.arange(len(z1)).repeat(2) + len(z1) * dist.get_rank(group)
    losses = (
        solo.vicreg_loss_func,
        lambda *z: solo.simclr_loss_func(torch.cat(z), indexes),
        solo.barlow_loss_func,
        lambda *z: vicreg_loss(*z, batch_group=group).loss,
        lambda *z: nt_xent_loss(*z, temperature=0.1, batch_group=group).loss,
        lambda *z: barlow_twins_loss(*z, loss_scale=0.025, batch_group=group).loss,
    )

    def of(loss_fn):
        return lambda parameter: loss_fn(z1 @ parameter, z2 @ parameter)

    torch.set_default_dtype(weight.dtype)  # of their batch normalization
    try:
        return trained(group, [of(loss_fn) for loss_fn in losses], weight)
    finally:
        torch.set_default_dtype(torch.float32)


def lejepa_over_ranks(group, z, weight, slices):
    """Train with lejepa's statistic and with ours."""
    import checkouts

    lejepa = checkouts.load("lejepa")
    statistic = lejepa.univariate.EppsPulley()

    def theirs(parameter):
        return lejepa.multivariate.SlicingUnivariateTest(statistic, slices.shape[1])(z @ parameter)

    def ours(parameter):
        return sigreg_loss(z @ parameter, slices=slices, batch_group=group).loss

    return trained(group, (theirs, ours), weight)


def koleo_over_ranks(group, x, weight, numbers):
    """Train with DINOv3's loss and with ours; numbers are its loss_group_size and topk."""
    import checkouts

    theirs = checkouts.load("dinov3.loss").KoLeoLossDistributed(**numbers)
    group_size, top_k = numbers["loss_group_size"], numbers["topk"]

    def ours(parameter):
        return koleo_loss(x @ parameter, group_size=group_size, top_k=top_k, batch_group=group).loss

    return trained(group, (lambda parameter: theirs(x @ parameter), ours), weight)


def teachers_over_ranks(group, logits):
    """Return this rank's assignments and the next centers, of DINOv2 and DINOv3 and of ours.

    With the number of patches that is left where DINOv2's iBOT read it.
    """
    import checkouts

    found, count = {}, logits.new_tensor(len(logits), dtype=torch.int64)
    prototypes = logits.shape[1]
    for name in ("dinov2", "dinov3"):
        loss = checkouts.load(f"{name}.loss").DINOLoss(prototypes)
        loss.center.zero_()
        found[f"{name} DINO"] = loss.sinkhorn_knopp_teacher(logits, 0.1)
        loss.update_center(logits)
        loss.apply_center_update()
        found[f"{name} center"] = loss.center[0]
    patches = checkouts.load("dinov2.loss").iBOTPatchLoss(prototypes)
    found["dinov2 iBOT"] = patches.sinkhorn_knopp_teacher(logits, 0.1, count)
    # Their iBOTPatchLoss compiles this module; here it runs as written.
    patches = checkouts.load("dinov3.loss.ibot_patch_loss").SinkhornKnoppTeacher()
    found["dinov3 iBOT"] = patches(logits, 0.1, logits.new_tensor(len(logits), dtype=torch.int64))
    ours = sinkhorn(logits, temperature=0.1, batch_group=group)
    center = updated_center(torch.zeros(prototypes), logits, batch_group=group)
    return found, ours, center, int(count)
