import copy
import dataclasses
import pickle
from typing import Annotated

import numpy as np
import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

import termwise as tw


@tw.terms
class ExampleTerms(tw.Terms):
    error: Float[Tensor, ""]
    per_row: Float[Tensor, " rows"]
    count: Int[Tensor, ""]
    extra: Float[Tensor, ""] | None = None


def example(x: Tensor) -> ExampleTerms:
    error = x.square().sum()
    return ExampleTerms(loss=2 * error, error=error, per_row=x[:, 0], count=torch.tensor(2**40 + 1))


def test_a_record_is_frozen_slotted_keyword_only_and_starts_with_loss():
    record = example(torch.ones(2, 3))
    assert dataclasses.fields(record)[0].name == "loss"
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.loss = torch.zeros(())
    with pytest.raises((AttributeError, TypeError)):
        object.__setattr__(record, "other", 1)
    with pytest.raises(TypeError, match="positional"):
        ExampleTerms(*dict(record.items()).values())
    assert record == record
    assert record != example(torch.ones(2, 3))


def test_metrics_are_python_floats_exact_in_float64_with_vectors_by_index():
    x = torch.tensor([[1.5, 2.0], [0.1, 4.0]])
    metrics = example(x).metrics()
    assert metrics == {
        "loss": 2 * metrics["error"],
        "error": x.square().sum().item(),
        "per_row[0]": 1.5,
        "per_row[1]": x[1, 0].item(),
        "count": float(2**40 + 1),
    }
    assert all(type(value) is float for value in metrics.values())


def test_metrics_moves_to_the_host_once():
    record = example(torch.ones(2, 3))
    with torch.profiler.profile() as profile:
        record.metrics()
    assert not [event for event in profile.events() if event.name == "aten::item"]


def test_fields_of_two_axes_are_no_metrics():
    @tw.terms
    class Wide(tw.Terms):
        samples: Float[Tensor, "batch dim"]

    record = Wide(loss=torch.tensor(1.0), samples=torch.zeros(3, 2))
    assert record.metrics() == {"loss": 1.0}
    assert [name for name, _ in record.items()] == ["loss", "samples"]


def test_detach_leaves_the_graph_and_keeps_absent_fields():
    x = torch.ones(2, 3, requires_grad=True)
    record = example(x)
    assert record.error.requires_grad
    assert not any(value.requires_grad for _, value in record.detach().items())
    assert record.detach().extra is None


@pytest.mark.parametrize(
    "copier", [copy.copy, copy.deepcopy, lambda record: pickle.loads(pickle.dumps(record))]
)
def test_a_detached_record_copies_and_pickles(copier):
    record = example(torch.ones(2, 3, requires_grad=True)).detach()
    assert copier(record).metrics() == record.metrics()


def test_a_record_is_saved_by_torch(tmp_path):
    record = example(torch.ones(2, 3))
    torch.save(record, tmp_path / "record.pt")
    for weights_only in (True, False):
        loaded = torch.load(tmp_path / "record.pt", weights_only=weights_only)
        assert type(loaded) is ExampleTerms
        assert loaded.metrics() == record.metrics()


def test_a_record_is_a_pytree():
    record = example(torch.ones(2, 3))
    doubled = torch.utils._pytree.tree_map(lambda value: 2 * value, record)
    assert isinstance(doubled, ExampleTerms)
    assert doubled.metrics()["error"] == 2 * record.metrics()["error"]


def test_terms_refuses_a_class_that_is_not_terms():
    with pytest.raises(TypeError, match=r"terms needs a subclass of termwise\.Terms, got .*Other"):

        @tw.terms
        class Other:
            loss: Float[Tensor, ""]


@pytest.mark.parametrize(
    ("hint", "shown"),
    [(int, "int"), (list[Tensor], r"list\[torch.Tensor\]"), (Float[np.ndarray, ""], "Float")],
)
def test_terms_refuses_fields_that_are_not_tensors(hint, shown):
    with pytest.raises(TypeError, match=rf"terms: Counted\.steps needs a tensor's .*, got {shown}"):
        tw.terms(type("Counted", (tw.Terms,), {"__annotations__": {"steps": hint}}))


def test_terms_takes_every_way_to_write_a_tensor():
    hints = [Tensor, Float[Tensor, ""], Float[Tensor, ""] | None, Annotated[Tensor, "nats"]]
    fields = {f"term{i}": hint for i, hint in enumerate(hints)}
    record = tw.terms(type("Some", (tw.Terms,), {"__annotations__": fields}))
    assert [field.name for field in dataclasses.fields(record)] == ["loss", *fields]


def test_a_record_prints_as_a_table():
    record = example(torch.tensor([[1.5, 2.0], [0.125, 4.0]], requires_grad=True))
    assert repr(record) == (
        "ExampleTerms(\n"
        "    loss     44.5312\n"
        "    error    22.2656\n"
        "    per_row  [1.5, 0.125]  [2]\n"
        "    count    1.09951e+12\n"
        "    extra    None\n"
        ")"
    )
    assert "<tr><th>per_row</th><td>[1.5, 0.125]</td><td>[2]</td></tr>" in record._repr_html_()
    long = dataclasses.replace(record, per_row=torch.arange(9.0))
    assert "per_row  [0, 1, 2, 3, 4, 5, ...]  [9]\n" in repr(long)


def test_a_record_without_numbers_prints_its_shapes():
    record = example(torch.ones(2, 3, device="meta"))
    assert "per_row  [...]" in repr(record)
    seen = []
    torch.vmap(lambda x: seen.append(repr(example(x))) or x)(torch.ones(4, 2, 3))
    assert "loss     ..." in seen[0]


def test_a_term_is_found_by_its_name():
    record = example(torch.ones(2, 3))
    assert record["error"] is record.error
    with pytest.raises(KeyError, match="ExampleTerms has no term 'sim', only loss, error, per_row"):
        record["sim"]
    with pytest.raises(KeyError, match="no term 'extra'"):  # it is None
        record["extra"]


def test_to_moves_every_term():
    record = example(torch.ones(2, 3))
    moved = record.to("meta", non_blocking=True)
    assert type(moved) is ExampleTerms
    assert all(value.device.type == "meta" for _, value in moved.items())
    assert moved.extra is None
    assert record.to(torch.float64).loss.dtype == torch.float64


def test_metrics_take_a_prefix():
    record = example(torch.ones(1, 3))
    assert list(record.metrics("train/")) == [f"train/{name}" for name in record.metrics()]
