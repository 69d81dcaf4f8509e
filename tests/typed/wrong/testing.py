"""Calls of `termwise.testing` that a type checker refuses. Never run."""

from torch import Tensor

from termwise import testing


def bowl(model: testing.GaussianEnergy, x: Tensor) -> Tensor:
    return model(x).mean()


def module_gaussian_energy(x: Tensor) -> None:
    testing.GaussianEnergy(x)  # error: reportCallIssue: Argument missing for parameter "covariance"
    testing.GaussianEnergy(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    testing.GaussianEnergy(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "covariance" of type "Tensor"
    testing.GaussianEnergy(x, x)()  # error: reportCallIssue: Argument missing for parameter "x"
    testing.GaussianEnergy(x, x)(x, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    testing.GaussianEnergy(x, x)("x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor" in function "__call__"


def calls_of_check_recovers() -> None:
    testing.check_recovers()  # error: reportCallIssue: Argument missing for parameter "loss_fn"
    testing.check_recovers(bowl, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    testing.check_recovers(bowl, toleranec=None)  # error: reportCallIssue: No parameter named "toleranec"


def calls_of_exact_noise(x: Tensor) -> None:
    testing.exact_noise()  # error: reportCallIssue: Argument missing for parameter "x"
    testing.exact_noise(x, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    testing.exact_noise("x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor"


def calls_of_exact_projections(x: Tensor) -> None:
    testing.exact_projections()  # error: reportCallIssue: Argument missing for parameter "x"
    testing.exact_projections(x, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    testing.exact_projections("x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor"


def calls_of_sigma_points(x: Tensor) -> None:
    testing.sigma_points(x)  # error: reportCallIssue: Argument missing for parameter "covariance"
    testing.sigma_points(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    testing.sigma_points(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "covariance" of type "Tensor"
