"""A loop as in torchtitan: FSDP2 over samples, tensor parallel over heads and vocabulary.

torchrun --nproc-per-node 4 docs/pages/distributed/titan_loop.py
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fsdp2 import VOCAB, sentences, usual_mean
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from termwise.lm import NextTokenTerms, linear_next_token_loss, next_token_loss

STEPS, DIM, HEAD = 4, 16, 4


class Attention(nn.Module):
    """Causal attention, with as many heads as the projections that this rank holds."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Mix the positions."""
        q, k, v = (f(x).unflatten(2, (-1, HEAD)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.RMSNorm(DIM), Attention()
        self.norm2, self.up = nn.RMSNorm(DIM), nn.Linear(DIM, 2 * DIM, bias=False)
        self.down = nn.Linear(2 * DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add to x what the layer makes of it."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.silu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A language model that returns logits, or its loss where the loss is to apply the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.RMSNorm(DIM), nn.Linear(DIM, VOCAB, bias=False)

    # --8<-- [start:fused]
    def forward(
        self, inputs: Tensor, tokens: Tensor | None = None, **groups: dist.ProcessGroup
    ) -> Tensor | NextTokenTerms:
        """Return logits, or the terms of the loss of tokens."""
        hidden = self.norm(self.blocks(self.embedding(inputs)))
        if tokens is None:
            return self.head(hidden)
        hidden = hidden.redistribute(placements=[Replicate()]).to_local()  # all positions
        weight = self.head.weight.to_local()  # gathered by FSDP2: this rank's words, all of them
        return linear_next_token_loss(hidden, weight, tokens, **groups)

    # --8<-- [end:fused]


def parallelize(model: Transformer, mesh: DeviceMesh) -> None:
    """Shard the model in place, as torchtitan does."""
    # --8<-- [start:parallelize]
    whole = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
    layer = {
        "norm1": SequenceParallel(),
        "attention": PrepareModuleInput(**whole),
        "attention.q": ColwiseParallel(),
        "attention.k": ColwiseParallel(),
        "attention.v": ColwiseParallel(),
        "attention.out": RowwiseParallel(output_layouts=Shard(1)),
        "norm2": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        **{f"blocks.{i}.{name}": how for i in range(2) for name, how in layer.items()},
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
    }
    parallelize_module(model, mesh["tensor"], plan)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    # --8<-- [end:parallelize]


def main() -> None:
    """Train over ranks and in one process side by side, and compare their gradients."""
    on_cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda else "cpu"
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")

    torch.manual_seed(0)
    model = Transformer().to(device, torch.float64)
    alone = copy.deepcopy(model)  # one process that sees all sentences
    shape = (dist.get_world_size() // 2, 2)
    mesh = init_device_mesh("cuda" if on_cuda else "cpu", shape, mesh_dim_names=("data", "tensor"))
    parallelize(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    # --8<-- [start:train]
    groups = {"batch_group": mesh.get_group("data"), "vocab_group": mesh.get_group("tensor")}

    def train(tokens: Tensor, fused: bool) -> tuple[float, float]:
        inputs = tokens.clamp_min(0)
        if fused:
            terms = model(inputs, tokens, **groups)
        else:
            logits = model(inputs).to_local()  # this rank's columns of the vocabulary
            terms = next_token_loss(logits, tokens, **groups)
        optimizer.zero_grad()
        terms.loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        optimizer.step()
        return terms.metrics()["loss"], norm.item()

    # --8<-- [end:train]

    optimizer_alone = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    worst = torch.zeros((), device=device, dtype=torch.float64)
    for step in range(STEPS):
        # SequenceParallel needs a length that its ranks divide: 10 instead of 9.
        parts = [F.pad(sentences(step, rank), (0, 1), value=-1) for rank in range(shape[0])]
        parts = [part.to(device) for part in parts]
        loss, norm = train(parts[mesh["data"].get_local_rank()], fused=step % 2 == 1)
        optimizer_alone.zero_grad()
        whole = usual_mean(alone, torch.cat(parts))
        whole.backward()
        norm_alone = nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        optimizer_alone.step()
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        differences = [(one.grad.full_tensor() - other.grad).abs().max() for one, other in pairs]
        differences += [(whole.detach() - loss).abs(), (norm_alone - norm).abs()]
        worst = torch.stack([worst, *differences]).max()
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
