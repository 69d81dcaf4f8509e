"""What holds for every loss: it compiles, transforms, exports, copies, and waits for no device.

A family's file defines FAMILY and CASES and imports these checks, each of which runs on each case.
"""

import copy
import dataclasses
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from losses import Case
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import termwise as tw


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.CASES
        metafunc.parametrize("case", cases.values(), ids=cases.keys())


def gradients(terms: tw.Terms, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(terms.loss, inputs, materialize_grads=True)


def assert_same(ours: tw.Terms, theirs: tw.Terms) -> None:
    assert type(ours) is type(theirs)
    torch.testing.assert_close(dict(ours.items()), dict(theirs.items()))


class Graphs:
    """The backend aot_eager, counting graphs, and not what it compiles within one of them."""

    def __init__(self) -> None:
        self.count, self.within = 0, False

    def __call__(self, graph, inputs):
        if self.within:
            return lookup_backend("aot_eager")(graph, inputs)
        self.count, self.within = self.count + 1, True
        try:
            return lookup_backend("aot_eager")(graph, inputs)
        finally:
            self.within = False


def mark_rows(values: Any, of_other_rows: Any) -> None:
    """Mark the number of rows, the one size that differs: Dynamo raises if it is a constant."""
    for x, other in zip(tree_leaves(values), tree_leaves(of_other_rows), strict=True):
        for axis, size in enumerate(x.shape if isinstance(x, Tensor) else ()):
            if size != other.shape[axis]:
                torch._dynamo.mark_dynamic(x, axis)


# test_laws.py compiles the functions as they are by default: the first size, then sizes as symbols.
# Floats stay constants here: as symbols each of them costs a compilation of its own.
@torch._dynamo.config.patch(specialize_float=True)
def test_compiled_once_is_eager_at_every_size(case):
    counter = Graphs()
    compiled = torch.compile(case.call_module, fullgraph=True, backend=counter)
    inputs, extra = [x.requires_grad_() for x in case.tensors()], case.extra()
    mark_rows((inputs, extra), (case.tensors(8), case.extra(8)))
    ours, theirs = (run(*inputs, **extra) for run in (compiled, case.call_module))
    assert_same(ours, theirs)
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs))
    for rows in (8, 9, 12, 13, 16, 20, 33, 64, 65):
        inputs = [x.requires_grad_() for x in case.tensors(rows)]
        ours = compiled(*inputs, **case.extra(rows))
    assert_same(ours, case.call_module(*inputs, **case.extra(rows)))
    assert counter.count == 1, "sizes are constants of the graphs"


@pytest.mark.parametrize("form", ["function", "module"])
def test_the_module_is_the_function(case, form):
    inputs = case.tensors()
    ours = case.call_module(*inputs, **case.extra())
    assert_same(ours, case.call_function(*inputs, **case.extra()))


def test_the_fields_of_the_module_are_keywords_of_the_function(case):
    if not isinstance(case.module, tw.LossModule):
        pytest.skip("a module that is not made of its fields")
    keywords = inspect.signature(case.function).parameters
    held = getattr(case.module, "cfg", case.module)
    defaults = inspect.signature(type(held)).parameters
    for field in dataclasses.fields(held):
        if field.kw_only and field.name not in case.of_the_module:
            assert f"{field.name}={getattr(held, field.name)!r}" in repr(case.module)
            # What the function requires, such as a coefficient, a config may have.
            if (default := keywords[field.name].default) is not inspect.Parameter.empty:
                assert defaults[field.name].default == default, field.name


def test_vmap_is_a_loop(case):
    batches = [
        torch.stack(xs) for xs in zip(*[case.tensors(seed=s) for s in range(3)], strict=True)
    ]
    masks = case.extra()

    def loss(*inputs):
        return case.call_function(*inputs, **masks)

    ours = torch.vmap(loss)(*batches)
    last = torch.vmap(loss, in_dims=-1)(*[x.movedim(0, -1) for x in batches])
    assert_same(ours, last)
    for index in range(3):
        expected = loss(*[x[index] for x in batches])
        torch.testing.assert_close(
            {name: value[index] for name, value in ours.items()}, dict(expected.items())
        )


def test_vmap_and_grad_in_either_order(case):
    batch, *others = [torch.stack([x, x + 1, x * 2]) for x in case.tensors()]

    extra = case.extra()

    def loss(*inputs):
        return case.call_function(*inputs, **extra).loss

    inside = torch.vmap(torch.func.grad(loss))(batch, *others)
    outside = torch.func.grad(lambda *xs: torch.vmap(loss)(*xs).sum())(batch, *others)
    batch.requires_grad_()
    total = sum(loss(*xs) for xs in zip(batch, *others, strict=True))
    (expected,) = torch.autograd.grad(total, batch)
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(outside, expected)


