"""Nothing that is exported is missing in what the type checkers read of tests/typed.

Read as text: what the types are is for pyright and mypy to say, that each is asserted is said here.
"""

import ast
import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path

import calls
import pytest
from exports import EXPORTS
from torch import nn

import termwise

TYPED = Path(__file__).parents[1] / "typed"
METHODS = (types.FunctionType, classmethod, staticmethod)


def asserted() -> dict[str, set[str]]:
    """Return the types that `assert_type` is told of each expression.

    An expression is spelled by what it is of: `lm.NextTokenLoss()()` is the call of a module, and
    with a parameter `terms: lm.NextTokenTerms`, `terms.loss` is `lm.NextTokenTerms.loss`.
    """
    found: dict[str, set[str]] = {}
    by_hand = [path.read_text() for path in sorted(TYPED.glob("*.py"))]
    for text in (*by_hand, *map(calls.right, calls.families())):
        for function in ast.walk(ast.parse(text)):
            if isinstance(function, ast.FunctionDef):
                arguments = [a for a in function.args.args if a.annotation]  # not self
                names = {a.arg: ast.unparse(a.annotation) for a in arguments}
                for call in ast.walk(function):
                    if isinstance(call, ast.Call) and ast.unparse(call.func) == "assert_type":
                        what, known = call.args
                        found.setdefault(spelled(what, names), set()).add(ast.unparse(known))
    return found


def spelled(expression: ast.expr, names: dict[str, str]) -> str:
    match expression:
        case ast.Name(id=name):
            return names.get(name, name)
        case ast.Attribute(value=owner, attr=name):
            return f"{spelled(owner, names)}.{name}"
        case ast.Call(func=ast.Attribute(value=owner, attr="get"), args=[ast.Constant(value=key)]):
            return f"{spelled(owner, names)}.{key}"  # of a TypedDict
        case ast.Call(func=called):
            return f"{spelled(called, names)}()"
    return ast.unparse(expression)


ASSERTED = asserted()


def needed(name: str, value: object) -> list[str]:
    """List what has to be asserted of an export."""
    if typing.get_origin(value) is typing.Literal:
        return [name]
    if not isinstance(value, type):
        return [f"{name}()"]  # a function, or an alias of a Callable
    if issubclass(value, Exception):
        return []
    fields = inspect.get_annotations(value)
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
    members = [member for member in fields if not member.startswith("_")]
    for member, of in inspect.getmembers_static(value):
        if member.startswith("_") or not of_ours(value, member):
            continue
        if isinstance(of, METHODS):
            members.append(f"{member}()")
        elif isinstance(of, property):
            members.append(member)
    if issubclass(value, nn.Module):
        members = [m for m in members if m not in ("forward()", "extra_repr()") and "()" in m]
        called = [] if value is termwise.LossModule else [f"{name}()()"]  # a base is not called
        return [*called, *(f"{name}.{member}" for member in members)]
    return [f"{name}.{member}" for member in members]


def of_ours(value: type, member: str) -> bool:
    """Whether a class of this package brings a member, and the class itself, if not Terms."""
    owner = next(parent for parent in value.__mro__ if member in vars(parent))
    return owner is value or (owner is termwise.Terms and member in ("metrics", "detach"))


@pytest.mark.parametrize("name", EXPORTS)
def test_each_type_is_asserted(name):
    wanted = needed(name, EXPORTS[name])
    assert [what for what in wanted if what not in ASSERTED] == []
    assert [what for what in wanted if "Any" in ASSERTED[what]] == []


OVERLOADED = [
    name
    for name, value in EXPORTS.items()
    if inspect.isfunction(value) and typing.get_overloads(value)
]


@pytest.mark.parametrize("name", OVERLOADED)
def test_the_type_of_each_overload_is_asserted(name):
    assert len(ASSERTED[f"{name}()"]) == len(typing.get_overloads(EXPORTS[name]))


def test_each_function_and_module_is_called_wrongly():
    by_hand = [path.read_text() for path in sorted((TYPED / "wrong").glob("*.py"))]
    wrong = "".join([*by_hand, *map(calls.wrong, calls.families())])
    called = set(re.findall(r"^ +(\w+\.\w+)\(.*# error: ", wrong, flags=re.MULTILINE))
    wanted = {
        name
        for name, value in EXPORTS.items()
        if inspect.isfunction(value) or (inspect.isclass(value) and issubclass(value, nn.Module))
    }
    assert wanted - called == {"termwise.LossModule"}  # whose subclasses are
