"""`python -m termwise` as a user calls it, and the views that VICReg's run draws."""

import base64
import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import termwise as tw
from termwise.demo import (
    _command,
    _comparison,
    _densities,
    _distill,
    _energy,
    _energy_digits,
    _joint_embedding,
    _report,
    _vicreg,
)
from termwise.demo._command import main
from termwise.demo._report import new_figure
from termwise.demo._training import Run, Setting
from termwise.energy import (
    ConditionalNoiseContrastiveTerms,
    ContrastiveDivergenceTerms,
    DenoisingScoreMatchingTerms,
    EnergyDiscrepancyTerms,
    FiniteDifferenceScoreMatchingTerms,
    MaximumLikelihoodTerms,
    NoiseContrastiveTerms,
    RankingNoiseContrastiveTerms,
    ScoreMatchingTerms,
    SlicedScoreMatchingTerms,
)
from termwise.joint_embedding import (
    BarlowTwinsTerms,
    DINOTerms,
    InfoNCETerms,
    LeJEPATerms,
    MultiViewVICRegTerms,
    SigmoidContrastiveTerms,
)

FORK_RANKS = Path(__file__).parents[1] / "fork_ranks.py"
# What the runs import, besides ours: once for all of them.
IMPORTS = "termwise.demo._command,matplotlib.figure,rich.console,sklearn.datasets,torch._dynamo"
TERMS = {
    "vicreg": {"loss", "sim", "var", "cov", "std", "rank"},
    "targeted-variance": {"loss", "cross_entropy", "squared_error", "variance"},
}
OBJECTIVES = {
    "vanilla": ["mse", "sparsity", "l0", "l1"],
    "topk": ["mse", "aux", "l0", "n_dead"],
    "jumprelu": ["mse", "sparsity", "pre_act", "l0", "threshold_mean"],
    "matryoshka": [
        "mse",
        *(f"mse_per_prefix[{i}]" for i in range(5)),
        "sparsity",
        "aux",
        "l0",
        "l1",
    ],
}
STUDENTS = ["cross-entropy only", "projected KL", "partitioned"]
LOSSES = {
    "maximum likelihood": MaximumLikelihoodTerms,
    "contrastive divergence": ContrastiveDivergenceTerms,
    "persistent CD": ContrastiveDivergenceTerms,
    "energy discrepancy": EnergyDiscrepancyTerms,
    "NCE": NoiseContrastiveTerms,
    "ranking NCE": RankingNoiseContrastiveTerms,
    "conditional NCE": ConditionalNoiseContrastiveTerms,
    "score matching": ScoreMatchingTerms,
    "sliced score matching": SlicedScoreMatchingTerms,
    "finite-difference SM": FiniteDifferenceScoreMatchingTerms,
    "denoising SM": DenoisingScoreMatchingTerms,
    "NCE without log q": NoiseContrastiveTerms,
}
VIEWS = {
    "InfoNCE": InfoNCETerms,
    "SigLIP": SigmoidContrastiveTerms,
    "Barlow Twins": BarlowTwinsTerms,
    "VICReg": MultiViewVICRegTerms,
    "LeJEPA": LeJEPATerms,
    "DINO": DINOTerms,
    "Barlow, no off-diagonal": BarlowTwinsTerms,
    "VICReg, no var, cov": MultiViewVICRegTerms,
    "DINO, no Sinkhorn": DINOTerms,
}
RUNS = ["vicreg", "joint-embedding", "targeted-variance", "sae", "energy", "distill"]
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


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def five_steps(tmp_path_factory):
    """Make all runs once, one over two ranks, and one that cannot be: where they wrote to."""
    folders = [tmp_path_factory.mktemp(name) for name in ("all", "two_ranks", "refused")]
    command = "--steps 5 --json terms.json"
    jobs = [str(folders[0]), "1", f"-m termwise {command}"]
    jobs += [str(folders[1]), "2", f"-m termwise vicreg {command}"]
    jobs += [str(folders[2]), "1", "-m termwise vicreg nothing"]
    done = python(str(FORK_RANKS), IMPORTS, *jobs, cwd=folders[0])
    assert done.returncode == 0, done.stderr
    return folders


@pytest.fixture
def nothing_drawn(monkeypatch):
    for part in ("draw", "write_page"):
        monkeypatch.setattr(_report, part, lambda *_: None)


def ended(folder: Path) -> tuple[str, str, str]:
    return tuple((folder / name).read_text() for name in ("codes", "out", "err"))


