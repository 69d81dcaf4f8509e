"""The forward Laplacian: one pass that carries a value, its Jacobian and its Laplacian.

For z a function of x, a `Carrier` holds z, J = dz/dx and L = sum_d d2z/dx_d2. Each torch function
that the energy calls takes carriers to carriers:

    linear f      f(z),  f(J),               f(L)
    elementwise f f(z),  f'(z) J,            f'(z) L + f''(z) sum_d J_d^2
    bilinear f    f(a, b), f(Ja, b) + f(a, Jb), f(La, b) + f(a, Lb) + 2 sum_d f(Ja_d, Jb_d)

The rows of a batch do not depend on each other, so one Jacobian axis does for all of them. What is
large is J: an axis of directions before those of z. It is kept as `scale * base`, so that an
elementwise function multiplies the small scale and leaves the large base alone, and as long as it
is the same in all rows (the weight of a first linear layer) it is a view of one row.

Li et al., A computational framework for neural network-based variational Monte Carlo with Forward
Laplacian, Nature Machine Intelligence 6 (2024), https://arxiv.org/abs/2307.08214.
"""

import dataclasses
import functools
import math
import operator
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .._autograd import Function
from ._higher_order import COMPOSITIONS


class UnknownFunctionError(NotImplementedError):
    """The energy calls what carriers have no rule for."""


class WithoutGradError(UnknownFunctionError):
    """The energy calls something under no_grad, as the forward of an autograd.Function does."""


def carried(x: Tensor, directions: Tensor, kept: bool) -> "Carrier":
    """Give x as a carrier of its derivatives along directions, "directions *event".

    Args:
        x: "batch *event".
        directions: what the Jacobian of x by itself is made of, such as rows of the identity.
        kept: whether the results are in a graph. The energy itself runs with grad mode on, so that
            what it calls under no_grad can be told.
    """
    base = directions.unsqueeze(1).expand(-1, *x.shape)
    return Carrier(x, base, None, None, None, kept, False)


