"""What a step of each energy loss costs, in steps that only average the energy of the data.

`python tests/bench/bench_energy_costs.py`. A step is forward and backward to the parameters; an
MLP of widths d, 256, 256, 1 with SiLU, on vectors. Peak is in a fresh process.
"""

import argparse
from collections.abc import Callable

import measure
import torch
from torch import Tensor, nn

from termwise import energy

BATCH, DIMENSIONS, NOISES = 128, 784, 16
Energy = Callable[[Tensor], Tensor]


def density(x: Tensor) -> Tensor:
    return -0.5 * x.square().sum(-1)


def cases(batch: int) -> dict[str, Callable[[Energy], Tensor]]:
    x, other = torch.randn(batch, DIMENSIONS), torch.randn(batch, DIMENSIONS)
    noises, time = torch.randn(NOISES, batch, DIMENSIONS), torch.rand(batch)
    log_z = torch.zeros(())
    of_x, of_other, of_noises = density(x), density(other), density(noises)

    def kl_term(model: Energy) -> Tensor:
        samples = energy.langevin(model, x, steps=1, step_size=0.01, differentiable_steps=1)
        return energy.contrastive_divergence_kl_term(model, samples).loss

    return {
        "mean energy": lambda model: model(x).mean(),
        "maximum_likelihood": lambda e: energy.maximum_likelihood_loss(e, x, other).loss,
        "contrastive_divergence, 10 steps": lambda e: energy.contrastive_divergence_loss(e, x).loss,
        "kl_term, with 1 step of langevin": kl_term,
        "noise_contrastive, nu = 1": lambda e: (
            energy.noise_contrastive_loss(
                e, x, other, log_noise_x=of_x, log_noise_noise=of_other, log_z=log_z
            ).loss
        ),
        "ranking_noise_contrastive, K = 16": lambda e: (
            energy.ranking_noise_contrastive_loss(
                e, x, noises, log_noise_x=of_x, log_noise_noise=of_noises
            ).loss
        ),
        "conditional_noise_contrastive, K = 16": lambda e: (
            energy.conditional_noise_contrastive_loss(e, x, x + noises).loss
        ),
        "energy_discrepancy, M = 16": lambda e: energy.energy_discrepancy_loss(e, x, t=0.1).loss,
        "score_matching": lambda e: energy.score_matching_loss(e, x).loss,
        "sliced_score_matching, K = 1": lambda e: energy.sliced_score_matching_loss(e, x).loss,
        "finite_difference, K = 1": lambda e: (
            energy.finite_difference_score_matching_loss(e, x).loss
        ),
        "denoising": lambda e: energy.denoising_score_matching_loss(e, x, sigma=0.1).loss,
        "denoising, antithetic": lambda e: (
            energy.denoising_score_matching_loss(e, x, sigma=0.1, antithetic=True).loss
        ),
        "flow_matching": lambda e: energy.flow_matching_loss(e, other, x, time).loss,
        "equilibrium_matching": lambda e: energy.equilibrium_matching_loss(e, other, x, time).loss,
        "energy_matching, flow alone": lambda e: (
            energy.energy_matching_loss(e, other, x, time).loss
        ),
        "energy_matching, negatives": lambda e: (
            energy.energy_matching_loss(e, other, x, time, other).loss
        ),
        "energy_square_penalty": lambda e: energy.energy_square_penalty(e, x).loss,
        "gradient_penalty": lambda e: energy.gradient_penalty(e, x).loss,
    }


def step(name: str, batch: int) -> Callable[[], tuple[Tensor, ...]]:
    torch.manual_seed(0)
    layers = [nn.Linear(DIMENSIONS, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU()]
    model = nn.Sequential(*layers, nn.Linear(256, 1), nn.Flatten(0))
    loss, parameters = cases(batch)[name], list(model.parameters())
    return lambda: torch.autograd.grad(
        loss(model), parameters, allow_unused=True, materialize_grads=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print(measure.peak_growth(step(options.peak, 2), step(options.peak, BATCH)))
        return
    print(
        f"torch {torch.__version__}, one thread, float32, batch {BATCH}, {DIMENSIONS} dimensions, "
        f"{NOISES} noises"
    )
    steps = {name: step(name, BATCH) for name in cases(2)}
    for run in steps.values():
        run()
    seconds = measure.seconds(steps, 15)
    for name in steps:
        peak = measure.peak_in_fresh_processes(__file__, name, times=3) / 2**20
        ratio = seconds[name] / seconds["mean energy"]
        print(f"{name:38} {1e3 * seconds[name]:7.1f} ms {ratio:6.1f}x {peak:6.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
