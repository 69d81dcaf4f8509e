"""Every fence of the README and the pages is run: here, by doctest, or by the test it names."""

import argparse
import doctest
import re
import runpy
import shlex
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import checkouts
import pytest
import torch.distributed as dist

import termwise
from termwise.demo._command import RUNS, _parser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs/pages").rglob("*.md"))]
CI = (ROOT / ".ci/run").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Of the two forms that the site understands, the one that is no Python: formatters leave it alone.
SNIPPET = re.compile(r"--8<--\n([^:\n]+)(?::(.+))?\n--8<--\n")


@dataclass(frozen=True)
class Fence:
    page: Path
    line: int
    """Of the opening mark, from 1."""
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def fences_of(page: Path) -> list[Fence]:
    fences, opened = [], None
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        mark = re.match(r"^\s*(```+|~~~+)\s*(.*)$", line)
        if opened is None and mark:
            opened = (mark[1], number, mark[2].split(" ")[0], [])
        elif opened is not None and mark and mark[1] == opened[0] and not mark[2]:
            fences.append(Fence(page, opened[1], opened[2], "\n".join(opened[3]) + "\n"))
            opened = None
        elif opened is not None:
            opened[3].append(line)
    assert opened is None, f"{page}: the fence of line {opened[1]} does not end"
    return fences


FENCES = [fence for page in PAGES for fence in fences_of(page)]


def of(language: str) -> list[Fence]:
    return [fence for fence in FENCES if fence.language == language]


def test_there_are_fences_and_each_is_of_a_kind_that_is_run():
    assert len(FENCES) > 20
    strange = [str(one) for one in FENCES if one.language not in ("pycon", "python", "sh", "text")]
    assert strange == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_doctest_sees_every_line_of_a_pycon_fence_and_nothing_else(page):
    options = PROJECT["tool"]["pytest"]["ini_options"]
    assert "--doctest-glob=*.md" in options["addopts"]
    assert {"docs", "README.md"} <= set(options["testpaths"])
    examples = doctest.DocTestParser().get_examples(page.read_text(), page.name)
    inside = [fence for fence in fences_of(page) if fence.language == "pycon"]
    seen = {fence: [] for fence in inside}
    for example in examples:
        assert not example.options.get(doctest.SKIP), f"{page}:{example.lineno + 1} is skipped"
        first = example.lineno + 1
        last = first + len(example.source.splitlines()) + len(example.want.splitlines()) - 1
        around = [
            one for one in inside if one.line < first and last <= one.line + one.code.count("\n")
        ]
        assert len(around) == 1, f"{page}:{first} is run, and not within one pycon fence"
        seen[around[0]].append(example)
    for fence in inside:
        written = "".join(re.findall(r"^(?:>>>|\.\.\.) ?(.*\n)", fence.code, re.MULTILINE))
        assert written, f"{fence} has nothing that is run"
        assert written == "".join(one.source for one in seen[fence]), str(fence)
        assert fence.code.startswith(">>> "), f"{fence} begins with what is not run"
        # Without it the end of the fence would be taken for what is printed.
        assert fence.code.endswith("\n\n"), f"{fence} needs an empty line at its end"


def scripts_run() -> set[str]:
    """List what tests of the scripts and examples run, in tests/peers on request."""
    on_request = (ROOT / "tests/peers/test_examples.py").read_text()
    in_tests = (ROOT / "tests/docs/test_example_losses.py").read_text()
    paths = [*(ROOT / "docs/pages/distributed").glob("*.py")]
    for path in (ROOT / "docs/pages/examples").glob("*.py"):
        if f"\nimport {path.stem}\n" in on_request or f'    "{path.stem}": [' in in_tests:
            paths.append(path)
    return {str(path.relative_to(ROOT)) for path in paths}


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


PYTHON_PAGES = sorted({fence.page for fence in of("python")})


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_fences_of_a_page_run_in_order_with_a_group_of_one_rank(page, one_rank):
    namespace = {"__name__": "page"}
    for fence in fences_of(page):
        if fence.language != "python":
            continue
        if "--8<--" in fence.code:
            included = SNIPPET.fullmatch(fence.code)
            assert included, f"{fence}: code beside an included script is not run"
            path, section = included.groups()
            assert path in scripts_run(), f"{fence}: no test runs {path}"
            check_section((ROOT / path).read_text(), section)
            continue
        code = "\n" * fence.line + fence.code  # so that a traceback names the page's line
        exec(compile(code, str(page), "exec"), namespace)


