"""Whether a loss over ranks is the loss of one process, in value and in gradient."""

import functools
import pickle
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Final, Literal, Unpack, cast

import torch
from torch import Tensor

from ._calls import Call, Inputs, Signature, drawn_calls
from ._laws import (
    GRADIENT,
    BrokenLawError,
    Function,
    MisuseError,
    Numbers,
    called,
    close,
    few,
    hold,
    leaf,
    refuse_unknown_arguments,
    refuse_unknown_axis,
    result_axes,
    values_and_gradients,
)
from ._ranks import Ranks

# Uneven, and with a rank that holds nothing.
_CUTS: Final = ((3, 1), (2, 0, 3))


def assert_sharding(
    fn: Function,
    axis: str | Sequence[str],
    group_argument: str,
    *,
    grad_reduction: Literal["mean", "sum"] | None = None,
    whole: Collection[str] = (),
    ranks: Ranks | None = None,
    max_examples: int = 2,
    **inputs: Unpack[Inputs],
) -> None:
    """Assert that over ranks a function equals one process on all the data.

    Real ranks hold uneven shares of the axis, one of them none. All tensors that have the axis by
    their annotation are cut along it, all others are the same on every rank. Every rank's terms
    equal those of one process (or are its share of them, where their annotation has the axis), and
    the ranks' gradients combine to the gradient of one process, in float64. A call sends as often
    under `torch.no_grad()` as with gradients: otherwise ranks that differ in grad mode, as where
    one of them evaluates, wait for each other until the group's timeout.

    Args:
        fn: the function, which ranks must be able to import.
        axis: name of the axis that is cut, or names of several that are cut alike.
        group_argument: name of the argument that takes the process group.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            With "mean" a rank's gradient is its share of the whole one times the number of ranks,
            with "sum" its share. None: what the argument `grad_reduction` of the drawn call says;
            without one, "mean".
        whole: arguments that are the same on every rank and whose gradient is whole on each, with
            nothing to be combined.
        ranks: running ranks; None starts some, which takes seconds.
        max_examples: calls to draw for each way to cut.
        **inputs: as [`calls`][termwise.testing.calls] takes them. In `sizes`, the axis has the
            shares of the ranks, one tuple or a list of several, of 2 or of `ranks.count` numbers:
            `{"batch": [(3, 1), (2, 0, 3)]}`, which is what is tried if it has a size, or none.

    Raises:
        AssertionError: with the problem, and the smallest call found that shows it, as code.
        ValueError: the function cannot be imported, or has no such argument or axis.
    """
    signature = Signature(fn)
    refuse_unknown_arguments("assert_sharding", fn, [group_argument])
    try:
        pickle.dumps(fn)
    except (AttributeError, pickle.PicklingError) as error:
        raise MisuseError(
            f"assert_sharding: ranks import {signature.name}, which needs a name in a module: "
            f"{error}"
        ) from None
    sizes = dict(inputs.get("sizes") or {})
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    for name in axes:
        refuse_unknown_axis("assert_sharding", signature, name)
    cuts = _cuts([sizes.pop(name, None) for name in axes])

    def place(names: Sequence[str | None]) -> int | None:
        return next((index for index, name in enumerate(names) if name in axes), None)

    def check(cut: Sequence[int], running: Ranks, several: list[Call]) -> None:
        (call,) = several
        names = call.axes()
        places = {path: at for path, of in names.items() if (at := place(of)) is not None}
        if not places:
            raise MisuseError(
                f"assert_sharding: no argument that was drawn of {signature.name} has axis {axis}"
            )
        values, gradients = values_and_gradients(call)
        parts = {
            path: _split(tensor, cut, places[path])
            for path, tensor in call.tensors().items()
            if path in places
        }
        shares = [_share(call, parts, rank) for rank in range(len(cut))]
        answers = cast(
            "list[tuple[Numbers, Numbers, list[int]]]",
            running(_on_a_rank, [group_argument] * len(cut), shares),
        )
        where = f"{' and '.join(axes)} over ranks as {list(cut)}"
        for rank, (_, _, (with_gradients, without)) in enumerate(answers):
            if with_gradients != without:
                raise BrokenLawError(
                    f"rank {rank} makes {with_gradients} collectives with gradients and {without} "
                    f"under torch.no_grad(): ranks that differ in it would hang, {where}",
                    call,
                )
        for name, value in values.items():
            at = place(result_axes(signature, name, value))
            pieces = [value] * len(cut) if at is None else _split(value, cut, at)
            for rank, ((ours, _, _), wanted) in enumerate(zip(answers, pieces, strict=True)):
                if not close(ours[name], wanted):
                    raise BrokenLawError(
                        f"{name} is {few(wanted)}, and on rank {rank} {few(ours[name])}, {where}",
                        call,
                    )
        reduction = grad_reduction or call.get("grad_reduction", "mean")
        share = len(cut) if reduction == "mean" else 1
        for name, wanted in gradients.items():
            path = name.removeprefix(GRADIENT)
            theirs = [found[name] for _, found, _ in answers]
            if path in whole:
                combined = list(theirs)
            elif path in parts:
                combined = [torch.cat(theirs, places[path]) / share]
            else:
                combined = [torch.stack(theirs).sum(0) / share]
            for gradient in combined:
                if not close(gradient, wanted):
                    ratio = (gradient.square().sum() / wanted.square().sum()).sqrt()
                    raise BrokenLawError(
                        f"{name} is {few(wanted)}, and combined by {reduction} {few(gradient)}, "
                        f"{ratio:.6g} times as long, {where}",
                        call,
                    )

    inputs["dtypes"] = (torch.float64,)
    with nullcontext(ranks) if ranks else Ranks(max(len(cut) for cut in cuts)) as running:
        for cut in cuts:
            inputs["sizes"] = {**sizes, **dict.fromkeys(axes, sum(cut))}
            hold(
                "assert_sharding",
                drawn_calls(fn, inputs, generic=True),
                functools.partial(check, cut, running),
                max_examples,
                shrink=False,  # a call that ranks hang in takes long, and all are small
            )


def _cuts(given: Sequence[Any]) -> list[tuple[int, ...]]:
    for shares in given:
        if isinstance(shares, tuple):
            return [cast("tuple[int, ...]", shares)]
        if isinstance(shares, list):
            return cast("list[tuple[int, ...]]", shares)
    return list(_CUTS)


def _share(call: Call, parts: Mapping[str, Sequence[Tensor]], rank: int) -> Call:
    return call.mapped(lambda path, t: parts[path][rank] if path in parts else t)


def _split(tensor: Tensor, cut: Sequence[int], axis: int) -> list[Tensor]:
    return list(cast("tuple[Tensor, ...]", tensor.split(list(cut), axis)))


def _on_a_rank(group: Any, group_argument: str, call: Call) -> tuple[Numbers, Numbers, list[int]]:
    here = call.changed(**{group_argument: group})
    return *values_and_gradients(here), [_collectives(group, here, kept) for kept in (True, False)]


def _collectives(group: Any, call: Call, kept: bool) -> int:
    """Count the collectives of a forward pass, with gradients or without."""
    backend = group._get_backend(torch.device("cpu"))
    before: int = backend._get_sequence_number_for_group()
    with torch.set_grad_enabled(kept):
        called(call.mapped(leaf))
    after: int = backend._get_sequence_number_for_group()
    return after - before