def test_batched_gradients_through_a_retained_graph(case):
    inputs = [x.requires_grad_() for x in case.tensors()]
    terms = case.call_function(*inputs, **case.extra())
    weights = torch.tensor([1.0, -2.0, 0.5])
    (batched,) = torch.autograd.grad(
        terms.loss, inputs[:1], weights, is_grads_batched=True, retain_graph=True
    )
    (single,) = torch.autograd.grad(terms.loss, inputs[:1])
    torch.testing.assert_close(batched, weights.view(-1, *[1] * single.ndim) * single)


def test_grad_has_aux(case):
    inputs = case.tensors()

    def loss(*inputs):
        terms = case.call_function(*inputs, **case.extra())
        return terms.loss, terms

    gradient, terms = torch.func.grad(loss, has_aux=True)(*inputs)
    assert isinstance(terms, tw.Terms)
    inputs = [x.requires_grad_() for x in inputs]
    expected = case.call_function(*inputs, **case.extra())
    assert_same(terms, expected)
    torch.testing.assert_close(gradient, gradients(expected, inputs)[0])


class Trained(nn.Module):
    """A model that returns the terms of its own loss."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.case = case
        self.loss_fn = case.module

    def forward(self, *inputs: Tensor) -> tw.Terms:
        rows = inputs[0].shape[0]
        embedded = [self.linear(x) if x.shape[-1] == 3 else x for x in inputs]
        return self.case.call_module(*embedded, **self.case.extra(rows))


def test_functional_call(case):
    model, inputs = Trained(case), case.tensors()
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


def test_export_saves_and_loads(case, tmp_path):
    model, inputs = Trained(case), case.tensors()
    with torch.no_grad():
        exported = torch.export.export(model, tuple(inputs))
        torch.export.save(exported, tmp_path / "loss.pt2")
        loaded = torch.export.load(tmp_path / "loss.pt2").module()
        assert_same(loaded(*inputs), model(*inputs))


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "torch.save"])
def test_a_module_copies(case, copier):
    model = case.module
    if copier == "deepcopy":
        copied = copy.deepcopy(model)
    elif copier == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    inputs = case.tensors()
    assert repr(copied) == repr(model)
    ours = case.call(copied, *inputs, **case.extra())
    assert_same(ours, case.call_module(*inputs, **case.extra()))


def test_nothing_waits_for_the_device(case):
    # A fake tensor has no data: .item(), a boolean index or nonzero would raise.
    with FakeTensorMode() as mode:
        inputs = [mode.from_tensor(x).requires_grad_() for x in case.tensors()]
        extra, options = (
            tree_map_only(Tensor, mode.from_tensor, numbers)
            for numbers in (case.extra(), case.options)
        )
        terms = dataclasses.replace(case, options=options).call_function(*inputs, **extra)
        assert [g.shape for g in gradients(terms, inputs)] == [x.shape for x in inputs]


def test_autocast_changes_nothing(case):
    inputs = [x.requires_grad_() for x in case.tensors()]
    plain = case.call_function(*inputs, **case.extra())
    expected = gradients(plain, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = case.call_function(*inputs, **case.extra())
        ours = gradients(cast, inputs) if not case.first else ()
    # An energy's own backward pass is as its caller runs it.
    ours = ours or gradients(cast, inputs)
    assert_same(cast, plain)
    torch.testing.assert_close(ours, expected)


def test_no_grad_gives_the_same_terms(case):
    inputs = [x.requires_grad_() for x in case.tensors()]
    with torch.no_grad():
        quiet = case.call_function(*inputs, **case.extra())
    assert not quiet.loss.requires_grad
    assert_same(quiet, case.call_function(*inputs, **case.extra()).detach())
    with torch.inference_mode():
        assert_same(quiet, case.call_function(*inputs, **case.extra()))


def test_no_public_loss_is_left_out(request):
    family, cases = request.module.FAMILY, request.module.CASES.values()
    public = vars(family).values()
    functions = {
        value
        for value in public
        if inspect.isfunction(value)
        and isinstance(returned := inspect.signature(value).return_annotation, type)
        and issubclass(returned, tw.Terms)
    }
    modules = {v for v in public if isinstance(v, type) and issubclass(v, nn.Module)}
    assert functions == {case.function for case in cases}
    assert modules == {type(case.module) for case in cases}
