"""Conditional noise-contrastive estimation."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from losses._bench import model, over_batches
from losses._energies import NOISES, bowl, mean, of_all, of_energy, right, variant
from termwise.energy import ConditionalNoiseContrastiveLoss, conditional_noise_contrastive_loss


def formula(energy, x, noise, *, log_forward, log_backward, weights, **_):
    towards = (-energy(x) + log_forward).exp()
    back = (-of_all(energy, noise) + log_backward).exp()
    right_way_round = towards / (towards + back)
    classification = -mean(right_way_round.log().mean(0), weights)
    return {
        "loss": 2 * classification,
        "classification": classification,
        "accuracy": mean(right((towards / back).log()).mean(0), weights),
        "log_odds": mean((towards / back).log().mean(0), weights),
    }


# What the benches measure.


def plain_conditional(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    return 2 * F.softplus(model(x)(x) - model(x)(noise)).mean()


def our_conditional(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    return conditional_noise_contrastive_loss(model(x), x, noise[None]).loss


CONDITIONAL = of_energy(
    function=conditional_noise_contrastive_loss,
    formula=formula,
    bench={"": over_batches(plain_conditional, our_conditional)},
    variants={"": variant(ConditionalNoiseContrastiveLoss(bowl), shapes=NOISES)},
    weights={"classification": 2.0},
    overrides=dict.fromkeys(("log_forward", "log_backward"), Float[Tensor, "noises batch"]),
    permuted=("batch", "noises"),
)
