"""A hook of mkdocs: what pages show of public names is read from the library.

The page of a loss is written by hand where it explains (what the loss is for, its gradient, its
cost); formula, terms, module and references are put around that. Tables and lists of losses take
the order of the navigation, the title of each page and the first line of each docstring. Other
rows stand in comments: when to choose a loss on its page, what differs on the page of another
library.
"""

import gc
import inspect
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import termwise
import termwise.testing

MODULES = {
    "joint_embedding": "Joint embedding",
    "sae": "Sparse autoencoders",
    "energy": "Energy-based models",
    "lm": "Language models",
    "groups": "Over ranks",
    "testing": "The test kit",
}
DOCS = Path(__file__).parent
SETTINGS = (DOCS / "mkdocs.yml").read_text()
NAVIGATION = re.findall(r"api/(\w+)/(?!index)(\w+)\.md", SETTINGS)


def on_startup(**_: Any) -> None:
    """Collect garbage seldom: a build makes millions of objects and frees few of them."""
    gc.set_threshold(50_000, 20, 100)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Write what a page asks for, and around the text of a loss what its docstring says."""
    return written(markdown, page.file.src_uri)


def written(markdown: str, path: str) -> str:
    """Return the page at a path below `pages`, as the site has it."""
    found = re.fullmatch(r"api/(\w+)/(\w+)\.md", path)
    if found and found.groups() in NAVIGATION:
        markdown = _loss_page(markdown, *found.groups())
    for comment, rows in _ROWS.items():
        if comment in markdown:
            markdown = markdown.replace(comment, "\n".join(rows()))
    markdown = re.sub(r"<!-- table of (\w+) -->", lambda x: "\n".join(_table(x[1])), markdown)
    markdown = re.sub(
        r"<!-- choices of (\w+): (.*) -->", lambda x: "\n".join(_choices(x[1], x[2])), markdown
    )
    return re.sub(r"<!-- list of (\w+) -->", lambda x: ",\n".join(_links(x[1])), markdown)


def _loss_page(markdown: str, family: str, stem: str) -> str:
    """Add a loss's formula, terms, module and references to the text of its page."""
    loss = _loss(family, stem)
    name = f"termwise.{family}.{loss.__name__}"
    parts = [part.rstrip("\n") for part in re.split(r"^(?=## )", markdown, flags=re.MULTILINE)]
    titles = [part.partition("\n")[0] for part in parts]
    for title in ("## Gradient", "## Cost"):
        if title not in titles:
            raise ValueError(f"docs/pages/api/{family}/{stem}.md needs a section '{title}'")
    gradient, after = titles.index("## Gradient"), titles.index("## Cost") + 1
    written = [
        parts[0],
        f"## Formula\n\n::: {name}\n    options: {{extra: {{part: formula}}}}",
        *parts[1:gradient],
        f"## Terms\n\n{_terms(family, loss)}",
        *parts[gradient:after],
        "## Module",
        *_modules(family, loss),
        *parts[after:],
        f"## References\n\n::: {name}\n    options: {{extra: {{part: references}}, "
        "show_root_heading: false, show_root_toc_entry: false}",
    ]
    return "\n\n".join(written) + "\n"


def _terms(family: str, loss: Any) -> str:
    """Write the record of a loss, or a link where a loss before it has the same."""
    record = _record(loss)
    name = f"termwise.{family}.{record.__name__}"
    if next(of for stem in _stems(family) if _record(of := _loss(family, stem)) is record) is loss:
        return f"::: {name}\n    options: {{show_signature: false}}"
    return f"See [`{record.__name__}`][{name}]: this loss returns the same record."


def _modules(family: str, loss: Any) -> Iterator[str]:
    """Write the modules of a loss's file that return its record, each after its config."""
    for name, value in vars(getattr(termwise, family)).items():
        if (
            inspect.isclass(value)
            and issubclass(value, termwise.LossModule)
            and value.__module__ == loss.__module__
            and _record(value.forward) is _record(loss)
        ):
            if config := value.__annotations__.get("cfg"):
                of = f"termwise.{family}.{config.__name__}"
                yield f"::: {of}\n    options: {{show_signature: false}}"
            yield f"::: termwise.{family}.{name}\n    options: {{members: [forward]}}"


def _table(family: str) -> Iterator[str]:
    """Write a row for each loss that has a page."""
    yield from ("| | loss | what it does | terms | groups |", "|---|---|---|---|---|")
    for stem in _stems(family):
        loss = _loss(family, stem)
        terms = [name for name in _record(loss).__annotations__ if name != "loss"]
        groups = [f"`{x}`" for x in inspect.signature(loss).parameters if x.endswith("_group")]
        cells = _first_line(loss), ", ".join(terms), ", ".join(groups)
        yield f"| {_link(family, stem)} | `{loss.__name__}` | {' | '.join(cells)} |"


