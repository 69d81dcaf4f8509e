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


def draws_of_calls() -> None:
    testing.calls(bowl, 1)  # error: reportCallIssue: Expected 1 positional argument
    testing.calls(bowl, size={})  # error: reportCallIssue: No parameter named "size"
    testing.calls("bowl")  # error: reportArgumentType: parameter "fn"
    testing.broken_calls(bowl, 1)  # error: reportCallIssue: Expected 1 positional argument
    testing.broken_calls(bowl, dtypes=["float32"])  # error: reportArgumentType: parameter "dtypes"


def laws(x: Tensor) -> None:
    testing.assert_compiles(bowl, backends="eager")  # error: reportCallIssue: No parameter named "backends"
    testing.assert_contract()  # error: reportCallIssue: Argument missing for parameter "fn"
    testing.assert_contract(bowl, compiled="no")  # error: reportArgumentType: parameter "compiled"
    testing.assert_contract(bowl, sizes=3)  # error: reportArgumentType: parameter "sizes"
    testing.assert_deterministic(bowl, device=0.5)  # error: reportArgumentType: parameter "device"
    testing.assert_double_backward(bowl, refused="no")  # error: reportArgumentType: parameter "refused"
    testing.assert_forward_mode(bowl, argument=["x"])  # error: reportCallIssue: No parameter named "argument"
    testing.assert_masked(bowl, ["mask"])  # error: reportArgumentType: parameter "mask"
    testing.assert_masked(bowl, nothing="zero")  # error: reportArgumentType: parameter "nothing"
    testing.assert_finite(bowl, ignore=["x"])  # error: reportCallIssue: No parameter named "ignore"
    testing.assert_formula(bowl)  # error: reportCallIssue: Argument missing for parameter "reference"
    testing.assert_formula(bowl, x)  # error: reportArgumentType: parameter "reference"
    testing.assert_gradients(bowl, "x")  # error: reportCallIssue: Expected 1 positional argument
    testing.assert_gradients(bowl, second=x)  # error: reportArgumentType: parameter "second"
    testing.assert_launches(bowl)  # error: reportCallIssue: Argument missing for parameter "axis"
    testing.assert_launches(bowl, "batch", at_most="9")  # error: reportArgumentType: parameter "at_most"
    testing.assert_permutation_invariant(bowl)  # error: reportCallIssue: Argument missing for parameter "axis"
    testing.assert_permutation_invariant(bowl, 0)  # error: reportArgumentType: parameter "axis"
    testing.assert_pure(bowl, given={"x": x})  # error: reportArgumentType: parameter "given"
    testing.assert_recompiles(bowl, at_most=None)  # error: reportArgumentType: parameter "at_most"
    testing.assert_pure(x.sum())  # error: reportArgumentType: parameter "fn"
    testing.assert_scale(bowl, ["x"])  # error: reportCallIssue: Argument missing for parameter "degree"
    testing.assert_scale(bowl, ["x"], "1")  # error: reportArgumentType: parameter "degree"
    testing.assert_sharding(bowl, "batch")  # error: reportCallIssue: Argument missing for parameter "group_argument"
    testing.assert_sharding(bowl, "batch", "group", grad_reduction="max")  # error: reportArgumentType: parameter "grad_reduction"
    testing.assert_sharding(bowl, "batch", "group", ranks=3)  # error: reportArgumentType: parameter "ranks"
    testing.assert_shift_invariant(bowl, dim=1)  # error: reportCallIssue: No parameter named "dim"
    testing.assert_symmetric(bowl, "x")  # error: reportCallIssue: Argument missing for parameter "second"
    testing.assert_terms_sum(bowl)  # error: reportCallIssue: Argument missing for parameter "weights"
    testing.assert_terms_sum(bowl, ["error"])  # error: reportArgumentType: parameter "weights"
    testing.assert_vmaps(bowl, max_examples="3")  # error: reportArgumentType: parameter "max_examples"


def running_ranks() -> None:
    testing.Ranks("3")  # error: reportArgumentType: parameter "count"
    testing.Ranks(3).stop()  # error: reportAttributeAccessIssue: Cannot access attribute "stop"
