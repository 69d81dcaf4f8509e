"""Times and peak memory of two implementations of one formula, side by side.

One thread, median of alternating runs in one process; peak memory in fresh processes, as the
growth of the resident set over what the inputs and one small call had taken.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def seconds(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Time each function in turn, repeats times over, and give the medians."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def peak_in_fresh_processes(script: str, *arguments: object, times: int = 5) -> float:
    """Run `script --peak arguments` some times over, and give the median of the bytes it prints.

    The allocator reuses freed blocks or not as their addresses fall, which are random.
    """
    command = [sys.executable, script, "--peak", *map(str, arguments)]
    return statistics.median(
        int(subprocess.run(command, check=True, capture_output=True, timeout=600).stdout)
        for _ in range(times)
    )


def peak_growth(warm_up: Callable[[], object], function: Callable[[], object]) -> int:
    """Return how far one call lifts this process's peak resident set, in bytes (Linux only).

    The warm-up, on inputs too small to count, loads what the first call of any size loads.
    """
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
    before = _peak()
    function()
    return _peak() - before


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
