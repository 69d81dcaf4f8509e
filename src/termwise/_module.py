"""A loss as a module: its fields are its hyperparameters, and there is one typed way to call it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast, dataclass_transform

from torch import nn

from ._contract import contract


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(dataclasses.field,))
class LossModule(nn.Module):
    """Base of a loss as a module: a class that annotates hyperparameters and writes `__call__`.

    Each annotated field is a keyword of the constructor, checked as a contract checks arguments,
    and is shown by `print(module)`. A field that is given by position, such as a model whose energy
    the loss differentiates, is declared with `dataclasses.field(kw_only=False)`. Parameters and
    buffers are made in `__post_init__`.

    `__call__` is written once, with the shapes and the record that it returns, so that type
    checkers know what a call gives. At run time it is the module's `forward`: hooks,
    `torch.compile` and `torch.export` see an ordinary module.

    A module holds no process group (it has to pickle): a group comes with each call.

    Examples:
        >>> import torch
        >>> from jaxtyping import Float
        >>> from torch import Tensor
        >>> import termwise as tw
        >>> @tw.terms
        ... class HuberTerms(tw.Terms):
        ...     mean_error: Float[Tensor, ""]
        >>> @tw.contract
        ... def huber_loss(
        ...     x: Float[Tensor, " n"], y: Float[Tensor, " n"], *, delta: float = 1.0
        ... ) -> HuberTerms:
        ...     error = torch.nn.functional.huber_loss(x, y, delta=delta)
        ...     return HuberTerms(loss=error, mean_error=(x - y).mean().detach())
        >>> class HuberLoss(tw.LossModule):
        ...     delta: float = 1.0
        ...
        ...     def __call__(self, x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> HuberTerms:
        ...         return huber_loss(x, y, **self.hyperparameters())
        >>> loss_fn = HuberLoss(delta=0.5)
        >>> loss_fn
        HuberLoss(delta=0.5)
        >>> loss_fn(torch.tensor([2.0]), torch.zeros(1))["loss"]
        tensor(0.8750)
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make the class a dataclass whose constructor is checked, and its call the forward."""
        super().__init_subclass__(**kwargs)
        if "__call__" in cls.__dict__:
            forward: Any = cls.__dict__["__call__"]
            forward.__name__, forward.__qualname__ = "forward", f"{cls.__qualname__}.forward"
            cls.forward = forward
            del cls.__call__  # nn.Module's own, with its hooks, is found in its place
        dataclasses.dataclass(kw_only=True, eq=False, repr=False)(cls)
        for field in dataclasses.fields(cast("Any", cls)):
            if field.name in cls.__dict__:  # it would hide a Module or Parameter of that name
                delattr(cls, field.name)
        set_fields: Callable[..., None] = contract(cls.__init__)

        @functools.wraps(set_fields)
        def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            nn.Module.__init__(self)
            set_fields(self, *args, **kwargs)

        setattr(cls, "__init__", construct)  # noqa: B010 -- a type checker takes no assignment

    def hyperparameters(self) -> dict[str, Any]:
        """Return the fields that are given by keyword, by name: the keywords of the function."""
        return keyword_fields(self)

    def extra_repr(self) -> str:
        """Show every field that is not a module, as `print(module)` does."""
        names = [field.name for field in dataclasses.fields(cast("Any", self))]
        shown = {name: getattr(self, name) for name in names}
        return ", ".join(f"{n}={v!r}" for n, v in shown.items() if not isinstance(v, nn.Module))


def keyword_fields(record: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that its constructor takes by keyword alone, by name."""
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.kw_only}
