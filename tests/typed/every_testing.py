"""What a type checker knows of `termwise.testing`. Never run: pyright and mypy read it."""

from typing import assert_type

from torch import Tensor

from termwise import testing


def recovered(model: testing.GaussianEnergy, x: Tensor) -> Tensor:
    return model(x).mean()


def functions(x: Tensor) -> None:
    assert_type(testing.check_recovers(recovered), None)
    assert_type(testing.exact_noise(x), tuple[Tensor, Tensor])
    assert_type(testing.exact_projections(x), Tensor)
    assert_type(testing.sigma_points(x, x), Tensor)


def modules(x: Tensor) -> None:
    assert_type(testing.GaussianEnergy(x, x)(x), Tensor)
