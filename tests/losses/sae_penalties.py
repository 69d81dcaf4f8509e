"""Penalties on latents."""

import torch

from losses._latents import POWERS, dense, of_latents, size
from termwise.sae import lp_penalty, tanh_penalty


def powers(f, *, p, decoder_norm):
    costs = size(dense(f, decoder_norm)) ** p
    return (costs if decoder_norm is None else costs * decoder_norm).sum(1)


def tanhs(f, *, scale, decoder_norm):
    sizes = size(dense(f, decoder_norm))
    return torch.tanh(scale * (sizes if decoder_norm is None else sizes * decoder_norm)).sum(1)


LP = of_latents(function=lp_penalty, formula=powers, overrides=POWERS, shards={}, second=("right",))
TANH = of_latents(function=tanh_penalty, formula=tanhs, shards={}, second=("right",))
