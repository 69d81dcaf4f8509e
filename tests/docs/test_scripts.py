"""The scripts of the distributed guide, run by torchrun as the guide says."""

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPTS = sorted((Path(__file__).parents[2] / "docs/pages/distributed").glob("*.py"))
# The same two processes run one script after another; each of them ends with its exit code.
ALL = """
import runpy, sys
for path in sys.argv[1:]:
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as done:
        assert not done.code, path
"""


def test_the_scripts_over_two_ranks_have_the_gradients_of_one_process(tmp_path):
    (tmp_path / "all.py").write_text(ALL)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d"),
            *("--rdzv-endpoint=127.0.0.1:0", "--nproc-per-node=2", str(tmp_path / "all.py")),
            *map(str, SCRIPTS),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    steps = re.findall(r"^step \d: loss \d+\.\d+$", done.stdout, re.MULTILINE)
    assert len(steps) == 4 * len(SCRIPTS)
    found = re.findall(r"^largest difference from one process: (\S+)$", done.stdout, re.MULTILINE)
    assert len(found) == len(SCRIPTS) == 3, done.stdout
    assert all(float(number) <= 1e-12 for number in found)
