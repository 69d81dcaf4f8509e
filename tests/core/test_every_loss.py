"""What holds for every loss as it is used: compiled, mapped, exported, copied, on any device.

From the variants that tests/losses declares; test_laws.py has what follows from signatures alone.
"""

import copy
import dataclasses
import functools
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from declared import CASES, Case
from losses import Variant
from losses._energies import bowl
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import (
    tree_map,
    tree_map_only,
    tree_structure,
    treespec_dumps,
    treespec_loads,
)

import termwise as tw
from termwise import testing
from termwise.testing import Call
from termwise.testing._calls import violations


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def gradients(terms: tw.Terms, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(terms.loss, inputs, materialize_grads=True)


def assert_same(ours: tw.Terms, theirs: tw.Terms) -> None:
    assert type(ours) is type(theirs)
    torch.testing.assert_close(dict(ours.items()), dict(theirs.items()))


# --- compiled -------------------------------------------------------------------------------


def is_written_by_hand(case: Case) -> bool:
    """Whether a part of the backward pass is ours, which aot_eager then traces as well."""
    inputs = [x.requires_grad_() for x in case.held.tensors()]
    found = [case.function(*inputs, **case.held.extra()).loss.grad_fn]
    for node in found:  # which grows
        found += [of for of, _ in node.next_functions if of is not None and of not in found]
    return any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in found)


def test_compiled(case):
    """One graph has the terms and the gradients of eager mode at ten sizes, and at no size more."""
    held = case.held

    def loss(inputs, extra):
        return case.function(*inputs, **extra)

    def on(rows: int) -> dict[str, Any]:
        return {"inputs": held.tensors(rows), "extra": held.extra(rows)}

    testing.assert_recompiles(
        loss,
        "rows",
        given=lambda sizes: on(sizes["rows"]),
        dtypes=[torch.float32],
        at_most=1,
        dynamic=True,
        # The graph of an energy is what the energy asks for.
        traced_at=None if case.name.startswith("energy.") else 2**18,
        backend="aot_eager" if is_written_by_hand(case) else "eager",
    )


EACH = pytest.mark.parametrize("name", {case.loss: name for name, case in CASES.items()}.values())


# Shapes are looked up here, as users have it; conftest.py switches that off elsewhere.
@torch._dynamo.config.patch(fake_tensor_cache_enabled=True)
@EACH
def test_compiled_without_gradients(name):
    """A backward pass of ours is traced otherwise there."""
    case = CASES[name]
    if is_written_by_hand(case) or case.name.startswith("energy."):
        compiled = torch.compile(case.function, fullgraph=True, backend="eager")
        inputs, extra = case.held.tensors(), case.held.extra()
        assert_same(compiled(*inputs, **extra), case.function(*inputs, **extra))


@EACH
def test_a_gradient_that_is_compiled_is_right_or_refused(name):
    """Within torch.func, Dynamo differentiates the forward pass of a function of ours."""
    case = CASES[name]
    if not is_written_by_hand(case):
        return
    inputs, extra = case.held.tensors(), case.held.extra()
    gradient = torch.func.grad(lambda *xs: case.function(*xs, **extra).loss)
    try:
        ours = torch.compile(gradient, fullgraph=True, backend="eager")(*inputs)
    except RuntimeError as refused:  # the second is PyTorch's, of its custom operators
        refusals = ("has a gradient of its own", "autograd.Function with functorch transforms")
        if not any(refusal in str(refused) for refusal in refusals):
            raise
    else:
        torch.testing.assert_close(ours, gradient(*inputs))


