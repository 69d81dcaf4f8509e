"""Langevin dynamics."""

from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor

from losses._energies import of_energy
from termwise.energy import langevin

LANGEVIN = of_energy(
    function=langevin,
    overrides={
        "adjust": "metropolis",
        "noise_scale": None,
        "noise": Float[Tensor, "{steps} batch *event"],
        "uniform": Float[Tensor, "{steps} batch"],
        "differentiable_steps": 0,
        "generator": None,
        "steps": st.integers(1, 2),
    },
    shards={},
    # Only with respect to the energy's parameters.
    not_held=dict.fromkeys(("assert_gradients", "assert_double_backward"), "no part of the result"),
    ignores=("noise", "uniform"),  # of a step that is not taken
)
