"""Runs commands of Python, each in ranks that are copies of a process that has imported torch.

    python tests/fork_ranks.py IMPORT,IMPORT... FOLDER RANKS COMMAND [FOLDER RANKS COMMAND]...

A command is "SCRIPT.py" or "-m MODULE", with arguments. To import what it needs takes seconds, a
copy none. Ranks have the environment that torchrun gives them, a lone one has nothing of it. They
work in FOLDER, where `out`, `err` and `codes` then hold what they printed and how they ended; ranks
also name the threads that they end with, as show_threads.py does.
"""

import importlib
import os
import runpy
import shlex
import signal
import socket
import sys
import traceback
from pathlib import Path

from show_threads import show

SECONDS = 250


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(command: list[str]) -> int:
    """Run a script or a module as the main one, and return the code that it ends with."""
    try:
        if command[0] == "-m":
            sys.argv = command[1:]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fork(folder: Path, rank: int, count: int, port: int, command: list[str]) -> int:
    """Start a rank and return its process."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    signal.alarm(SECONDS)
    os.chdir(folder)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if count > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    code = run(command)
    if count > 1:
        show()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    modules, *rest = sys.argv[1:]
    for module in modules.split(","):
        importlib.import_module(module)
    for folder, count, command in zip(*[iter(rest)] * 3, strict=True):
        port, ranks = free_port(), range(int(count))
        words = shlex.split(command)
        processes = [fork(Path(folder), rank, len(ranks), port, words) for rank in ranks]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        (Path(folder) / "codes").write_text(" ".join(map(str, codes)))


if __name__ == "__main__":
    main()
