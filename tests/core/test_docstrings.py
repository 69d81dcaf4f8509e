"""What is exported says what it is in its first line, and each field of a record beneath itself.

An editor shows an annotation `Float[Tensor, "batch dim"]` as `Tensor`: pyright leaves out what
`Annotated` adds. So that it shows the shape all the same, docstrings repeat it, word by word.

Read from the source: a string beneath a field is nowhere at run time.
"""

import ast
import dataclasses
import re

import pytest
from exports import CLASSES, EXPORTS, FUNCTIONS, definition, first_line, is_module, members, shaped


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_the_first_line_is_one_sentence(name):
    text = ast.get_docstring(definition(name))
    assert re.fullmatch(r"(?![a-z])\S.{8,}[^.]\.", first_line(text))
    assert not re.search(r"[.!?] [A-Z]", first_line(text))
    assert text.splitlines()[1:2] in ([], [""])


def fields_of(name: str) -> list[str]:
    """Name the fields of a module: test_every_*_loss.py holds that the function has them."""
    return [field.name for field in dataclasses.fields(EXPORTS[name])] if is_module(name) else []


@pytest.mark.parametrize("name", CLASSES)
def test_each_field_and_method_says_what_it_is(name):
    for member, text in members(definition(name)).items():
        if member not in ("forward", "extra_repr", *fields_of(name)):
            assert text, f"{name}.{member} has no docstring"
        if text:
            assert text.partition("\n\n")[0].endswith("."), f"{name}.{member}: {text}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_repeats_its_shapes(name):
    function = definition(name)
    text = ast.get_docstring(function)
    for argument in [*function.args.args, *function.args.kwonlyargs]:
        if shape := shaped(argument.annotation):
            assert f"\n    {argument.arg} ({shape}): " in text
    if shape := shaped(function.returns):
        assert f"\nReturns:\n    {shape}: " in text


@pytest.mark.parametrize("name", CLASSES)
def test_a_field_with_axes_repeats_its_shape(name):
    docstrings = members(definition(name))
    for part in definition(name).body if not is_module(name) else ():
        if isinstance(part, ast.AnnAssign) and 'Tensor, ""' not in shaped(part.annotation):
            assert docstrings.get(part.target.id, "").startswith(shaped(part.annotation))
