"""The test kit's laws over every public function with a contract, as tests/losses declares it."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import hypothesis
import pytest
import torch
from declared import DECLARED, PUBLIC
from exports import EXPORTS
from hypothesis.strategies import SearchStrategy
from losses import Declaration
from torch import nn
from torch.autograd import forward_ad

from termwise import testing
from termwise.testing import _laws

EVERY = pytest.mark.parametrize("name", DECLARED)


LOSSES = {name: of for name, of in DECLARED.items() if of.is_a_loss()}
MODULES = {
    name: value
    for name, value in EXPORTS.items()
    if inspect.isclass(value) and issubclass(value, nn.Module)
    if not name.startswith(("termwise.", "testing."))
}
DECLARED_MODULES = {type(held.module) for of in LOSSES.values() for held in of.variants.values()}


@pytest.mark.parametrize("name", PUBLIC)
def test_each_function_is_declared(name):
    assert name in DECLARED, (
        f"write a Declaration with function={PUBLIC[name].__name__} in tests/losses"
    )


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_has_a_formula_its_weights_and_its_module(name):
    of = LOSSES[name]
    given = {"formula": of.formula, "weights": of.weights, "variants": of.variants or None}
    lacks = [field for field, value in given.items() if value is None]
    assert not lacks, f"the declaration of {name} in tests/losses needs {', '.join(lacks)}"


@pytest.mark.parametrize("name", MODULES)
def test_each_module_is_declared(name):
    assert MODULES[name] in DECLARED_MODULES, f"no variant in tests/losses has module={name}(...)"


def test_no_other_module_is_declared():
    assert not DECLARED_MODULES - set(MODULES.values())


# A law that compares with finite differences as another one does.
LIKE = {"assert_double_backward": "assert_gradients"}
REFUSED = {"": None, "right": False, "refused": True}


def hold(name: str, law: str, *arguments: Any, **more: Any) -> None:
    """Hold a law of a function; where it is declared not to hold, see that it says so."""
    of = DECLARED[name]
    run = getattr(testing, law)
    told = {"sizes": of.sizes, "elements": of.elements, "overrides": of.overrides, **more}
    like = LIKE.get(law, law)
    told["overrides"] = {**told["overrides"], **of.more.get(law, of.more.get(like, {}))}
    if law in of.by or like in of.by:
        told["arguments"] = of.by.get(law, of.by.get(like))
    if law in of.not_held:
        hypothesis.settings.register_profile("usual", hypothesis.settings.default)
        hypothesis.settings.load_profile("unshrunk")
        try:
            with pytest.raises((AssertionError, ValueError), match=of.not_held[law]):
                run(of.function, *arguments, **told)
        finally:
            hypothesis.settings.load_profile("usual")
    else:
        run(of.function, *arguments, **told)


@EVERY
def test_contract(name):
    # test_every_loss.py refuses compiled, and what is no loss does below.
    hold(name, "assert_contract", max_examples=3, compiled=False)


@EVERY
def test_pure(name):
    hold(name, "assert_pure", aliases=DECLARED[name].aliases, max_examples=5)


@EVERY
def test_finite(name):
    of = DECLARED[name]
    limits = ("mask", "target", "sample_mask", "valid_rows")  # what leaves elements out
    parameters = inspect.signature(of.function).parameters
    every = {
        limit: None for limit in limits if limit in parameters and parameters[limit].default is None
    }
    overrides = {**of.overrides, **every}
    ignores = [path for path in of.ignores if path.partition(".")[0] in parameters]
    told = {"ignores": ignores, "scale": of.large, "overrides": overrides}
    hold(name, "assert_finite", max_examples=5, **told)


@EVERY
def test_gradients(name, monkeypatch):
    of = DECLARED[name]
    with on_path(monkeypatch, of.paths[0]):
        # Where second derivatives are right, first ones are compared there too.
        hold(name, "assert_gradients", max_examples=1 if of.second[0] == "right" else 2)


def ends(of: Declaration) -> list[Mapping[str, Any]]:
    """Return the first and the last path: between them blocks are only of other sizes."""
    return [of.paths[0], of.paths[-1]][: len(of.paths)]


@EVERY
def test_second_derivatives_are_right_or_refused(name, monkeypatch):
    of = DECLARED[name]
    # What is not held is so as it is written: elsewhere it may be refused.
    is_held = "assert_double_backward" not in of.not_held
    paths = ends(of)[: 2 if is_held else 1]
    for path, said in zip(paths, (of.second[0], of.second[-1]), strict=False):
        with on_path(monkeypatch, path):
            told = {"refused": REFUSED[said], "max_examples": 1 if is_held else 3}
            hold(name, "assert_double_backward", **told)


@EVERY
def test_forward_mode_is_right_or_refused(name, monkeypatch):
    of = DECLARED[name]
    for path in ends(of):
        with on_path(monkeypatch, path):
            hold(name, "assert_forward_mode", max_examples=1)


def jvp_of_dual_tensors(fn, primals, tangents):
    """Do what torch.func.jvp does, by tensors that are dual: no transform of torch.func is seen."""
    with forward_ad.dual_level(), torch.no_grad():
        found = fn(*map(forward_ad.make_dual, primals, tangents))
        parts = {name: forward_ad.unpack_dual(value) for name, value in found.items()}
    return (
        {name: part.primal for name, part in parts.items()},
        {name: torch.zeros_like(p) if t is None else t for name, (p, t) in parts.items()},
    )


@EVERY
def test_forward_mode_of_dual_tensors_under_no_grad(name, monkeypatch):
    monkeypatch.setattr(torch.func, "jvp", jvp_of_dual_tensors)
    hold(name, "assert_forward_mode", max_examples=1)


@EVERY
def test_deterministic(name):
    hold(name, "assert_deterministic", max_examples=2)


@pytest.mark.parametrize(
    ("name", "mask"), [(name, mask) for name, of in DECLARED.items() for mask in of.masked]
)
def test_masked(name, mask, monkeypatch):
    of = DECLARED[name]
    given = {argument: value for argument, value in of.overrides.items() if argument != mask}
    for path in ends(of)[: 1 if mask == "sample_mask" else 2]:  # it makes a mask of tokens
        with on_path(monkeypatch, path):
            told = {"max_examples": 4, "overrides": given, **of.masked[mask]}
            hold(name, "assert_masked", mask, **told)


def test_each_mask_is_declared():
    for name, of in DECLARED.items():
        hints = {
            p.name: str(p.annotation) for p in inspect.signature(of.function).parameters.values()
        }
        masks = {p for p in hints if "mask" in p or p == "valid_rows"}
        floating = any("Float" in hint for hint in hints.values())
        assert masks <= set(of.masked) or not floating, name


@contextlib.contextmanager
def on_path(monkeypatch: pytest.MonkeyPatch, path: Mapping[str, Any]) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for where, value in path.items():
            patch.setattr(where, value)
        yield


@pytest.mark.parametrize("name", [name for name, of in DECLARED.items() if of.formula])
def test_formula(name, monkeypatch):
    of = DECLARED[name]

    def reference(**arguments: Any) -> Any:
        found = of.formula(**arguments)
        assert not of.is_a_loss() or set(found) == fields(of), "the formula leaves out a term"
        return found

    examples = 6
    for path in of.paths:
        with on_path(monkeypatch, path):
            for at in of.formula_at:
                overrides = {**of.overrides, **of.more.get("assert_formula", {}), **at}
                told = {"sizes": of.sizes, "elements": of.elements, "overrides": overrides}
                testing.assert_formula(of.function, reference, max_examples=examples, **told)
                examples = 3  # besides the large and the empty calls


def fields(of: Declaration) -> set[str]:
    return set(of.function.__annotations__["return"].__dataclass_fields__)


# The energy is held there: its parameters are trained by the samples alone.
HELD = ("energy.contrastive_divergence_kl_term",)


@pytest.mark.parametrize(
    "name", [name for name, of in DECLARED.items() if of.is_a_loss() and "energy" in of.overrides]
)
def test_the_parameters_of_an_energy_have_the_gradient_of_the_formula(name):
    of = DECLARED[name]
    overrides = {**of.overrides, **of.more.get("assert_formula", {})}
    inputs = {"sizes": of.sizes, "elements": of.elements, "overrides": overrides}

    @hypothesis.settings(max_examples=5)
    @hypothesis.given(testing.calls(of.function, dtypes=[torch.float64], **inputs))
    def check(call):
        scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        of_scale = call.changed(energy=lambda x: call["energy"](scale * x))
        losses = of_scale().loss, of.formula(**of_scale)["loss"]
        ours, theirs = (
            torch.autograd.grad(loss, scale, allow_unused=True, materialize_grads=True)[0]
            if loss.requires_grad
            else torch.zeros_like(scale)
            for loss in losses
        )
        torch.testing.assert_close(ours, 0 * theirs if name in HELD else theirs)

    check()


@pytest.mark.parametrize("name", [name for name, of in DECLARED.items() if not of.variants])
def test_compiles(name):
    """What is no loss: test_every_loss.py has the losses, and runs them through autograd."""
    hold(name, "assert_compiles", backend="eager")


@EVERY
def test_vmaps(name):
    hold(name, "assert_vmaps", max_examples=2)


@EVERY
def test_order_does_not_matter(name):
    of = DECLARED[name]
    for axis in of.permuted:
        sizes = dict(of.sizes)
        if isinstance(sizes.get(axis), SearchStrategy):
            sizes[axis] = sizes[axis].filter(lambda size: size > 1)
        hold(name, "assert_permutation_invariant", axis, sizes=sizes, max_examples=3)


@EVERY
def test_symmetries(name):
    of = DECLARED[name]
    for pair in of.symmetric:
        hold(name, "assert_symmetric", *pair, max_examples=3)
    for axis, arguments in of.shifted.items():
        hold(name, "assert_shift_invariant", axis, arguments=arguments, max_examples=3)
    for arguments, degrees in of.scaled.items():
        hold(name, "assert_scale", arguments, degrees, max_examples=3)


@pytest.mark.parametrize("name", [name for name, of in DECLARED.items() if of.optimum])
def test_nothing_is_lost_at_the_optimum(name):
    of = DECLARED[name]
    inputs = {"sizes": of.sizes, "elements": of.elements, "overrides": of.overrides}

    @hypothesis.settings(max_examples=5)
    @hypothesis.given(testing.calls(of.function, dtypes=[torch.float64], **inputs))
    def check(call):
        best = call.changed(**of.optimum(call))
        values, gradients = _laws.values_and_gradients(best)
        for value in (values["loss"], *gradients.values()):
            torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)

    check()


@EVERY
def test_terms_sum(name):
    of = DECLARED[name]
    if of.is_a_loss():
        more = {"also_in_graph": of.also_in_graph, "detached": of.detached}
        hold(name, "assert_terms_sum", of.weights, max_examples=5, **more)


@EVERY
def test_sharding(name, ranks):
    of = DECLARED[name]
    parameters = inspect.signature(of.function).parameters
    found = {p for p in parameters if p == "group" or p.endswith("_group")}
    assert found == set(of.shards)
    for group, shared in of.shards.items():
        if shared is None:
            continue
        axis, more = shared
        sizes = {**of.sizes, **more.get("sizes", {})}
        told = {**more, "sizes": sizes, "ranks": ranks, "max_examples": 1}
        hold(name, "assert_sharding", axis, group, **told)