def test_no_name_means_all_runs_with_table_line_figure_and_json_and_they_repeat(
    five_steps, monkeypatch, nothing_drawn
):
    tmp_path = five_steps[0]
    codes, out, err = ended(tmp_path)
    assert (codes, err) == ("0", "")
    assert "\x1b" not in out
    assert "\r" not in out
    lines = [line for line in out.splitlines() if line.startswith("measured: ")]
    assert len(lines) == len(RUNS)
    assert all("held-out" in line for line in lines)
    results = json.loads((tmp_path / "terms.json").read_text())
    assert list(results) == RUNS
    for run in RUNS:
        png = (tmp_path / "termwise-demo" / f"{run}.png").read_bytes()
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(png) > 20_000
    for run, terms in TERMS.items():
        assert all(f" {term} " in out for term in terms)
        check_json(results[run], terms, MEASURED[run])
    check_norms(results["vicreg"]["gradient_norms"])
    assert all(f" {loss} " in out for loss in VIEWS)
    check_representations(results["joint-embedding"])
    assert all(f" {objective} " in out for objective in OBJECTIVES)
    check_frontier(results["sae"])
    assert all(f" {student} " in out for student in STUDENTS)
    check_students(results["distill"])
    assert all(f" {loss} " in out for loss in LOSSES)
    check_energies(results["energy"])

    monkeypatch.chdir(tmp_path)
    for name in ("_save", "write_page"):
        monkeypatch.setattr(_report, name, lambda *_, **__: None)
    # All draw from generators of the same class. Two trainings of joint-embedding repeat below.
    others = ["targeted-variance", "sae", "energy"]
    assert main([*others, "--seed", "0", "--steps", "5", "--json", "again.json"]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again == {run: results[run] for run in others}
    once = results["joint-embedding"]["trainings"]
    digits = _joint_embedding._Digits(quiet(5))
    for name in ("LeJEPA", "DINO"):
        learnt = _joint_embedding._learn(name, _joint_embedding.METHODS[name], digits, quiet(5))
        assert learnt.measured == once[name]["measured"]
        assert learnt.terms == {term: of["curve"] for term, of in once[name]["terms"].items()}


def test_one_page_has_all_runs_and_needs_no_other_file(five_steps):
    folder = five_steps[0]
    page = folder / "termwise-demo" / "index.html"
    assert ended(folder)[1].splitlines()[-1] == f"report: {page.resolve().as_uri()}"
    text = page.read_text()
    assert not re.findall(r"(?:src|href)=\"(?!#|data:image/png;base64,)", text)
    for run in RUNS:
        section = text.partition(f'<section id="{run}">')[2].partition("</section>")[0]
        assert f'<a href="#{run}">' in text
        assert f"python -m termwise {run} --steps 5 --seed 0" in section
        assert "held-out" in section
        assert f"{run}: 5 steps" in section.partition("<table>")[2]
        drawn = (folder / "termwise-demo" / f"{run}.png").read_bytes()
        assert base64.b64encode(drawn).decode() in section
    assert f"termwise {tw.__version__}, PyTorch {torch.__version__}" in text
    # A sentence or a table may have anything in it.
    shown = types.SimpleNamespace(sentence="a < b & c", table=lambda *_: "<tag>")
    finished = _report.Finished(shown, 1.0, folder / "termwise-demo" / "sae.png", "python -c '<'")
    _report.write_page(folder / "other.html", {"x": finished})
    other = (folder / "other.html").read_text()
    assert "<p>a &lt; b &amp; c</p>" in other
    assert "<pre>&lt;tag&gt;</pre>" in other


def test_open_opens_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened = []
    monkeypatch.setattr(_command.webbrowser, "open", opened.append)
    quick = types.SimpleNamespace(
        sentence="s", table=lambda *_: "t", figure=lambda: new_figure(2, 1)
    )
    run = Run(about="", steps=1, train=lambda _: quick)
    monkeypatch.setitem(_command.RUNS, "vicreg", run)
    assert main(["vicreg", "--open"]) == 0
    assert opened == [(tmp_path / "termwise-demo" / "index.html").as_uri()]


def check_json(result: dict[str, dict], terms: set[str], measured: set[str]) -> None:
    assert set(result["terms"]) == set(result["control"]["terms"]) == terms
    check_curves(result["terms"])
    check_curves(result["control"]["terms"])
    assert set(result["measured"]) == measured
    assert all(type(value) is float for value in result["measured"].values())


def check_curves(terms: dict[str, dict]) -> None:
    for term in terms.values():
        assert len(term["curve"]) == 5
        assert (term["first"], term["last"]) == (term["curve"][0], term["curve"][-1])
        assert all(type(value) is float for value in term["curve"])


def check_norms(norms: dict[str, dict[str, float]]) -> None:
    assert list(norms) == ["sim", "var", "cov"]
    for by_step in norms.values():
        assert list(by_step) == ["1", "2", "3", "4", "5"]
        assert all(norm > 0 for norm in by_step.values())
    # Why sim rises at first.
    assert norms["var"]["1"] > 2 * norms["sim"]["1"] > norms["cov"]["1"]


def check_representations(result: dict) -> None:
    assert list(result["references"]) == ["raw pixels", "untrained"]
    assert list(result["trainings"]) == list(VIEWS)
    for loss, one in result["trainings"].items():
        assert list(one["terms"]) == [field.name for field in dataclasses.fields(VIEWS[loss])]
        check_curves(one["terms"])
        assert list(one["rank"]) == ["1", "2", "3", "4", "5"]
        measured = one["measured"]
        for accuracy in ("probe_accuracy", "neighbour_accuracy"):
            assert 0.2 < measured[accuracy] < 1
            assert result["references"]["untrained"][accuracy] > 0.75
        assert 0 <= measured["alignment"] <= 4
        assert -8 <= measured["uniformity"] <= 0
        assert 1 <= measured["rank"] <= 128
    # They start from the same weights, and those without a term from the same loss but for it.
    trainings = result["trainings"]
    assert len({one["rank"]["1"] for one in trainings.values()}) == 1
    whole, without = (trainings[name]["terms"] for name in ("Barlow Twins", list(VIEWS)[6]))
    assert without["loss"]["first"] == pytest.approx(whole["on_diagonal"]["first"], rel=1e-6)


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


def test_a_student_that_is_taught_reads_unseen_text_better(tmp_path, monkeypatch, nothing_drawn):
    train = _distill._train_student
    no_student = _distill.Student(terms={"loss": [0.0]}, held_out={0: 0.0})
    monkeypatch.setattr(
        _distill,
        "_train_student",
        lambda name, *rest: train(name, *rest) if name != "partitioned" else no_student,
    )
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
    sides = [_distill._Tokenized(tokens, passages * 3, passages) for tokens in (300, 264)]
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


def check_energies(result: dict) -> None:
    assert set(result["densities"]) == {"eight Gaussians", "moons"}
    for density in result["densities"].values():
        truth = density["truth"]
        assert truth["log_likelihood"] == pytest.approx(truth["negative_entropy"], abs=0.05)
        assert list(density["losses"]) == list(LOSSES)
        for loss, one in density["losses"].items():
            fields = [field.name for field in dataclasses.fields(LOSSES[loss])]
            names = {name.partition("[")[0] for name in one["terms"]}
            assert names == set(fields) - {"negatives"}, loss
            check_curves(one["terms"])
            measured = one["measured"]
            assert ("log_z_learnt" in measured) == (LOSSES[loss] is NoiseContrastiveTerms)
            assert measured["kl"] > 0
            assert measured["log_z_error"] < 1e-3
            below = truth["log_likelihood"] - measured["log_likelihood"]
            assert below == pytest.approx(measured["kl"], abs=0.05)
    digits = result["digits"]["terms"]
    assert set(digits) == {
        *("loss", "energy_data", "energy_model", "gap", "regularization", "energy_squares")
    }
    assert len(digits["gap"]["curve"]) == 7  # a quarter more
    assert set(result["measured"]) == {
        "log_z_error",
        "energy_seen_digits",
        "energy_held_out_digits",
        *(
            f"auroc_{images}_{by}"
            for images in ("shuffled_pixels", "gaussian_samples")
            for by in ("model", "full_gaussian", "diagonal_gaussian")
        ),
    }
    assert result["measured"]["auroc_shuffled_pixels_model"] > 0.95
    # Nothing but covariance tells these from digits, to a Gaussian.
    assert result["measured"]["auroc_gaussian_samples_full_gaussian"] == pytest.approx(0.5, abs=0.1)


def test_sparse_autoencoders_trade_error_for_sparsity(tmp_path, monkeypatch, nothing_drawn):
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


def test_two_ranks_that_share_the_batch_report_the_terms_of_one_process(five_steps):
    alone = json.loads((five_steps[0] / "terms.json").read_text())["vicreg"]
    codes, out, err = ended(five_steps[1])
    assert codes == "0 0", err
    assert "gloo" not in err, err  # a thread that may abort the process at its end
    assert out.count("measured: ") == 1
    together = json.loads((five_steps[1] / "terms.json").read_text())["vicreg"]
    for name in TERMS["vicreg"]:
        expected = alone["terms"][name]["curve"]
        assert together["terms"][name]["curve"] == pytest.approx(expected, rel=1e-5), name
    for name, norms in alone["gradient_norms"].items():
        assert together["gradient_norms"][name] == pytest.approx(norms, rel=1e-4), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["vicregg"],
            "unknown run 'vicregg', choose from: vicreg, joint-embedding, targeted-variance, sae, "
            "energy, distill",
        ),
        (["--steps", "0"], "argument --steps: needs an integer of 1 or more, got '0'"),
        (["--steps", "-3"], "argument --steps: needs an integer of 1 or more, got '-3'"),
        (["--seed", "x"], "argument --seed: needs an integer from 0"),
        (["--device", "cuda:99"], "device 'cuda:99' is not available"),
        (["--device", "toaster"], "device 'toaster' is not available"),
        (["--device", "meta"], "device 'meta' is not available"),
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