def _choices(family: str, head: str) -> Iterator[str]:
    """Write the rows in which the page of each loss says when to choose it."""
    first, rest = head.split(" | ", 1)
    yield f"| {first} | loss | {rest} |\n|---|---|---|---|"
    for stem in _stems(family):
        text = (DOCS / "pages/api" / family / f"{stem}.md").read_text()
        name = _loss(family, stem).__name__
        for row in re.findall(r"^<!-- when: (.*) -->$", text, re.MULTILINE):
            cells = row.split(" | ")
            if len(cells) == 3:  # a row of four cells has its own link
                cells[1:1] = [f"[`{name}`][termwise.{family}.{name}]"]
            yield f"| {' | '.join(cells)} |"


def _links(family: str) -> Iterator[str]:
    """Write a link to each loss: by the title of its page, or else by its name."""
    yield from (_link(family, stem) for stem in _stems(family))
    paged = {_loss(family, stem).__name__ for stem in _stems(family)}
    for name in _public(getattr(termwise, family)):
        if name.endswith("_loss") and name not in paged | {"create_loss"}:
            yield f"[`{name}`][termwise.{family}.{name}]"


def _libraries() -> Iterator[str]:
    """Write the rows that the page of each library has in its comments."""
    yield "| project | theirs | ours | main difference | multiply |\n|---|---|---|---|---|"
    for project, page in re.findall(r"- (.+): coming_from/(\w+\.md)", SETTINGS):
        first = f"[{project}]({page})"
        text = (DOCS / "pages/coming_from" / page).read_text()
        for row in re.findall(r"^<!-- in short: (.*) -->$", text, re.MULTILINE):
            yield f"| {first} | {row} |"
            first = ""


def _measurements() -> Iterator[str]:
    """Write what tests/bench/run.py has put on the pages of losses as one table, of few columns."""
    yield "| loss, size | eager | of plain, of the peer | of the floor | compiled | peak |"
    yield "|---|---|---|---|---|---|"
    for family, stem in NAVIGATION:
        text = (DOCS / "pages/api" / family / f"{stem}.md").read_text()
        found = re.search(r"<!-- measured by .* -->\n\n\|.*\n\|.*\n((?:\|.*\n)+)", text)
        name = f"{family}.{_loss(family, stem).__name__}"
        for row in found[1].splitlines() if found else ():
            of, size, eager, plain, peer, *times, peak, share = map(str.strip, row[1:-1].split("|"))
            first = ", ".join(filter(None, (f"[`{name}`][termwise.{name}]", of, size)))
            ratios = ", ".join(filter(None, (plain, peer)))
            memory = f"{peak} ({share} of plain)" if share else peak
            yield f"| {first} | {eager} | {ratios} | {' | '.join(times)} | {memory} |"


def _link(family: str, stem: str) -> str:
    page = DOCS / "pages/api" / family / f"{stem}.md"
    title = page.read_text().partition("\n")[0].removeprefix("# ")
    return f"[{title}][termwise.{family}.{_loss(family, stem).__name__}]"


def _stems(family: str) -> list[str]:
    return [stem for of, stem in NAVIGATION if of == family]


def loss_of(path: str) -> Any:
    """Return the function that the page at a path below `pages` is of."""
    _, family, page = path.split("/")
    return _loss(family, page.removesuffix(".md"))


def _loss(family: str, stem: str) -> Any:
    """Return the function that a page is of."""
    module = getattr(termwise, family)
    return getattr(module, f"{stem}_loss", None) or getattr(module, stem)


def _record(loss: Any) -> Any:
    return inspect.signature(loss).return_annotation


def _lines() -> Iterator[str]:
    modules = {"termwise": "Core", **{f"termwise.{name}": of for name, of in MODULES.items()}}
    for path, title in modules.items():
        module = termwise if path == "termwise" else getattr(termwise, path.partition(".")[2])
        yield from (f"## {title}", "", f"`{path}`", "", "| name | what it is |", "|---|---|")
        # Losses first, then what else there is: records and modules stand beside their loss.
        names = sorted(_public(module), key=lambda name: (not name.endswith("_loss"), name.lower()))
        for name in names:
            yield f"| [`{name}`][{path}.{name}] | {_first_line(getattr(module, name))} |"
        yield ""


def _public(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    ]


def _first_line(of: Any) -> str:
    """Return the first line of a docstring, or of a Literal what it allows."""
    if inspect.isclass(of) or inspect.isroutine(of):
        line = (inspect.getdoc(of) or "").partition("\n\n")[0].replace("\n", " ")
        return line.replace("|", "\\|")
    if typing.get_origin(of) is not typing.Literal:
        return "A type."
    return f"One of {', '.join(f'`{json.dumps(value)}`' for value in typing.get_args(of))}."


_ROWS = {
    "<!-- names -->": _lines,
    "<!-- table of libraries -->": _libraries,
    "<!-- table of measurements -->": _measurements,
}
