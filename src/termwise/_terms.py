"""The record that every loss returns: frozen, slotted, a pytree, with named terms."""

import dataclasses
import html
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Self, TypeVar, cast, dataclass_transform

import torch
from jaxtyping import Float
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import is_fake

from ._numbers import accumulator

T = TypeVar("T", bound="Terms")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Terms:
    """The record that a loss returns: named tensors, `loss` first.

    Subclass it and decorate the subclass with [`@terms`][termwise.terms]. Records compare by
    identity, can be pickled and, once detached, copied with `deepcopy` (PyTorch copies only leaves
    of a graph). They are pytrees, so `vmap`, `torch.func`, `torch.compile`, `torch.export` and DDP
    find their tensors.
    """

    loss: Float[Tensor, ""]
    """The scalar to call `.backward()` on."""

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) in the order of declaration, leaving out fields that are None."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield field.name, value

    def __getitem__(self, name: str) -> Tensor:
        """Return the term with this name, as in `terms["sim"]`.

        Raises:
            KeyError: there is no term with this name, or it is None.
        """
        named = dict(self.items())
        if name not in named:
            raise KeyError(f"{type(self).__name__} has no term {name!r}, only {', '.join(named)}")
        return named[name]

    def detach(self) -> Self:
        """Return the record with all terms detached from the graph."""
        return self._mapped(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert every term; takes the arguments of `torch.Tensor.to`.

        Lightning and accelerate call this to move the result of a step.
        """
        return self._mapped(lambda value: value.to(*args, **kwargs))

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Return every term as a Python float for logging, with one transfer to the host.

        The key of a scalar is the name of its field, that of element `i` of a vector is `field[i]`,
        both after the prefix: `terms.metrics("train/")`. Fields with more axes are data rather than
        metrics, and are omitted. Only this method and `repr` synchronize with the device.
        """
        return host_numbers(
            {name: value for name, value in self.items() if value.ndim <= 1}, prefix
        )

    def __repr__(self) -> str:
        """Return a table of name, value and shape. Synchronizes with the device."""
        return text_table(type(self).__name__, self._table())

    def _repr_html_(self) -> str:
        """Return the table of `repr` as HTML, for notebooks."""
        return html_table(type(self).__name__, self._table())

    def _table(self) -> list[tuple[str, str, str]]:
        shown = {name: value for name, value in self.items() if is_readable(value)}
        values = host_numbers({name: value.reshape(-1)[:_SHOWN] for name, value in shown.items()})
        rows: list[tuple[str, str, str]] = []
        for field in dataclasses.fields(self):
            value: object = getattr(self, field.name)
            if not isinstance(value, Tensor):
                rows.append((field.name, repr(value), ""))
                continue
            heads = range(min(value.numel(), _SHOWN)) if field.name in shown else ()
            texts = [f"{values[f'{field.name}[{i}]']:.6g}" for i in heads]
            if value.numel() > len(texts):
                texts.append("...")
            text = texts[0] if value.ndim == 0 else f"[{', '.join(texts)}]"
            rows.append((field.name, text, str(list(value.shape)) if value.ndim else ""))
        return rows

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Self:
        return dataclasses.replace(self, **{name: change(value) for name, value in self.items()})


# Elements of a vector that `repr` shows.
_SHOWN = 6


def text_table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as aligned lines, within the parentheses of a record."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join([f"{title}(", *(f"    {line}".rstrip() for line in lines), ")"])


def html_table(title: str, rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as an HTML table, whose first column has the headings."""
    cells = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for name, *row in rows
    )
    return f"<table><caption>{html.escape(title)}</caption>{cells}</table>"


def is_readable(value: Tensor) -> bool:
    """Whether a tensor has values to show; meta, fake and traced tensors do not."""
    wrapped = torch.compiler.is_compiling() or is_functorch_wrapped_tensor(value)
    return not (wrapped or value.device.type == "meta" or is_fake(value))


def host_numbers(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, float]:
    """Return scalars by name and vectors' elements by `name[i]`, with one transfer to the host."""
    if not tensors:
        return {}
    dtype = accumulator(next(iter(tensors.values())))
    # float64 represents every float32, and every count below 2**53, exactly.
    flat = torch.cat([value.detach().reshape(-1).to(dtype) for value in tensors.values()])
    names = [
        prefix + label
        for name, value in tensors.items()
        for label in ([f"{name}[{i}]" for i in range(len(value))] if value.ndim else [name])
    ]
    return dict(zip(names, cast("list[float]", flat.tolist()), strict=True))


@dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False)
def terms(cls: type[T]) -> type[T]:
    """Turn a subclass of [`Terms`][termwise.Terms] into the record of a loss.

    The class becomes a frozen, slotted, keyword-only dataclass that compares by identity, and is
    registered as a pytree. Without this registration `vmap`, `grad(has_aux=True)` and
    `torch.export` raise errors, and `DistributedDataParallel(static_graph=True)` silently skips the
    reduction of gradients.

    Args:
        cls: a subclass of `Terms` with an annotated field for each term, in the order in which they
            are shown; `loss` is inherited and comes first.

    Raises:
        TypeError: `cls` is not a subclass of `Terms`, or a field is not annotated as a tensor.

    Examples:
        >>> import torch
        >>> from jaxtyping import Float
        >>> from torch import Tensor
        >>> import termwise as tw
        >>> @tw.terms
        ... class RidgeTerms(tw.Terms):
        ...     error: Float[Tensor, ""]
        ...     penalty: Float[Tensor, ""]
        >>> error, penalty = torch.tensor(2.0), torch.tensor(3.0)
        >>> RidgeTerms(loss=error + 0.1 * penalty, error=error, penalty=penalty).metrics()
        {'loss': 2.299..., 'error': 2.0, 'penalty': 3.0}
    """
    if not issubclass(cls, Terms):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"terms needs a subclass of termwise.Terms, got {cls.__qualname__}")
    for name, hint in inspect.get_annotations(cls).items():
        if not _is_tensor_hint(hint):
            raise TypeError(
                f"terms: {cls.__qualname__}.{name} needs a tensor's annotation, such as "
                f'Float[Tensor, ""], alone or with None, got {_name_of(hint)}: a record is what is '
                f"differentiated, logged and moved; a number of the loss is an argument"
            )
    record = dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)(cls)
    torch.export.register_dataclass(
        record, serialized_type_name=f"{record.__module__}.{record.__qualname__}"
    )
    torch.serialization.add_safe_globals([record])
    return record


def _is_tensor_hint(hint: Any) -> bool:
    """Whether a field is annotated as a tensor. An unresolved string counts as one."""
    if isinstance(hint, str) or hint is None or hint is type(None):
        return True
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return all(_is_tensor_hint(option) for option in typing.get_args(hint))
    if origin is Annotated:
        return _is_tensor_hint(typing.get_args(hint)[0])
    kind = getattr(hint, "array_type", hint)  # of a jaxtyping annotation
    return isinstance(kind, type) and issubclass(kind, Tensor)


def _name_of(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else repr(hint)
