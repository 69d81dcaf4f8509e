"""Noise-contrastive estimation."""

import math

import torch

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


NOISE_CONTRASTIVE = of_energy(
    function=noise_contrastive_loss,
    formula=formula,
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
