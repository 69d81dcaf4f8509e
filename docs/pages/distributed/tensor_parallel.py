"""A language model whose embedding and head are sharded over the vocabulary, unevenly.

torchrun --nproc-per-node 2 docs/pages/distributed/tensor_parallel.py
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from termwise.lm import next_token_loss, targeted_variance_loss

VOCAB, STEPS = 101, 4  # rows that two ranks share as 51 and 50


def main() -> None:
    """Train over ranks and in one process side by side, and compare their gradients."""
    on_cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda else "cpu"
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")

    torch.manual_seed(0)
    body = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    model = nn.Sequential()
    model.embedding, model.body = nn.Embedding(VOCAB, 16), body
    model.head = nn.Linear(16, VOCAB, bias=False)
    model = model.to(device, torch.float64)
    alone = copy.deepcopy(model)  # one process with the whole vocabulary

    # --8<-- [start:train]
    mesh = init_device_mesh("cuda" if on_cuda else "cpu", (dist.get_world_size(),))
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),  # rows are words
        "head": ColwiseParallel(output_layouts=Shard(-1)),  # logits stay on their rank
    }
    parallelize_module(model, mesh, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, foreach=False)
    group = mesh.get_group()

    def train(tokens: Tensor) -> float:
        logits = model(tokens)  # "batch time vocab", this rank's columns of the vocabulary
        fit = next_token_loss(logits, tokens, vocab_group=group)
        shard = model.embedding.weight.to_local()  # this rank's rows of the vocabulary
        held = targeted_variance_loss(shard, vocab_group=group)
        optimizer.zero_grad()
        (fit.loss + held.loss).backward()  # each rank's is its shard: nothing is averaged
        optimizer.step()
        return fit.metrics()["loss"] + held.metrics()["loss"]

    # --8<-- [end:train]

    optimizer_alone = torch.optim.SGD(alone.parameters(), lr=0.5)
    worst = torch.zeros((), device=device, dtype=torch.float64)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCAB, (5, 9), generator=generator).to(device)
        loss = train(tokens)
        optimizer_alone.zero_grad()
        logits, rows = alone(tokens)[:, :-1].flatten(0, 1), alone.embedding.weight
        variance = rows.var(1, correction=0).mean()
        whole = F.cross_entropy(logits, tokens[:, 1:].flatten()) + 0.1 * (variance - 1).square()
        whole.backward()
        optimizer_alone.step()
        for one, other in zip(model.parameters(), alone.parameters(), strict=True):
            gradient = one.grad.full_tensor() if isinstance(one.grad, DTensor) else one.grad
            worst = worst.maximum((gradient - other.grad).abs().max())
        worst = worst.maximum((whole.detach() - loss).abs())
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
