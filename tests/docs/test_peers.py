"""The *Coming from* pages name the versions that tests/peers runs, which is run on request."""

import re
import tomllib
from pathlib import Path

import checkouts
import pytest

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/pages/coming_from"
PINS = {
    name.lower().replace("_", "-"): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "tests/peers/constraints.txt").read_text(), re.MULTILINE
    )
}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# What test_<name>.py of tests/peers calls: the package, and the page that says what it found.
PEERS = {
    "liger": ("liger-kernel", "liger"),
    "lightly": ("lightly", "lightly"),
    "open_clip": ("open-clip-torch", "open_clip"),
    "pytorch_metric_learning": ("pytorch-metric-learning", "pytorch_metric_learning"),
    "sentence_transformers": ("sentence-transformers", "sentence_transformers"),
    "sae_lens": ("sae-lens", "saelens"),
    "stable_pretraining": ("stable-pretraining", "stable_pretraining"),
    "torchcfm": ("torchcfm", "torchcfm"),
    "torchebm": ("torchebm", "torchebm"),
    "trl": ("trl", "trl"),
}
# What test_<name>.py calls of a checkout: its repositories, and the page.
CHECKOUTS = {
    "lejepa": (["lejepa"], "lejepa"),
    "dino": (["dinov2", "dinov3"], "dinov2"),
    "solo_learn": (["solo-learn"], "solo_learn"),
}
FILES = {path.stem.removeprefix("test_") for path in (ROOT / "tests/peers").glob("test_*.py")}
# Several trainers at once, on a page of their own; and what open_clip's page leaves to the pairs.
RUN = sorted(FILES - {"examples", "open_clip_sigmoid", *CHECKOUTS})


def test_each_module_of_the_peers_is_of_a_package_that_the_extra_installs():
    assert set(RUN) <= set(PEERS)
    wanted = {re.split(r"[<>=]", one)[0] for one in EXTRAS["peers"]}
    assert {PEERS[name][0] for name in RUN} <= wanted
    assert wanted <= set(PINS)


def opening_of(page):
    return (PAGES / f"{page}.md").read_text().split("\n|", 1)[0]


@pytest.mark.parametrize("name", RUN)
def test_a_page_opens_with_the_version_that_was_run(name):
    package, page = PEERS[name]
    opening = opening_of(page)
    assert re.search(rf"(?<![\d.]){re.escape(PINS[package])}(?![.]?\d)", opening), (
        f"{page}.md does not say before its table that {package} {PINS[package]} was run"
    )


@pytest.mark.parametrize("page", sorted(set(PAGES.glob("*.md")) - {PAGES / "index.md"}))
def test_every_page_has_the_same_sections(page):
    text = page.read_text()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == ["Calls", "Arguments", "What differs", "Examples"], page.name
    calls, arguments, _, examples = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert " | here | differs |\n" in calls
    assert "\n|---|---|" in arguments
    assert text.count("```pycon") == examples.count("```pycon") > 0
    for row in re.findall(r"^\| (.*) \|$", text, re.MULTILINE):
        assert not re.search(r"(^|\| )(the same|as above|as for|see below)\b", row), row


@pytest.mark.parametrize("name", CHECKOUTS)
def test_a_page_opens_with_the_commits_that_were_run(name):
    repositories, page = CHECKOUTS[name]
    for repository in repositories:
        owner, commit = checkouts.COMMITS[repository]
        assert f"{owner}/{repository}" in opening_of(page)
        assert re.search(rf"\b{commit[:7]}\b", opening_of(page))
    assert f"tests/peers/test_{name}.py" in opening_of(page)


def test_the_pins_suit_the_ordinary_ones():
    """The compiler and the checkers of a call are those of the ordinary suite."""
    text = (ROOT / "tests/constraints.txt").read_text()
    for package in ("torch", "jaxtyping", "beartype", "einops", "pytest", "hypothesis"):
        assert f"\n{package}=={PINS[package]}\n" in text


def test_the_ordinary_run_leaves_them_out():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "--ignore=tests/peers" in options["addopts"]
    assert "peers" not in str(EXTRAS["test"]) + str(EXTRAS["dev"])
