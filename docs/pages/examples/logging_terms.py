"""Terms in Weights & Biases and in TensorBoard: `metrics()` is the dict that loggers take.

python docs/pages/examples/logging_terms.py
"""

from collections.abc import Mapping
from typing import Protocol

import torch
import wandb
from torch import nn

import termwise as tw
from termwise.sae import vanilla_loss


class Writer(Protocol):
    """What is used of `torch.utils.tensorboard.SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Write a number."""


def train(run: "wandb.Run", writer: Writer | None = None) -> None:
    """Train a sparse autoencoder for 40 steps and log it every ten."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(16, 64), nn.Linear(64, 16)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    # --8<-- [start:log]
    average = tw.TermAverage()
    for step in range(40):
        x = torch.randn(128, 16)
        f = encoder(x).relu()
        terms = vanilla_loss(x, f, decoder(f), sparsity_coeff=1e-3)
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
        average = average.update(terms)  # stays on the device
        if step % 10 == 9:
            logged: Mapping[str, float] = average.metrics("train/")  # one transfer to the host
            run.log(dict(logged), step=step)
            for name, value in logged.items():
                if writer is not None:
                    writer.add_scalar(name, value, step)
            average = tw.TermAverage()
    # --8<-- [end:log]


if __name__ == "__main__":
    with wandb.init(project="termwise", mode="offline") as opened:
        train(opened)
