"""`python -m termwise` as a user calls it, and the views that VICReg's run draws."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from termwise.demo import _distill, _vicreg
from termwise.demo._command import main

TERMS = {
    "vicreg": {"loss", "sim", "var", "cov", "std"},
    "targeted-variance": {"loss", "cross_entropy", "squared_error", "variance"},
}
OBJECTIVES = {
    "vanilla": ["mse", "sparsity", "l0", "l1"],
    "topk": ["mse", "aux", "l0", "n_dead"],
    "jumprelu": ["mse", "sparsity", "pre_act", "l0", "threshold_mean"],
    "matryoshka": ["mse", *(f"mse_per_prefix[{i}]" for i in range(5)), "sparsity", "l0", "l1"],
}
STUDENTS = ["cross-entropy only", "projected KL", "partitioned"]
RUNS = [*TERMS, "sae", "distill"]
MEASURED = {
    "vicreg": {f"probe_accuracy_{x}" for x in ("raw_pixels", "untrained", "collapsed", "trained")},
    "targeted-variance": {
        "variance_before",
        "variance_after",
        "variance_target",
        "variance_after_without_the_term",
        "cross_entropy_trained",
        "cross_entropy_without_the_term",
        "cross_entropy_unigram",
        "cross_entropy_uniform",
    },
}


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def termwise(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "termwise", *arguments, cwd=cwd, **environment)


def five_steps(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = termwise(*arguments, "--steps", "5", "--json", "terms.json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def test_no_name_means_all_runs_with_table_line_figure_and_json_and_they_repeat(tmp_path):
    done = five_steps(cwd=tmp_path)
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("measured: ")]
    assert len(lines) == len(RUNS)
    assert all("held-out" in line for line in lines)
    results = json.loads((tmp_path / "terms.json").read_text())
    assert list(results) == RUNS
    for run in RUNS:
        png = (tmp_path / "termwise-demo" / f"{run}.png").read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(png) > 20_000
    for run, terms in TERMS.items():
        assert all(f" {term} " in done.stdout for term in terms)
        check_json(results[run], terms, MEASURED[run])
    assert all(f" {objective} " in done.stdout for objective in OBJECTIVES)
    check_frontier(results["sae"])
    assert all(f" {student} " in done.stdout for student in STUDENTS)
    check_students(results["distill"])

    five_steps("--seed", "0", cwd=tmp_path)
    assert json.loads((tmp_path / "terms.json").read_text()) == results


def check_json(result: dict[str, dict], terms: set[str], measured: set[str]) -> None:
    assert set(result["terms"]) == set(result["control"]["terms"]) == terms
    check_curves(result["terms"])
    assert set(result["measured"]) == measured
    assert all(type(value) is float for value in result["measured"].values())


def check_curves(terms: dict[str, dict]) -> None:
    for term in terms.values():
        assert len(term["curve"]) == 5
        assert (term["first"], term["last"]) == (term["curve"][0], term["curve"][-1])
        assert all(type(value) is float for value in term["curve"])


def check_frontier(result: dict) -> None:
    check_curves(result["network"]["terms"])
    assert 0 <= result["measured"]["network_accuracy"] <= 1
    trainings = result["trainings"]
    assert [one["objective"] for one in trainings] == [name for name in OBJECTIVES for _ in "123"]
    assert len({(one["objective"], one["setting"]) for one in trainings}) == len(trainings)
    for one in trainings:
        assert list(one["terms"]) == ["loss", *OBJECTIVES[one["objective"]]]
        check_curves(one["terms"])
        measured = one["measured"]
        assert set(measured) == {"fvu", "fvu_of_few", "l0", "dead"}
        assert measured["fvu"] > 0
        assert measured["fvu_of_few"] > 0
        assert 0 <= measured["l0"] <= 256 - measured["dead"]
        if one["objective"] == "topk":
            assert measured["l0"] == pytest.approx(int(one["setting"].removeprefix("k ")), rel=0.01)


def check_students(result: dict) -> None:
    check_curves(result["teacher"]["terms"])
    assert list(result["students"]) == STUDENTS
    for name, student in result["students"].items():
        taught = [] if name == "cross-entropy only" else ["distillation", "top1_agreement"]
        assert list(student["terms"]) == ["loss", "cross_entropy", *taught]
        check_curves(student["terms"])
        # They start from the same weights.
        assert student["held_out_bits_per_byte"]["0"] == pytest.approx(3.7, abs=0.3)
        last = student["held_out_bits_per_byte"]["5"]
        assert 0 < last < 8
        measured = f"bits_per_byte_{name.lower().replace(' ', '_').replace('-', '_')}"
        assert result["measured"][measured] == last
    assert result["measured"]["common_tokens"] == 511


def test_a_student_that_is_taught_reads_unseen_text_better(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Half of its steps: enough for the projected KL, not for the partitioned loss.
    assert main(["distill", "--steps", "80", "--json", "terms.json"]) == 0
    measured = json.loads((tmp_path / "terms.json").read_text())["distill"]["measured"]
    alone, taught = (
        measured[f"bits_per_byte_{name}"] for name in ("cross_entropy_only", "projected_kl")
    )
    assert measured["bits_per_byte_teacher"] < taught < alone - 0.02


def test_the_sentence_drawn_is_cut_into_chunks_of_equal_text():
    passages = [
        "Tokens are cut in two ways. Both of them end where a chunk of text ends. And so on"
    ]
    sides = [_distill._Side(tokens, passages * 3, passages) for tokens in (300, 264)]
    chunks = _distill._align(passages[0], *sides)
    ends = [0]
    for chunk in chunks:
        assert chunk.student[0][0] == chunk.teacher[0][0] == ends[-1]
        assert chunk.student[-1][1] == chunk.teacher[-1][1]
        ends.append(chunk.student[-1][1])
    assert ends[-1] == len(passages[0])
    assert _distill._sentence_of("\n".join(passages)).startswith("Tokens are cut")
    text = "It is short. This sentence has the length that fits a line of the figure well. And on."
    assert _distill._sentence_of(text) == text[13:78]


def test_sparse_autoencoders_trade_error_for_sparsity(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sae", "--steps", "25", "--json", "terms.json"]) == 0
    trainings = json.loads((tmp_path / "terms.json").read_text())["sae"]["trainings"]
    for objective in OBJECTIVES:
        points = sorted(
            (one["measured"]["l0"], one["measured"]["fvu"])
            for one in trainings
            if one["objective"] == objective
        )
        errors = [fvu for _, fvu in points]
        assert errors == sorted(errors, reverse=True), objective
        assert max(errors) < 1, objective


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_ranks_that_share_the_batch_report_the_terms_of_one_process(tmp_path):
    five_steps("vicreg", cwd=tmp_path)
    alone = json.loads((tmp_path / "terms.json").read_text())["vicreg"]
    launcher = [
        *("-m", "torch.distributed.run", "--nproc-per-node=2"),
        *("--master-addr=127.0.0.1", f"--master-port={free_port()}"),
    ]
    command = ["-m", "termwise", "vicreg", "--steps", "5", "--json", "terms.json"]
    done = python(*launcher, *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("measured: ") == 1
    together = json.loads((tmp_path / "terms.json").read_text())["vicreg"]
    for name in TERMS["vicreg"]:
        expected = alone["terms"][name]["curve"]
        assert together["terms"][name]["curve"] == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vicregg"], "unknown run 'vicregg', there are: vicreg, targeted-variance, sae, distill"),
        (["--steps", "0"], "argument --steps: needs a whole number from 1 up, got '0'"),
        (["--steps", "-3"], "argument --steps: needs a whole number from 1 up, got '-3'"),
        (["--seed", "x"], "argument --seed: needs a whole number"),
        (["--device", "cuda:99"], "the device 'cuda:99' is not there"),
        (["--device", "toaster"], "the device 'toaster' is not there"),
        (["--device", "meta"], "the device 'meta' is not there"),
        (["--out", "file/inside"], "cannot write to --out file/inside: Not a directory"),
        (["--out", "file"], "cannot write to --out file: File exists"),
        (["--json", "none/x.json"], "cannot write --json none/x.json: No such file or directory"),
        (["--json", "."], "cannot write --json .: Is a directory"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"python -m termwise: {message}")
    assert printed.err.count("\n") == 1


def test_the_process_leaves_with_code_2_and_no_traceback(tmp_path):
    done = termwise("vicreg", "nothing", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["sklearn", "matplotlib", "rich", "tokenizers"])
def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch, capsys, module):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)  # so that importing it fails
    assert main(["vicreg", "--steps", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    expected = f'python -m termwise: {module} cannot be imported: pip install "termwise[demo]"\n'
    assert printed.err == expected
    assert not list(tmp_path.iterdir())


def test_help_and_list_need_no_extra_and_import_termwise_imports_none_of_it(tmp_path):
    for module in ("sklearn", "matplotlib", "rich", "tokenizers"):
        (tmp_path / f"{module}.py").write_text("raise ImportError")
    assert "--nproc-per-node 2" in termwise("--help", cwd=tmp_path).stdout
    listed = termwise("--list", cwd=tmp_path)
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == RUNS
    code = (
        "import sys, termwise; "
        "extra = {'sklearn', 'matplotlib', 'rich', 'tokenizers', 'termwise.demo'}; "
        "print(extra & sys.modules.keys())"
    )
    assert python("-c", code, cwd=tmp_path).stdout == "set()\n"


def test_two_views_differ_stay_images_and_repeat_by_the_generator():
    images = torch.rand(32, 8, 8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    state = torch.get_rng_state()
    first, second = _vicreg.augment(images, generator), _vicreg.augment(images, generator)
    again = _vicreg.augment(images, torch.Generator().manual_seed(2))
    for view in (first, second):
        assert view.shape == images.shape
        assert view.dtype == images.dtype
        assert view.min() >= 0
        assert view.max() <= 1
    assert torch.equal(first, again)
    assert not (first == second).flatten(1).all(1).any()
    # A view is still of its own image: nearer to it, on average, than to another.
    distance = (first - images).square().mean()
    assert distance < (first - images.roll(1, 0)).square().mean()
    assert torch.equal(torch.get_rng_state(), state)
