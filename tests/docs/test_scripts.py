"""The scripts of the distributed guide, run by torchrun as the guide says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "docs/pages/distributed").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_over_two_ranks_has_the_gradients_of_one_process(script):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d"),
            *("--rdzv-endpoint=127.0.0.1:0", "--nproc-per-node=2"),
            *(str(ROOT / "tests/show_threads.py"), str(script)),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert "gloo" not in done.stderr, done.stderr  # a thread that may abort the process at its end
    assert len(re.findall(r"^step \d: loss \d+\.\d+$", done.stdout, re.MULTILINE)) == 4
    found = re.search(r"^largest difference from one process: (\S+)$", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    assert float(found[1]) <= 1e-12
