"""A JumpReLU autoencoder under SAELens' trainer, with the loss of this library.

python docs/pages/examples/saelens_trainer.py
"""

from collections.abc import Callable, Iterator

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from termwise.sae import jumprelu_loss

D_MODEL, D_SAE, ROWS, STEPS = 16, 64, 256, 200


# --8<-- [start:sae]
class NamedJumpReLU(JumpReLUTrainingSAE):
    """SAELens' module, whose training step computes the loss of this library."""

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Return the loss, and each term by its name."""
        with torch.no_grad():
            self.threshold.clamp_(min=0.0)  # as SAELens does before each step
        x = step_input.sae_in
        f, pre = self.encode_with_hidden_pre(x)
        x_hat = self.decode(f)
        terms = jumprelu_loss(
            x,
            pre,
            self.W_dec,
            self.b_dec,
            threshold=self.threshold,
            f=f,
            x_hat=x_hat,
            sparsity_coeff=step_input.coefficients["l0"],  # SAELens' warm-up is in it
            bandwidth=self.cfg.jumprelu_bandwidth,
            input_gradient=self.cfg.jumprelu_ste_to_input,
            feature_reduction="sum",  # SAELens sums squared errors over d_model
        )
        named = dict(terms.detach().items())
        losses = {name: named.pop(name) for name in ("mse", "sparsity")}
        return TrainStepOutput(x, x_hat, f, pre, terms.loss, losses, metrics=named)


# --8<-- [end:sae]


def activations() -> Iterator[Tensor]:
    """Yield batches of rows that are sums of a few of 32 directions."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(32, D_MODEL, generator=generator)
    while True:
        active = torch.rand(ROWS, 32, generator=generator) < 0.1
        yield (active * torch.rand(ROWS, 32, generator=generator)) @ directions


def main(
    kind: Callable[..., JumpReLUTrainingSAE] = NamedJumpReLU,
) -> tuple[JumpReLUTrainingSAE, dict[str, float]]:
    """Train for 200 steps; return the module, and what SAELens would log of one more batch."""
    torch.manual_seed(0)
    config = JumpReLUTrainingSAEConfig(
        d_in=D_MODEL, d_sae=D_SAE, l0_coefficient=0.1, l0_warm_up_steps=50
    )
    trainer = SAETrainer(
        SAETrainerConfig(STEPS * ROWS, ROWS, lr=3e-3, lr_end=3e-3, dead_feature_window=50),
        kind(config),
        activations(),
    )
    sae = trainer.fit()
    output = trainer.step(next(trainer.data_provider))
    return sae, trainer.build_train_step_log_dict(output, trainer.n_training_samples)


if __name__ == "__main__":
    for name, value in main()[1].items():
        print(f"{name:40} {value:.4f}")
