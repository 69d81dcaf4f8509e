"""What could not be differentiated forward is not tried so again, unless what is asked differs."""

import pytest
import torch
from torch import nn

from termwise.energy import _fallback, hessian_trace, sliced_score_matching_loss

WAYS = {
    "forward_laplacian": lambda energy, x: hessian_trace(energy, x),
    "forward_over_reverse": lambda energy, x: hessian_trace(
        energy, x, trace="forward_over_reverse"
    ),
    "sliced": lambda energy, x: sliced_score_matching_loss(energy, x).loss,
}


@pytest.fixture(autouse=True)
def no_energy_is_known():
    _fallback._warned.clear()
    _fallback._failed.clear()


class Counted(nn.Module):
    """An energy that counts its calls; it looks at its numbers, which no transform allows."""

    def __init__(self, unless=lambda module, x: False):
        super().__init__()
        self.calls, self.unless = 0, unless

    def forward(self, x):
        self.calls += 1
        if self.unless(self, x):
            return x.sin().sum(1)
        return torch.special.erfcx(x).sum(1) * float(x.detach().numpy().size > 0)

    def calls_of(self, way, x):
        before = self.calls
        WAYS[way](self, x)
        return self.calls - before


@pytest.mark.parametrize("way", WAYS)
def test_an_energy_that_failed_is_called_once_from_then_on(way):
    energy = Counted()
    x = torch.rand(3, 2)
    with pytest.warns(UserWarning, match="does not go through"):
        assert energy.calls_of(way, x) == 2
    assert energy.calls_of(way, x) == 1
    assert energy.calls_of(way, x[:2]) == 1
    with torch.no_grad():
        assert energy.calls_of(way, x) == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_closure_made_anew_is_known_by_what_it_calls(way):
    def closure(energy):
        return lambda x: energy(x) + 0

    x = torch.rand(3, 2)
    for energy in (Counted(), Counted()):
        with pytest.warns(UserWarning, match="does not go through"):
            WAYS[way](closure(energy), x)
        calls = energy.calls
        WAYS[way](closure(energy), x)
        assert energy.calls == calls + 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore")
def test_another_dtype_event_or_mode_is_tried_again(way):
    energy = Counted()
    x = torch.rand(3, 2)
    assert energy.calls_of(way, x) == 2
    for other in (x.double(), torch.rand(3, 4), x[:1]):
        assert energy.calls_of(way, other) == 2
        assert energy.calls_of(way, other) == 1
    for mode in (torch.autograd.graph.save_on_cpu, torch.autograd.detect_anomaly):
        known = len(_fallback._failed)
        with mode():
            energy.calls_of(way, x)
            assert len(_fallback._failed) == known + 1  # some modes refuse before any call
            assert energy.calls_of(way, x) == 1
    energy.eval()
    assert energy.calls_of(way, x) == 2
    assert energy.train().calls_of(way, x) == 1


@pytest.mark.parametrize("way", ["forward_laplacian", "sliced"])
@pytest.mark.filterwarnings("ignore")
def test_a_mode_that_ended_condemns_no_energy(way):
    energy = Counted(unless=lambda module, x: True)
    x = torch.rand(3, 2)
    with torch.autograd.graph.save_on_cpu():
        assert energy.calls_of(way, x) == 2
    assert energy.calls_of(way, x) == 1
    energy.unless = lambda module, x: not module.training
    assert energy.calls_of(way, x) == 2
    assert energy.eval().calls_of(way, x) == 1
    assert not any(energy.training in key[1] for key in _fallback._failed)


@pytest.mark.filterwarnings("ignore")
def test_running_out_of_memory_is_not_remembered():
    def out_of_memory(module, x):
        if type(x) is not torch.Tensor:
            raise torch.OutOfMemoryError("no more")

    energy = Counted(unless=out_of_memory)
    x = torch.rand(3, 2)
    assert energy.calls_of("forward_laplacian", x) == 2
    assert energy.calls_of("forward_laplacian", x) == 2


def test_an_energy_without_a_hash_is_taken():
    class Quadratic:
        __hash__ = None

        def __call__(self, x):
            return x.square().sum(1)

    torch.testing.assert_close(hessian_trace(Quadratic(), torch.rand(3, 2)), torch.full((3,), 4.0))


@pytest.mark.filterwarnings("ignore:.*does not go through this energy")
def test_energies_made_anew_at_each_step_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(_fallback, "_MOST", 4)
    for _ in range(10):
        Counted().calls_of("sliced", torch.ones(2, 3))
    assert 0 < len(_fallback._failed) <= 4
    assert 0 < len(_fallback._warned) <= 4