def test_the_process_leaves_with_code_2_and_no_traceback(five_steps):
    codes, out, err = ended(five_steps[2])
    assert (codes, out) == ("2", "")
    assert err.count("\n") == 1
    assert {path.name for path in five_steps[2].iterdir()} == {"codes", "out", "err"}


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
    code = (
        "import sys, termwise; "
        "extra = {'sklearn', 'matplotlib', 'rich', 'tokenizers', 'termwise.demo'}; "
        "print(extra & sys.modules.keys()); "
        "from termwise.demo._command import main; "
        "main(['--list']); main(['--help'])"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    imported, *listed = done.stdout.splitlines()
    assert imported == "set()"
    assert [line.split()[0] for line in listed[: len(RUNS)]] == RUNS
    assert "--nproc-per-node 2" in done.stdout


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


def test_bars_start_at_chance_and_norms_of_gradients_have_a_logarithmic_axis():
    curves = {name: [1.0, 2.0] for name in TERMS["vicreg"]}
    result = _comparison.Comparison(
        terms=curves,
        control=curves,
        control_name="without",
        about={name: f"about {name}" for name in curves},
        levels={},
        measured={},
        sentence="",
        bars={"without": 0.2, "trained": 0.9},
        bars_about="accuracy",
        bars_format="{:.0%}",
        bars_start=0.1,
        gradient_norms={"sim": {1: 1.0, 8: 10.0}, "var": {1: 3.0, 8: 0.3}},
    )
    *_, norms, bars = result.figure().axes
    assert norms.get_yscale() == "log"
    assert [list(curve.get_xdata()) for curve in norms.lines] == [[1, 8], [1, 8]]
    assert [list(curve.get_ydata()) for curve in norms.lines] == [[1.0, 10.0], [3.0, 0.3]]
    assert bars.get_xlim()[0] == 0.1
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars.patches]
    assert spans == [(0.1, pytest.approx(0.2)), (0.1, pytest.approx(0.9))]
    assert [text.get_text() for text in bars.texts[:2]] == ["20%", "90%"]


