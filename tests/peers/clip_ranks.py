"""The CLIP of the example, in float64, by a few steps of the loss LOSS on batches of BATCH pairs.

    python tests/peers/clip_ranks.py LOSS BATCH

LOSS is open_clip or termwise. As a script, rank 0 saves the parameters in the file `parameters`.
"""

import sys
from types import SimpleNamespace

import open_clip_loop
import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss


def theirs(images, texts, *, scale, symmetric, normalize, batch_group):
    if batch_group is None:
        return SimpleNamespace(loss=ClipLoss()(images, texts, scale))
    ranks = {"rank": batch_group.rank(), "world_size": batch_group.size()}
    loss_fn = ClipLoss(local_loss=True, gather_with_grad=True, **ranks)
    return SimpleNamespace(loss=loss_fn(images, texts, scale))


def parameters(group, loss, batch):
    """Return what the example trains with this loss, over the ranks of the group or without one."""
    replaced = {"STEPS": 4, "BATCH": batch}
    if loss == "open_clip":
        replaced["info_nce_loss"] = theirs
    before = {name: getattr(open_clip_loop, name) for name in replaced}
    torch.set_default_dtype(torch.float64)
    try:
        vars(open_clip_loop).update(replaced)
        return {name: p.detach() for name, p in open_clip_loop.train(group).named_parameters()}
    finally:
        vars(open_clip_loop).update(before)
        torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = parameters(dist.group.WORLD, sys.argv[1], int(sys.argv[2]))
    if dist.get_rank() == 0:
        torch.save(found, "parameters")
    dist.destroy_process_group()
