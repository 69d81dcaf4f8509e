"""Logits that processes share: spawned consumers and producers, and what becomes of them."""

import dataclasses
import multiprocessing
import os
import pickle
import sys

import pytest
import torch

from termwise.lm import SharedLogits, SharedLogitsHandle

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="SharedLogits needs Linux's anonymous memory"
)

SHAPE = (3, 2, 4)
SECONDS = 60


def logits(seed, dtype=torch.bfloat16):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


# What another process runs, as source: a test module is no module that it could import from.
_CONSUMER = """
import torch
from termwise.lm import SharedLogits
consumer = SharedLogits.open(pipe.recv())
view = consumer[1:3]
while (asked := pipe.recv()) != "leave":
    try:
        if asked == "slice":
            pipe.send((consumer[1:3].float().tolist(), str(view.dtype), consumer.writes))
        elif asked == "view":
            pipe.send(view.float().tolist())
        elif asked == "write":
            consumer.write(torch.zeros(3, 2, 4, dtype=torch.bfloat16))
    except RuntimeError as error:
        pipe.send(str(error))
"""
_PRODUCER = """
import torch
from termwise.lm import SharedLogits
producer = SharedLogits.create((3, 2, 4), dtype=torch.bfloat16)
while (asked := pipe.recv()) != "leave":
    if asked == "handle":
        pipe.send(producer.handle)
    else:
        producer.write(asked)
        pipe.send(producer.writes)
"""


@pytest.fixture
def spawn():
    """Run source in a process that talks through a pipe: a fresh interpreter, or a copy of one."""
    started = []

    def start(source, method="forkserver"):
        context = multiprocessing.get_context(method)
        if method == "forkserver":  # of which a process has one, with what Ranks loads
            context.set_forkserver_preload(["termwise.testing", "torch.distributed.fsdp"])
        ours, theirs = context.Pipe()
        process = context.Process(target=exec, args=(source, {"pipe": theirs}), daemon=True)
        process.start()
        theirs.close()
        started.append(process)
        return process, ours

    yield start
    for process in started:
        process.kill()
        process.join()


def answer(pipe):
    if not pipe.poll(SECONDS):
        raise TimeoutError("the other process did not answer")
    return pipe.recv()


def ask(pipe, question):
    pipe.send(question)
    return answer(pipe)


def test_a_spawned_consumer_sees_each_write_until_the_producer_closes(spawn):
    producer = SharedLogits.create(SHAPE, dtype=torch.bfloat16)
    _, pipe = spawn(_CONSUMER, "spawn")
    pipe.send(producer.handle)
    zeros = torch.zeros(2, 2, 4).tolist()
    assert ask(pipe, "slice") == (zeros, "torch.bfloat16", 0)
    for step in (1, 2):
        producer.write(logits(step))
        values = logits(step)[1:3].float().tolist()
        assert ask(pipe, "slice") == (values, "torch.bfloat16", step)
        assert ask(pipe, "view") == values  # the view taken at the start: there is no copy
    assert ask(pipe, "write") == "SharedLogits.write needs the process that made the buffer"
    producer.close()
    assert "has closed it" in ask(pipe, "slice")
    assert ask(pipe, "view") == values  # and stays readable
    pipe.send("leave")


def test_the_buffer_outlives_a_consumer_that_dies(spawn):
    producer = SharedLogits.create(SHAPE, dtype=torch.bfloat16)
    process, pipe = spawn(_CONSUMER)
    pipe.send(producer.handle)
    producer.write(logits(1))
    assert ask(pipe, "slice")[0] == logits(1)[1:3].float().tolist()
    process.kill()
    process.join(SECONDS)
    producer.write(logits(2))
    assert torch.equal(SharedLogits.open(producer.handle)[0:3], logits(2))


def test_a_producer_that_dies_is_noticed_and_what_it_wrote_can_still_be_read(spawn):
    process, pipe = spawn(_PRODUCER)
    handle = ask(pipe, "handle")
    consumer = SharedLogits.open(handle)
    view = consumer[0:2]
    assert ask(pipe, logits(5)) == 1
    assert torch.equal(view, logits(5)[:2])
    process.kill()
    process.join(SECONDS)
    assert torch.equal(view, logits(5)[:2])
    assert consumer.writes == 1
    with pytest.raises(RuntimeError, match=f"but process {handle.process} has ended"):
        consumer[0:2]
    with pytest.raises(
        RuntimeError, match=f"a live producer, but process {handle.process} has ended"
    ):
        SharedLogits.open(handle)
    consumer.close()
    assert torch.equal(view, logits(5)[:2])


def test_handles_are_small_and_stale_or_mismatched_ones_are_refused(tmp_path):
    producer = SharedLogits.create(SHAPE, dtype=torch.float16)
    handle = pickle.loads(pickle.dumps(producer.handle))
    assert handle == producer.handle
    assert len(pickle.dumps(SharedLogits.create((4, 64, 999)).handle)) < 500
    with (tmp_path / "file").open("w+") as file:
        for changed in (
            {"token": handle.token ^ 1},
            {"shape": (3, 2, 5)},
            {"dtype": torch.float32},
            {"descriptor": file.fileno()},
        ):
            with pytest.raises(RuntimeError, match="the handle is stale, or is not this prod"):
                SharedLogits.open(dataclasses.replace(handle, **changed))
    producer.close()
    with pytest.raises(RuntimeError, match="SharedLogits.open needs a live producer"):
        SharedLogits.open(handle)
    # Another buffer that is given the closed one's number is not taken for it.
    other = SharedLogits.create(SHAPE, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="the handle is stale"):
        SharedLogits.open(dataclasses.replace(handle, descriptor=other.handle.descriptor))


