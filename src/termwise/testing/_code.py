"""Write a call as Python code."""

import dataclasses
import enum
import functools
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


def write_call(fn: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Return the imports that a call needs, and the call, as code.

    Arguments that are equal to their default are omitted. A value that cannot be written as code,
    such as a lambda, becomes a name, and a comment among the imports says what it stands for.
    """
    imports: set[str] = set()
    function = _write(fn, imports, "fn")
    parameters = inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn).parameters
    lines = [
        f"    {name}={_write(value, imports, name)},\n"
        for name, value in arguments.items()
        if name not in parameters or not _is_default(value, parameters[name].default)
    ]
    return "\n".join(sorted(imports)), f"{function}(\n{''.join(lines)})"


def is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(cast("object", value), "_fields")


def _is_default(value: Any, default: Any) -> bool:
    if value is default:
        return True
    return (
        type(value) is type(default)
        and isinstance(value, (bool, int, float, str))
        and bool(value == default)
    )


def _write(value: Any, imports: set[str], role: str) -> str:
    """Write a value as code, or as the name `role` if it cannot be written as code."""
    if isinstance(value, Tensor):
        imports.add("import torch")
        return _write_tensor(value.detach())
    if isinstance(value, torch.Generator):
        imports.add("import torch")
        return f"torch.Generator().manual_seed({value.initial_seed()})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = _name(type(value), imports)
        fields = (
            f"{field.name}={_write(getattr(value, field.name), imports, f'{role}_{field.name}')}"
            for field in dataclasses.fields(value)
            if field.init
        )
        return f"{kind}({', '.join(fields)})"
    if is_named_tuple(value):
        parts: Mapping[str, Any] = cast("Any", value)._asdict()
        fields = (
            f"{name}={_write(part, imports, f'{role}_{name}')}" for name, part in parts.items()
        )
        return f"{_name(type(value), imports)}({', '.join(fields)})"
    if isinstance(value, tuple):
        items = _write_items(cast("Sequence[Any]", value), imports, role)
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    if isinstance(value, list):
        items = _write_items(cast("Sequence[Any]", value), imports, role)
        return f"[{', '.join(items)}]"
    if isinstance(value, dict):
        entries = cast("Mapping[Any, Any]", value)
        keys = _write_items(list(entries), imports, f"{role}_key")
        values = _write_items(list(entries.values()), imports, role)
        pairs = (f"{key}: {one}" for key, one in zip(keys, values, strict=True))
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, float):
        return _write_number(value, torch.float64)
    if isinstance(value, enum.Enum):
        return f"{_name(type(value), imports)}.{value.name}"
    if isinstance(value, str):
        return repr(value) if '"' in value or "\\" in value else f'"{value}"'
    if isinstance(value, functools.partial):
        return _write_partial(cast("functools.partial[object]", value), imports, role)
    owner = getattr(value, "__self__", None)
    if inspect.ismethod(value) and not isinstance(owner, type):
        if not _has_usable_repr(owner):
            return _stand_in(role, f"{type(owner).__name__}.{value.__name__}", imports)
        return f"{_write(owner, imports, role)}.{value.__name__}"
    if type(value).__module__ == "numpy" and hasattr(value, "shape"):
        imports.add("import torch")
        return f"{_write_tensor(torch.from_numpy(value))}.numpy()"
    if inspect.isroutine(value) or isinstance(value, type):
        name = _name(value, imports)
        if "<" not in name:
            return name
        what = "lambda" if value.__name__ == "<lambda>" else value.__name__
        return _stand_in(role, what, imports)
    if not _has_usable_repr(value):
        return _stand_in(role, type(value).__name__, imports)
    if type(value).__module__ == "torch":  # a dtype or a device
        imports.add("import torch")
    elif type(value).__module__ != "builtins":
        _name(type(value), imports)
    return repr(value)


def _write_items(items: Sequence[Any], imports: set[str], role: str) -> list[str]:
    return [_write(item, imports, f"{role}_{index}") for index, item in enumerate(items)]


def _has_usable_repr(value: Any) -> bool:
    """Whether the `repr` of an object is code that creates it."""
    if not isinstance(value, nn.Module) or type(value).__repr__ is not nn.Module.__repr__:
        return dataclasses.is_dataclass(value) or not repr(value).startswith("<")
    if any(True for part in (value.children, value.parameters, value.buffers) for _ in part()):
        return False  # the `repr` shows none of their values
    kind = type(value)
    no_arguments = (
        kind.__init__ is nn.Module.__init__ or len(inspect.signature(kind.__init__).parameters) == 1
    )
    return no_arguments or kind.extra_repr is not nn.Module.extra_repr


def _stand_in(role: str, what: str, imports: set[str]) -> str:
    """Return a name for a value that has no code, and add a comment that says what it is."""
    imports.add(f"# {role}: the {what} that was {'tested' if role == 'fn' else 'passed'}")
    return role


def _write_partial(value: functools.partial[Any], imports: set[str], role: str) -> str:
    imports.add("import functools")
    arguments = [_write(value.func, imports, role), *_write_items(value.args, imports, role)]
    arguments += [
        f"{name}={_write(one, imports, f'{role}_{name}')}" for name, one in value.keywords.items()
    ]
    return f"functools.partial({', '.join(arguments)})"


def _write_tensor(value: Tensor) -> str:
    if value.layout != torch.strided:
        dense = _write_tensor(value.to_dense())
        return f"{dense}.to_sparse(layout={value.layout})"
    if value.is_meta:
        return f'torch.empty({list(value.shape)}, dtype={value.dtype}, device="meta")'
    if value.numel() == 0:
        return f"torch.zeros({list(value.shape)}, dtype={value.dtype})"
    shape = list(value.shape)
    expanded = [
        not stride and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)
    ]
    if any(expanded):
        for axis in (axis for axis, one in enumerate(expanded) if one):
            value = value.narrow(axis, 0, 1)
        return f"{_write_tensor(value)}.expand({', '.join(map(str, shape))})"
    inferred = (torch.float32, torch.int64, torch.bool)
    dtype = "" if value.dtype in inferred else f", dtype={value.dtype}"
    numbers = cast("object", value.cpu().tolist())
    return f"torch.tensor({_write_nested(numbers, value.dtype)}{dtype}){_write_strides(value)}"


def _write_strides(value: Tensor) -> str:
    """Write the calls that give a contiguous tensor the strides of this one."""
    if value.is_contiguous():
        return ""
    if value.ndim == 1:
        return ".repeat_interleave(2)[::2]"
    if value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last):
        return ".to(memory_format=torch.channels_last)"
    if value.mT.is_contiguous():
        return ".mT.contiguous().mT"
    twice = ", ".join(["1"] * (value.ndim - 1) + ["2"])
    return f".repeat({twice})[..., :{value.shape[-1]}]"


def _write_nested(numbers: object, dtype: torch.dtype) -> str:
    if isinstance(numbers, list):
        inside = (_write_nested(one, dtype) for one in cast("list[object]", numbers))
        return f"[{', '.join(inside)}]"
    if isinstance(numbers, complex):
        part = torch.float32 if dtype == torch.complex64 else torch.float64
        real, imaginary = (_write_number(one, part) for one in (numbers.real, numbers.imag))
        return f"complex({real}, {imaginary})" if numbers.imag else real
    return _write_number(numbers, dtype) if isinstance(numbers, float) else repr(numbers)


def _write_number(number: float, dtype: torch.dtype) -> str:
    """Write a float with the fewest digits that are exact in its dtype."""
    if not math.isfinite(number):
        return f'float("{number}")'
    for digits in range(1, 17):
        short = float(f"{number:.{digits}g}")
        if torch.tensor(short, dtype=dtype).item() == number:
            return repr(short)
    return repr(number)


def _name(thing: Any, imports: set[str]) -> str:
    """Return the name of a function or a class, and add its import from a public module."""
    name: str | None = getattr(thing, "__qualname__", None)
    module: str | None = getattr(thing, "__module__", None)
    if name is None or module is None:
        return repr(thing)
    own: str = thing.__name__
    if getattr(sys.modules.get(module), own, None) is thing:  # torch.sin has another __qualname__
        name = own
    first = name.partition(".")[0]
    if "<" in name:  # a lambda or a local function, which cannot be imported
        return name.rpartition("<locals>.")[2]
    parts: Sequence[str] = module.split(".")
    while len(parts) > 1 and parts[-1].startswith("_"):
        outer = sys.modules.get(".".join(parts[:-1]))
        if getattr(outer, first, None) is not getattr(sys.modules.get(module), first, thing):
            break
        parts = parts[:-1]
    imports.add(f"from {'.'.join(parts)} import {first}")
    return name
