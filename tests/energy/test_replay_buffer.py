"""Replay buffer: places, shares begun anew, writing in place, copies, refusals."""

import copy
import io
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import termwise as tw
from termwise.energy import ReplayBuffer


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fresh(n: int, generator: torch.Generator | None) -> Tensor:
    """Samples that are told from the buffer's by their sign."""
    return -1 - torch.rand(n, 2, 2, generator=generator)


def counted(capacity: int) -> ReplayBuffer:
    """A buffer in which each sample says its place."""
    return ReplayBuffer(torch.arange(float(capacity))[:, None, None].repeat(1, 2, 2))


@given(capacity=st.integers(1, 12), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_places_are_distinct_and_where_the_samples_stand(capacity, share, seed):
    buffer, n = counted(capacity), round(share * capacity)
    samples, places = buffer.draw(n, generator=seeded(seed))
    assert places.dtype == torch.int64
    assert len(set(places.tolist())) == n
    assert torch.equal(samples, buffer.samples[places])
    samples.zero_()
    assert torch.equal(buffer.samples, counted(capacity).samples)


def test_every_place_is_as_likely():
    buffer = counted(10)
    generator = seeded()
    seen = torch.cat([buffer.draw(3, generator=generator)[1] for _ in range(1000)])
    expected, spread = 300, (1000 * 0.3 * 0.7) ** 0.5
    assert ((seen.bincount(minlength=10) - expected).abs() < 4 * spread).all()


@pytest.mark.parametrize("reinit", [0.0, 0.05, 0.4, 1.0])
def test_a_share_begins_anew(reinit):
    buffer = counted(4000)
    samples, places = buffer.draw(4000, init_fn=fresh, reinit=reinit, generator=seeded())
    anew = (samples < 0).flatten(1)
    assert torch.equal(anew.all(1), anew.any(1))
    anew = anew.any(1)
    spread = (4000 * reinit * (1 - reinit)) ** 0.5
    assert abs(anew.sum().item() - 4000 * reinit) <= 4 * spread
    assert torch.equal(samples[~anew], buffer.samples[places][~anew])
    assert len(samples[anew].unique()) >= 3.98 * anew.sum()  # each its own, but for rounding


def test_without_an_init_fn_none_begins_anew():
    samples, places = counted(50).draw(50, reinit=1.0, generator=seeded())
    assert torch.equal(samples[:, 0, 0].long(), places)


def test_writing_is_in_place_and_detached():
    buffer = counted(6)
    held = buffer.samples
    samples, places = buffer.draw(3, generator=seeded())
    moved = (samples + 100).requires_grad_()
    assert buffer.write(moved, places) is moved
    assert buffer.samples is held
    expected = counted(6).samples
    expected[places] += 100
    assert torch.equal(held, expected)
    assert not held.requires_grad
    buffer.write(samples.double(), places)
    assert held.dtype == torch.float32
    assert torch.equal(held, counted(6).samples)


def test_a_buffer_may_be_on_another_device_than_its_chains():
    """The meta device, which every machine has: it holds no numbers, and mixes with no other."""
    held = ReplayBuffer(torch.zeros(6, 2, 2, device="meta"))
    samples, places = held.draw(3, init_fn=fresh, generator=seeded())
    assert (samples.device.type, places.device.type) == ("meta", "meta")
    samples, places = counted(6).draw(3, generator=seeded())
    assert held.write(samples.double(), places).device.type == "cpu"
    assert (held.samples.device.type, held.samples.dtype) == ("meta", torch.float32)


def test_the_generator_is_the_only_chance():
    buffer, before = counted(9), torch.get_rng_state()

    def of(seed):
        return buffer.draw(5, init_fn=fresh, reinit=0.5, generator=seeded(seed))

    first, again, other = of(1), of(1), of(2)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[1], other[1])
    started = [ReplayBuffer.start(fresh, 4, seeded(seed)).samples for seed in (1, 1, 2)]
    assert torch.equal(started[0], started[1])
    assert not torch.equal(started[0], started[2])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    first = buffer.draw(5)
    torch.manual_seed(1)
    assert all(map(torch.equal, first, buffer.draw(5)))