def test_memory_goes_when_nobody_holds_it():
    with SharedLogits.create(SHAPE) as producer:
        consumer = SharedLogits.open(producer.handle)
        descriptor = producer.handle.descriptor
        link = f"/proc/self/fd/{descriptor}"
        assert "termwise" in os.readlink(link)
        mapped = os.stat(link).st_ino
    assert not os.path.exists(link) or os.stat(link).st_ino != mapped
    consumer.close()
    with pytest.raises(RuntimeError, match="closed in this process"):
        consumer[0:1]
    with pytest.raises(RuntimeError, match="closed in this process"):
        producer.write(torch.zeros(SHAPE))
    del producer, consumer
    with open("/proc/self/maps") as maps:
        assert not any(f" {mapped} " in line and "memfd:termwise" in line for line in maps)


def test_a_producer_that_is_dropped_closes():
    producer = SharedLogits.create(SHAPE)
    consumer = SharedLogits.open(producer.handle)
    del producer
    with pytest.raises(RuntimeError, match="has closed it"):
        consumer[0:1]


def test_rows_are_written_and_sliced_in_place():
    producer = SharedLogits.create(SHAPE)
    consumer = SharedLogits.open(producer.handle)
    producer.write(logits(1, torch.float32))
    producer.write(logits(2, torch.float32)[:1].requires_grad_(), start=2)
    assert torch.equal(consumer[:], torch.cat([logits(1, torch.float32)[:2], consumer[2:3]]))
    assert torch.equal(consumer[2:], logits(2, torch.float32)[:1])
    assert not consumer[:].requires_grad
    assert not producer[:].requires_grad
    assert consumer[1:1].shape == (0, 2, 4)
    assert consumer[0:2].data_ptr() == consumer[:].data_ptr()
    assert consumer[:].data_ptr() % 64 == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn])
def test_dtypes_are_kept(dtype):
    producer = SharedLogits.create(SHAPE, dtype=dtype)
    producer._logits.copy_(logits(3, torch.float32).to(dtype))
    read = SharedLogits.open(producer.handle)[0:3]
    assert read.dtype == dtype
    assert torch.equal(read.float(), logits(3, torch.float32).to(dtype).float())


def test_refusals():
    producer = SharedLogits.create(SHAPE)
    for wrong in (slice(0, 4), slice(-1, 3), slice(2, 1), slice(0, 3, 2)):
        with pytest.raises(IndexError, match="needs a slice within 0 to 3, got slice"):
            producer[wrong]
    with pytest.raises(ValueError, match=r"needs logits of \[rows, 2, 4\] in torch.float32, got"):
        producer.write(torch.zeros(3, 2, 5))
    with pytest.raises(ValueError, match=r"got \[3, 2, 4\] in torch.bfloat16"):
        producer.write(torch.zeros(SHAPE, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="needs rows within 0 to 3, got 2 to 4"):
        producer.write(torch.zeros(2, 2, 4), start=2)
    assert producer.writes == 0
    for shape, options in (
        ((0, 2, 4), {}),
        (SHAPE, {"dtype": torch.int64}),
        (SHAPE, {"device": "meta"}),
    ):
        with pytest.raises(ValueError, match="needs sizes from 1 up, a floating dtype and a dev"):
            SharedLogits.create(shape, **options)
    assert isinstance(producer.handle, SharedLogitsHandle)


def test_a_number_is_no_slice_and_a_loop_does_not_end_at_once():
    producer = SharedLogits.create(SHAPE)
    for wrong, shown in ((0, r"\[0:1\]"), (2, r"\[2:3\]"), (-1, r"\[0:1\]"), ((0, 1), r"\[0:1\]")):
        with pytest.raises(TypeError, match=f"^SharedLogits needs a slice, such as {shown}, got "):
            producer[wrong]
    with pytest.raises(TypeError, match="needs a slice"):
        list(producer)


@pytest.mark.parametrize("failing", ["ftruncate", "mmap", "size"])
def test_a_buffer_that_cannot_be_made_leaves_no_file_open(failing, monkeypatch):
    def fail(*_):
        raise OSError(12, "no memory")

    shape = SHAPE
    if failing == "ftruncate":
        monkeypatch.setattr(os, "ftruncate", fail)
    elif failing == "mmap":
        monkeypatch.setattr("termwise.lm._shared_logits.mmap.mmap", fail)
    else:
        shape = (2**40, 2**20, 2**20)
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(RuntimeError, match=r"SharedLogits.create needs \d+ bytes of shared memory"):
        SharedLogits.create(shape)
    assert sorted(os.listdir("/proc/self/fd")) == before


_CUDA_CONSUMER = _CONSUMER.replace("import torch\n", "import torch; torch.cuda.init()\n")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="sharing by CUDA IPC needs a GPU")
def test_on_a_gpu_a_spawned_consumer_sees_each_write(spawn):
    producer = SharedLogits.create(SHAPE, dtype=torch.bfloat16, device="cuda")
    _, pipe = spawn(_CUDA_CONSUMER, "spawn")
    pipe.send(producer.handle)
    for step in (1, 2):
        producer.write(logits(step).cuda())
        values = logits(step)[1:3].float().tolist()
        assert ask(pipe, "slice") == (values, "torch.bfloat16", step)
        assert ask(pipe, "view") == values
    pipe.send("leave")
