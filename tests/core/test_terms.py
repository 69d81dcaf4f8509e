import copy
import dataclasses
import pickle

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
    assert torch.load(tmp_path / "record.pt", weights_only=False).metrics() == record.metrics()


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
