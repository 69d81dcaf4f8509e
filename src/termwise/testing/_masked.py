"""Whether masked elements affect the result."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias, Unpack

import torch
from torch import Tensor

from .._annotations import is_array, options_of, show
from ._calls import Call, Inputs, Signature, calls, is_inexact, look_up
from ._laws import (
    GRADIENT,
    BrokenLawError,
    Function,
    MisuseError,
    Numbers,
    brief,
    check_law,
    close,
    derivatives,
    format_difference,
    is_among,
    leaf,
    refuse_unknown_arguments,
    replaced,
    result_axes,
    run_call,
    scalar,
    term,
)

MaskFunction: TypeAlias = Callable[[Tensor], Tensor]
EmptyResult: TypeAlias = float | Mapping[str, float] | type[Exception]


def assert_masked(
    fn: Function,
    mask: str = "mask",
    *,
    arguments: Sequence[str] | Mapping[str, MaskFunction] | None = None,
    nothing: EmptyResult | None = None,
    max_examples: int = 8,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that masked elements affect neither the value nor the gradient, even if they are NaN.

    With NaN or infinity in the masked elements, the result and the gradients do not change, and the
    gradient of the masked elements is exactly 0. If everything is masked, the result and the
    gradients are finite, or as `nothing` says. Parts of the result that have the axes of the mask
    are compared where the mask keeps them.

    Args:
        fn: the function.
        mask: name of the argument (or field, "batch.mask") that is the mask. If it is optional, it
            is a tensor in every call.
        arguments: tensors that are masked; all floating ones that have all axes of the mask, if
            None. A mapping contains a function for each tensor, which takes the mask and returns
            True for the elements to keep, in the shape of the mask:
            `{"logits": lambda labels: labels != -100}` or `{"keys": lambda padding: ~padding}`.
            Without a function, the mask is boolean, and True for the elements to keep.
        nothing: expected result if everything is masked: the value of the loss (or of the single
            result), values of terms by name, or the error that is raised. It may be NaN, as the
            mean of an empty tensor is. None: any finite values.
        max_examples: number of calls to draw.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls], in float64 by default. If
            `elements` or `overrides` sets the elements of the mask, a mask of everything is tested
            only if they draw it.

    Raises:
        AssertionError: if the law fails; the message ends with the smallest failing call, as code.
        ValueError: if the function has no such argument, no floating tensor has the axes of the
            mask, or the mask keeps all or no elements in every call.

    Examples:
        >>> import torch
        >>> from jaxtyping import Bool, Float
        >>> from torch import Tensor
        >>> from termwise import testing
        >>> def loss(
        ...     x: Float[Tensor, "batch dim"], mask: Bool[Tensor, " batch"]
        ... ) -> Float[Tensor, ""]:
        ...     return (x * mask[:, None]).sum() / mask.sum()
        >>> testing.assert_masked(loss)
        Traceback (most recent call last):
        AssertionError: assert_masked: loss: result is nan if mask excludes everything...
    """
    law = "assert_masked"
    refuse_unknown_arguments(law, fn, [mask, *(arguments or ())])
    overrides = dict(inputs.get("overrides") or {})
    elements = inputs.get("elements")
    restricted = {**overrides, **(elements if isinstance(elements, Mapping) else {})}
    arrays = [option for option in options_of(Signature(fn).hints.get(mask)) if is_array(option)]
    if is_array(restricted.get(mask)):
        del restricted[mask]
    if len(arrays) == 1:
        overrides.setdefault(mask, arrays[0])
    compared = False

    def check(call: Call) -> None:
        nonlocal compared
        given = call.tensors().get(mask)
        if given is None:
            return
        masks = [given]
        if given.dtype == torch.bool and look_up(mask, restricted) is None:
            every_second = (torch.arange(given.numel()) % 2 == 1).reshape(given.shape)
            partial = given.any() and not given.all()
            masks = [given if partial else every_second]
            masks += [torch.zeros_like(given), torch.ones_like(given)]
        for one in masks:
            masked = replaced(call, {mask: one})
            kept = _kept_elements(law, masked, mask, arguments)
            if not any(where.any() for where in kept.values()):
                check_all_masked(masked, kept)
            elif not all(where.all() for where in kept.values()):
                compared = True
                check_partly_masked(masked, kept)

    def check_all_masked(call: Call, kept: Numbers) -> None:
        excluded = f"if {mask} excludes everything"
        with_nan = f"{excluded}, with NaN in the excluded elements"
        filled = _fill(call, kept, math.nan)
        for masked, condition in ((call, excluded), (filled, with_nan)):
            if isinstance(nothing, type):
                _check_raises(masked, condition, nothing)
            else:
                _check_empty_result(law, masked, mask, nothing, condition)

    def check_partly_masked(call: Call, kept: Numbers) -> None:
        expected = _values_and_gradients(call, mask)
        for path, where in kept.items():
            gradient = expected.get(GRADIENT + path, torch.zeros(()))
            if (gradient.where(~where, 0) != 0).any():
                nonzero = brief(gradient[~where & (gradient != 0)][0])
                raise BrokenLawError(
                    f"{GRADIENT}{path} is {nonzero} for an element that {mask} excludes", call
                )
        # NaN in one tensor at a time, so that the message can name it.
        fillings = [(path, {path: where}, math.nan) for path, where in kept.items()]
        for names, filled, number in (*fillings, (" and ".join(kept), kept, math.inf)):
            changed = _fill(call, filled, number)
            ours = _values_and_gradients(changed, mask)
            for name, value in expected.items():
                if not close(ours[name], value):
                    one, two = format_difference(value, ours[name])
                    raise BrokenLawError(
                        f"{name} is {one}, but {two} with {number} in the elements of {names} that "
                        f"{mask} excludes",
                        changed,
                    )

    inputs["overrides"] = overrides
    inputs.setdefault("dtypes", (torch.float64,))
    check_law(law, calls(fn, **inputs), check, max_examples)
    if not compared:
        raise MisuseError(
            f"{law}: {mask} kept all or no elements in every call of {Signature(fn).name}: pass "
            "sizes, elements or overrides with which it keeps some"
        )


