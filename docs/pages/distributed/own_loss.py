"""A loss of your own over ranks: the soft Dice loss, which is no mean over samples.

torchrun --nproc-per-node 2 docs/pages/distributed/own_loss.py
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

import termwise as tw

IMAGES, PIXELS, STEPS = 19, 30, 4


# --8<-- [start:loss]
@tw.terms
class DiceTerms(tw.Terms):
    """Terms of `dice_loss`."""

    loss: Float[Tensor, ""]
    """1 - 2 overlap / (predicted + true)."""
    overlap: Float[Tensor, ""]
    """Predicted probability on true pixels, mean over images."""
    images: Float[Tensor, ""]
    """Images of all ranks; detached."""


@tw.contract
def dice_loss(
    logits: Float[Tensor, "images pixels"],
    labels: Bool[Tensor, "images pixels"],
    *,
    batch_group: ProcessGroup | None = None,
    grad_reduction: tw.groups.GradReduction = "mean",
) -> DiceTerms:
    """Compute the soft Dice loss of all pixels of all ranks."""
    predicted = logits.sigmoid()
    parts = torch.stack([(predicted * labels).sum(), predicted.sum(), labels.sum()])
    # One sum over ranks; what follows is the same on every rank.
    overlap, mass, true = tw.groups.sum_over_ranks(
        parts, batch_group, grad_reduction=grad_reduction
    ).unbind()
    images = tw.groups.count_over_ranks(logits, batch_group)
    return DiceTerms(
        loss=1 - 2 * overlap / (mass + true),
        overlap=overlap / images,
        images=images.to(overlap.dtype),
    )


# --8<-- [end:loss]


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Return a whole batch of images and labels: the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(IMAGES, PIXELS, generator=generator, dtype=torch.float64)
    return x, x.roll(1, 1) + x > 0.5


def own(whole: Tensor, step: int) -> Tensor:
    """Return this rank's images: rank r has r + 1 shares, and rank 0 none in the last step."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    shares = torch.arange(1.0, ranks + 1)
    if step == STEPS - 1 and ranks > 1:
        shares[0] = 0
    ends = (len(whole) * shares.cumsum(0) / shares.sum()).round().long().tolist()
    return whole[([0, *ends])[rank] : ends[rank]]


def main() -> None:
    """Train over ranks and in one process side by side, and compare their gradients."""
    on_cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda else "cpu"
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    group = dist.group.WORLD

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(PIXELS, 32), nn.GELU(), nn.Linear(32, PIXELS))
    network = network.to(device, torch.float64)
    alone = copy.deepcopy(network)  # one process that sees the whole batch
    model = DistributedDataParallel(network, process_group=group)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.5) for net in (network, alone)]

    worst = torch.zeros((), device=device, dtype=torch.float64)
    for step in range(STEPS):
        x, labels = (part.to(device) for part in batch(step))
        terms = dice_loss(model(own(x, step)), own(labels, step), batch_group=group)
        expected = dice_loss(alone(x), labels)
        for optimizer, loss in zip(optimizers, (terms.loss, expected.loss), strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        pairs = zip(network.parameters(), alone.parameters(), strict=True)
        differences = [(one.grad - other.grad).abs().max() for one, other in pairs]
        differences += [(terms[name] - expected[name]).abs() for name, _ in terms.items()]
        worst = torch.stack([worst, *differences]).max()
        if dist.get_rank() == 0:
            print(f"step {step}: loss {terms.metrics()['loss']:.6f}")

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
