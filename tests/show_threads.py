"""Runs a script or a module, and names the threads that are left when the interpreter winds down.

One of gloo's that is still at work there aborts the process now and then: no run shows it reliably.

python tests/show_threads.py SCRIPT.py
python tests/show_threads.py -m MODULE [ARGUMENT...]
"""

import atexit
import runpy
import sys
from pathlib import Path


def show() -> None:
    """Name this process's threads, as Linux does."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    print("threads at the end:", *sorted(names), file=sys.stderr)


if __name__ == "__main__":
    atexit.register(show)
    sys.argv.pop(0)
    if sys.argv[0] == "-m":
        sys.argv.pop(0)
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
