"""A hook of mkdocs: the page of every public name, with the first line of its docstring."""

import inspect
import json
import typing
from collections.abc import Iterator
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


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write the tables where a page asks for them."""
    return markdown.replace("<!-- names -->", "\n".join(_lines()))


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