def test_views_of_a_digit_are_two_of_all_of_it_and_four_of_a_part(monkeypatch):
    monkeypatch.setattr(_joint_embedding, "augment", lambda images, generator: images)
    images = torch.rand(16, 8, 8, generator=torch.Generator().manual_seed(1))
    views = _joint_embedding.draw_views(images, True, torch.Generator().manual_seed(2))
    assert views.shape == (6, 16, 8, 8)
    assert torch.equal(views[:2], images.expand(2, 16, 8, 8))
    assert torch.equal(
        views[:2], _joint_embedding.draw_views(images, False, torch.Generator().manual_seed(2))
    )
    # A part, at the size of an image: a ramp has three quarters of its slope, from another start.
    ramp = torch.arange(8.0).expand(16, 8, 8)
    zoomed = _joint_embedding.draw_views(ramp, True, torch.Generator().manual_seed(2))[2:]
    slope = zoomed.diff(dim=3)[..., 1:-1, 1:-1]  # nothing is outside of an image
    torch.testing.assert_close(slope, torch.full((4, 16, 6, 5), 0.75))
    assert zoomed[0, :, 0, 4].std() > 0.3


def test_rank_is_one_where_embeddings_are_one_point_or_one_line(monkeypatch):
    digits = _joint_embedding._Digits(quiet(1))
    network = _joint_embedding.Network(quiet(1))
    for z, expected in (
        (torch.ones(500, 4), 1),
        (torch.linspace(-1, 1, 500)[:, None] * torch.tensor([1.0, 2.0]), 1),
        (torch.eye(4).repeat(125, 1), 4),
    ):
        monkeypatch.setattr(network, "forward", lambda images, z=z: z)
        assert digits.rank(network, quiet(1)) == pytest.approx(expected, rel=1e-6)
    assert network.training


