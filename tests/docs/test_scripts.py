"""The scripts of the distributed guide, the first by torchrun as the guide says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIRST, *SCRIPTS = sorted((ROOT / "docs/pages/distributed").glob("*.py"))
RANKS = {script: 4 if script.stem == "titan_loop" else 2 for script in SCRIPTS}


def python(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run each script over its ranks, and leave in a folder of its name what it printed."""
    folder = tmp_path_factory.mktemp("scripts")
    jobs = []
    for script in SCRIPTS:
        (folder / script.stem).mkdir()
        jobs += [str(folder / script.stem), str(RANKS[script]), str(script)]
    modules = "termwise,torch._dynamo,torch.distributed.fsdp,torch.distributed.tensor.parallel"
    done = python(str(ROOT / "tests/fork_ranks.py"), modules, *jobs)
    assert done.returncode == 0, done.stderr
    return folder


def check(out: str, err: str) -> None:
    assert "Warning" not in err, err
    assert "gloo" not in err, err  # a thread that may abort the process at its end
    assert len(re.findall(r"^step \d: loss \d+\.\d+$", out, re.MULTILINE)) == 4
    found = re.search(r"^largest difference from one process: (\S+)$", out, re.MULTILINE)
    assert found is not None, out
    assert float(found[1]) <= 1e-12


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_over_ranks_has_the_gradients_of_one_process(script, folder):
    out, err, codes = ((folder / script.stem / one).read_text() for one in ("out", "err", "codes"))
    assert codes == " ".join(["0"] * RANKS[script]), err
    check(out, err)


def test_torchrun_runs_the_first_script():
    launcher = ["-m", "torch.distributed.run", "--rdzv-backend=c10d"]
    launcher += ["--rdzv-endpoint=127.0.0.1:0", "--nproc-per-node=2"]
    done = python(*launcher, str(ROOT / "tests/show_threads.py"), str(FIRST))
    assert done.returncode == 0, done.stderr
    check(done.stdout, done.stderr)
