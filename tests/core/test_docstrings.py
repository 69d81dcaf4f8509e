"""What is exported says what it is in its first line, and each field of a record beneath itself.

Read from the source: a string beneath a field is nowhere at run time.
"""

import ast
import functools
import inspect
import re
from pathlib import Path

import pytest
from exports import EXPORTS, FAMILIES

CLASSES = [name for name, value in EXPORTS.items() if inspect.isclass(value)]
FUNCTIONS = [name for name, value in EXPORTS.items() if inspect.isfunction(value)]


@functools.cache
def definitions(family: str) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """Give what a family's files define, of overloads the last."""
    return {
        part.name: part
        for path in Path(FAMILIES[family].__file__).parent.glob("*.py")
        for part in ast.parse(path.read_text()).body
        if isinstance(part, ast.FunctionDef | ast.ClassDef)
    }


def node(name: str) -> ast.FunctionDef | ast.ClassDef:
    family, _, own = name.partition(".")
    return definitions(family)[own]


def members(kind: ast.ClassDef) -> dict[str, str | None]:
    """Give the docstrings of public fields and methods."""
    found = {}
    for part, beneath in zip(kind.body, [*kind.body[1:], None], strict=True):
        match part, beneath:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=text)):
                found[name] = text
            case ast.AnnAssign(target=ast.Name(id=name)), _:
                found[name] = None
            case ast.FunctionDef(name=name), _:
                found[name] = ast.get_docstring(part)
    return {name: text for name, text in found.items() if not name.startswith("_")}


def first_line(docstring: str | None) -> str:
    return (docstring or "").partition("\n")[0]


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_the_first_line_is_one_sentence(name):
    text = ast.get_docstring(node(name))
    assert re.fullmatch(r"(?![a-z])\S.{8,}[^.]\.", first_line(text))
    assert not re.search(r"[.!?] [A-Z]", first_line(text))
    assert text.splitlines()[1:2] in ([], [""])


@pytest.mark.parametrize("name", CLASSES)
def test_each_field_and_method_says_what_it_is(name):
    for member, text in members(node(name)).items():
        if member not in ("forward", "extra_repr"):
            assert text, f"{name}.{member} has no docstring"
        if text:
            assert text.partition("\n\n")[0].endswith("."), f"{name}.{member}: {text}"