@pytest.mark.parametrize("density", [_densities.eight_gaussians(), _densities.moons()])
def test_known_densities_are_normalised_and_drawn_from(density):
    plane = _densities.Plane(torch.device("cpu"))
    log_p = plane.on_grid(density.log_density)
    assert plane.integral(log_p.exp()) == pytest.approx(1, abs=1e-6)
    log_z, error = plane.log_integral(log_p + 3)
    assert log_z == pytest.approx(3, abs=1e-6)
    assert error < 1e-6
    drawn = density.draw(50_000, torch.Generator().manual_seed(0))
    mean, second = (
        torch.tensor([plane.integral(plane.on_grid(f) * log_p.exp()) for f in moments])
        for moments in (
            (lambda x: x[:, 0], lambda x: x[:, 1]),
            (lambda x: x[:, 0] ** 2, lambda x: x[:, 0] * x[:, 1]),
        )
    )
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.03, rtol=0)
    products = torch.stack([drawn[:, 0] ** 2, drawn[:, 0] * drawn[:, 1]], dim=1)
    torch.testing.assert_close(products.mean(0), second, atol=0.05, rtol=0)


def test_quadrature_says_how_wrong_it_is():
    plane = _densities.Plane(torch.device("cpu"))
    wide, narrow = (
        plane.log_integral(plane.on_grid(lambda x, s=s: -x.square().sum(1) / (2 * s**2)))
        for s in (3.0, 0.04)
    )
    for (value, error), deviation in ((wide, 3.0), (narrow, 0.04)):
        true = math.log(2 * math.pi * deviation**2)
        assert 1e-3 < abs(value - true) < error


def quiet(steps: int) -> Setting:
    def follow(label: str, steps: int):
        return contextlib.nullcontext(lambda metrics: None)

    return Setting(steps=steps, seed=0, device=torch.device("cpu"), group=None, follow=follow)


def test_noise_contrastive_estimation_finds_a_density_and_its_normaliser(monkeypatch):
    losses = {name: _energy.LOSSES[name] for name in ("NCE", "NCE without log q")}
    monkeypatch.setattr(_energy, "LOSSES", losses)
    density = _energy.learn_density("moons", _densities.moons(), quiet(150))
    found, wrong = (density.learnt[name].measured for name in losses)
    assert found["kl"] < 0.1
    assert found["log_z_learnt"] == pytest.approx(found["log_z"], abs=0.1)
    assert wrong["kl"] > 0.2
    held_out = density.measured["log_likelihood"] - found["log_likelihood"]
    assert held_out == pytest.approx(found["kl"], abs=0.02)


def test_images_of_digits_keep_their_moments_and_their_order():
    seen = _vicreg.load_digits()[0].flatten(1)
    units = _energy_digits.Units(seen)
    generator = torch.Generator().manual_seed(0)
    again = units.gaussian(20_000, generator)
    torch.testing.assert_close(again.mean(0), seen.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.cov(again.T), torch.cov(seen.T), atol=0.01, rtol=0)
    z = units.add_noise(seen, generator)
    # Of a Gaussian the mean of what it was without noise is linear, and nearer to it.
    precision = units.scale**2 / (units.clean + 0.1**2)
    denoised = units.denoised(z, z * precision)
    distance = (denoised - seen).square().mean()
    assert distance < 0.7 * (units.denoised(z, 0 * z) - seen).square().mean()
    mean = units.full_gaussian(z).mean(), units.diagonal_gaussian(z).mean()
    assert mean == pytest.approx((64, 64), rel=0.02)


def test_area_under_the_curve_counts_ties_as_halves():
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])
    assert _energy_digits.auroc(low, high) == 0.875
    assert _energy_digits.auroc(high, low) == 0.125
