"""The command line: parse it, report invalid input before any training, and train."""

import argparse
import dataclasses
import functools
import importlib
import os
import sys
import tempfile
import time
import webbrowser
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from . import _distill, _energy, _joint_embedding, _report, _sae, _targeted_variance, _vicreg
from ._check import check
from ._training import Run, Setting

RUNS = {
    "vicreg": _vicreg.RUN,
    "joint-embedding": _joint_embedding.RUN,
    "targeted-variance": _targeted_variance.RUN,
    "sae": _sae.RUN,
    "energy": _energy.RUN,
    "distill": _distill.RUN,
}

_EXTRA = ("sklearn", "matplotlib", "rich", "tokenizers")
_EPILOG = """\
examples:
  python -m termwise --list
  python -m termwise check --device cuda
  python -m termwise vicreg --steps 100 --json terms.json
  torchrun --nproc-per-node 2 -m termwise vicreg
"""


class _RefusedError(Exception):
    """Invalid input; the message is printed to stderr in one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _RefusedError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ranks:
    """The rank of this process under torchrun; a single rank without it."""

    rank: int
    local_rank: int
    count: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for invalid input."""
    ranks = _ranks()
    try:
        options = _parser().parse_args(arguments)
        if options.runs == ["check"]:
            return check(_device(options.device, ranks))
        if options.list:
            _list(ranks)
            return 0
        _train(_chosen(options.runs), options, ranks)
    except _RefusedError as refusal:
        if ranks.rank == 0:
            print(f"python -m termwise: {refusal}", file=sys.stderr)
        return 2
    return 0


def leave(code: int) -> NoReturn:
    """End the process with an exit code."""
    if _ranks().count == 1:
        sys.exit(code)
    # gloo's threads outlive the group, and can abort an interpreter that shuts down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m termwise",
        description=(
            "Train small models on real data, with losses of each family. Each run prints a table\n"
            "of its terms and a result on held-out data, and draws a figure.\n"
            "Nothing is downloaded, and a run takes seconds on a CPU."
        ),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="names of runs (default: all), or check, which tests the library on this machine",
    )
    parser.add_argument("--list", action="store_true", help="list the runs and exit")
    steps = ", ".join(f"{run.steps} for {name}" for name, run in RUNS.items())
    parser.add_argument(
        "--steps", type=_at_least_one, metavar="N", help=f"training steps (default: {steps})"
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        metavar="N",
        help="seed of data, views and weights (default: 0)",
    )
    parser.add_argument(
        "--device", default="cpu", metavar="D", help="device, such as cuda (default: cpu)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("termwise-demo"),
        metavar="DIR",
        help="folder for the figures and the report, index.html (default: termwise-demo)",
    )
    parser.add_argument("--open", action="store_true", help="open the report at the end")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all curves and measurements to a file"
    )
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs an integer of 1 or more, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"needs an integer from 0 to 2**63 - 1, got {text!r}")
    return int(text)


def _list(ranks: _Ranks) -> None:
    if ranks.rank == 0:
        width = max(len(name) for name in RUNS)
        for name, run in RUNS.items():
            print(f"{name:{width}}  {run.about}")


def _chosen(names: Sequence[str]) -> dict[str, Run]:
    for name in names:
        if name not in RUNS:
            raise _RefusedError(f"unknown run {name!r}, choose from: {', '.join(RUNS)}")
    return {name: RUNS[name] for name in names} if names else RUNS


def _train(runs: dict[str, Run], options: argparse.Namespace, ranks: _Ranks) -> None:
    device = _device(options.device, ranks)
    _check_extra()
    if ranks.rank == 0:
        _check_folder(options.out)
        _check_file(options.json)
    from rich.console import Console  # after the check, because only a run needs the extra

    torch.set_num_threads(1)  # models this small are slower with more threads
    console = Console(quiet=ranks.rank != 0)
    finished: dict[str, _report.Finished] = {}
    with _process_group(device, ranks) as group:
        for name, run in runs.items():
            if group is not None and not run.shared:
                console.print(f"{name}: only rank 0 trains, this run does not use several ranks")
                if ranks.rank != 0:
                    continue
            setting = Setting(
                steps=options.steps or run.steps,
                seed=options.seed,
                device=device,
                group=group if run.shared else None,
                follow=functools.partial(_report.show_progress, console),
            )
            start = time.perf_counter()
            result = run.train(setting)
            if ranks.rank == 0:
                figure = options.out / f"{name}.png"
                _report.draw(figure, name, result)
                seconds = time.perf_counter() - start
                command = f"python -m termwise {name} --steps {setting.steps} --seed {setting.seed}"
                finished[name] = _report.Finished(result, seconds, figure, command)
                _report.print_result(console, name, result, seconds, figure)
    if ranks.rank != 0:
        return
    page = (options.out / "index.html").resolve()
    _report.write_page(page, finished)
    console.print(f"report: {page.as_uri()}", soft_wrap=True, highlight=False)
    if options.open:
        webbrowser.open(page.as_uri())
    if options.json is not None:
        _report.write_json(options.json, {name: one.result for name, one in finished.items()})


def _ranks() -> _Ranks:
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return _Ranks(rank=0, local_rank=0, count=1)
    return _Ranks(
        rank=int(os.environ["RANK"]),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        count=int(os.environ["WORLD_SIZE"]),
    )


def _device(text: str, ranks: _Ranks) -> torch.device:
    """Return the device, on CUDA a different one for each rank; raise if it is not available."""
    try:
        device = torch.device(text)
        if device.type == "cuda" and ranks.count > 1:
            device = torch.device("cuda", ranks.local_rank)
        torch.zeros(1, device=device).cpu()
    # AssertionError if PyTorch is not built for the device, NotImplementedError for meta.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise _RefusedError(f"device {text!r} is not available: {reason}") from error
    return device


def _check_extra() -> None:
    for module in _EXTRA:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise _RefusedError(
                f'{module} cannot be imported: pip install "termwise[demo]"'
            ) from error


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _RefusedError(f"cannot write to --out {folder}: {error.strerror}") from error


def _check_file(file: Path | None) -> None:
    if file is None:
        return
    is_new = not file.exists()
    try:
        with file.open("a"):
            pass
    except OSError as error:
        raise _RefusedError(f"cannot write --json {file}: {error.strerror}") from error
    if is_new:
        file.unlink()


@contextmanager
def _process_group(
    device: torch.device, ranks: _Ranks
) -> Generator[ProcessGroup | None, None, None]:
    """Yield the process group of torchrun's ranks, or None if there is only one rank."""
    if ranks.count == 1:
        yield None
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
