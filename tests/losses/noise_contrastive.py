"""Noise-contrastive estimation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from losses._bench import log_density, model, over_batches
from losses._energies import PAIR, bowl, mean, of_energy, right, variant
from termwise.energy import NoiseContrastiveLoss, noise_contrastive_loss


def formula(energy, x, noise, *, log_noise_x, log_noise_noise, log_z, weights, **_):
    nu = len(noise) / len(x)
    model_x, model_noise = ((-energy(rows) - log_z).exp() for rows in (x, noise))
    p_data = model_x / (model_x + nu * log_noise_x.exp())
    p_noise = nu * log_noise_noise.exp() / (model_noise + nu * log_noise_noise.exp())
    margins = -energy(x) - log_noise_x - log_z - math.log(nu)
    of_margins = energy(noise) + log_noise_noise + log_z + math.log(nu)
    accuracy = (mean(right(margins), weights) + nu * right(of_margins).mean()) / (1 + nu)
    data, of_noise = -mean(p_data.log(), weights), -nu * p_noise.log().mean()
    return {
        "loss": data + of_noise,
        "data": data,
        "noise": of_noise,
        "accuracy": accuracy,
        "log_z": log_z,
    }


# What the benches measure.


def plain_noise_contrastive(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    of_data, of_noise = (model(y)(y) + log_density(y) for y in (x, noise))
    return F.softplus(of_data).mean() + F.softplus(-of_noise).mean()


def our_noise_contrastive(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    logs = {"log_noise_x": log_density(x), "log_noise_noise": log_density(noise)}
    return noise_contrastive_loss(model(x), x, noise, log_z=x.new_zeros(()), **logs).loss


NOISE_CONTRASTIVE = of_energy(
    function=noise_contrastive_loss,
    formula=formula,
    bench={"": over_batches(plain_noise_contrastive, our_noise_contrastive)},
    variants={
        "": variant(
            NoiseContrastiveLoss(bowl, log_z=0.0),
            options={"log_z": torch.zeros(())},
            shapes=PAIR,
            named={"log_noise_x": "rows", "log_noise_noise": "rows"},
            of_the_module=("log_z", "learn_log_z"),
        )
    },
    weights={"data": 1.0, "noise": 1.0},
    shards={"batch_group": (("batch", "noise"), {})},
    permuted=("batch", "noise"),
)
