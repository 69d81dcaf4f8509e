"""Ranking noise-contrastive estimation."""

import torch
from torch import Tensor

from losses._bench import log_density, model, over_batches
from losses._energies import NOISES, bowl, mean, of_all, of_energy, right, variant
from termwise.energy import RankingNoiseContrastiveLoss, ranking_noise_contrastive_loss


def formula(energy, x, noise, *, log_noise_x, log_noise_noise, weights, **_):
    of_data = (-energy(x) - log_noise_x).exp()
    of_noise = (-of_all(energy, noise) - log_noise_noise).exp()
    p = torch.cat([of_data[None], of_noise]) / (of_data + of_noise.sum(0))
    return {
        "loss": -mean(p[0].log(), weights),
        "data": mean(energy(x) + log_noise_x, weights),
        "normalizer": mean((of_data + of_noise.sum(0)).log(), weights),
        "accuracy": mean(right((of_data / of_noise.amax(0)).log()), weights),
        "effective_candidates": mean(1 / p.square().sum(0), weights),
    }


# What the benches measure.


def plain_ranking(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    both = torch.stack([-model(y)(y) - log_density(y) for y in (x, noise)])
    return -both.log_softmax(0)[0].mean()


def our_ranking(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    logs = {"log_noise_x": log_density(x), "log_noise_noise": log_density(noise)[None]}
    return ranking_noise_contrastive_loss(model(x), x, noise[None], **logs).loss


RANKING = of_energy(
    function=ranking_noise_contrastive_loss,
    formula=formula,
    bench={"": over_batches(plain_ranking, our_ranking)},
    variants={
        "": variant(
            RankingNoiseContrastiveLoss(bowl),
            shapes=NOISES,
            named={"log_noise_x": "rows", "log_noise_noise": "noises rows"},
        )
    },
    weights={"data": 1.0, "normalizer": 1.0},
    permuted=("batch", "noises"),
)
