"""What the benches measure, by name: each loss beside the best plain formula, on the same inputs.

Each is declared with its loss, in tests/losses. `run.py` times the cases that have sizes,
`launches.py` counts the kernels of those that have a number of rows.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from losses import declared
from losses._bench import Case as Case
from losses._bench import Loss as Loss


def itself(function: Callable[..., object]) -> Loss:
    return lambda *inputs: function(*inputs).loss


DECLARED = {
    ", ".join(filter(None, [f"{family}.{one.function.__name__}", label])): (one, case)
    for family in ("lm", "sae", "joint_embedding", "energy")
    for one in declared()
    if one.function.__module__.split(".")[1] == family
    for label, case in one.bench.items()
}
CASES = {
    name: case if case.ours else dataclasses.replace(case, ours=itself(one.function))
    for name, (one, case) in DECLARED.items()
}
PATHS = {name: one.paths for name, (one, _) in DECLARED.items()}
