"""Every public name stands on one page of the documentation, and every loss has a page of its own.

Read from the `:::` lines of the pages as the hooks of mkdocs write them: nothing is built but the
picture of each loss.
"""

import html
import inspect
import re
import runpy
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import names
import narrow
import peers
import pictures
import pytest
from drawing import figure

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


COUNTS = Counter(name for name, _ in RENDERED)
NAMES = [name for family in FAMILIES for name in exported(family)]


def page_of(loss: str) -> str:
    family, _, function = loss.removeprefix("termwise.").rpartition(".")
    return f"api/{family}/{function.removesuffix('_loss')}.md"


# The tests of a page are of those that are there: test_every_loss_has_a_page says which are not.
PAGED = [loss for loss in LOSSES if COUNTS[loss]]


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_rendered_once(name):
    assert COUNTS[name] == 1, (
        f"{COUNTS[name]} pages of docs/pages/api show {name}, where one has to: a loss's own page "
        f"shows the loss, its record and its modules; for all else write a line '::: {name}'"
    )


def test_there_is_no_other_name():
    assert set(COUNTS) <= set(NAMES)
    assert len(LOSSES) >= 31


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_has_a_page(loss):
    family = loss.split(".")[1]
    page = DOCS / "pages" / page_of(loss)
    assert page in PAGES, f"write docs/pages/{page_of(loss)}, with sections Gradient and Cost"
    listed = page_of(loss) in names.SETTINGS
    assert listed, f"docs/mkdocs.yml does not list {page_of(loss)}, in the order of its tables"
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


def text_of(loss: str) -> str:
    page = SimpleNamespace(file=SimpleNamespace(src_uri=page_of(loss)))
    return peers.on_page_markdown(PAGES[DOCS / "pages" / page_of(loss)], page=page)


# What a part needs to have in its section. Signature, formula and references are those of the
# docstring: test_api_pages.py says that they are rendered, and check_site.py that they are there.
PARTS = {
    "Terms": r"Terms\b",
    "Gradient": r"\bgradient",
    "Cost": r"\b(pass|product|call|gradient|operation|eigenvalue|softmax|read|sort|arithmetic)",
    "In other libraries": r"- \[[^]]+\]\(../../coming_from/\w+\.md\): .|known to us",
    "References": r"part: references",
}
MEMORY = r"(?i)\b(held|holds?|saved|saves|stored|kept|memory|MiB)\b"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("loss", PAGED)
def test_a_part_of_a_page(loss, part):
    text = sections(text_of(loss))[part]
    assert re.search(PARTS[part], text), f"{part} of {page_of(loss)} has no {PARTS[part]}"


@pytest.mark.parametrize("loss", PAGED)
def test_cost_is_in_memory_too(loss):
    told = re.search(MEMORY, sections(text_of(loss))["Cost"])
    assert told, f"Cost of {page_of(loss)} says nothing of memory: no {MEMORY}"


CHOSEN = names.written((DOCS / "pages/which_loss.md").read_text(), "which_loss.md")
CHOICES = [row for row in CHOSEN.splitlines() if row.startswith("| ")]


def test_each_choice_has_four_cells():
    assert [row for row in CHOICES if len(re.split(r"(?<!\\)\|", row)) != 6] == []


@pytest.mark.parametrize("loss", PAGED)
def test_every_loss_can_be_chosen(loss):
    found = any(f"][{loss}]" in row for row in CHOICES)
    row = "<!-- when: what I have | choose it when | cost; held -->"
    assert found, f"docs/pages/{page_of(loss)} needs a line {row}, which which_loss.md shows"


def test_there_is_no_picture_of_anything_else():
    assert set(pictures.PICTURES) <= set(map(page_of, LOSSES))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_picture_is_of_the_loss(loss):
    picture = pictures.PICTURES.get(page_of(loss))
    assert picture, f"docs/pictures.py needs a Picture for {page_of(loss)!r}"
    called = []

    def counted(*args, **options):
        called.append(1)
        return names.loss_of(page_of(loss))(*args, **options)

    drawn = figure(picture, counted)
    assert len(called) >= picture.points
    # Labels with their units, a legend, a sentence, and a line for each term that is drawn.
    assert drawn.count("<svg") == 1 + picture.slope
    panel, *slopes = drawn.split("<svg")[1:]
    assert html.escape(picture.axis, quote=False) in panel
    assert html.escape(picture.unit, quote=False) in panel
    for number, name in enumerate(picture.terms, 1):
        assert f"stroke: var(--line-{number})" in panel
        assert f'<span class="line-{number}">{html.escape(name)}</span>' in drawn
    assert not slopes or "stroke: var(--line-" in slopes[0]
    assert not re.search(r"#0000|nan|font-family", panel)
    assert len(picture.says.split()) >= 20
    assert html.escape(picture.says) in drawn


def test_a_page_without_a_loss_is_left_as_it_is():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="api/sae/index.md"))
    assert pictures.on_page_content("<p>", page=page) == "<p>"
    assert peers.on_page_markdown("## References", page=page) == "## References"


def test_the_picture_stands_above_the_formula():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="api/lm/next_token.md"))
    content = pictures.on_page_content('<p><h2 id="formula">', page=page)
    assert re.fullmatch(r'<p><figure class="picture">.*</figure><h2 id="formula">', content)


def test_rows_of_other_libraries_are_found():
    names = peers.NAMES["nt_xent"]
    lightly = "- [lightly](../../coming_from/lightly.md): `NTXentLoss`."
    assert f"{lightly} No difference, on one process." in names
    assert "Differs: the variance term is half." in "\n".join(peers.NAMES["vicreg"])


def test_tables_formulas_and_figures_fit_a_narrow_screen():
    cells = "<td>x_y</td><td><code>a_b</code></td><td>c</td>"
    table = f"<table><th>one</th><th>two</th><th>three</th>{cells}</table>"
    formula = '<math display="block"><mrow>a<mspace width="2em"></mspace>b</mrow></math>'
    for page, labelled in (("which_loss.md", True), ("numbers.md", False)):
        at = SimpleNamespace(file=SimpleNamespace(src_uri=page))
        made = narrow.on_page_content(f'{table}{formula}<img alt="" src="a/b.png" />', page=at)
        assert ('<td data-label="two"><code>a_<wbr>b</code>' in made) == labelled
        assert ("<td><code>a_<wbr>b</code>" in made) != labelled
        a, b = (f'<math display="block"><mrow>{x}</mrow></math>' for x in "ab")
        assert f'<span class="formula">{a}{b}</span>' in made
        assert made.endswith('<a href="a/b.png"><img alt="" src="a/b.png" /></a>')
