"""The forward Laplacian: propagate a value, its Jacobian and its Laplacian in one pass.

For z a function of x, a `Carrier` holds z, J = dz/dx and L = sum_d d2z/dx_d2. Each PyTorch function
that the energy calls maps carriers to carriers:

    linear f      f(z),  f(J),               f(L)
    elementwise f f(z),  f'(z) J,            f'(z) L + f''(z) sum_d J_d^2
    bilinear f    f(a, b), f(Ja, b) + f(a, Jb), f(La, b) + f(a, Lb) + 2 sum_d f(Ja_d, Jb_d)

The rows of a batch do not depend on each other, so one Jacobian axis suffices for all of them. The
largest tensor is J, which has an axis of directions before those of z. It is stored as `scale *
base`, so that an elementwise function multiplies only the small scale. As long as base is the same
in all rows (the weight of a first linear layer), it is a view of one row.

`RULES` maps PyTorch functions to their rules. A test compares each rule with reverse mode. A
missing or unsupported rule raises an error, and the losses then use reverse mode.

Li et al., A computational framework for neural network-based variational Monte Carlo with Forward
Laplacian, Nature Machine Intelligence 6 (2024), https://arxiv.org/abs/2307.08214.
"""

import dataclasses
import functools
import math
import operator
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, overrides
from torch.utils import _pytree

from .._autograd import Function
from .._numbers import block_rows
from ._higher_order import COMPOSITIONS
from ._row_space import Directions, once


class UnknownFunctionError(NotImplementedError):
    """The energy calls a function without a rule for carriers."""


class NoCarrierError(NotImplementedError):
    """The energy does not return a carrier: the result does not depend on x."""


def carried(x: Tensor, directions: Tensor | Directions, create_graph: bool) -> "Carrier":
    """Return x as a carrier of its derivatives along directions.

    Args:
        x: "batch *event".
        directions: rows of the Jacobian of x with respect to itself, such as rows of the identity:
            "directions *event" for all rows, or "directions batch *event". `Directions` are chosen
            at the first use of x.
        create_graph: whether the results are in a graph. The energy itself runs in grad mode, so
            that its calls under no_grad can be recognized.
    """
    # An energy that writes to x in place raises an error, as for a leaf in autograd.
    if isinstance(directions, Directions):
        return Carrier(x, x[None, :0], None, None, None, create_graph, True, directions)
    base = directions if directions.ndim > x.ndim else directions.unsqueeze(1)
    return Carrier(x, base.expand(-1, *x.shape), None, None, None, create_graph, True)


@dataclasses.dataclass(eq=False, repr=False)
class Carrier(Tensor):
    """A value with its derivatives, which PyTorch functions treat as a tensor.

    A tensor without storage: calls that bypass `__torch_function__` reach `__torch_dispatch__`,
    which raises an error. FSDP2, which hooks a module's inputs and outputs, finds the tensors in a
    graph through the fields.
    """

    value: Tensor
    base: Tensor
    """ "directions *value". """
    scale: Tensor | None
    """In the shape of the value. The Jacobian is scale * base. None: 1."""
    laplacian: Tensor | None
    """None: 0."""
    squares: Tensor | None
    """The sum of base^2 over directions, computed when it is first needed."""
    create_graph: bool
    aliased: bool
    """Whether other tensors could share its storage, if it had one."""
    directions: Directions | None = None
    """For x itself, whose base is created at each use, when the directions are known."""

    def __new__(cls, value: Tensor, *_: Any, **__: Any) -> "Carrier":
        made: Carrier = Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            dtype=value.dtype,
            device=value.device,
        )
        return made

    @property
    def jacobian(self) -> Tensor:
        return self.base if self.scale is None else self.base * self.scale

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        rule = RULES.get(func)
        if rule is None:
            raise _unknown(func)
        if rule is not _metadata:
            # The forward of an autograd.Function runs without grad mode, and has its own backward;
            # saved-tensor hooks may run a part of the energy again much later.
            if not torch.is_grad_enabled():
                raise _unknown(func, "under no_grad")
            if saved_tensors_hooks(True) is not None:
                raise _unknown(func, "under saved-tensor hooks, which checkpoint uses too")
            if rule not in (_constant, _detached):
                _begin(func, args, kwargs or {})
        return rule(func, args, kwargs or {})

    @classmethod
    def _dispatch(cls, func: Callable[..., Any], *_: Any) -> Any:
        raise _unknown(func, "past torch's Python functions")

    # PyTorch declares it as a function, but calls it as a method of the class.
    __torch_dispatch__: Any = _dispatch


_autograd: Any = torch._C._autograd  # pyright: ignore
saved_tensors_hooks = cast("Callable[[bool], object]", _autograd._top_saved_tensors_default_hooks)


def is_carrier(value: object) -> bool:
    """Whether a value is a carrier."""
    return type(value) is Carrier


def carrier_of(energies: object) -> Carrier:
    """Return the result of an energy for a carrier.

    Raises:
        NoCarrierError: it is not a carrier; calling it in reverse mode reports the cause.
    """
    if not is_carrier(energies):
        raise NoCarrierError(f"the energy gave {type(energies).__name__}")
    return cast("Carrier", energies)


def _unknown(func: Callable[..., Any], why: str = "") -> UnknownFunctionError:
    name = overrides.resolve_name(func) or getattr(func, "__name__", str(func))
    return UnknownFunctionError(f"{name} {why}".strip())


def _no_pytree(*_: Any) -> NoReturn:
    # torch.func would map over the parts of a carrier, and DistributedDataParallel that looks for
    # unused parameters would look for a graph that is not there.
    raise UnknownFunctionError("a transform or wrapper that takes tensors apart")


_pytree.register_pytree_node(Carrier, _no_pytree, _no_pytree)


def _like(
    model: Carrier,
    value: Tensor,
    base: Tensor,
    laplacian: Tensor | None,
    scale: Tensor | None = None,
    squares: Tensor | None = None,
) -> Carrier:
    return Carrier(value, base, scale, laplacian, squares, model.create_graph, False)