def test_a_buffer_does_not_share_what_it_was_started_with():
    data = torch.ones(3, 2, requires_grad=True)
    buffer = ReplayBuffer.start(lambda n, generator: data, 3)
    buffer.write(torch.zeros(1, 2), torch.tensor([0]))
    assert torch.equal(data, torch.ones(3, 2))
    assert not buffer.samples.requires_grad


def test_it_copies_saves_and_is_a_tree():
    buffer = counted(3)
    file = io.BytesIO()
    torch.save(buffer, file)
    file.seek(0)
    for other in (copy.deepcopy(buffer), torch.load(file, weights_only=False)):
        assert torch.equal(other.samples, buffer.samples)
        other.write(torch.zeros(1, 2, 2), torch.tensor([2]))
        assert torch.equal(buffer.samples, counted(3).samples)
    leaves, _ = torch.utils._pytree.tree_flatten(buffer)
    assert leaves == [buffer.samples]
    assert torch.utils._pytree.tree_map(lambda x: x + 1, buffer).samples[0, 0, 0] == 1
    with pytest.raises(AttributeError):
        buffer.samples = torch.zeros(3)


def test_nothing_waits_for_the_device():
    # A fake tensor has no data: .item(), a boolean index or nonzero would raise.
    with FakeTensorMode():
        buffer = ReplayBuffer.start(fresh, 6)
        samples, places = buffer.draw(4, init_fn=fresh)
        assert buffer.write(samples, places).shape == (4, 2, 2)


def test_a_drawn_and_written_buffer_compiles():
    buffer = counted(5)

    def advance():
        samples, places = buffer.draw(3, init_fn=fresh, reinit=0.0)
        return buffer.write(samples + 10, places)

    torch.compile(advance, fullgraph=True, backend="aot_eager")()
    assert (buffer.samples != counted(5).samples).flatten(1).any(1).sum() == 3


def refused(error: type[Exception], text: str):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def test_refusals():
    buffer = counted(6)
    with refused(ValueError, "ReplayBuffer.draw needs n in 0..6, got 7"):
        buffer.draw(7)
    with refused(ValueError, "ReplayBuffer.draw needs n in 0..6, got -1"):
        buffer.draw(-1)
    for reinit in (-0.1, 1.5):
        with refused(ValueError, f"ReplayBuffer.draw needs reinit in [0, 1], got {reinit}"):
            buffer.draw(2, init_fn=fresh, reinit=reinit)
    for given_back, shown in [
        (torch.ones(2, 3), "float32[2, 3]"),
        (torch.ones(3, 2, 2), "float32[3, 2, 2]"),
        (torch.ones(2, 2, 2).double(), "float64[2, 2, 2]"),
        (None, "None"),
    ]:
        with refused(
            tw.ContractError,
            f"ReplayBuffer.draw: init_fn(2, generator) needs float32[2, 2, 2], got {shown}",
        ):
            buffer.draw(2, init_fn=lambda n, generator: given_back)  # noqa: B023
    with refused(
        tw.ContractError,
        "ReplayBuffer.start: init_fn(4, generator) needs 4 samples, got float32[3, 2, 2]",
    ):
        ReplayBuffer.start(lambda n, generator: fresh(3, generator), 4)
    with refused(ValueError, "ReplayBuffer.start needs a capacity of at least 1, got 0"):
        ReplayBuffer.start(fresh, 0)
    with refused(ValueError, "ReplayBuffer needs samples with an axis of capacity, got a scalar"):
        ReplayBuffer(torch.ones(()))
    with refused(
        tw.ContractError,
        "ReplayBuffer.write: samples need event [2, 2], got float32[2, 3]",
    ):
        buffer.write(torch.ones(2, 3), torch.tensor([0, 1]))
    with refused(
        tw.ContractError,
        'ReplayBuffer.write: places needs Int[Tensor, " n"], got int64[3]: axis n is 3, but it is '
        "2 in samples",
    ):
        buffer.write(torch.ones(2, 2, 2), torch.tensor([0, 1, 2]))