@EACH
def test_a_wrong_argument_is_named_as_dynamo_traces_it(name, monkeypatch):
    """test_contract.py shows that Dynamo can trace it, and raises the error."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    case = CASES[name]
    names = inspect.signature(case.loss).bind(
        *case.held.first, *case.held.tensors(), **case.held.options, **case.held.extra()
    )
    found = violations(Call(case.loss, names.arguments, {}))
    # In Dynamo a NumPy scalar is an array without axes.
    found = [broken for broken in found if broken.kind != "array"]
    assert found
    for broken in found:
        with pytest.raises(tw.ContractError) as refused:
            broken()
        assert broken.argument in str(refused.value)


# --- as a module ----------------------------------------------------------------------------


def test_the_module_is_the_function(case):
    inputs, extra = case.held.tensors(), case.held.extra()
    assert_same(case.module(*inputs, **extra), case.function(*inputs, **extra))


def test_the_fields_of_the_module_are_keywords_of_the_function(case):
    module = case.held.module
    if not isinstance(module, tw.LossModule):
        pytest.skip("a module that is not made of its fields")
    keywords = inspect.signature(case.loss).parameters
    config = getattr(module, "cfg", module)
    defaults = inspect.signature(type(config)).parameters
    for field in dataclasses.fields(config):
        if field.kw_only and field.name not in case.held.of_the_module:
            assert f"{field.name}={getattr(config, field.name)!r}" in repr(module)
            # What the function requires, such as a coefficient, a config may have.
            if (default := keywords[field.name].default) is not inspect.Parameter.empty:
                assert defaults[field.name].default == default, field.name


class Trained(nn.Module):
    """A model that returns the terms of its own loss."""

    def __init__(self, held: Variant) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.loss_fn, self.extra = held.module, held.extra()

    def forward(self, *inputs: Tensor, extra: dict[str, Any] | None = None) -> tw.Terms:
        embedded = [self.linear(x) if x.shape[-1] == 3 else x for x in inputs]
        return self.loss_fn(*embedded, **(self.extra if extra is None else extra))


def test_functional_call(case):
    model, inputs = Trained(case.held), case.held.tensors()
    parameters = {name: p.detach() * 2 for name, p in model.named_parameters()}

    def loss(parameters):
        terms = torch.func.functional_call(model, parameters, tuple(inputs))
        return terms.loss, terms

    gradient, terms = torch.func.grad(loss, has_aux=True)(parameters)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 2
    expected = model(*inputs)
    assert_same(terms, expected)
    expected.loss.backward()
    torch.testing.assert_close(gradient["linear.weight"], model.linear.weight.grad)


def sizes_that_change(case: Case) -> dict[str, Any] | None:
    """Return which axes of a call's tensors are rows, or None if sizes cannot differ."""
    given = [(case.held.tensors(rows), case.held.extra(rows)) for rows in (7, 11)]
    if not all(isinstance(x, Tensor | float | int | str) for x in given[0][1].values()):
        return None  # the indices of an alignment are those of a text
    if case.loss.__name__ in ("score_matching_loss", "sliced_score_matching_loss"):
        return None  # PyTorch's vmap asks for numbers

    def axes(x: Any, other: Any) -> dict[int, Any] | None:
        if not isinstance(x, Tensor):
            return None
        sizes = enumerate(zip(x.shape, other.shape, strict=True))
        return {axis: torch.export.Dim.DYNAMIC for axis, (size, of) in sizes if size != of}

    inputs, extra = tree_map(axes, *given)
    return {"inputs": tuple(inputs), "extra": extra}


@EACH
def test_export_saves_and_loads(name):
    case = CASES[name]
    model, changes = Trained(case.held), sizes_that_change(case)
    inputs, extra = case.held.tensors(), case.held.extra()
    with torch.no_grad():
        exported = torch.export.export(
            model,
            tuple(inputs),
            {} if changes is None else {"extra": extra},
            dynamic_shapes=changes,
        )
        # A graph of PyTorch's own operators is PyTorch's to save: ours is the record around it.
        record = treespec_loads(treespec_dumps(exported.call_spec.out_spec))
        if any("termwise" in str(node.target) for node in exported.graph.nodes):
            saved = io.BytesIO()
            torch.export.save(exported, saved)
            saved.seek(0)
            exported = torch.export.load(saved)
        expected = model(*inputs)
        assert record == tree_structure(expected)
        for rows in (7,) if changes is None else (7, 11):
            inputs, extra = case.held.tensors(rows), case.held.extra(rows)
            told = {} if changes is None else {"extra": extra}
            assert_same(exported.module()(*inputs, **told), model(*inputs, **told))


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_a_module_copies(case, copier):
    model = case.held.module
    if copier == "deepcopy":
        copied = copy.deepcopy(model)
    elif copier == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    inputs, extra = case.held.tensors(), case.held.extra()
    assert repr(copied) == repr(model)
    assert_same(copied(*inputs, **extra), case.module(*inputs, **extra))


# --- mapped and differentiated --------------------------------------------------------------


def test_vmap_is_a_loop(case):
    each = [case.held.tensors(seed=seed) for seed in range(3)]
    batches = [torch.stack(xs) for xs in zip(*each, strict=True)]
    loss = functools.partial(case.function, **case.held.extra())
    ours = torch.vmap(loss)(*batches)
    last = torch.vmap(loss, in_dims=-1)(*[x.movedim(0, -1) for x in batches])
    assert_same(ours, last)
    for index in range(3):
        expected = loss(*[x[index] for x in batches])
        torch.testing.assert_close(
            {name: value[index] for name, value in ours.items()}, dict(expected.items())
        )


