"""What a type checker knows of `termwise.testing`. Never run: pyright and mypy read it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, assert_type

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor
from torch.distributed import ProcessGroup

from termwise import testing


def recovered(model: testing.GaussianEnergy, x: Tensor) -> Tensor:
    return model(x).mean()


def loss(x: Tensor, *, weight: float = 1.0, batch_group: ProcessGroup | None = None) -> Tensor:
    return weight * x.sum()


def functions(ranks: testing.Ranks, x: Tensor) -> None:
    assert_type(testing.calls(loss), SearchStrategy[testing.Call])
    assert_type(testing.broken_calls(loss), SearchStrategy[testing.BrokenCall])
    assert_type(testing.assert_compiles(loss), None)
    assert_type(testing.assert_contract(loss, sizes={"batch": 3}), None)
    assert_type(testing.assert_deterministic(loss, device="cpu"), None)
    assert_type(testing.assert_double_backward(loss, refused=False), None)
    assert_type(testing.assert_finite(loss), None)
    assert_type(testing.assert_finite(loss, scale={"x": 10}), None)
    assert_type(testing.assert_forward_mode(loss, arguments=["x"]), None)
    assert_type(testing.assert_formula(loss, loss), None)
    assert_type(testing.assert_gradients(loss), None)
    assert_type(testing.assert_launches(loss, "batch", at_most=9, plain=loss), None)
    assert_type(testing.assert_masked(loss, "mask", nothing={"loss": 0.0}), None)
    assert_type(testing.assert_masked(loss, arguments={"x": lambda mask: ~mask}), None)
    assert_type(testing.assert_permutation_invariant(loss, "batch"), None)
    assert_type(testing.assert_pure(loss, aliases=["x"]), None)
    assert_type(testing.assert_recompiles(loss, at_most=2), None)
    assert_type(testing.assert_recompiles(loss, ["batch"], dynamic=True), None)
    assert_type(testing.assert_scale(loss, ["x"], degree=1), None)
    assert_type(testing.assert_sharding(loss, "batch", "batch_group", ranks=ranks), None)
    assert_type(testing.assert_shift_invariant(loss, "batch"), None)
    assert_type(testing.assert_symmetric(loss, "x", "y"), None)
    assert_type(testing.assert_terms_sum(loss, {"error": 1.0}), None)
    assert_type(testing.assert_vmaps(loss), None)
    of_names: dict[str, Any] = {"x": x}
    testing.assert_pure(loss, overrides=of_names)
    testing.assert_pure(loss, overrides={"x": x, ("y", "z"): (x, x)})
    testing.assert_pure(loss, given=testing.calls(loss).filter(bool))
    testing.assert_pure(loss, given=lambda sizes: {"x": torch.ones(sizes["batch"])})
    assert_type(testing.check_recovers(recovered), None)
    assert_type(testing.exact_noise(x), tuple[Tensor, Tensor])
    assert_type(testing.exact_projections(x), Tensor)
    assert_type(testing.sigma_points(x, x), Tensor)


def modules(x: Tensor) -> None:
    assert_type(testing.GaussianEnergy(x, x)(x), Tensor)


def members_of_call(one: testing.Call) -> None:
    assert_type(one.fn, Callable[..., Any])
    assert_type(one.sizes, dict[str, Any])
    assert_type(one.hints, dict[str, Any])
    assert_type(one.given, frozenset[str])
    assert_type(one.code(), str)
    assert_type(one.changed(x=1), testing.Call)
    assert_type(one.mapped(lambda path, tensor: tensor), testing.Call)
    assert_type(one.tensors(), dict[str, Tensor])
    assert_type(one.axes(), dict[str, tuple[str | None, ...]])


def members_of_broken_call(one: testing.BrokenCall) -> None:
    assert_type(one.argument, str)
    assert_type(one.violation, str)
    assert_type(one.kind, Literal["rank", "axis", "dtype", "array", "none", "literal"])


def members_of_inputs(one: testing.Inputs) -> None:
    assert_type(one.get("sizes"), Mapping[str, Any] | None)
    assert_type(one.get("dtypes"), Sequence[torch.dtype] | None)
    assert_type(one.get("elements"), Mapping[str, Any] | SearchStrategy[float] | None)
    assert_type(one.get("overrides"), Mapping[Any, Any] | None)
    assert_type(one.get("given"), SearchStrategy[Any] | Callable[[dict[str, Any]], Any] | None)


def members_of_ranks(one: testing.Ranks) -> None:
    assert_type(one.count, int)
    assert_type(one(loss, [1, 2]), list[Any])
    assert_type(one.close(), None)


def members_of_gaussian_energy(one: testing.GaussianEnergy, x: Tensor) -> None:
    assert_type(one.log_density(x), Tensor)
    assert_type(one.samples(), Tensor)
