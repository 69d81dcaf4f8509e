"""The losses of other libraries, called beside ours on the same tensors: run on request.

    python -m pip install -c tests/peers/constraints.txt -e ".[test,peers]"
    python -m pytest tests/peers

One environment, of Python 3.11, holds them all; `constraints.txt` has its exact versions. The run
is refused where a peer of another version is installed, so that what passed here is what the
*Coming from* pages name (`tests/docs/test_peers.py` compares those with `constraints.txt`). To move
on to newer releases, change the pins, run it, and bring the pages to what it finds.

lejepa, DINOv2, DINOv3 and solo-learn are called from checkouts: `checkouts.py` says how their code
is found, and at which commits. Without it, their tests are skipped.

Nothing is downloaded: models are tiny and random, tokenizers are trained by the tests.
"""

import checkouts
import pytest
from installed import PEERS, pins, version

INSTALL = 'python -m pip install -c tests/peers/constraints.txt -e ".[test,peers]"'


def pytest_configure() -> None:
    pinned = pins()
    other = [f"{name} is {version(name)}, not {pinned[name]}" for name in PEERS]
    other = [said for name, said in zip(PEERS, other, strict=True) if version(name) != pinned[name]]
    if other:
        pytest.exit(f"tests/peers needs other versions ({'; '.join(other)}): {INSTALL}", 4)
    if wrong := checkouts.wrong():
        pytest.exit("\n".join(["tests/peers needs:", *checkouts.commands(), *wrong]), 4)


def pytest_report_header() -> str:
    return "peers: " + ", ".join(f"{name} {version(name)}" for name in PEERS)
