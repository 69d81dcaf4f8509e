"""VICReg over micro-batches: gradients of the whole batch, accumulated, under data parallelism.

torchrun --nproc-per-node 2 docs/pages/distributed/accumulation.py
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import termwise as tw
from termwise.joint_embedding import info_nce_loss, vicreg_loss

ROWS, MICRO_BATCH, STEPS = 37, 5, 4


def compare() -> None:
    """Print terms of a batch beside the means over its micro-batches."""
    torch.manual_seed(0)
    # --8<-- [start:compare]
    z1, z2 = torch.randn(2, 256, 128)
    parts = list(zip(z1.split(64), z2.split(64), strict=True))
    for name, term in (
        ("sim", lambda z1, z2: vicreg_loss(z1, z2).sim),
        ("cov", lambda z1, z2: vicreg_loss(z1, z2).cov),
        ("InfoNCE", lambda z1, z2: info_nce_loss(z1, z2, scale=10.0).loss),
    ):
        mean = torch.stack([term(*part) for part in parts]).mean()
        print(f"{name} of 256 samples: {term(z1, z2):.2f}, mean of 4 x 64: {mean:.2f}")
    # --8<-- [end:compare]


def views(step: int) -> tuple[Tensor, Tensor]:
    """Return two views of a whole batch: the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    x, noise1, noise2 = torch.randn(3, ROWS, 12, generator=generator, dtype=torch.float64)
    return x + 0.1 * noise1, x + 0.1 * noise2


def own(batch: Tensor, step: int) -> Tensor:
    """Return this rank's rows: rank r has r + 1 shares, and the last rank none in the last step."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shares = torch.arange(1.0, ranks + 1)
    if step == STEPS - 1 and ranks > 1:
        shares[-1] = 0
    ends = (ROWS * shares.cumsum(0) / shares.sum()).round().long().tolist()
    return batch[([0, *ends])[rank] : ends[rank]]


def main() -> None:
    """Train over ranks and in one process side by side, and compare their gradients."""
    on_cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda else "cpu"
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    group = dist.group.WORLD
    if dist.get_rank() == 0:
        compare()

    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 16))
    encoder = encoder.to(device, torch.float64)
    alone = copy.deepcopy(encoder)  # one process that sees the whole batch, at once

    # --8<-- [start:train]
    model = DistributedDataParallel(encoder, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)

    def train(view1: Tensor, view2: Tensor) -> float:
        optimizer.zero_grad()
        terms = tw.cached_gradients(
            lambda micro_batch: model(torch.cat(micro_batch)).chunk(2),  # the views' embeddings
            zip(view1.split(MICRO_BATCH), view2.split(MICRO_BATCH), strict=True),
            lambda z1, z2: vicreg_loss(z1, z2, batch_group=group),
            no_sync=[model.no_sync],  # gradients are sent once
        )
        optimizer.step()
        return terms.metrics()["loss"]  # the whole batch's, on every rank

    # --8<-- [end:train]

    optimizer_alone = torch.optim.SGD(alone.parameters(), lr=0.02)
    worst = torch.zeros((), device=device, dtype=torch.float64)
    for step in range(STEPS):
        view1, view2 = (view.to(device) for view in views(step))
        loss = train(own(view1, step), own(view2, step))
        optimizer_alone.zero_grad()
        terms = vicreg_loss(alone(view1), alone(view2))
        terms.loss.backward()
        optimizer_alone.step()
        pairs = zip(encoder.parameters(), alone.parameters(), strict=True)
        differences = [(one.grad - other.grad).abs().max() for one, other in pairs]
        worst = torch.stack([worst, *differences, (terms.loss - loss).abs()]).max()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss:.6f}")

    worst = worst.nan_to_num(torch.inf)  # a NaN is no agreement
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(f"largest difference from one process: {worst:.1e}")
    dist.destroy_process_group()
    # Here, where all is alive: gloo's threads outlive the group. They can abort an interpreter
    # that winds down, and hang one that frees the group.
    sys.stdout.flush()
    os._exit(0 if worst <= 1e-12 else 1)


if __name__ == "__main__":
    main()
