"""A loop with Hugging Face's accelerate: the group of all processes goes to the loss.

accelerate launch --num-processes 2 --cpu docs/pages/examples/accelerate_loop.py
"""

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import termwise as tw
from termwise.joint_embedding import vicreg_loss


def main() -> dict[str, float]:
    """Train for an epoch and return the mean of each term."""
    torch.manual_seed(0)
    # --8<-- [start:loop]
    accelerator = Accelerator(cpu=True)  # leave cpu out to take what the machine has
    encoder = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
    loader = DataLoader(TensorDataset(torch.randn(256, 16)), batch_size=64, shuffle=True)
    encoder, optimizer, loader = accelerator.prepare(encoder, optimizer, loader)

    group = dist.group.WORLD if accelerator.num_processes > 1 else None
    average = tw.TermAverage()
    for (x,) in loader:
        views = torch.cat([x + 0.1 * torch.randn_like(x) for _ in range(2)])
        z1, z2 = encoder(views).chunk(2)  # one forward pass for both views
        terms = vicreg_loss(z1, z2, batch_group=group)
        optimizer.zero_grad()
        accelerator.backward(terms.loss)
        optimizer.step()
        average = average.update(terms)
    accelerator.print(average.metrics("epoch/"))
    # --8<-- [end:loop]
    return average.metrics()


if __name__ == "__main__":
    main()