@dataclasses.dataclass(eq=False)
class Carrier:
    """A value with its derivatives, which torch's functions take for a tensor.

    Not a subclass of Tensor: what would look past its derivatives fails instead. Its tensors are
    leaves of a pytree, by which wrappers that hook on a module's inputs and outputs find them.
    """

    value: Tensor
    base: Tensor
    """ "directions *value". """
    scale: Tensor | None
    """In the shape of the value. The Jacobian is scale * base. None: 1."""
    laplacian: Tensor | None
    """None: 0."""
    squares: Tensor | None
    """The sum of base^2 over directions, once it was needed."""
    kept: bool
    aliased: bool
    """Whether others may share its memory, were it a tensor."""

    @property
    def jacobian(self) -> Tensor:
        return self.base if self.scale is None else self.base * self.scale

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not torch.is_grad_enabled():
            raise WithoutGradError(func.__name__)
        return _apply(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("T", "mT"):
            return self.t() if name == "T" else self.transpose(-2, -1)
        if name == "data":
            return self.detach()
        attribute = getattr(Tensor, name)
        if not callable(attribute):
            return getattr(self.value, name)
        return functools.partial(_method, attribute, self)

    def _seen_as(self) -> type:
        """Pass for a tensor with type checkers and einops, and never with torch itself.

        Torch hands what isinstance says is a tensor to C++, where this one would be the end of the
        process: in `autograd.Function.apply`, for one.
        """
        asking = str(sys._getframe(1).f_globals.get("__name__", ""))  # pyright: ignore[reportPrivateUsage]
        return Carrier if asking.partition(".")[0] == "torch" else Tensor

    __class__ = property(_seen_as)  # pyright: ignore[reportIncompatibleMethodOverride]

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Any:
        return iter(self.unbind(0))


def is_carrier(value: object) -> bool:
    """Tell a carrier, of which isinstance says that it is a tensor."""
    return type(value) is Carrier


def _like(
    model: Carrier,
    value: Tensor,
    base: Tensor,
    laplacian: Tensor | None,
    scale: Tensor | None = None,
    squares: Tensor | None = None,
) -> Carrier:
    return Carrier(value, base, scale, laplacian, squares, model.kept, False)


def _method(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return Carrier.__torch_function__(func, (Carrier,), args, kwargs)


def _special_method(name: str) -> Callable[..., Any]:
    func = getattr(Tensor, name)

    def special(*args: Any) -> Any:
        return _method(func, *args)

    return special


for _name in (
    "add radd sub rsub mul rmul truediv rtruediv pow rpow matmul rmatmul neg abs getitem "
    "setitem lt le gt ge eq ne bool float int invert and or iadd isub imul itruediv ipow".split()
):
    setattr(Carrier, f"__{_name}__", _special_method(f"__{_name}__"))


torch.export.register_dataclass(Carrier, serialized_type_name="termwise.energy.Carrier")

# Names, since the same function is torch.sum and Tensor.sum.
_OPERATORS = {
    "__add__": "add",
    "__radd__": "add",
    "__sub__": "sub",
    "__rsub__": "rsub",
    "__mul__": "mul",
    "__rmul__": "mul",
    "__truediv__": "div",
    "__pow__": "pow",
    "__matmul__": "matmul",
    "__neg__": "neg",
    "__abs__": "abs",
    "__getitem__": "getitem",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
}

_CONSTANT = frozenset(
    "size dim numel nelement ndimension is_floating_point is_complex element_size "
    "get_device type stride is_contiguous is_tensor result_type is_signed lt le gt ge eq ne "
    "__lt__ __le__ __gt__ __ge__ __eq__ __ne__ less less_equal greater greater_equal "
    "not_equal isnan isinf isfinite isneginf isposinf isclose allclose equal signbit sign "
    "sgn floor ceil round trunc argmax argmin argsort logical_not logical_and logical_or "
    "heaviside item tolist __bool__ __float__ __int__ any all detach numpy zeros_like "
    "ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full "
    "new_empty new_tensor".split()
)
"""Functions whose result does not change with x, to first order."""

_VIEWS = frozenset(
    "reshape view reshape_as view_as flatten unflatten ravel squeeze unsqueeze transpose "
    "swapaxes swapdims permute t movedim moveaxis adjoint contiguous clone to float double "
    "half bfloat16 type_as expand expand_as broadcast_to repeat repeat_interleave tile flip "
    "fliplr flipud roll getitem index_select select narrow chunk split tensor_split unbind "
    "diagonal atleast_1d atleast_2d atleast_3d pixel_shuffle pixel_unshuffle rot90 alias "
    "cpu cuda take_along_dim gather unfold_copy".split()
)
"""Functions that only place elements: f(scale * base) = f(scale) * f(base)."""

_LINEAR = frozenset(
    "sum mean cumsum diff cat stack hstack vstack dstack column_stack trace tril triu "
    "matmul mm bmm mv dot vdot inner outer einsum tensordot chain_matmul conv1d conv2d "
    "conv3d conv_transpose1d conv_transpose2d conv_transpose3d avg_pool1d avg_pool2d "
    "avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d unfold fold "
    "interpolate upsample diag_embed linear bilinear".split()
)
"""Functions that are linear in each carrier, once a bias is left out."""

_JOINED = frozenset(["cat", "stack", "hstack", "vstack", "dstack", "column_stack"])
"""Functions of a list that are linear in all of it together."""

_BY_ROW = frozenset(
    "matmul linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d interpolate upsample".split()
)
"""Linear functions of one carrier in which a first axis is of rows, which do not mix."""

_PIECEWISE = frozenset(
    "pad max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d amax amin addmm addmv addbmm baddbmm".split()
)
"""Functions whose derivative changes with nothing, or by steps."""

_ELEMENTWISE = frozenset(
    "add sub rsub mul div neg reciprocal pow float_power square sqrt rsqrt exp exp2 expm1 "
    "log log2 log10 log1p sin cos tan asin acos atan arcsin arccos arctan sinh cosh tanh "
    "asinh acosh atanh arcsinh arccosh arctanh sigmoid expit relu relu6 silu gelu softplus "
    "elu selu celu mish leaky_relu hardtanh logsigmoid log_sigmoid softsign tanhshrink "
    "hardswish softshrink hardshrink threshold _threshold prelu clamp clamp_min clamp_max "
    "abs maximum minimum where masked_fill erf erfc erfinv lerp addcmul addcdiv xlogy "
    "logaddexp logaddexp2 atan2 arctan2 hypot sinc logit lgamma digamma i0 special_erf "
    "special_erfc special_expit special_xlogy special_log1p special_expm1 special_ndtr "
    "special_log_ndtr special_i0 special_sinc special_logit deg2rad rad2deg positive fmax "
    "fmin".split()
)

_GENERAL = frozenset(
    "prod cumprod logsumexp special_logsumexp logcumsumexp var linalg_inv inverse "
    "linalg_det det logdet linalg_solve".split()
)
"""Functions whose second derivative is taken along each direction."""


def _apply(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a torch function with carriers among its arguments."""
    if func in COMPOSITIONS or func in _COMPOSITIONS:
        return (_COMPOSITIONS.get(func) or COMPOSITIONS[func])(*args, **kwargs)
    name = getattr(func, "__name__", str(func))
    name = _OPERATORS.get(name, name)
    home = getattr(func, "__module__", None) or "torch"
    if home.partition(".")[0] != "torch":
        raise UnknownFunctionError(f"{home}.{name}")
    if name in _BY_NAME:
        return _BY_NAME[name](*args, **kwargs)
    call = _Call(Tensor.reshape if name == "view" else func, args, kwargs)
    first = call.carriers[0]
    if name in _CONSTANT:
        return call(*[carrier.value for carrier in call.carriers])
    if kwargs.get("inplace"):
        if first.aliased:
            raise UnknownFunctionError(f"{name} in place, of what shares its memory")
        result = _apply(func, args, {**kwargs, "inplace": False})
        for field in dataclasses.fields(Carrier):
            setattr(first, field.name, getattr(result, field.name))
        return first
    if kwargs.get("out") is not None:
        raise UnknownFunctionError(f"{name} with out=")
    with torch.set_grad_enabled(first.kept):
        if name in _ELEMENTWISE:
            return _elementwise(name, call)
        if name in _VIEWS:
            return _viewed(call)
        if name in _LINEAR:
            return _linear(name, call)
        if name in _PIECEWISE:
            return _differentiated(call, curved=False)
        if name in _GENERAL:
            return _differentiated(call, curved=True)
    raise UnknownFunctionError(name)


class _Call:
    """A function of the carriers among its arguments alone."""

    def __init__(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.carriers: list[Carrier] = []
        _collect((*args, *kwargs.values()), self.carriers)

    def __call__(self, *values: Tensor) -> Any:
        rest = list(values)
        args = _filled(self.args, rest)
        kwargs = {name: _filled(value, rest) for name, value in self.kwargs.items()}
        return self.func(*args, **kwargs)


def _collect(values: Sequence[Any], found: list[Carrier]) -> None:
    for value in values:
        if is_carrier(value):
            found.append(value)
        elif type(value) in (tuple, list):
            _collect(value, found)


def _filled(value: Any, rest: list[Tensor]) -> Any:
    if is_carrier(value):
        return rest.pop(0)
    if type(value) in (tuple, list):
        return type(value)(_filled(part, rest) for part in value)
    return value


def _viewed(call: _Call) -> Any:
    """Move the elements of one carrier."""
    (carrier,) = call.carriers
    carrier.aliased = True
    value = call(carrier.value)
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
    return Carrier(value, base, scale, laplacian, squares, carrier.kept, True)


def _elementwise(name: str, call: _Call) -> Any:
    """Apply f(a, b, ...), elementwise in each carrier."""
    value = call(*[carrier.value for carrier in call.carriers])
    carriers = [_expanded(carrier, value.shape) for carrier in call.carriers]
    first, second = _partial_derivatives(name, call, [carrier.value for carrier in carriers])
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
        carrier.base if isinstance(scale, float) and scale == 1.0 else _scaled(carrier.base, scale)
        for carrier, scale in zip(carriers, scales, strict=True)
    ]
    jacobian = _by_row(lambda *bases: functools.reduce(operator.add, bases), *terms)
    return _like(carriers[0], value, jacobian, laplacian)


def _partial_derivatives(
    name: str, call: _Call, values: list[Tensor]
) -> tuple[Sequence[Tensor | float], Sequence[Sequence[Tensor | float | None]]]:
    """Give the first derivatives of an elementwise function, and the second, None for 0."""
    count = len(values)
    nothing: list[list[Tensor | float | None]] = [[None] * count for _ in values]
    args = call.args
    left = len(args) == 2 and is_carrier(args[0])
    right = len(args) == 2 and is_carrier(args[1])
    if name in ("add", "sub") and (left or right):
        alpha = float(call.kwargs.get("alpha", 1)) * (1 if name == "add" else -1)
        return [1.0] * left + [alpha] * right, nothing
    if name == "mul" and left and right:
        return values[::-1], [[None, 1.0], [1.0, None]]
    if (name == "mul" and (left or right)) or (name == "div" and left and not right):
        other = args[1] if left else args[0]
        if not call.kwargs:
            return [1 / other if name == "div" else other], nothing
    if name == "neg":
        return [-1.0], nothing

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


def _linear(name: str, call: _Call) -> Carrier:
    """Apply what is linear in each carrier alone, or in all of them together."""
    if name in _JOINED:
        call = _all_carried(call)
    carriers = call.carriers
    value = call(*[carrier.value for carrier in carriers])
    call = _without_bias(name, call)
    if len(carriers) == 2 and name not in _JOINED and len(call.carriers) == 2:
        return _bilinear(call, value)
    if name not in _JOINED and len(carriers) > 1:
        return _differentiated(call, curved=True)
    laplacian = None
    if any(carrier.laplacian is not None for carrier in carriers):
        laplacian = call(
            *[
                torch.zeros_like(carrier.value) if carrier.laplacian is None else carrier.laplacian
                for carrier in carriers
            ]
        )
    (carrier, *_) = carriers
    weight = _weight(name, call)
    if weight is not None and carrier.scale is not None and carrier.value.ndim > 1:
        base = _ScaledProduct.apply(carrier.base, carrier.scale, weight)
    elif weight is not None:
        base = _by_row(functools.partial(F.linear, weight=weight), carrier.base)
    else:
        by_row = name in _BY_ROW or (name in _JOINED and _keeps_first_axis(call, value))
        mapped = torch.vmap(call)
        jacobians = [carrier.jacobian for carrier in carriers]
        base = _by_row(mapped, *jacobians) if by_row else mapped(*jacobians)
    return _like(carrier, value, base, laplacian)


def _bilinear(call: _Call, value: Tensor) -> Carrier:
    a, b = call.carriers
    ja, jb = a.jacobian, b.jacobian

    def crosswise(ja: Tensor, jb: Tensor) -> Tensor:
        return cast("Tensor", call(ja, b.value) + call(a.value, jb))

    base = torch.vmap(crosswise)(ja, jb)
    laplacian = 2 * torch.vmap(call)(ja, jb).sum(0)
    if a.laplacian is not None:
        laplacian = laplacian + call(a.laplacian, b.value)
    if b.laplacian is not None:
        laplacian = laplacian + call(a.value, b.laplacian)
    return _like(a, value, base, laplacian)


def _differentiated(call: _Call, *, curved: bool) -> Carrier:
    """Apply any function, by forward-mode derivatives along each direction."""
    carriers = call.carriers
    values = tuple(carrier.value for carrier in carriers)
    value = call(*values)
    if not isinstance(value, Tensor):
        raise UnknownFunctionError(
            f"{getattr(call.func, '__name__', call.func)} of several results"
        )

    def along(*tangents: Tensor) -> Tensor:
        return cast("Tensor", torch.func.jvp(call, values, tangents)[1])

    def twice(*tangents: Tensor) -> Tensor:
        def once(*point: Tensor) -> Tensor:
            return cast("Tensor", torch.func.jvp(call, point, tangents)[1])

        return cast("Tensor", torch.func.jvp(once, values, tangents)[1])

    jacobians = [carrier.jacobian for carrier in carriers]
    base = torch.vmap(along)(*jacobians)
    laplacian = torch.vmap(twice)(*jacobians).sum(0) if curved else None
    if any(carrier.laplacian is not None for carrier in carriers):
        drift = along(
            *[
                torch.zeros_like(carrier.value) if carrier.laplacian is None else carrier.laplacian
                for carrier in carriers
            ]
        )
        laplacian = _sum(laplacian, drift)
    return _like(carriers[0], value, base, laplacian)


def _all_carried(call: _Call) -> _Call:
    """Give plain tensors of a list a derivative of 0."""
    (model, *_) = call.carriers
    count = model.base.shape[0]

    def carry(part: Any) -> Any:
        if is_carrier(part) or not isinstance(part, Tensor):
            return part
        zero = torch.zeros((), dtype=part.dtype, device=part.device)
        return _like(model, part, zero.expand(count, *part.shape), None)

    parts, *rest = call.args or (call.kwargs["tensors"],)
    kwargs = {name: value for name, value in call.kwargs.items() if name != "tensors"}
    return _Call(call.func, ([carry(part) for part in parts], *rest), kwargs)


def _keeps_first_axis(call: _Call, value: Tensor) -> bool:
    axis = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)
    return call.func.__name__ in ("cat", "stack") and axis % value.ndim != 0


def _without_bias(name: str, call: _Call) -> _Call:
    place = 3 if name == "bilinear" else 2
    if name not in ("linear", "bilinear") and not name.startswith("conv"):
        return call
    args = (
        (*call.args[:place], None, *call.args[place + 1 :]) if len(call.args) > place else call.args
    )
    return _Call(
        call.func, args, {**call.kwargs, "bias": None} if "bias" in call.kwargs else call.kwargs
    )


def _weight(name: str, call: _Call) -> Tensor | None:
    """Give W where a function of one carrier is z W^T."""
    if len(call.args) < 2 or not is_carrier(call.args[0]):
        return None
    other = call.args[1]
    if not isinstance(other, Tensor) or is_carrier(other) or other.ndim != 2:
        return None
    if name == "linear":
        return other
    return other.mT if name in ("matmul", "mm") else None


def _expanded(carrier: Carrier, shape: Sequence[int]) -> Carrier:
    if carrier.value.shape == shape:
        return carrier
    return cast("Carrier", _viewed(_Call(torch.broadcast_to, (carrier, tuple(shape)), {})))


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


def _scaled(base: Tensor, scale: Tensor | float) -> Tensor:
    return base * scale


def _inner(a: Carrier, b: Carrier) -> Tensor:
    """Give the sum over directions of one Jacobian times another."""
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
    """Call a function that does not mix rows, once where they are all alike."""
    rows = bases[0].shape[1] if bases[0].ndim > 1 else 0
    alike = rows > 1 and all(
        base.ndim > 1 and base.shape[1] == rows and base.stride(1) == 0 for base in bases
    )
    if not alike:
        return function(*bases)
    of_one = function(*[base[:, :1] for base in bases])
    return of_one.expand(-1, rows, *of_one.shape[2:])


def _steps(base: Tensor) -> int:
    """Give how many directions make about 1 MiB, which stays in cache."""
    return max(1, 2**18 // max(1, math.prod(base.shape[1:])))


class _SquareSum(Function):
    """Sum base^2 over directions; remembers base alone."""

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


class _ScaledProduct(Function):
    """Multiply (base * scale) by weight^T, a few directions at a time; remembers no product."""

    generate_vmap_rule = True

    @staticmethod
    def forward(base: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        step = _steps(scale[None])
        return torch.cat([F.linear(part * scale, weight) for part in torch.split(base, step)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (gradient,) = gradients
        base, scale, weight = ctx.saved_tensors
        step = _steps(scale[None])
        of_base: list[Tensor] = []
        of_scale, of_weight = torch.zeros_like(scale), torch.zeros_like(weight)
        for part, outer in zip(torch.split(base, step), torch.split(gradient, step), strict=True):
            inner = outer @ weight
            of_base.append(inner * scale)
            of_scale = of_scale + (inner * part).sum(0)
            of_weight = of_weight + outer.flatten(0, -2).mT @ (part * scale).flatten(0, -2)
        return torch.cat(of_base), of_scale, of_weight


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
    wide = input if dtype is None else input.to(dtype)
    return wide - wide.detach().amax(dim, keepdim=True)


def _softmin(input: Any, dim: Any = None, *rest: Any, dtype: Any = None, **_: Any) -> Any:
    return _softmax(-input, dim, *rest, dtype=dtype)


def _glu(input: Any, dim: int = -1) -> Any:
    left, right = input.chunk(2, dim)
    return left * right.sigmoid()


def _norm(input: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    wide = input if dtype is None else input.to(dtype)
    if not isinstance(p, (int, float)) or dim is None:
        raise UnknownFunctionError("a norm of that kind")
    if p == 2:
        return wide.square().sum(dim, keepdim=keepdim).sqrt()
    if p == 1:
        return wide.abs().sum(dim, keepdim=keepdim)
    if math.isinf(p):
        return wide.abs().amax(dim, keepdim=keepdim)
    return wide.abs().pow(p).sum(dim, keepdim=keepdim).pow(1 / p)


def _vector_norm(
    x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    if dim is None:
        raise UnknownFunctionError("a norm without dim")
    return _norm(x, ord, dim, keepdim, dtype)


def _normalize(
    input: Any, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> Any:
    return input / _norm(input, p, dim, True).clamp_min(eps)


def _cosine_similarity(x1: Any, x2: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    lengths = [_norm(x, 2, dim, True).clamp_min(eps) for x in (x1, x2)]
    return ((x1 / lengths[0]) * (x2 / lengths[1])).sum(dim)


def _pairwise_distance(
    x1: Any, x2: Any, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False
) -> Any:
    return _norm(x1 - x2 + eps, p, -1, keepdim)


def _std(input: Any, *args: Any, **kwargs: Any) -> Any:
    return input.var(*args, **kwargs).sqrt()


def _mse(input: Any, target: Any, *_: Any, reduction: str = "mean", **options: Any) -> Any:
    squares = (input - target).square()
    if _ or any(value is not None for value in options.values()):
        raise UnknownFunctionError("mse_loss with these options")
    return squares if reduction == "none" else getattr(squares, reduction)()


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p > 0:
        raise UnknownFunctionError("dropout in training mode")
    return input


def _has_none(arguments: object) -> bool:
    return False


def _divide_into(x: Any, other: Any) -> Any:
    return other * x.reciprocal()


def _power_of(x: Any, other: Any) -> Any:
    return torch.pow(other, x)


def _after(x: Any, other: Any) -> Any:
    return torch.matmul(other, x)


# The function itself, once it no longer asks who else would do its work.
_multi_head_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": _has_none},
    argdefs=F.multi_head_attention_forward.__defaults__,
)

_COMPOSITIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: _multi_head_attention,
}

_BY_NAME: dict[str, Callable[..., Any]] = {
    "__rdiv__": _divide_into,
    "__rtruediv__": _divide_into,
    "__rpow__": _power_of,
    "__rmatmul__": _after,
    "softmax": _softmax,
    "softmin": _softmin,
    "glu": _glu,
    "norm": _norm,
    "linalg_vector_norm": _vector_norm,
    "normalize": _normalize,
    "cosine_similarity": _cosine_similarity,
    "pairwise_distance": _pairwise_distance,
    "std": _std,
    "mse_loss": _mse,
    "log_softmax": _log_softmax,
    **dict.fromkeys(
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout".split(),
        _dropout,
    ),
}
