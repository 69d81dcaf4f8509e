"""Every public name under the family that exports it: "lm.next_token_loss", "termwise.terms"."""

import ast
import functools
import inspect
from pathlib import Path

import termwise
import termwise.testing

_PUBLIC = {name: value for name, value in vars(termwise).items() if not name.startswith("_")}
# What a test has imported is there too: `termwise.demo` is a program, and exports nothing.
FAMILIES = {
    "termwise": termwise,
    **{n: v for n, v in _PUBLIC.items() if inspect.ismodule(v) and n != "demo"},
}
EXPORTS = {
    f"{family}.{name}": value
    for family, module in FAMILIES.items()
    for name, value in vars(module).items()
    if not name.startswith("_") and not inspect.ismodule(value)
}
FUNCTIONS = [name for name, value in EXPORTS.items() if inspect.isfunction(value)]
CLASSES = [name for name, value in EXPORTS.items() if inspect.isclass(value)]


@functools.cache
def _definitions(family: str) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """Return what a family's files define, of overloads the last."""
    return {
        part.name: part
        for path in Path(FAMILIES[family].__file__).parent.glob("*.py")
        for part in ast.parse(path.read_text()).body
        if isinstance(part, ast.FunctionDef | ast.ClassDef)
    }


def definition(name: str) -> ast.FunctionDef | ast.ClassDef:
    family, _, own = name.partition(".")
    return _definitions(family)[own]


def first_line(docstring: str | None) -> str:
    return (docstring or "").partition("\n")[0]


def members(kind: ast.ClassDef) -> dict[str, str | None]:
    """Return the docstrings of public fields and methods."""
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


def is_module(name: str) -> bool:
    """Whether a public class is a loss as a module, whose fields the function documents."""
    return issubclass(EXPORTS[name], termwise.LossModule) and name != "termwise.LossModule"


def shaped(annotation: ast.expr | None) -> str:
    """Write an annotation as the source does, where it has axes; else give nothing."""
    quoted = ast.unparse(annotation).replace("'", '"') if annotation else ""
    return quoted if 'Tensor, "' in quoted else ""