def _begin(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Create the Jacobian of x where a function reads it."""
    carriers: list[Carrier] = []
    _collect((args, kwargs), carriers)
    for carrier in carriers:
        if carrier.directions is not None and func not in _RESHAPES:
            weight = _weight_of(func, args, kwargs)
            carrier.base = carrier.directions.begin(carrier.value, weight)


def _weight_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    if func not in _PRODUCTS or len(args) < 2 or type(args[1]) not in (Tensor, torch.nn.Parameter):
        return None
    return _weight(_Call(func, args, kwargs))


class _Call:
    """A call as a function of the carriers among its arguments."""

    def __init__(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if kwargs.get("out") is not None:
            raise _unknown(func, "with out=")
        self.func, self.args, self.kwargs = func, args, kwargs
        self.carriers: list[Carrier] = []
        _collect((args, kwargs), self.carriers)

    def __call__(self, *values: Tensor) -> Any:
        rest = list(values)
        args = _filled(self.args, rest)
        kwargs = {name: _filled(value, rest) for name, value in self.kwargs.items()}
        return self.func(*args, **kwargs)

    def value(self) -> Any:
        with torch.set_grad_enabled(all(carrier.create_graph for carrier in self.carriers)):
            return self(*[carrier.value for carrier in self.carriers])

    def only_first(self) -> Carrier:
        """Return the one carrier; raise an error if it is not the function's first tensor."""
        first = self.args[0] if self.args else next(iter(self.kwargs.values()), None)
        if len(self.carriers) != 1 or not is_carrier(first):
            raise _unknown(self.func, "with a derivative in other arguments than the first")
        return self.carriers[0]


def _collect(value: Any, found: list[Carrier]) -> None:
    if is_carrier(value):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for part in cast("Sequence[Any]", value):
            _collect(part, found)
    elif isinstance(value, dict):
        for part in cast("dict[str, Any]", value).values():
            _collect(part, found)


def _filled(value: Any, rest: list[Tensor]) -> Any:
    if is_carrier(value):
        return rest.pop(0)
    if isinstance(value, (tuple, list)):
        parts = [_filled(part, rest) for part in cast("Sequence[Any]", value)]
        return parts if isinstance(value, list) else tuple(parts)
    return value


# A rule receives the function that was called.
Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def _metadata(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a result that does not depend on values."""
    return _Call(func, args, kwargs).value()


def _constant(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function whose derivative is 0."""
    return _Call(func, args, kwargs).value()


def _detached(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = _Call(func, args, kwargs)
    call.only_first().aliased = True
    return call.value()


def _viewed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply a function that only moves elements: f(scale * base) = f(scale) * f(base)."""
    call = _Call(func, args, kwargs)
    carrier = call.only_first()
    if any(isinstance(arg, Tensor) and arg.is_floating_point() for arg in args[1:]):
        raise _unknown(func, "with other tensors")
    carrier.aliased = True
    value = call.value()
    if carrier.directions is not None and func in _RESHAPES:
        if value.ndim == 2 and value.shape[0] == carrier.value.shape[0]:  # still x
            return dataclasses.replace(carrier, value=value)
        carrier.base = carrier.directions.begin(carrier.value, None)
    with torch.set_grad_enabled(carrier.create_graph):
        parts = [
            value,
            torch.vmap(call)(carrier.base),
            *(
                None if part is None else call(part)
                for part in (carrier.scale, carrier.laplacian, carrier.squares)
            ),
        ]
    if isinstance(value, Tensor):
        return _moved(parts, carrier)
    split = [[None] * len(value) if part is None else part for part in parts]
    return tuple(_moved(of_one, carrier) for of_one in zip(*split, strict=True))


def _moved(parts: Sequence[Any], carrier: Carrier) -> Carrier:
    value, base, scale, laplacian, squares = parts
    return Carrier(value, base, scale, laplacian, squares, carrier.create_graph, True)


def _reshaped(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply view, where the Jacobian may have other strides than the value."""
    return _viewed(Tensor.reshape, args, kwargs)


def _like_another(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Use only the shape of another tensor."""
    first, *others = args
    call = _Call(func, tuple(others), kwargs)
    others = [other.value if is_carrier(other) else other for other in others]
    kwargs = {k: v.value if is_carrier(v) else v for k, v in call.kwargs.items()}
    if is_carrier(first):
        return _viewed(func, (first, *others), kwargs)
    return func(first, *others, **kwargs)


def _converted(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Change dtype, device or memory format."""
    call = _Call(func, args, kwargs)
    value = call.value()
    (first, *_) = args
    if not is_carrier(first) or not isinstance(value, Tensor) or not _is_real(value):
        if isinstance(value, Tensor) and value.is_complex():
            raise _unknown(func, "to complex numbers")
        return value

    def convert(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.to(device=value.device, dtype=value.dtype)

    carrier = cast("Carrier", first)
    carrier.aliased = True
    with torch.set_grad_enabled(carrier.create_graph):
        parts = (carrier.base, carrier.scale, carrier.laplacian, carrier.squares)
        return _moved((value, *(convert(part) for part in parts)), carrier)


def _is_real(value: Tensor) -> bool:
    return value.is_floating_point()


Partials = Callable[
    [_Call, list[Tensor]],
    tuple[Sequence[Tensor | float], Sequence[Sequence[Tensor | float | None]]],
]
"""Return the first derivatives of an elementwise function, and the second, None for 0."""


def _elementwise(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Carrier:
    return _each(_Call(func, args, kwargs), _by_autograd)


def _each(call: _Call, partials: Partials) -> Carrier:
    """Apply f(a, b, ...), elementwise in each carrier."""
    if call.kwargs.get("inplace"):
        target = call.only_first()
        plain = _Call(call.func, call.args, {**call.kwargs, "inplace": False})
        return _overwrite(target, _each(plain, partials), call.func)
    with torch.set_grad_enabled(call.carriers[0].create_graph):
        value = call.value()
        if not isinstance(value, Tensor) or not _is_real(value):
            raise _unknown(call.func, "of which the result is no real tensor")
        carriers = [_expanded(carrier, value.shape) for carrier in call.carriers]
        first, second = partials(call, [carrier.value for carrier in carriers])
        laplacian = None
        for factor, carrier in zip(first, carriers, strict=True):
            laplacian = _sum(laplacian, _product(factor, carrier.laplacian, absent=None))
        for i, row in enumerate(second):
            for j, curvature in enumerate(row):
                if curvature is not None:
                    laplacian = _sum(laplacian, curvature * _inner(carriers[i], carriers[j]))
        scales = [
            _product(factor, 1.0 if carrier.scale is None else carrier.scale)
            for factor, carrier in zip(first, carriers, strict=True)
        ]
        base = carriers[0].base
        if all(carrier.base is base for carrier in carriers):
            total = functools.reduce(operator.add, scales)
            if not isinstance(total, Tensor):
                total = None if total == 1 else torch.full_like(value, total)
            elif total.shape != value.shape or total.dtype != value.dtype:
                total = total.to(value.dtype).expand(value.shape)
            return _like(carriers[0], value, base, laplacian, total, carriers[0].squares)
        terms = [
            carrier.base if isinstance(scale, float) and scale == 1.0 else carrier.base * scale
            for carrier, scale in zip(carriers, scales, strict=True)
        ]
        jacobian = _by_row(lambda *bases: functools.reduce(operator.add, bases), *terms)
        return _like(carriers[0], value, jacobian, laplacian)


def _overwrite(target: Carrier, result: Carrier, func: Callable[..., Any]) -> Carrier:
    """Write a result to a carrier in place."""
    if not is_carrier(target):
        raise _unknown(func, "on a tensor that did not depend on x")
    if target.aliased:
        raise _unknown(func, "in place, of what shares its memory")
    if result.value.shape != target.value.shape or result.value.dtype != target.value.dtype:
        raise _unknown(func, "in place, with another shape or dtype")
    for field in dataclasses.fields(Carrier):
        setattr(target, field.name, getattr(result, field.name))
    return target


def _in_place(functional: Callable[..., Any]) -> Rule:
    def rule(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not is_carrier(args[0]):
            raise _unknown(func, "on a tensor that did not depend on x")
        if any(arg is args[0] for arg in args[1:]):
            raise _unknown(func, "in place, of what it also reads")
        return _overwrite(args[0], RULES[functional](functional, args, kwargs), func)

    return rule


def _by_autograd(
    call: _Call, values: list[Tensor]
) -> tuple[Sequence[Tensor | float], Sequence[Sequence[Tensor | float | None]]]:
    count = len(values)

    def total(*point: Tensor) -> Tensor:
        return cast("Tensor", call(*point).sum())

    if count == 1:

        def slope(point: Tensor) -> tuple[Tensor, Tensor]:
            derivative = torch.func.grad(total)(point)
            return derivative.sum(), derivative

        curvature, derivative = torch.func.grad(slope, has_aux=True)(values[0])
        return [cast("Tensor", derivative)], [[curvature]]

    every = tuple(range(count))

    def slopes(*point: Tensor) -> tuple[Tensor, ...]:
        return cast("tuple[Tensor, ...]", torch.func.grad(total, every)(*point))

    def curvatures(i: int) -> tuple[Tensor, ...]:
        def slope(*point: Tensor) -> Tensor:
            return slopes(*point)[i].sum()

        return cast("tuple[Tensor, ...]", torch.func.grad(slope, every)(*values))

    return slopes(*values), [curvatures(i) for i in every]


def _known(partials: Callable[..., Any]) -> Rule:
    """Return the rule of an elementwise function of two arguments with known derivatives."""

    def of_call(call: _Call, values: list[Tensor]) -> Any:
        args = call.args
        if len(args) != 2 or set(call.kwargs) - {"alpha"}:
            return _by_autograd(call, values)
        count = len(values)
        found = partials(values, is_carrier(args[0]), is_carrier(args[1]), args, call.kwargs)
        if found is None:
            return _by_autograd(call, values)
        first, cross = found
        nothing: list[list[Tensor | float | None]] = [[None] * count for _ in values]
        return first, [[None, cross], [cross, None]] if cross is not None else nothing

    def rule(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _each(_Call(func, args, kwargs), of_call)

    return rule


def _of_sum(sign: int) -> Rule:
    def partials(_: Any, left: bool, right: bool, args: Any, kwargs: dict[str, Any]) -> Any:
        return [1.0] * left + [sign * float(kwargs.get("alpha", 1))] * right, None

    return _known(partials)


@_known
def _of_product(values: list[Tensor], left: bool, right: bool, args: Any, kwargs: Any) -> Any:
    if left and right:
        return values[::-1], 1.0
    return [args[1] if left else args[0]], None


@_known
def _of_quotient(values: list[Tensor], left: bool, right: bool, args: Any, kwargs: Any) -> Any:
    if right:
        return None
    dividend, divisor = args
    if isinstance(divisor, Tensor):  # an integer one would be divided in the default dtype
        divisor = divisor.to(torch.result_type(dividend.value, divisor))
    return [1 / divisor], None


def _multilinear(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Carrier:
    """Apply a function that is linear in each of its tensors."""
    call = _Call(func, args, kwargs)
    if len(call.carriers) == 1:
        return _linear(call, call.value(), _weight(call), _keeps_rows(call))
    with torch.set_grad_enabled(call.carriers[0].create_graph):
        return _products_rule(call)


def _products_rule(call: _Call) -> Carrier:
    carriers = call.carriers
    values = [carrier.value for carrier in carriers]
    jacobians = [carrier.jacobian for carrier in carriers]
    value = call(*values)

    def with_one(i: int, tangent: Tensor) -> Tensor:
        return cast("Tensor", call(*values[:i], tangent, *values[i + 1 :]))

    def slopes(*tangents: Tensor) -> Tensor:
        return functools.reduce(
            torch.add, [with_one(i, tangent) for i, tangent in enumerate(tangents)]
        )

    def with_two(i: int, j: int) -> Tensor:
        def product(a: Tensor, b: Tensor) -> Tensor:
            parts = list(values)
            parts[i], parts[j] = a, b
            return cast("Tensor", call(*parts))

        return 2 * torch.vmap(product)(jacobians[i], jacobians[j]).sum(0)

    base = torch.vmap(slopes)(*jacobians)
    count = len(carriers)
    laplacian = functools.reduce(
        torch.add, [with_two(i, j) for i in range(count) for j in range(i + 1, count)]
    )
    for i, carrier in enumerate(carriers):
        if carrier.laplacian is not None:
            laplacian = laplacian + with_one(i, carrier.laplacian)
    return _like(carriers[0], value, base, laplacian)


def _linear_in_first(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Carrier:
    call = _Call(func, args, kwargs)
    call.only_first()
    return _linear(call, call.value(), None, func in _BY_ROW)


def _linear(call: _Call, value: Tensor, weight: Tensor | None, by_row: bool) -> Carrier:
    """Apply a function that, except for a bias, is linear in its one carrier."""
    (carrier,) = call.carriers
    with torch.set_grad_enabled(carrier.create_graph):
        laplacian = None if carrier.laplacian is None else call(carrier.laplacian)
        if weight is not None and carrier.scale is not None:
            base = F.linear(carrier.base * carrier.scale, weight)
        elif weight is not None:
            if carrier.directions is not None and carrier.directions.of_layer:
                weight = once(weight)
            base = _by_row(functools.partial(F.linear, weight=weight), carrier.base)
        elif by_row:
            base = _by_row(torch.vmap(call), carrier.jacobian)
        else:
            base = torch.vmap(call)(carrier.jacobian)
    return _like(carrier, value, base, laplacian)


def _weight(call: _Call) -> Tensor | None:
    """Return W if a function of one carrier is z W^T."""
    if call.func not in _PRODUCTS or len(call.args) < 2 or not is_carrier(call.args[0]):
        return None
    carrier, other = call.args[:2]
    if not isinstance(other, Tensor) or other.ndim != 2 or carrier.value.ndim < 2:
        return None
    return other if call.func is F.linear else other.mT


def _keeps_rows(call: _Call) -> bool:
    """Whether the first axis of the one carrier is that of rows, which are independent."""
    return call.func in _CONVOLUTIONS and is_carrier(call.args[0])


def _with_bias(axis: int) -> Rule:
    """Return the rule of a function that is linear in two tensors, and adds a third, the bias.

    Args:
        axis: axis of the result along which the bias is added, counted from the end.
    """

    def rule(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        if bias is None:
            return _multilinear(func, args, kwargs)
        rest = (*args[:2], None, *args[3:]) if len(args) > 2 else args
        call = _Call(func, rest, {**kwargs, "bias": None} if "bias" in kwargs else kwargs)
        if len(call.carriers) == 1 and not is_carrier(bias):
            value = _Call(func, args, kwargs).value()
            return _linear(call, value, _weight(call), _keeps_rows(call))
        result = _multilinear(func, rest, call.kwargs) if call.carriers else call.value()
        return result + bias.reshape(-1, *[1] * (-1 - axis))

    return rule


def _joined(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Join a list of tensors, some of them without a derivative."""
    tensors, *rest = args or (kwargs["tensors"],)
    options = {name: value for name, value in kwargs.items() if name != "tensors"}
    if not isinstance(tensors, (tuple, list)):
        raise _unknown(func, "of something else than a list")
    axis = rest[0] if rest else options.get("dim", 0)
    return _together(
        lambda *parts: func(parts, *rest, **options),
        *cast("list[Any]", tensors),
        by_row=func in (torch.cat, torch.stack) and axis > 0,
    )


def _together(function: Callable[..., Tensor], *operands: Any, by_row: bool = False) -> Carrier:
    """Apply a function that is jointly linear in its operands; plain ones are constants."""
    call = _Call(lambda *parts: function(*parts), operands, {})
    carriers = [_with_zeros(call.carriers[0], part) for part in operands]
    with torch.set_grad_enabled(carriers[0].create_graph):
        value = function(*[carrier.value for carrier in carriers])
        mapped, jacobians = torch.vmap(function), [carrier.jacobian for carrier in carriers]
        base = _by_row(mapped, *jacobians) if by_row else mapped(*jacobians)
        laplacian = None
        if any(carrier.laplacian is not None for carrier in carriers):
            laplacian = function(
                *[
                    torch.zeros_like(c.value) if c.laplacian is None else c.laplacian
                    for c in carriers
                ]
            )
    return _like(carriers[0], value, base, laplacian)


def _with_zeros(model: Carrier, part: Any) -> Carrier:
    if is_carrier(part):
        return cast("Carrier", part)
    zero = torch.zeros((), dtype=part.dtype, device=part.device)
    return _like(model, part, zero.expand(model.base.shape[0], *part.shape), None)


def _by_steps(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Carrier:
    """Apply a piecewise linear function: its second derivative is 0."""
    call = _Call(func, args, kwargs)
    carrier = call.only_first()
    with torch.set_grad_enabled(carrier.create_graph):
        value = call(carrier.value)
        if not isinstance(value, Tensor):
            raise _unknown(func, "of several results")

        def along(tangent: Tensor) -> Tensor:
            return cast("Tensor", torch.func.jvp(call, (carrier.value,), (tangent,))[1])

        base = torch.vmap(along)(carrier.jacobian)
        laplacian = None if carrier.laplacian is None else along(carrier.laplacian)
    return _like(carrier, value, base, laplacian)


def _selected(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Select elements along an axis, such as the largest: values and indices."""
    call = _Call(func, args, kwargs)
    carrier = call.only_first()
    result = call.value()
    if isinstance(result, Tensor):  # msort
        raise _unknown(func, "with this result")
    _, indices = result
    axis = kwargs.get("dim", args[_AXES[func]] if len(args) > _AXES[func] else -1)
    if isinstance(axis, bool):  # sort(x, stable, dim)
        raise _unknown(func, "with these arguments")
    reduced = carrier.value.ndim > indices.ndim
    index = indices.unsqueeze(axis) if reduced else indices
    values = torch.gather(cast("Tensor", carrier), axis, index)
    return type(result)((values.squeeze(axis) if reduced else values, indices))


def _composed(composition: Callable[..., Any]) -> Rule:
    """Return a rule that calls other PyTorch functions with the carriers."""

    def rule(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("out") is not None:
            raise _unknown(func, "with out=")
        return composition(*args, **kwargs)

    return rule


def _expanded(carrier: Carrier, shape: Sequence[int]) -> Carrier:
    if carrier.value.shape == shape:
        return carrier
    return cast("Carrier", _viewed(torch.broadcast_to, (carrier, tuple(shape)), {}))


def _product(factor: Tensor | float, value: Tensor | float | None, absent: Any = 1.0) -> Any:
    if value is None:
        return absent
    if isinstance(factor, float) and factor == 1.0:
        return value
    return factor * value


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _inner(a: Carrier, b: Carrier) -> Tensor:
    """Return the sum over directions of one Jacobian times another."""
    if a.base is b.base:
        if a.squares is None:
            a.squares = _by_row(_square_sums, a.base)[0]
        if b.squares is None:
            b.squares = a.squares
        inner = a.squares
    else:
        inner = _by_row(_products, a.base, b.base)[0]
    for scale in (a.scale, b.scale):
        if scale is not None:
            inner = inner * scale
    return inner


def _square_sums(rows: Tensor) -> Tensor:
    return cast("Tensor", _SquareSum.apply(rows))[None]


def _products(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(0, keepdim=True)


def _by_row(function: Callable[..., Tensor], *bases: Tensor) -> Tensor:
    """Call a function that treats rows independently, once if all rows are equal."""
    rows = bases[0].shape[1] if bases[0].ndim > 1 else 0
    alike = rows > 1 and all(
        base.ndim > 1 and base.shape[1] == rows and base.stride(1) == 0 for base in bases
    )
    if not alike:
        return function(*bases)
    of_one = function(*[base[:, :1] for base in bases])
    return of_one.expand(-1, rows, *of_one.shape[2:])


def _steps(base: Tensor) -> int:
    """Return how many directions to process together."""
    return block_rows(base, math.prod(base.shape[1:]))


class _SquareSum(Function):
    """Sum base^2 over directions; saves only base."""

    generate_vmap_rule = True

    @staticmethod
    def forward(base: Tensor) -> Tensor:
        total = torch.zeros_like(base[0])
        for part in torch.split(base, _steps(base)):
            total = total + part.square().sum(0)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        base: Tensor = ctx.saved_tensors[0]
        return base * (2 * gradients[0])


def _take(input: Any, index: Tensor) -> Any:
    return input.reshape(-1)[index]


def _bilinear(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    result = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return result if bias is None else result + bias


def _chain_matmul(*matrices: Any) -> Any:
    return functools.reduce(torch.matmul, matrices)


def _softmax(input: Any, dim: Any = None, *rest: Any, dtype: Any = None, **_: Any) -> Any:
    exponential = _shifted(input, dim, *rest, dtype=dtype).exp()
    return exponential / exponential.sum(dim, keepdim=True)


def _log_softmax(input: Any, dim: Any = None, *rest: Any, dtype: Any = None, **_: Any) -> Any:
    shifted = _shifted(input, dim, *rest, dtype=dtype)
    return shifted - shifted.exp().sum(dim, keepdim=True).log()


def _shifted(input: Any, dim: Any, *rest: Any, dtype: Any) -> Any:
    if dim is None:
        raise UnknownFunctionError("softmax without dim")
    for option in rest:
        dtype = option if isinstance(option, torch.dtype) else dtype
    x = input if dtype is None else input.to(dtype)
    return x - x.detach().amax(dim, keepdim=True)


def _softmin(input: Any, dim: Any = None, *rest: Any, dtype: Any = None, **_: Any) -> Any:
    return _softmax(-input, dim, *rest, dtype=dtype)


def _logsumexp(input: Any, dim: Any, keepdim: bool = False) -> Any:
    maximum = input.detach().amax(dim, keepdim=True)
    maximum = maximum.masked_fill(maximum.isinf(), 0)
    result = (input - maximum).exp().sum(dim, keepdim=True).log() + maximum
    if keepdim:
        return result
    axes = (dim,) if isinstance(dim, int) else tuple(dim) or tuple(range(input.ndim))
    return result.squeeze(axes) if input.ndim else result


def _glu(input: Any, dim: int = -1) -> Any:
    left, right = input.chunk(2, dim)
    return left * right.sigmoid()


def _prelu(input: Any, weight: Any) -> Any:
    if input.ndim > 1 and weight.numel() > 1:
        weight = weight.reshape(-1, *[1] * (input.ndim - 2))
    return input.relu() - weight * (-input).relu()


def _masked_fill(input: Any, mask: Any, value: Any) -> Any:
    return torch.where(mask, value, input)


def _root(squares: Any) -> Any:
    """Return the root, with derivatives of 0 at 0, as in PyTorch's norms."""
    zero = squares == 0
    return squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _norm(
    input: Any,
    p: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    out: None = None,
    dtype: Any = None,
) -> Any:
    """Apply a norm over the elements of axes: torch.norm, for which "fro" is one of them."""
    x = input if dtype is None else input.to(dtype)
    if dim is None or dim in ((), []):
        dim = tuple(range(x.ndim))
    if p is None or p == "fro" or p == 2:
        return _root(x.square().sum(dim, keepdim=keepdim))
    if not isinstance(p, (int, float)) or not (p in (1, math.inf) or 2 < p < math.inf):
        raise UnknownFunctionError(f"a norm with p={p}")
    if p == 1:
        return x.abs().sum(dim, keepdim=keepdim)
    if p == math.inf:
        return x.abs().amax(dim, keepdim=keepdim)
    powers = x.abs().pow(p).sum(dim, keepdim=keepdim)
    zero = powers == 0
    return powers.masked_fill(zero, 1).pow(1 / p).masked_fill(zero, 0)


def _vector_norm(
    x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    if not isinstance(ord, (int, float)):
        raise UnknownFunctionError(f"a vector norm with ord={ord}")
    return _norm(x, ord, dim, keepdim, None, dtype)


def _matrix_norm(
    A: Any, ord: Any = "fro", dim: Any = (-2, -1), keepdim: bool = False, *, dtype: Any = None
) -> Any:
    if ord != "fro":
        raise UnknownFunctionError(f"a matrix norm with ord={ord}")
    return _norm(A, 2, dim, keepdim, None, dtype)


def _linalg_norm(
    A: Any, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    if ord is None:
        return _norm(A, 2, dim, keepdim, None, dtype)
    axes = A.ndim if dim is None else 1 if isinstance(dim, int) else len(dim)
    if axes == 1:
        return _vector_norm(A, ord, dim, keepdim, dtype=dtype)
    return _matrix_norm(A, ord, (-2, -1) if dim is None else dim, keepdim, dtype=dtype)


def _normalize(
    input: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> Any:
    return input / _norm(input, p, dim, True).clamp_min(eps)


def _cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    x1, x2 = cast("tuple[Any, Any]", torch.broadcast_tensors(x1, x2))
    lengths = [_norm(x, 2, dim, True).clamp_min(eps) for x in (x1, x2)]
    return ((x1 / lengths[0]) * (x2 / lengths[1])).sum(dim)


def _pairwise_distance(
    x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Any:
    return _norm(x1 - x2 + eps, p, -1, keepdim)


def _variance_and_mean(
    input: Any,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> tuple[Any, Any]:
    if isinstance(dim, bool):  # var(x, unbiased)
        dim, unbiased = None, dim
    if correction is None:
        correction = 0 if unbiased is False else 1
    if dim is None or dim in ((), []):
        dim = tuple(range(input.ndim))
    axes = (dim,) if isinstance(dim, int) else tuple(dim)
    count = math.prod(input.shape[axis] for axis in axes)
    mean = input.mean(axes, keepdim=True)
    squares = (input - mean).square().sum(axes, keepdim=True)
    freedom = max(0, count - correction)
    variance = squares / freedom if freedom else squares * math.inf
    if not keepdim and axes:
        variance, mean = variance.squeeze(axes), mean.squeeze(axes)
    return variance, mean


def _variance(*args: Any, **kwargs: Any) -> Any:
    return _variance_and_mean(*args, **kwargs)[0]


def _deviation(*args: Any, **kwargs: Any) -> Any:
    return _root(_variance(*args, **kwargs))


def _deviation_and_mean(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    variance, mean = _variance_and_mean(*args, **kwargs)
    return _root(variance), mean


def _extreme(select: Any, of_two: Any, of_all: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Apply torch.max or torch.min, which are three functions in one."""
    if not args and not kwargs:
        return of_all(input, tuple(range(input.ndim)))
    other = args[0] if args else kwargs.get("other")
    if isinstance(other, Tensor):
        return of_two(input, other)
    if not is_carrier(input):
        return select(input, *args, **kwargs)
    return _selected(select, (input, *args), kwargs)


def _addmm(input: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return _added(input, left @ right, beta, alpha)


def _addbmm(input: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return _added(input, (left @ right).sum(0), beta, alpha)


def _addr(input: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return _added(input, left.unsqueeze(-1) * right, beta, alpha)


def _added(input: Any, product: Any, beta: Any, alpha: Any) -> Any:
    product = product if alpha == 1 else alpha * product
    if beta == 0:  # existing values may be arbitrary, including NaN
        return product + torch.zeros_like(input)
    return product + (input if beta == 1 else beta * input)


def _setitem(x: Any, index: Any, value: Any) -> None:
    if not is_carrier(x):
        raise UnknownFunctionError("Tensor.__setitem__ on a tensor that did not depend on x")

    several: Any = index
    places: Any = several if isinstance(index, tuple) else (several,)
    for part in places:
        if isinstance(part, (list, range)) or (
            isinstance(part, Tensor) and part.ndim and part.dtype != torch.bool
        ):  # an element may be written twice
            raise UnknownFunctionError("Tensor.__setitem__ at listed places")

    def assign(x: Tensor, value: Tensor) -> Tensor:
        x = x.clone()
        x[index] = value
        return x

    part = value if isinstance(value, Tensor) else torch.full_like(x.value[:0].sum(), value)
    _overwrite(x, _together(assign, x, part.to(x.dtype)), Tensor.__setitem__)


def _index_add(input: Any, dim: int, index: Tensor, source: Any, *, alpha: Any = 1) -> Any:
    def add(x: Tensor, part: Tensor) -> Tensor:
        return torch.index_add(x, dim, index, part, alpha=alpha)

    return _together(add, input, source)


def _scatter_add(input: Any, dim: int, index: Tensor, src: Any) -> Any:
    def add(x: Tensor, part: Tensor) -> Tensor:
        return torch.scatter_add(x, dim, index, part)

    return _together(add, input, src)


def _broadcast_tensors(*tensors: Any) -> tuple[Any, ...]:
    if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)):
        tensors = tuple(cast("Sequence[Any]", tensors[0]))
    broadcast = cast("Any", torch.broadcast_shapes)
    shape = broadcast(*[tensor.shape for tensor in tensors])
    return tuple(tensor.broadcast_to(shape) for tensor in tensors)


def _pointwise_loss(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply an elementwise loss with its reduction."""
    options = dict(kwargs)
    reduction = _reduction(options)
    for name in ("size_average", "reduce"):
        options.pop(name, None)
    if options.get("weight") is not None and func is not F.binary_cross_entropy_with_logits:
        raise _unknown(func, "with weights")
    losses = _elementwise(func, args, {**options, "reduction": "none"})
    if reduction == "batchmean":
        return losses.sum() / args[0].shape[0]
    return _reduced(losses, reduction)


def _reduction(options: dict[str, Any]) -> Any:
    if options.get("size_average") is not None or options.get("reduce") is not None:
        raise UnknownFunctionError("a loss with size_average or reduce")
    return options.pop("reduction", "mean")


def _reduced(losses: Any, reduction: str) -> Any:
    return losses if reduction == "none" else getattr(losses, reduction)()


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    **options: Any,
) -> Any:
    reduction = _reduction(options)
    axis = 1 if input.ndim > 1 else 0
    logarithms = _log_softmax(input, axis)
    by_class = logarithms
    if weight is not None:
        by_class = logarithms * weight.reshape(-1, *[1] * (input.ndim - axis - 1))
    share = label_smoothing / input.shape[axis]
    if target.is_floating_point():
        losses = -(by_class * (target * (1 - label_smoothing) + share)).sum(axis)
        return losses.sum() / losses.numel() if reduction == "mean" else _reduced(losses, reduction)
    of_class: Any = F.nll_loss(logarithms, target, weight, None, ignore_index, None, reduction)
    if not label_smoothing:
        return of_class
    ignored = target == ignore_index
    even = _reduced(-by_class.sum(axis).masked_fill(ignored, 0), reduction.replace("mean", "sum"))
    if reduction == "mean":
        counts = 1.0 if weight is None else weight[target.masked_fill(ignored, 0)]
        even = even / (~ignored * counts).sum()
    return (1 - label_smoothing) * of_class + share * even


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p > 0:
        raise UnknownFunctionError("dropout in training mode")
    return input


def _solutions(solve: Callable[[Tensor], Tensor], rights: Tensor) -> Tensor:
    """Solve for many right sides at once, "directions ... n k", as columns of one."""
    columns: Any = rights.movedim(0, -1)
    solutions = cast("Any", solve(columns.flatten(-2))).unflatten(-1, columns.shape[-2:])
    return cast("Tensor", solutions.movedim(-1, 0))


def _solved(
    solve: Callable[[Tensor, Tensor], Tensor],
    read: Callable[[Tensor], Tensor],
    matrix: Any,
    right: Any,
) -> Any:
    """Solve A y = b: A Jy = Jb - Ja y, and A Ly = Lb - La y - 2 sum_d Ja_d Jy_d.

    Args:
        solve: solves a system with a matrix and a right side.
        read: the part of the matrix that is used.
        matrix: A.
        right: b, a matrix.
    """
    model = matrix if is_carrier(matrix) else right
    with torch.set_grad_enabled(model.create_graph):
        A = matrix.value if is_carrier(matrix) else matrix
        y = solve(A, right.value if is_carrier(right) else right)
        jacobian, laplacian = torch.zeros_like(y), torch.zeros_like(y)
        rights = jacobian.expand(model.base.shape[0], *y.shape)
        tangents = read(matrix.jacobian) if is_carrier(matrix) else None
        if is_carrier(right):

            def expand(tangent: Tensor) -> Tensor:
                return tangent.expand(y.shape)

            rights = rights + torch.vmap(expand)(right.jacobian)
            laplacian = laplacian + (0 if right.laplacian is None else right.laplacian)
        if tangents is not None:

            def multiply(tangent: Tensor) -> Tensor:
                return tangent @ y

            rights = rights - torch.vmap(multiply)(tangents)
        base = _solutions(functools.partial(solve, A), rights)
        if tangents is not None:
            laplacian = laplacian - 2 * torch.vmap(torch.matmul)(tangents, base).sum(0)
            if matrix.laplacian is not None:
                laplacian = laplacian - read(matrix.laplacian) @ y
        return _like(model, y, base, solve(A, laplacian))


def _solve(A: Any, B: Any, *, left: bool = True) -> Any:
    if not left:
        raise UnknownFunctionError("torch.linalg.solve with left=False")
    vector = B.ndim == 1 or (A.ndim - 1 == B.ndim and B.shape == A.shape[:-1])
    right = B.unsqueeze(-1) if vector else B
    solution = _solved(cast("Any", torch.linalg.solve), lambda A: A, A, right)
    return solution.squeeze(-1) if vector else solution


def _solve_triangular(
    A: Any, B: Any, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Any:
    if not left or unitriangular:
        raise UnknownFunctionError("torch.linalg.solve_triangular with these options")
    read = torch.triu if upper else torch.tril
    solve: Any = functools.partial(cast("Any", torch.linalg.solve_triangular), upper=upper)
    return _solved(solve, read, A, B)


def _inverse(A: Any) -> Any:
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return _solve(A, identity.expand(A.shape))


def _of_one(carrier: Any, value: Tensor, first: Any, second: Any) -> Carrier:
    """Apply a function of one carrier by its first and second derivatives along tangents."""
    with torch.set_grad_enabled(carrier.create_graph):
        jacobian = carrier.jacobian
        laplacian = second(jacobian).sum(0)
        if carrier.laplacian is not None:
            laplacian = laplacian + first(carrier.laplacian)
        return _like(carrier, value, first(jacobian), laplacian)


_linalg: Any = torch.linalg  # without types


def _traces(A: Tensor, B: Tensor) -> Tensor:
    return (A * B.mT).sum((-2, -1))


def _log_determinant(A: Any, value: Tensor) -> Any:
    with torch.set_grad_enabled(A.create_graph):
        inverse = _linalg.inv(A.value)

    def second(tangents: Tensor) -> Tensor:
        products = inverse @ tangents
        return -_traces(products, products)

    return _of_one(A, value, functools.partial(_traces, inverse), second)


def _logdet(A: Any) -> Any:
    return _log_determinant(A, _Call(torch.logdet, (A,), {}).value())


def _slogdet(A: Any) -> Any:
    result = _Call(cast("Any", torch.linalg.slogdet), (A,), {}).value()
    sign, logarithm = cast("tuple[Any, Any]", result)
    return type(result)((sign, _log_determinant(A, logarithm)))


def _det(A: Any) -> Any:
    sign, logarithm = _slogdet(A)
    return sign * logarithm.exp()


def _cholesky(A: Any, *, upper: bool = False) -> Any:
    """Factor A = L L^T: dA = dL L^T + L dL^T, and d2A = d2L L^T + 2 dL dL^T + L d2L^T."""
    if upper:
        raise UnknownFunctionError("torch.linalg.cholesky with upper=True")
    with torch.set_grad_enabled(A.create_graph):
        L = _linalg.cholesky(A.value)

        def first(tangents: Tensor) -> Tensor:
            symmetric = (tangents + tangents.mT) / 2  # as PyTorch differentiates it
            half = _linalg.solve_triangular(L, symmetric, upper=False)
            inner = _linalg.solve_triangular(L, half.mT, upper=False)
            lower = inner.tril() - inner.diagonal(dim1=-2, dim2=-1).diag_embed() / 2
            slopes: Tensor = L @ lower
            return slopes

        def second(tangents: Tensor) -> Tensor:
            slopes = first(tangents)
            return first(-2 * slopes @ slopes.mT)

        return _of_one(A, L, first, second)


def _transposed(x: Any) -> Any:
    return x.permute(tuple(range(x.ndim - 1, -1, -1)))


def _matrix_transposed(x: Any) -> Any:
    return x.transpose(-2, -1)


def _requires_grad(x: Any, requires_grad: bool = True) -> Any:
    if not requires_grad:
        raise UnknownFunctionError("Tensor.requires_grad_(False)")
    return x


def _has_none(arguments: object) -> bool:
    return False


# The function itself, without overrides.
_multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": _has_none},
    argdefs=F.multi_head_attention_forward.__defaults__,
)

RULES: dict[Callable[..., Any], Rule] = {}
"""Replacements of PyTorch functions for arguments with carriers."""


def _set(rule: Rule, names: str, *homes: Any) -> None:
    for name in names.split():
        for home in homes:
            function = getattr(home, name, None)
            # PyTorch has modules and dtypes with these names, and its own dunders.
            if callable(function) and (home is Tensor or not name.startswith("__")):
                RULES[function] = rule


_BOTH = torch, Tensor
_tensor: Any = Tensor  # whose property getters are used

for _name in (
    "shape dtype device ndim layout is_cpu is_cuda is_meta is_mps is_xpu is_xla is_sparse "
    "is_sparse_csr is_quantized is_nested is_mkldnn itemsize nbytes requires_grad "
    "retains_grad".split()
):
    if hasattr(Tensor, _name):  # some exist only in later versions of PyTorch
        RULES[getattr(Tensor, _name).__get__] = _metadata
_set(
    _metadata,
    "size dim numel nelement ndimension is_floating_point is_complex element_size get_device "
    "stride is_contiguous is_signed storage_offset is_same_size result_type __len__ is_inference "
    "is_conj is_neg has_names is_tensor",
    *_BOTH,
)
_set(
    _constant,
    "lt le gt ge eq ne less less_equal greater greater_equal not_equal __lt__ __le__ __gt__ "
    "__ge__ __eq__ __ne__ isnan isinf isfinite isneginf isposinf isclose allclose equal signbit "
    "sign sgn floor ceil round trunc fix argmax argmin argsort logical_not logical_and logical_or "
    "item tolist is_nonzero __bool__ __float__ __int__ __contains__ __repr__ "
    "__format__ any all zeros_like ones_like full_like empty_like rand_like randn_like new_zeros "
    "new_ones new_full new_empty nonzero count_nonzero searchsorted bucketize",
    *_BOTH,
)
_set(_detached, "detach", *_BOTH)
RULES[_tensor.data.__get__] = _composed(torch.detach)

_set(
    _viewed,
    "reshape flatten unflatten ravel squeeze unsqueeze transpose swapaxes swapdims permute t "
    "movedim adjoint expand broadcast_to repeat repeat_interleave tile flip fliplr flipud "
    "roll __getitem__ index_select select narrow chunk split tensor_split hsplit vsplit dsplit "
    "unbind unsafe_chunk unsafe_split diagonal atleast_1d atleast_2d atleast_3d rot90 "
    "take_along_dim gather",
    *_BOTH,
)
_set(_viewed, "unfold", Tensor)
_set(_viewed, "pixel_shuffle pixel_unshuffle channel_shuffle", torch, F)
_set(_viewed, "diagonal", torch.linalg)
_set(_reshaped, "view", Tensor)
_set(_like_another, "view_as reshape_as expand_as", *_BOTH)
_set(
    _converted,
    "to type type_as float double half bfloat16 long int short char byte bool cpu cuda contiguous "
    "clone positive",
    *_BOTH,
)
RULES[_tensor.T.__get__] = _composed(_transposed)
RULES[_tensor.mT.__get__] = _composed(_matrix_transposed)
RULES[Tensor.requires_grad_] = _composed(_requires_grad)

_set(
    _linear_in_first,
    "sum mean cumsum trace tril triu diag_embed diag adaptive_avg_pool1d avg_pool1d",
    *_BOTH,
)
_set(
    _linear_in_first,
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "unfold fold interpolate upsample nll_loss",
    F,
)
_BY_ROW = frozenset(
    [F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool2d, F.interpolate]
)
"""Linear functions whose first axis is that of rows, which are independent."""
_set(
    _multilinear,
    "matmul mm bmm mv dot vdot inner outer ger einsum tensordot kron cross __matmul__ __rmatmul__",
    *_BOTH,
)
_set(_multilinear, "matmul multi_dot vecdot cross", torch.linalg)
_set(_with_bias(-1), "linear", F)
for _axes in (1, 2, 3):
    _set(_with_bias(-1 - _axes), f"conv{_axes}d conv_transpose{_axes}d", torch, F)
_RESHAPES = frozenset([torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view])
_PRODUCTS = frozenset([F.linear, torch.matmul, Tensor.matmul, torch.mm, Tensor.mm])
_CONVOLUTIONS = frozenset(
    getattr(F, f"conv{kind}{axes}d") for kind in ("", "_transpose") for axes in (1, 2, 3)
)
_set(
    _joined,
    "cat concat concatenate stack hstack vstack dstack row_stack",
    torch,
)

_set(_by_steps, "amax amin", *_BOTH)
_set(_by_steps, "max_pool1d max_pool2d max_pool3d", torch, F)
_set(_by_steps, "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d pad", F)
_AXES: dict[Callable[..., Any], int] = {}
for _home in _BOTH:
    for _name, _place in {"median": 1, "nanmedian": 1, "mode": 1, "cummax": 1, "cummin": 1}.items():
        _AXES[getattr(_home, _name)] = _place
    for _name, _place in {"max": 1, "min": 1, "sort": 1, "topk": 2, "kthvalue": 2}.items():
        _AXES[getattr(_home, _name)] = _place
RULES.update(dict.fromkeys(_AXES, _selected))
for _name in ("max", "min"):
    _functions = (
        getattr(torch, _name),
        getattr(torch, f"{_name}imum"),
        getattr(torch, f"a{_name}"),
    )
    _set(_composed(functools.partial(_extreme, *_functions)), _name, *_BOTH)

_ELEMENTWISE = (
    "rsub neg negative reciprocal pow float_power square sqrt rsqrt exp exp2 expm1 log log2 log10 "
    "log1p sin cos tan asin acos atan arcsin arccos arctan sinh cosh tanh asinh acosh atanh "
    "arcsinh arccosh arctanh sigmoid relu relu6 silu gelu softplus elu selu celu mish leaky_relu "
    "hardtanh logsigmoid softsign tanhshrink hardswish softshrink hardshrink threshold clamp clip "
    "clamp_min clamp_max abs absolute maximum minimum where erf erfc erfinv lerp addcmul addcdiv "
    "xlogy logaddexp logaddexp2 atan2 arctan2 hypot sinc logit lgamma digamma i0 deg2rad rad2deg "
    "fmax fmin remainder fmod frac nan_to_num copysign"
)
_set(_elementwise, _ELEMENTWISE, torch, Tensor, F)
_set(_elementwise, "__rsub__ __rdiv__ __rtruediv__ __pow__ __rpow__ __abs__ __neg__", Tensor)
_set(
    _elementwise,
    "erf erfc erfinv expit xlogy xlog1py log1p expm1 exp2 ndtr log_ndtr i0 sinc logit digamma psi "
    "gammaln entr",
    torch.special,
)
_set(_of_sum(1), "add __add__ __radd__", *_BOTH)
_set(_of_sum(-1), "sub subtract __sub__", *_BOTH)
_set(_of_product, "mul multiply __mul__ __rmul__", *_BOTH)
_set(_of_quotient, "div divide true_divide __truediv__ __div__", *_BOTH)

for _composition, _names, _homes in (
    (torch.movedim, "moveaxis", _BOTH),
    (_take, "take", _BOTH),
    (_bilinear, "bilinear", (F,)),
    (_chain_matmul, "chain_matmul", (torch,)),
    (_softmax, "softmax", (*_BOTH, F, torch.special)),
    (_log_softmax, "log_softmax", (*_BOTH, F, torch.special)),
    (_softmin, "softmin", (F,)),
    (_logsumexp, "logsumexp", (*_BOTH, torch.special)),
    (_glu, "glu", (F,)),
    (_prelu, "prelu", (*_BOTH, F)),
    (_masked_fill, "masked_fill", _BOTH),
    (_norm, "norm", _BOTH),
    (_vector_norm, "vector_norm", (torch.linalg,)),
    (_matrix_norm, "matrix_norm", (torch.linalg,)),
    (_linalg_norm, "norm", (torch.linalg,)),
    (_normalize, "normalize", (F,)),
    (_cosine_similarity, "cosine_similarity", (F,)),
    (_pairwise_distance, "pairwise_distance", (F,)),
    (_variance, "var", _BOTH),
    (_deviation, "std", _BOTH),
    (_variance_and_mean, "var_mean", (torch,)),
    (_deviation_and_mean, "std_mean", (torch,)),
    (_addmm, "addmm addmv baddbmm", _BOTH),
    (_addbmm, "addbmm", _BOTH),
    (_addr, "addr", _BOTH),
    (_setitem, "__setitem__", (Tensor,)),
    (_index_add, "index_add", _BOTH),
    (_scatter_add, "scatter_add", _BOTH),
    (_broadcast_tensors, "broadcast_tensors", (torch,)),
    (_cross_entropy, "cross_entropy", (F,)),
    (_dropout, "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout", (F,)),
    (_dropout, "dropout", (torch,)),
    (_solve, "solve", (torch.linalg,)),
    (_solve_triangular, "solve_triangular", (torch.linalg,)),
    (_inverse, "inverse", _BOTH),
    (_inverse, "inv", (torch.linalg,)),
    (_logdet, "logdet", _BOTH),
    (_slogdet, "slogdet", (*_BOTH, torch.linalg)),
    (_det, "det", (*_BOTH, torch.linalg)),
    (_cholesky, "cholesky", (torch.linalg,)),
    (_multi_head_attention, "multi_head_attention_forward", (F,)),
):
    _set(_composed(_composition), _names, *_homes)
_set(
    _pointwise_loss,
    "mse_loss l1_loss smooth_l1_loss huber_loss kl_div soft_margin_loss "
    "binary_cross_entropy_with_logits",
    F,
)
for _function, _stand_in in COMPOSITIONS.items():
    RULES.setdefault(_function, _composed(_stand_in))

_AREAS = "asinh", "acosh", "atanh", "arcsinh", "arccosh", "arctanh"
for _home in (*_BOTH, F):
    for _name in (*_ELEMENTWISE.split(), "add", "sub", "mul", "div", "masked_fill", "prelu"):
        _new: Any = getattr(_home, _name, None)
        _old: Any = getattr(_home, f"{_name}_", None)
        # PyTorch cannot differentiate asinh_ and similar functions.
        if _new and _old and not _name.startswith(_AREAS):
            RULES[_old] = _in_place(_new)
for _name in ("addmm", "addmv", "baddbmm", "addbmm", "addr", "index_add", "scatter_add"):
    RULES[getattr(Tensor, f"{_name}_")] = _in_place(getattr(Tensor, _name))
