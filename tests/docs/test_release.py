"""The version stands in one place, and what repeats it agrees."""

import re
import tomllib
from pathlib import Path

import termwise

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CITATION = (ROOT / "docs/CITATION.cff").read_text()


def test_the_package_takes_its_version_from_the_module():
    assert re.fullmatch(r"\d+\.\d+\.\d+", termwise.__version__)
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"] == {"path": "src/termwise/__init__.py"}
    text = (ROOT / "src/termwise/__init__.py").read_text()
    assert text.count(f'__version__ = "{termwise.__version__}"') == 1


def test_the_citation_is_of_this_version_and_license():
    fields = dict(re.findall(r"^([a-z-]+): ?(.*)$", CITATION, re.MULTILINE))
    assert fields["cff-version"] == "1.2.0"
    assert fields["version"] == termwise.__version__
    assert fields["license"] == PROJECT["project"]["license"]
    assert fields.keys() >= {"message", "title", "authors"}  # which the format demands
    assert "  - name: The termwise authors\n" in CITATION


def test_the_changelog_begins_with_this_version_and_each_release_has_its_numbers():
    changelog = (ROOT / "docs/pages/changelog.md").read_text()
    _, *releases = re.split(r"^## ", changelog, flags=re.MULTILINE)
    assert releases[0].splitlines()[0] == termwise.__version__
    for release in releases:
        _, numbers = release.split("\n### Numbers\n\n")
        # A table of old and new values, or a sentence that there are none.
        assert numbers.startswith(
            ("None", "| call | old | new | why | how to get the old value |\n|---")
        )
