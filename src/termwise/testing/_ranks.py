"""Processes on this machine that form process groups, to test losses over ranks."""

import contextlib
import datetime
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

import torch
import torch.distributed as dist

_SECONDS: Final = 40


class Ranks:
    """Processes with gloo process groups that run functions until they are closed.

    Starting them takes seconds, a call takes milliseconds: share one instance between tests. Each
    rank uses one thread. The ranks find each other through a temporary file, and end with `close()`
    or with the `with` block.

    Args:
        count: number of ranks, at least 2.

    Raises:
        ValueError: if `count` is below 2.

    Examples:
        ```python
        @pytest.fixture(scope="session")
        def ranks():
            with testing.Ranks(3) as running:
                yield running
        ```
    """

    def __init__(self, count: int = 3) -> None:
        if count < 2:
            raise ValueError(f"Ranks needs a count of 2 or more, got {count}")
        self.count = count
        self._start()

    def _start(self) -> None:
        count = self.count
        self._folder = tempfile.TemporaryDirectory()
        store = (Path(self._folder.name) / "store").as_uri()
        # One process imports, and the ranks are forks of it: eight imports would take a minute.
        context = multiprocessing.get_context("forkserver")
        # A custom operator imports Dynamo when it is first called.
        context.set_forkserver_preload(
            ["termwise.testing", "torch.distributed.fsdp", "torch._dynamo"]
        )
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, store, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """Run `function(group, *arguments_of_the_rank)` on each rank.

        The ranks are restarted after a timeout, and if one of them ends or raises an error while
        others wait for it.

        Args:
            function: the function. It is pickled, so it must be importable from a module. Its first
                argument is the process group of the ranks that run it.
            *arguments: for each other parameter a sequence with one value for each rank: 2 values,
                or `count`.

        Returns:
            The results of the ranks, in order.

        Raises:
            ValueError: if the arguments are for another number of ranks.
            RuntimeError: if a rank raises an error; the message contains the tracebacks.
            TimeoutError: if a rank does not answer within 40 seconds.
        """
        (world,) = {len(values) for values in arguments}
        if world not in (2, self.count):
            raise ValueError(f"Ranks needs arguments for 2 or {self.count} ranks, got {world}")
        for rank in range(world):
            self._pipes[rank].send((function, world, [values[rank] for values in arguments]))
        answers: dict[int, tuple[bool, Any]] = {}
        ended = False
        end = time.monotonic() + _SECONDS
        while len(answers) < world and time.monotonic() < end:
            left = {self._pipes[rank]: rank for rank in range(world) if rank not in answers}
            for pipe in cast("list[Connection]", wait(left, max(0.0, end - time.monotonic()))):
                rank = left[pipe]
                try:
                    failed, result = pipe.recv()
                except EOFError:
                    failed, result, ended = True, f"rank {rank} has ended", True
                answers[rank] = failed, result
                if failed:  # the others may be waiting for it
                    end = min(end, time.monotonic() + 2)
        failures = [text for failed, text in answers.values() if failed]
        silent = [rank for rank in range(world) if rank not in answers]
        if silent or ended:
            self._end(0)
            self._start()
        if failures:
            raise RuntimeError("\n".join(failures))
        if silent:
            raise TimeoutError(f"ranks {silent} did not answer within {_SECONDS} seconds")
        return [answers[rank][1] for rank in range(world)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the ranks."""
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # of a rank that has ended
                pipe.send(None)
        self._end(20)

    def _end(self, seconds: float) -> None:
        for process in self._processes:
            process.join(seconds)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def _serve(rank: int, count: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=store,
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=_SECONDS),
    )
    groups = {2: dist.new_group([0, 1]), count: dist.group.WORLD}
    while (message := pipe.recv()) is not None:
        function, world, arguments = message
        try:
            pipe.send((False, function(groups[world], *arguments)))
        except BaseException:
            pipe.send((True, f"rank {rank}: {traceback.format_exc()}"))
    dist.destroy_process_group()