def check_section(text: str, section: str | None) -> None:
    if section is not None:
        start, end = (f"# --8<-- [{end}:{section}]" for end in ("start", "end"))
        assert text.count(start) == text.count(end) == 1
        assert text.index(start) < text.index(end)


def commands() -> list[tuple[Fence, str]]:
    return [
        (fence, command.strip())
        for fence in of("sh")
        for line in fence.code.splitlines()
        if line.strip()
        for command in line.split("&&")
    ]


@pytest.mark.parametrize(("fence", "command"), commands(), ids=lambda x: str(x)[:60])
def test_a_command_is_one_that_a_test_runs_or_that_could_run(fence, command):
    words = shlex.split(command)
    if words[:3] == ["python", "-m", "pip"]:
        check_install(words[3:])
    elif words[:3] == ["python", "-m", "build"]:
        assert " ".join(words) == "python -m build --wheel --outdir dist ."
        assert "\npython -m build --wheel --outdir " in CI
    elif words == ["python", "-m", "pytest"]:
        # A step of .ci/run takes this line out of the README and runs it.
        assert "grep -F 'python -m pytest' README.md" in CI
        assert command in (ROOT / "README.md").read_text()
    elif words[:-1] == ["python", "-m", "pytest", "-q", "-n0", "--tb=line", "-k"]:
        assert (ROOT / f"tests/losses/{words[-1]}.py").is_file()
    elif words == ["python", "-m", "pytest", "tests/peers"]:  # run on request
        assert list((ROOT / "tests/peers").glob("test_*.py"))
    elif words[0] == "export" or words == ["python", "tests/peers/checkouts.py", "|", "sh"]:
        variable = words[1].partition("=")[0] if words[0] == "export" else "TERMWISE_CHECKOUTS"
        assert all(f"${variable}/" in line for line in checkouts.commands())
    elif words[:3] == ["python", "-m", "termwise"]:
        check_demo(words[3:])
    elif words[0] == "torchrun" and words[1] == "--nproc-per-node":
        if words[3:5] == ["-m", "termwise"]:
            check_demo(words[5:])
        else:
            assert words[3] in scripts_run(), f"no test runs {words[3]}"
            assert len(words) == 4
    elif words[0] == "python" and words[1].startswith("tests/bench/"):
        assert len(words) == 2
        check_bench(ROOT / words[1])
    elif words[:2] in (["mkdocs", "serve"], ["mkdocs", "build"]):
        assert words[2:] == ["-f", "docs/mkdocs.yml"]
        # Not --quiet, which keeps warnings from --strict.
        assert "mkdocs build --strict --config-file docs/mkdocs.yml" in CI
    elif words[:2] == ["mike", "deploy"]:
        version = termwise.__version__.rpartition(".")[0]
        assert words[2:4] == ["--config-file", "docs/mkdocs.yml"]
        assert words[4:] == ["--update-aliases", version, "latest"]
        assert "provider: mike" in (ROOT / "docs/mkdocs.yml").read_text()
    elif words[0] == ".ci/release":
        assert (ROOT / words[0]).is_file()
        assert words[1:] in ([], ["--dry-run"])
    elif words[0] in ("ruff", "pyright"):
        assert f"\n{command}\n" in CI
    else:
        pytest.fail(f"{fence}: nothing runs {command!r}")


def check_install(words: list[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("install", choices=["install"])
    parser.add_argument("-c")
    parser.add_argument("-e", action="store_true")
    parser.add_argument("what")
    options = parser.parse_args(words)
    assert options.c is None or (ROOT / options.c).is_file()
    name, _, extra = options.what.rstrip("]").partition("[")
    assert name == "." or (name == "termwise" and not options.e)
    assert set(extra.split(",")) <= {"", *PROJECT["project"]["optional-dependencies"]}


def check_demo(words: list[str]) -> None:
    options = _parser().parse_args(words)  # refuses what it does not know
    assert set(options.runs) <= set(RUNS) or options.runs == ["check"]


def check_bench(path: Path) -> None:
    sys.path.insert(0, str(path.parent))
    try:
        module = runpy.run_path(str(path), run_name="imported")
    finally:
        sys.path.remove(str(path.parent))
    assert callable(module["main"])


def test_each_bench_stands_on_a_page_and_pages_name_only_those_that_import():
    benches = {path.name for path in (ROOT / "tests/bench").glob("bench_*.py")}
    named = {name for page in PAGES for name in re.findall(r"bench_\w+\.py", page.read_text())}
    assert named == benches
    for name in sorted(benches):
        check_bench(ROOT / "tests/bench" / name)
