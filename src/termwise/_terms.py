"""The record that every loss returns: frozen, slotted, a pytree, and every term has a name."""

import dataclasses
from collections.abc import Iterator
from typing import Self, TypeVar, cast, dataclass_transform

import torch
from jaxtyping import Float
from torch import Tensor

from ._numbers import accumulator

T = TypeVar("T", bound="Terms")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Terms:
    """What a loss returns: named tensors, `loss` first.

    Subclass it under [`@terms`][termwise.terms]. Records compare by identity, pickle and deepcopy
    (detached ones: PyTorch copies only leaves of a graph), and are pytrees, so `vmap`,
    `torch.func`, `torch.compile`, `torch.export` and DDP see the tensors in them.
    """

    loss: Float[Tensor, ""]
    """The scalar to call `.backward()` on."""

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) in the order of declaration, leaving out fields that are None."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield field.name, value

    def detach(self) -> Self:
        """Give the same record outside the graph."""
        return dataclasses.replace(self, **{name: value.detach() for name, value in self.items()})

    def metrics(self) -> dict[str, float]:
        """Move every term to the host in one transfer, as Python floats for a logger.

        A scalar is named as its field, element `i` of a vector `field[i]`. Fields with more axes
        are data rather than metrics and are left out. This is the one method here that waits for
        the device.
        """
        kept = [(name, value.detach()) for name, value in self.items() if value.ndim <= 1]
        wide = accumulator(self.loss)  # float64 holds a float32, and a count below 2**53, exactly
        flat = torch.cat([value.reshape(-1).to(wide) for _, value in kept])
        numbers = cast("list[float]", flat.tolist())
        names = [
            label
            for name, value in kept
            for label in ([f"{name}[{i}]" for i in range(len(value))] if value.ndim else [name])
        ]
        return dict(zip(names, numbers, strict=True))


@dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False)
def terms(cls: type[T]) -> type[T]:
    """Make a subclass of [`Terms`][termwise.Terms] the record of a loss.

    The class becomes a frozen, slotted, keyword-only dataclass that compares by identity, and is
    registered as a pytree. Without the registration `vmap`, `grad(has_aux=True)` and
    `torch.export` refuse the record, and `DistributedDataParallel(static_graph=True)` skips the
    reduction of gradients without a word.

    Args:
        cls: a subclass of `Terms` with an annotated field for each term, in the order in which
            they are to be read; `loss` is inherited and comes first.

    Raises:
        TypeError: if `cls` is not a subclass of `Terms`.

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
    record = dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)(cls)
    torch.export.register_dataclass(
        record, serialized_type_name=f"{record.__module__}.{record.__qualname__}"
    )
    return record
