"""Gloo ranks that start once and run one case after another.

A case is a function in `cases.py`: `case(group, *arguments)`, run on every rank with that rank's
own arguments. Ranks are processes of this machine that meet through a file.
"""

import datetime
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 40


def rows(sizes: Sequence[int], columns: int = 4, seed: int = 0) -> list[torch.Tensor]:
    """Give each rank rows of a different scale and place."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, columns, generator=generator, dtype=torch.float64) * (rank + 0.5) + rank
        for rank, n in enumerate(sizes)
    ]


class Ranks:
    """Ranks, three unless told, and the group of the first two of them."""

    def __init__(self, folder: Path, count: int = 3) -> None:
        # One process imports, and the ranks are its copies: eight imports would take a minute.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["termwise.lm", "termwise.sae", "torch.distributed.fsdp"])
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, count, str(folder / "store"), theirs), daemon=True
            )
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def __call__(self, case: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """Run a case on as many ranks as each sequence of arguments has elements."""
        (world,) = {len(values) for values in arguments}
        for rank in range(world):
            mine = [values[rank] for values in arguments]
            self._pipes[rank].send((case, world, mine))
        answers = []
        for rank, pipe in enumerate(self._pipes[:world]):
            if not pipe.poll(SECONDS):
                raise TimeoutError(f"rank {rank} did not answer {case.__name__}")
            answers.append(pipe.recv())
        failures = [text for failed, text in answers if failed]
        if failures:
            raise RuntimeError("\n".join(failures))
        return [result for _, result in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                process.kill()


def _serve(rank: int, count: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, count),
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    groups = {2: dist.new_group([0, 1]), count: dist.group.WORLD}
    while (message := pipe.recv()) is not None:
        case, world, arguments = message
        try:
            pipe.send((False, case(groups[world], *arguments)))
        except BaseException:
            pipe.send((True, f"rank {rank}: {traceback.format_exc()}"))
    dist.destroy_process_group()
