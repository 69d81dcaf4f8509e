"""Every public name stands on one page of the documentation, and every loss has a page of its own.

Read from the `:::` lines of the pages as the hook of mkdocs writes them: nothing is built.
"""

import inspect
import re
import runpy
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import termwise
import termwise.testing

DOCS = Path(__file__).parents[2] / "docs"
WRITTEN = runpy.run_path(str(DOCS / "names.py"))["written"]
PAGES = {
    page: WRITTEN(page.read_text(), page.relative_to(DOCS / "pages").as_posix())
    for page in sorted((DOCS / "pages/api").rglob("*.md"))
}
FAMILIES = {
    "termwise": termwise,
    "termwise.energy": termwise.energy,
    "termwise.groups": termwise.groups,
    "termwise.joint_embedding": termwise.joint_embedding,
    "termwise.lm": termwise.lm,
    "termwise.sae": termwise.sae,
    "termwise.testing": termwise.testing,
}
HEADINGS = ["Formula", "Terms", "Gradient", "Cost", "Module", "References"]
REFERENCES = "part: references"


def exported(family: str) -> dict[str, object]:
    """Return the public names of a namespace, the namespaces within it left out."""
    return {
        f"{family}.{name}": value
        for name, value in vars(FAMILIES[family]).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }


def blocks(text: str) -> list[tuple[str, str]]:
    """Return each name that a page has rendered, with its options."""
    return re.findall(r"^::: (\S+)\n((?:    .*\n)*)", text, flags=re.MULTILINE)


def sections(text: str) -> dict[str, str]:
    """Return what stands under each heading of the second level."""
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# A reference stands apart at the end of a page whose formula is rendered above.
RENDERED = [
    (name, page)
    for page, text in PAGES.items()
    for name, options in blocks(text)
    if REFERENCES not in options
]
LOSSES = {
    name: record
    for family in FAMILIES
    for name, value in exported(family).items()
    if inspect.isfunction(value)
    and inspect.isclass(record := inspect.signature(value).return_annotation)
    and issubclass(record, termwise.Terms)
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_public_name_is_rendered_once(family):
    counts = Counter(name for name, _ in RENDERED if name.rpartition(".")[0] == family)
    assert {name: counts[name] for name in exported(family)} == dict(counts)
    assert set(counts.values()) == {1}


def test_there_is_no_other_name():
    assert {name.rpartition(".")[0] for name, _ in RENDERED} == set(FAMILIES)
    assert len(LOSSES) >= 31


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_has_a_page(loss):
    family, _, function = loss.removeprefix("termwise.").rpartition(".")
    page = DOCS / "pages/api" / family / f"{function.removesuffix('_loss')}.md"
    text = PAGES[page]
    title, under = text.splitlines()[0], sections(text)
    assert re.fullmatch(r"# \S.+", title)
    assert [heading for heading in under if heading in HEADINGS] == HEADINGS
    assert list(under)[-1] == "References"
    assert [name for name in LOSSES if (name, page) in RENDERED] == [loss]
    assert f"::: {loss}\n    options: {{extra: {{part: formula}}" in under["Formula"]
    assert f"::: {loss}\n    options: {{extra: {{{REFERENCES}}}" in under["References"]
    record = f"termwise.{family}.{LOSSES[loss].__name__}"
    assert f"::: {record}\n" in under["Terms"] or f"][{record}]" in under["Terms"]
    assert re.search(rf"^::: termwise\.{family}\.[A-Z]\w+$", under["Module"], re.MULTILINE)
    for heading in ("Gradient", "Cost"):
        assert len(under[heading].split()) > 20


@pytest.mark.parametrize("loss", LOSSES)
def test_what_a_page_shows_of_the_docstring_is_there(loss):
    family, _, function = loss.rpartition(".")
    docstring = inspect.getdoc(getattr(FAMILIES[family], function))
    assert docstring.count("$$") >= 2
    assert not re.search(r"[bB]igg?[lr]?\\\|", docstring)  # which is drawn as a single bar
    assert re.search(r"^References:\n {4}\S", docstring, re.MULTILINE)


def test_every_page_is_in_the_navigation():
    navigation = (DOCS / "mkdocs.yml").read_text()
    listed = re.findall(r"api/\S+\.md", navigation)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS / "pages")) for page in PAGES)
