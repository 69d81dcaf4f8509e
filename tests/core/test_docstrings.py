"""What is exported says what it is in its first line, and each field of a record beneath itself.

An editor shows an annotation `Float[Tensor, "batch dim"]` as `Tensor`: pyright leaves out what
`Annotated` adds. So that it shows the shape all the same, docstrings repeat it, word by word.

Arguments that most losses have are described in one sentence, the same everywhere.

Read from the source: a string beneath a field is nowhere at run time.
"""

import ast
import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from exports import CLASSES, EXPORTS, FUNCTIONS, definition, first_line, is_module, members, shaped

import termwise


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_the_first_line_is_one_sentence(name):
    text = ast.get_docstring(definition(name))
    assert re.fullmatch(r"(?![a-z])\S.{8,}[^.]\.", first_line(text))
    assert not re.search(r"[.!?] [A-Z]", first_line(text))
    assert text.splitlines()[1:2] in ([], [""])


def fields_of(name: str) -> list[str]:
    """Name the fields of a module: test_every_loss.py holds that the function has them."""
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


SOURCE = Path(termwise.__file__).parent
ROOT = Path(__file__).parents[2]


@functools.cache
def parsed() -> list[tuple[str, ast.AST]]:
    """Return every node of the sources, with its file."""
    files = {str(path.relative_to(SOURCE)): path for path in sorted(SOURCE.rglob("*.py"))}
    return [(name, node) for name in files for node in ast.walk(ast.parse(files[name].read_text()))]


@functools.cache
def documented() -> list[tuple[str, str]]:
    """Return every string that documents something in the sources, with where it is."""
    return [
        (f"{path}:{getattr(node, 'name', '')}", inspect.cleandoc(part.value.value))
        for path, node in parsed()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        for part in node.body
        if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
        if isinstance(part.value.value, str)
    ]


def arguments(text: str) -> dict[str, str]:
    """Return what a docstring says of each argument, on one line, without its annotation."""
    section = re.search(r"\nArgs:\n(.*?)(?=\n\S|\Z)", text, re.DOTALL)
    entries = re.split(r"\n    (?=\S)", "\n" + section[1]) if section else []
    found = (re.match(r"(\w+)(?: \(.*?\))?: (.*)", " ".join(entry.split())) for entry in entries)
    return {entry[1]: entry[2] for entry in found if entry}


def functions() -> Iterator[tuple[str, str]]:
    """Yield the docstring of every function of the sources, except properties."""
    for path, node in parsed():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {getattr(part, "id", "") for part in node.decorator_list}
            if "property" not in decorators and (text := ast.get_docstring(node)):
                yield f"{path}:{node.name}", text


def test_a_docstring_begins_with_an_imperative_verb():
    """Return, Compute, Whether: not Returns, Give, The loss, What, How, Of."""
    assert not [where for where, text in documented() if re.match(r"(Give|Tell|Say)s?\b", text)]
    other = re.compile(
        r"(The|An?|What|How|Which|Where|Who|Of|In|On|From|One|Its?|Each)\b"
        r"|[A-Z]\w*[^s\W]s\b"
    )
    assert not [where for where, text in functions() if other.match(text)]


# Words that only their author understands, and what PyTorch's documentation would say.
PLAIN = {
    r"hangs? on\b": "depends on",
    r"\banew\b": "again",
    r"\bnobody\b": "no rank, no user",
    r"\bstraddl": "extends over",
    r"\bfor ever\b": "forever",
    r"the other way round": "the opposite order, or sign",
    r"whatever (it|they) (holds?|held)": "even if it is NaN",
    r"[Ss]ent by each rank": "each rank sends",
    r"[Kk]ept for the backward": "saved for the backward pass",
    r"(is|are) refused \(`": "raises",
    r"[Hh]alves are": "half precision is",
    r"[Nn]othing is to be averaged": "not to be averaged",
    r"\b(normal|standard|regular)is(e|ed|es|ing|ation)\b": "-ize",
}


def test_docstrings_and_pages_are_in_plain_english():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs/pages").rglob("*.md"))]
    texts = [*documented(), *((str(page.relative_to(ROOT)), page.read_text()) for page in pages)]
    said = {
        f"{where}: {found[0]}": plain
        for where, text in texts
        for riddle, plain in PLAIN.items()
        if (found := re.search(riddle, " ".join(text.split())))
    }
    assert not said


# One meaning, one sentence; what else a loss has to say of the argument follows it.
_OTHERS = (
    "affect no term and no gradient|"
    "affect neither the value nor the gradient|"
    "keep no latents and get no gradient"
)
SENTENCES = {
    "batch_group": (
        r"process group whose ranks hold different (rows|samples|tokens), in any numbers, "
        r"0 included\. None(, here and below)?: no communication\."
    ),
    "grad_reduction": (
        r"how the trainer combines the ranks' gradients: \"mean\" \(DDP, FSDP\) or \"sum\"\."
    ),
    "mask": (
        r"(rows|samples|tokens|student tokens) that count; "
        rf"the others ({_OTHERS}), even if they are NaN\. None: all\b"
    ),
}


@pytest.mark.parametrize("argument", SENTENCES)
def test_an_argument_of_every_loss_has_the_same_sentence_everywhere(argument):
    said = [(where, arguments(text).get(argument)) for where, text in documented()]
    # A law of the test kit takes the name of a mask.
    said = [(where, text) for where, text in said if text and not where.startswith("testing/")]
    assert len(said) > 15
    wrong = [where for where, text in said if not re.match(SENTENCES[argument], text)]
    assert not wrong


def test_grad_reduction_says_that_it_needs_a_group():
    for where, text in documented():
        said = arguments(text)
        if {"batch_group", "group"} & said.keys() and "grad_reduction" in said:
            assert "Without a group it has no effect." in said["grad_reduction"], where


def test_a_docstring_says_that_no_gpu_has_run_what_it_says_of_one():
    """Without a GPU such a path is tested on the CPU and on meta tensors."""
    of_devices = re.compile(r"\bCUDA\b|[Oo]n an accelerator|accelerator device")
    names = [name for name in [*FUNCTIONS, *CLASSES] if not name.startswith("testing.")]
    found = {name: ast.get_docstring(definition(name)) for name in names}
    found = {name: text for name, text in found.items() if of_devices.search(text)}
    assert len(found) > 10
    for name, text in found.items():
        assert "no gpu has run" in " ".join(text.split()).lower(), name
