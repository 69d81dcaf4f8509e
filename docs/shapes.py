"""A griffe extension: shape annotations stand on the site as they stand in the source.

griffe reads a string in an annotation as a forward reference, and so a shape as an expression:
`"batch *event"` becomes `batch * event`, and `" batch"` loses its quotes. Here a string stays one.

A docstring says its shapes once more, for editors that show an annotation without them. On the
site the annotation itself has them, and they leave the docstring.
"""

import ast
import dataclasses
import json
import re
from typing import Any

import griffe

# Of an argument in parentheses after its name, of a result or a field before what it is.
_ARGUMENT = re.compile(r'^( +\w+) \(.*Tensor, ".*?"\].*?\):', re.MULTILINE)
_RESULT = re.compile(r'^( *)(?!\w+ \()\S*\[Tensor, ".*?"\].*?: (\S)', re.MULTILINE)


class Shapes(griffe.Extension):
    """Build annotations anew, without a look inside strings."""

    def on_function_instance(
        self, *, node: ast.AST | griffe.ObjectNode, func: griffe.Function, **_: Any
    ) -> None:
        """Mend the parameters and the result of a function."""
        if not isinstance(node, ast.FunctionDef):
            return
        _say_once(func)
        arguments = node.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        for argument in [*named, arguments.vararg, arguments.kwarg]:
            if argument is not None:
                parameter = func.parameters[argument.arg]
                parameter.annotation = _annotation(argument.annotation, func)
                parameter.default = _quoted(parameter.default)
        func.returns = _annotation(node.returns, func)

    def on_attribute_instance(
        self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **_: Any
    ) -> None:
        """Mend a field of a record, the value of a type alias, the result of a property."""
        if isinstance(node, ast.FunctionDef):
            attr.annotation = _annotation(node.returns, attr)
        if isinstance(node, ast.AnnAssign):
            _say_once(attr)
            attr.annotation = _annotation(node.annotation, attr)
            if node.value is not None:
                attr.value = _annotation(node.value, attr)


def _say_once(of: griffe.Object) -> None:
    if of.docstring is not None:
        text = _ARGUMENT.sub(r"\1:", of.docstring.value)
        of.docstring.value = _RESULT.sub(lambda found: found[1] + found[2].upper(), text)


def _annotation(node: ast.expr | None, of: griffe.Object) -> griffe.Expr | str | None:
    return _quoted(griffe.get_expression(node, parent=of.parent, parse_strings=False))


def _quoted(part: Any) -> Any:
    """Write strings with the source's double quotes, in all of an expression."""
    if isinstance(part, str):
        return json.dumps(ast.literal_eval(part)) if part.startswith("'") else part
    if isinstance(part, list):
        return [_quoted(item) for item in part]
    if isinstance(part, griffe.Expr) and not isinstance(part, griffe.ExprName):
        for field in dataclasses.fields(part):
            setattr(part, field.name, _quoted(getattr(part, field.name)))
    return part
