"""A loss as a module: its fields are its hyperparameters, and its call is typed."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast, dataclass_transform

from torch import nn

from ._contract import contract


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(dataclasses.field,))
class LossModule(nn.Module):
    """Base class of losses as modules: a subclass declares hyperparameters and `__call__`.

    Each annotated field is a keyword argument of the constructor, checked like the arguments of a
    function under `contract`, and is shown by `print(module)`. Declare a positional field, such as
    a model, with `dataclasses.field(kw_only=False)`. Create parameters and buffers in
    `__post_init__`.

    Write `__call__` with the shapes of its arguments and the record that it returns, so that type
    checkers know the type of a call. At run time it is the module's `forward`: hooks,
    `torch.compile` and `torch.export` see an ordinary module.

    A module does not store a process group, so that it can be pickled: pass the group with each
    call.

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
        """Make the class a dataclass with a checked constructor, and its call `forward`."""
        super().__init_subclass__(**kwargs)
        if "__call__" in cls.__dict__:
            forward: Any = cls.__dict__["__call__"]
            forward.__name__, forward.__qualname__ = "forward", f"{cls.__qualname__}.forward"
            cls.forward = forward
            del cls.__call__  # nn.Module's own `__call__`, with its hooks, is then found instead
        dataclasses.dataclass(kw_only=True, eq=False, repr=False)(cls)
        for field in dataclasses.fields(cast("Any", cls)):
            if field.name in cls.__dict__:  # else it hides a Module or Parameter of that name
                delattr(cls, field.name)
        set_fields: Callable[..., None] = contract(cls.__init__)

        @functools.wraps(set_fields)
        def construct(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            nn.Module.__init__(self)
            set_fields(self, *args, **kwargs)

        setattr(cls, "__init__", construct)  # noqa: B010 -- a type checker takes no assignment

    def hyperparameters(self) -> dict[str, Any]:
        """Return the keyword fields by name, to pass to the function."""
        return keyword_fields(self)

    def extra_repr(self) -> str:
        """Show every field that is not a module, for `print(module)`."""
        names = [field.name for field in dataclasses.fields(cast("Any", self))]
        shown = {name: getattr(self, name) for name in names}
        return ", ".join(f"{n}={v!r}" for n, v in shown.items() if not isinstance(v, nn.Module))


def keyword_fields(record: Any) -> dict[str, Any]:
    """Return the keyword-only fields of a dataclass by name."""
    return {f.name: getattr(record, f.name) for f in dataclasses.fields(record) if f.kw_only}