def test_vmap_and_grad_in_either_order(case):
    batch, *others = [torch.stack([x, x + 1, x * 2]) for x in case.held.tensors()]
    extra = case.held.extra()

    def loss(*inputs):
        return case.function(*inputs, **extra).loss

    inside = torch.vmap(torch.func.grad(loss))(batch, *others)
    outside = torch.func.grad(lambda *xs: torch.vmap(loss)(*xs).sum())(batch, *others)
    batch.requires_grad_()
    total = sum(loss(*xs) for xs in zip(batch, *others, strict=True))
    (expected,) = torch.autograd.grad(total, batch)
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(outside, expected)


def test_batched_gradients_through_a_retained_graph(case):
    inputs = [x.requires_grad_() for x in case.held.tensors()]
    terms = case.function(*inputs, **case.held.extra())
    weights = torch.tensor([1.0, -2.0, 0.5])
    (batched,) = torch.autograd.grad(
        terms.loss, inputs[:1], weights, is_grads_batched=True, retain_graph=True
    )
    (single,) = torch.autograd.grad(terms.loss, inputs[:1])
    torch.testing.assert_close(batched, weights.view(-1, *[1] * single.ndim) * single)


def test_grad_has_aux(case):
    inputs, extra = case.held.tensors(), case.held.extra()

    def loss(*inputs):
        terms = case.function(*inputs, **extra)
        return terms.loss, terms

    gradient, terms = torch.func.grad(loss, has_aux=True)(*inputs)
    assert isinstance(terms, tw.Terms)
    inputs = [x.requires_grad_() for x in inputs]
    expected = case.function(*inputs, **extra)
    assert_same(terms, expected)
    torch.testing.assert_close(gradient, gradients(expected, inputs)[0])


# --- devices, modes and rows that do not count ----------------------------------------------


def test_nothing_waits_for_the_device(case):
    # A fake tensor has no data: .item(), a boolean index or nonzero would raise.
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(x).requires_grad_() for x in case.held.tensors()]
        extra, options = (
            tree_map_only(Tensor, mode.from_tensor, dict(numbers))
            for numbers in (case.held.extra(), case.held.options)
        )
        faked = dataclasses.replace(case, held=dataclasses.replace(case.held, options=options))
        terms = faked.function(*inputs, **extra)
        assert [g.shape for g in gradients(terms, inputs)] == [x.shape for x in inputs]


def rounded(x: Tensor) -> Tensor:
    """An energy with a product that autocast would round."""
    return bowl(x @ (1.1 * torch.eye(3, dtype=x.dtype)))


def test_autocast_changes_nothing(case):
    if case.held.first:
        case = dataclasses.replace(case, held=dataclasses.replace(case.held, first=(rounded,)))
    inputs, extra = [x.requires_grad_() for x in case.held.tensors()], case.held.extra()
    plain = case.function(*inputs, **extra)
    expected = gradients(plain, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = case.function(*inputs, **extra)
        ours = gradients(cast, inputs) if not case.held.first else ()
    # An energy's own backward pass is as its caller runs it.
    ours = ours or gradients(cast, inputs)
    assert_same(cast, plain)
    torch.testing.assert_close(ours, expected)
    if case.held.first:  # nor is it on where nobody asked for it
        inputs = [x.detach().double() for x in inputs]
        extra = {name: x.double() if isinstance(x, Tensor) else x for name, x in extra.items()}
        torch.testing.assert_close(
            plain.loss.double(), case.function(*inputs, **extra).loss, rtol=1e-4, atol=1e-4
        )


# Their products of few samples are PyTorch's own: numbers.md says so.
ROUNDED = {
    *("decoupled_contrastive_loss", "info_nce_loss", "nt_xent_loss", "supervised_contrastive_loss"),
    *("multi_view_vicreg_loss", "tico_loss", "variance_covariance_loss", "vicreg_loss"),
}


def test_autocast_around_the_backward_pass_alone_changes_nothing(case):
    if case.held.first or case.loss.__name__ in ROUNDED:
        pytest.skip("an energy's own backward pass, or one that rounds")
    inputs, extra = [x.requires_grad_() for x in case.held.tensors()], case.held.extra()
    expected = gradients(case.function(*inputs, **extra), inputs)
    terms = case.function(*inputs, **extra)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(gradients(terms, inputs), expected)


def test_no_grad_gives_the_same_terms(case):
    inputs, extra = [x.requires_grad_() for x in case.held.tensors()], case.held.extra()
    with torch.no_grad():
        quiet = case.function(*inputs, **extra)
    assert not quiet.loss.requires_grad
    assert_same(quiet, case.function(*inputs, **extra).detach())
    with torch.inference_mode():
        assert_same(quiet, case.function(*inputs, **extra))
