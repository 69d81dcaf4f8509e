"""What a mask leaves out may hold anything."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias, Unpack

import torch
from torch import Tensor

from .._annotations import is_array, options_of, show
from ._calls import Call, Inputs, Signature, calls, given_for, is_inexact
from ._laws import (
    GRADIENT,
    BrokenLawError,
    Function,
    MisuseError,
    Numbers,
    called,
    close,
    derivatives,
    few,
    hold,
    is_of,
    leaf,
    refuse_unknown_arguments,
    replaced,
    result_axes,
    scalar,
    term,
    told_apart,
)

Counted: TypeAlias = Callable[[Tensor], Tensor]
Nothing: TypeAlias = float | Mapping[str, float] | type[Exception]


def assert_masked(
    fn: Function,
    mask: str = "mask",
    *,
    arguments: Sequence[str] | Mapping[str, Counted] | None = None,
    nothing: Nothing | None = None,
    max_examples: int = 8,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that what a mask leaves out may hold anything, and reaches neither value nor gradient.

    With NaN and with infinity in the places that do not count, the result and the gradients are
    those of the call without them, and the gradient in these places is exactly 0. Where the mask
    leaves out everything, the result is finite with finite gradients, or as `nothing` says. A part
    of the result that has the mask's axes is compared in the places that count.

    Args:
        fn: the function.
        mask: the argument (or field, "batch.mask") that says which places count. It is a tensor in
            each call that is tried, where it could also be None.
        arguments: tensors that it masks; all floating ones that have all its axes, if None. A
            mapping gives for each a function of the mask that returns where the tensor counts, as
            booleans of the mask's shape: `{"logits": lambda labels: labels != -100}`, or
            `{"keys": lambda padding: ~padding}`. A mask of booleans is otherwise True where
            something counts.
        nothing: what is returned where nothing counts: the loss (or the one result), terms by
            name, or the error that refuses it; NaN for a mean of nothing that is NaN. Any finite
            numbers, if None.
        max_examples: calls to draw.
        **inputs: as [`calls`][termwise.testing.calls] takes them; float64 unless `dtypes` says
            otherwise. With `elements` for the mask, or an override that is no annotation, a mask
            that leaves out everything is tried only if they draw it.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
        ValueError: the function has no such argument, no tensor has the mask's axes, or no call
            left anything out.

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
        AssertionError: assert_masked: loss: result is nan where mask leaves out everything...
    """
    law = "assert_masked"
    refuse_unknown_arguments(law, fn, [mask, *(arguments or ())])
    overrides = dict(inputs.get("overrides") or {})
    elements = inputs.get("elements")
    limited = {**overrides, **(elements if isinstance(elements, Mapping) else {})}
    arrays = [option for option in options_of(Signature(fn).hints.get(mask)) if is_array(option)]
    if is_array(limited.get(mask)):
        del limited[mask]
    if len(arrays) == 1:
        overrides.setdefault(mask, arrays[0])
    tried = False

    def check(call: Call) -> None:
        nonlocal tried
        given = call.tensors().get(mask)
        if given is None:
            return
        masks = [given]
        if given.dtype == torch.bool and given_for(mask, limited) is None:
            every_second = (torch.arange(given.numel()) % 2 == 1).reshape(given.shape)
            partial = given.any() and not given.all()
            masks = [given if partial else every_second]
            masks += [torch.zeros_like(given), torch.ones_like(given)]
        for one in masks:
            with_one = replaced(call, {mask: one})
            counted = _counted(law, with_one, mask, arguments)
            if not any(kept.any() for kept in counted.values()):
                check_nothing(with_one, counted)
            elif not all(kept.all() for kept in counted.values()):
                tried = True
                check_left_out(with_one, counted)

    def check_nothing(call: Call, counted: Numbers) -> None:
        where = f"where {mask} leaves out everything"
        for held, also in ((call, ""), (_filled(call, counted, math.nan), ", which is NaN")):
            if isinstance(nothing, type):
                _check_refused(held, where + also, nothing)
            else:
                _check_values_of_nothing(law, held, mask, nothing, where + also)

    def check_left_out(call: Call, counted: Numbers) -> None:
        wanted = _numbers(call, mask)
        for path, kept in counted.items():
            slope = wanted.get(GRADIENT + path, torch.zeros(()))
            if (slope.where(~kept, 0) != 0).any():
                nonzero = few(slope[~kept & (slope != 0)][0])
                raise BrokenLawError(
                    f"{GRADIENT}{path} is {nonzero} in a place that {mask} leaves out", call
                )
        # NaN in each alone, to name it.
        filled = [(path, {path: kept}, math.nan) for path, kept in counted.items()]
        for where, places, poison in (*filled, (" and ".join(counted), counted, math.inf)):
            poisoned = _filled(call, places, poison)
            ours = _numbers(poisoned, mask)
            for name, value in wanted.items():
                if not close(ours[name], value):
                    one, two = told_apart(value, ours[name])
                    raise BrokenLawError(
                        f"{name} is {one}, and {two} with {poison} in {where} in the places that "
                        f"{mask} leaves out",
                        poisoned,
                    )

    inputs["overrides"] = overrides
    inputs.setdefault("dtypes", (torch.float64,))
    hold(law, calls(fn, **inputs), check, max_examples)
    if not tried:
        raise MisuseError(
            f"{law}: {mask} left out some places and not all in no call of {Signature(fn).name}: "
            "give sizes, elements or overrides that do"
        )