def _kept_elements(
    law: str, call: Call, mask: str, arguments: Sequence[str] | Mapping[str, MaskFunction] | None
) -> Numbers:
    """Return which elements of each tensor the mask keeps, as booleans of its shape."""
    signature, axes, given = Signature(call.fn), call.axes(), call.tensors()[mask]
    paths: Collection[str] | None = arguments
    functions: Mapping[str, MaskFunction] = {}
    if isinstance(arguments, Mapping):
        functions = arguments
    if given.dtype != torch.bool and not functions:
        raise MisuseError(
            f"{law}: {mask} of {signature.name} is {show(given)}, not boolean: pass arguments="
            f"{{name: lambda {mask}: ...}} with a function that returns the elements to keep"
        )
    kept: Numbers = {}
    for path, tensor in call.tensors().items():
        if path == mask or not is_inexact(tensor.dtype) or not is_among(path, paths):
            continue
        function: MaskFunction | None = look_up(path, functions)
        where = function(given) if function is not None else given
        expanded = _expand(where, axes.get(mask, ()), tensor, axes.get(path, ()))
        if expanded is None and arguments is not None:
            raise MisuseError(
                f"{law}: {path} of {signature.name} is {show(tensor)}, without the axes of {mask}, "
                f"{show(given)}"
            )
        if expanded is not None:
            kept[path] = expanded
    if not kept:
        raise MisuseError(f"{law}: no floating tensor of {signature.name} has the axes of {mask}")
    return kept


def _expand(
    where: Tensor, mask_axes: tuple[str | None, ...], tensor: Tensor, axes: tuple[str | None, ...]
) -> Tensor | None:
    """Expand a mask to a tensor's shape, by the names of axes; None if the tensor lacks one."""
    if None in mask_axes:  # any number of axes, which come first
        if where.shape != tensor.shape[: where.ndim]:
            return None
        return where.reshape(*where.shape, *[1] * (tensor.ndim - where.ndim)).expand(tensor.shape)
    if not set(mask_axes) <= set(axes):
        return None
    if len(mask_axes) == 1:  # every axis of this name, as in a matrix of pairwise distances
        indices = [i for i, name in enumerate(axes) if name == mask_axes[0]]
        shapes = [[-1 if i == index else 1 for i in range(tensor.ndim)] for index in indices]
        return torch.stack([where.reshape(shape).expand(tensor.shape) for shape in shapes]).all(0)
    indices = [axes.index(name) for name in mask_axes]
    order = sorted(range(len(indices)), key=lambda i: indices[i])
    sizes = [tensor.shape[i] if i in indices else 1 for i in range(tensor.ndim)]
    return where.permute(order).reshape(sizes).expand(tensor.shape)


def _fill(call: Call, kept: Numbers, number: float) -> Call:
    """Return a copy of the call with a number in all elements that are not kept."""
    tensors = call.tensors()
    return replaced(call, {path: tensors[path].where(kept[path], number) for path in kept})


def _values_and_gradients(call: Call, mask: str) -> Numbers:
    """Return the results, with 0 where they are masked, and the gradients."""
    signature, axes = Signature(call.fn), call.axes().get(mask, ())
    live = call.mapped(leaf)
    values = run_call(live)
    for name, value in values.items():
        names = result_axes(signature, name, value)
        kept = _expand(call.tensors()[mask] != 0, axes, value, names)
        if kept is not None and axes and value.ndim:
            values[name] = value.where(kept, 0)
    loss = scalar(values)
    leaves = {path: t for path, t in live.tensors().items() if t.requires_grad}
    numbers = {name: value.detach() for name, value in values.items()}
    if loss.requires_grad:
        found = derivatives(loss, list(leaves.values()))
        numbers |= {GRADIENT + path: value for path, value in zip(leaves, found, strict=True)}
    return numbers


def _check_raises(call: Call, condition: str, error: type[Exception]) -> None:
    try:
        call()
    except error:
        return
    raise BrokenLawError(f"no {error.__name__} is raised {condition}", call)


def _check_empty_result(
    law: str, call: Call, mask: str, nothing: float | Mapping[str, float] | None, condition: str
) -> None:
    numbers = _values_and_gradients(call, mask)
    if nothing is None:
        for name, value in numbers.items():
            if not torch.isfinite(value).all():
                bad = brief(value[~torch.isfinite(value)][0])
                hint = "" if name.startswith(GRADIENT) else " (pass nothing= if this is expected)"
                raise BrokenLawError(f"{name} is {bad} {condition}{hint}", call)
        return
    loss = "loss" if "loss" in numbers else "result"
    expected = nothing if isinstance(nothing, Mapping) else {loss: nothing}
    for name, number in expected.items():
        value = term(law, call.fn, numbers, name)
        if not close(value, torch.full_like(value, number)):
            one, two = format_difference(value, torch.full_like(value, number))
            raise BrokenLawError(f"{name} is {one} {condition}, but nothing= says {two}", call)
