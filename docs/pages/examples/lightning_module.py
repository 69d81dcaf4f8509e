"""VICReg in PyTorch Lightning: the loss as a module, its terms in the log, the group under DDP.

python docs/pages/examples/lightning_module.py
"""

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from termwise.joint_embedding import VICRegLoss


# --8<-- [start:module]
class TwoViews(pl.LightningModule):
    """An encoder that is trained on two noisy views of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8))
        self.loss_fn = VICRegLoss(cov_weight=0.1)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Compute the loss of the batch of all ranks, and log its terms."""
        (x,) = batch
        z1, z2 = (self.encoder(x + 0.1 * torch.randn_like(x)) for _ in range(2))
        group = dist.group.WORLD if dist.is_initialized() else None
        terms = self.loss_fn(z1, z2, batch_group=group)
        # Every rank has the same terms: nothing is to be reduced, and no sync_dist.
        self.log_dict({f"train/{name}": value for name, value in terms.detach().items()})
        return terms.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


# --8<-- [end:module]


def main() -> dict[str, float]:
    """Train for an epoch and return what was logged last."""
    pl.seed_everything(0)
    loader = DataLoader(TensorDataset(torch.randn(256, 16)), batch_size=64, shuffle=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", enable_progress_bar=False, **quiet)
    trainer.fit(TwoViews(), loader)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main())