def _counted(
    law: str, call: Call, mask: str, arguments: Sequence[str] | Mapping[str, Counted] | None
) -> Numbers:
    """Return where each tensor counts, as booleans of its shape."""
    signature, axes, given = Signature(call.fn), call.axes(), call.tensors()[mask]
    paths: Collection[str] | None = arguments
    functions: Mapping[str, Counted] = {}
    if isinstance(arguments, Mapping):
        functions = arguments
    if given.dtype != torch.bool and not functions:
        raise MisuseError(
            f"{law}: {mask} of {signature.name} is {show(given)}, no mask of booleans: give in "
            f"arguments a function of it for each tensor, {{name: lambda {mask}: ...}}"
        )
    counted: Numbers = {}
    for path, tensor in call.tensors().items():
        if path == mask or not is_inexact(tensor.dtype) or not is_of(path, paths):
            continue
        function: Counted | None = given_for(path, functions)
        kept = function(given) if function is not None else given
        placed = _placed(kept, axes.get(mask, ()), tensor, axes.get(path, ()))
        if placed is None and arguments is not None:
            raise MisuseError(
                f"{law}: {path} of {signature.name} is {show(tensor)}, which {mask}, "
                f"{show(given)}, cannot mask along its axes"
            )
        if placed is not None:
            counted[path] = placed
    if not counted:
        raise MisuseError(f"{law}: no floating tensor of {signature.name} has the axes of {mask}")
    return counted


def _placed(
    kept: Tensor, of_mask: tuple[str | None, ...], tensor: Tensor, names: tuple[str | None, ...]
) -> Tensor | None:
    """Lay a mask along the axes of a tensor that have the same names; None if it has not all."""
    if None in of_mask:  # any number of axes, which come first
        if kept.shape != tensor.shape[: kept.ndim]:
            return None
        return kept.reshape(*kept.shape, *[1] * (tensor.ndim - kept.ndim)).expand(tensor.shape)
    if not set(of_mask) <= set(names):
        return None
    if len(of_mask) == 1:  # along each axis of the name, as of the distances of all pairs
        places = [i for i, name in enumerate(names) if name == of_mask[0]]
        shapes = [[-1 if i == place else 1 for i in range(tensor.ndim)] for place in places]
        return torch.stack([kept.reshape(shape).expand(tensor.shape) for shape in shapes]).all(0)
    places = [names.index(name) for name in of_mask]
    order = sorted(range(len(places)), key=lambda i: places[i])
    sizes = [tensor.shape[i] if i in places else 1 for i in range(tensor.ndim)]
    return kept.permute(order).reshape(sizes).expand(tensor.shape)


def _filled(call: Call, counted: Numbers, poison: float) -> Call:
    """Return the call with a number in the places that do not count."""
    tensors = call.tensors()
    return replaced(call, {path: tensors[path].where(counted[path], poison) for path in counted})


def _numbers(call: Call, mask: str) -> Numbers:
    """Return the results where they count, and the gradients."""
    signature, axes = Signature(call.fn), call.axes().get(mask, ())
    live = call.mapped(leaf)
    values = called(live)
    for name, value in values.items():
        names = result_axes(signature, name, value)
        kept = _placed(call.tensors()[mask] != 0, axes, value, names)
        if kept is not None and axes and value.ndim:
            values[name] = value.where(kept, 0)
    loss = scalar(values)
    leaves = {path: t for path, t in live.tensors().items() if t.requires_grad}
    numbers = {name: value.detach() for name, value in values.items()}
    if loss.requires_grad:
        slopes = derivatives(loss, list(leaves.values()))
        numbers |= {GRADIENT + path: slope for path, slope in zip(leaves, slopes, strict=True)}
    return numbers


def _check_refused(call: Call, where: str, error: type[Exception]) -> None:
    try:
        call()
    except error:
        return
    raise BrokenLawError(f"no {error.__name__} {where}", call)


def _check_values_of_nothing(
    law: str, call: Call, mask: str, nothing: float | Mapping[str, float] | None, where: str
) -> None:
    numbers = _numbers(call, mask)
    if nothing is None:
        for name, value in numbers.items():
            if not torch.isfinite(value).all():
                bad = few(value[~torch.isfinite(value)][0])
                hint = "" if name.startswith(GRADIENT) else ": say in nothing= what is documented"
                raise BrokenLawError(f"{name} is {bad} {where}{hint}", call)
        return
    loss = "loss" if "loss" in numbers else "result"
    documented = nothing if isinstance(nothing, Mapping) else {loss: nothing}
    for name, number in documented.items():
        value = term(law, call.fn, numbers, name)
        if not close(value, torch.full_like(value, number)):
            one, two = told_apart(value, torch.full_like(value, number))
            raise BrokenLawError(f"{name} is {one} {where}, and documented as {two}", call)
