"""A language model under FSDP2, whose ranks hold other sentences with unequally many tokens.

torchrun --nproc-per-node 2 docs/pages/distributed/fsdp2.py
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from termwise.lm import next_token_loss

VOCAB, LENGTH, STEPS = 50, 9, 4


class Block(nn.Module):
    """A layer of a model that predicts a token from the one before alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        """Add to x what the layer makes of it."""
        return x + self.net(x)


def sentences(step: int, rank: int) -> Tensor:
    """Return a rank's sentences, each as long as the rank lets it be: -1 is padding."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randint(VOCAB, (3 + rank, LENGTH), generator=generator)
    lengths = torch.randint(2, 4 + 3 * rank, (3 + rank, 1), generator=generator)
    return tokens.where(torch.arange(LENGTH) < lengths, -1)


def main() -> None:
    """Train over ranks and in one process side by side, and compare their gradients."""
    on_cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda else "cpu"
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    ranks = dist.get_world_size()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCAB, 16), Block(), nn.Linear(16, VOCAB, bias=False))
    model = model.to(device, torch.float64)
    alone = copy.deepcopy(model)  # one process that sees all sentences

    # --8<-- [start:train]
    mesh = init_device_mesh("cuda" if on_cuda else "cpu", (ranks,))
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train(tokens: Tensor) -> float:
        logits = model(tokens.clamp_min(0))
        terms = next_token_loss(logits, tokens, batch_group=mesh.get_group())
        optimizer.zero_grad()
        terms.loss.backward()  # FSDP2 takes the mean over ranks and keeps a shard of it
        optimizer.step()
        return terms.metrics()["loss"]  # over the tokens of all ranks, on every rank

    # --8<-- [end:train]

    optimizer_alone = torch.optim.SGD(alone.parameters(), lr=0.1)
    worst, usual = torch.zeros(2, device=device, dtype=torch.float64)
    for step in range(STEPS):
        parts = [sentences(step, rank).to(device) for rank in range(ranks)]
        loss = train(parts[dist.get_rank()])
        # What a mean over each rank's own tokens comes to, once the ranks are averaged.
        means = torch.stack([usual_mean(alone, tokens) for tokens in parts]).mean()
        usual_gradients = torch.autograd.grad(means, list(alone.parameters()))
        optimizer_alone.zero_grad()
        tokens = torch.cat(parts)
        whole = usual_mean(alone, tokens)
        whole.backward()
        optimizer_alone.step()
        for one, other, third in zip(
            model.parameters(), alone.parameters(), usual_gradients, strict=True
        ):
            worst = worst.maximum((one.grad.full_tensor() - other.grad).abs().max())
            usual = usual.maximum((third - other.grad).abs().max())
        worst = worst.maximum((whole.detach() - loss).abs())
        if dist.get_rank() == 0:
            print(f"step {step}: loss {loss:.6f}")

    worst = worst.nan_to_num(torch.inf)  # a NaN is no agreement
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(f"largest difference from one process: {worst:.1e}")
        print(f"and of the mean of the ranks' own means: {usual:.1e}")
    dist.destroy_process_group()
    # Here, where all is alive: gloo's threads outlive the group. They can abort an interpreter
    # that winds down, and hang one that frees the group.
    sys.stdout.flush()
    os._exit(0 if worst <= 1e-12 else 1)


def usual_mean(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return PyTorch's cross-entropy of the next token."""
    logits = model(tokens.clamp_min(0))[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, tokens[:, 1:].flatten(), ignore_index=-1)


if __name__ == "__main__":
    main()
