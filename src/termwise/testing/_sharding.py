"""Whether a loss over ranks equals the loss of one process, in value and in gradient."""

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
    brief,
    check_law,
    close,
    leaf,
    refuse_unknown_arguments,
    refuse_unknown_axis,
    result_axes,
    run_call,
    values_and_gradients,
)
from ._ranks import Ranks

# Uneven, and one of them with an empty rank.
_SPLITS: Final = ((3, 1), (2, 0, 3))


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
    """Assert that a function over ranks equals the same function on one process with all data.

    The ranks are processes that hold uneven shards, one of them empty. Tensors whose annotation has
    the axis are split along it; all others are the same on every rank. On every rank, the terms
    must equal those of one process (or the rank's shard of them, where their annotation has the
    axis). The gradients of the ranks, combined as `grad_reduction` says, must equal the gradient of
    one process. Both are compared in float64. Finally, a call must make the same number of
    collectives under `torch.no_grad()` as with gradients; otherwise ranks in different grad modes,
    such as one that evaluates, would hang.

    Args:
        fn: the function, which must be importable by the ranks.
        axis: name of the axis to split, or several names, which are split in the same way.
        group_argument: name of the argument that takes the process group.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            None: as the argument `grad_reduction` of the drawn call says, or "mean" if there is no
            such argument.
        whole: arguments that are the same on every rank and whose gradient is complete on each
            rank, so that it is not combined.
        ranks: running ranks. None: start them, which takes seconds.
        max_examples: number of calls to draw for each split.
        **inputs: keyword arguments of [`calls`][termwise.testing.calls]; `dtypes` has no effect.
            In `sizes`, the entry of the axis contains the sizes of the shards: a tuple of 2 or
            `ranks.count` numbers, or a list of tuples to test one after another. Default:
            `[(3, 1), (2, 0, 3)]`.

    Raises:
        AssertionError: if the law fails; the message ends with the failing call, as code.
        ValueError: if the function cannot be imported, or has no such argument or axis.
    """
    signature = Signature(fn)
    refuse_unknown_arguments("assert_sharding", fn, [group_argument])
    try:
        pickle.dumps(fn)
    except (AttributeError, pickle.PicklingError) as error:
        raise MisuseError(
            f"assert_sharding: ranks must import {signature.name}, so define it at the top level "
            f"of a module: {error}"
        ) from None
    sizes = dict(inputs.get("sizes") or {})
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    for name in axes:
        refuse_unknown_axis("assert_sharding", signature, name)
    splits = _splits([sizes.pop(name, None) for name in axes])

    def split_index(names: Sequence[str | None]) -> int | None:
        return next((index for index, name in enumerate(names) if name in axes), None)

    def check(split: Sequence[int], running: Ranks, calls: list[Call]) -> None:
        (call,) = calls
        indices = {
            path: index
            for path, names in call.axes().items()
            if (index := split_index(names)) is not None
        }
        if not indices:
            raise MisuseError(
                f"assert_sharding: no tensor in a call of {signature.name} has axis {axis}"
            )
        values, gradients = values_and_gradients(call)
        shards = {
            path: _split(tensor, split, indices[path])
            for path, tensor in call.tensors().items()
            if path in indices
        }
        rank_calls = [_of_rank(call, shards, rank) for rank in range(len(split))]
        answers = cast(
            "list[tuple[Numbers, Numbers, list[int]]]",
            running(_run_on_rank, [group_argument] * len(split), rank_calls),
        )
        where = f"with {' and '.join(axes)} split over ranks as {list(split)}"
        for rank, (_, _, (with_gradients, without)) in enumerate(answers):
            if with_gradients != without:
                raise BrokenLawError(
                    f"rank {rank} makes {with_gradients} collectives with gradients, but {without} "
                    f"under torch.no_grad(): ranks in different grad modes would hang, {where}",
                    call,
                )
        for name, value in values.items():
            index = split_index(result_axes(signature, name, value))
            pieces = [value] * len(split) if index is None else _split(value, split, index)
            for rank, ((ours, _, _), expected) in enumerate(zip(answers, pieces, strict=True)):
                if not close(ours[name], expected):
                    raise BrokenLawError(
                        f"{name} is {brief(expected)} on one process, but {brief(ours[name])} on "
                        f"rank {rank}, {where}",
                        call,
                    )
        reduction = grad_reduction or call.get("grad_reduction", "mean")
        divisor = len(split) if reduction == "mean" else 1
        for name, expected in gradients.items():
            path = name.removeprefix(GRADIENT)
            of_ranks = [found[name] for _, found, _ in answers]
            if path in whole:
                combined = list(of_ranks)
            elif path in shards:
                combined = [torch.cat(of_ranks, indices[path]) / divisor]
            else:
                combined = [torch.stack(of_ranks).sum(0) / divisor]
            for gradient in combined:
                if not close(gradient, expected):
                    ratio = (gradient.square().sum() / expected.square().sum()).sqrt()
                    raise BrokenLawError(
                        f"{name} is {brief(expected)} on one process, but {brief(gradient)} "
                        f"combined by {reduction} over ranks, with a norm {ratio:.6g} times as "
                        f"large, {where}",
                        call,
                    )

    inputs["dtypes"] = (torch.float64,)
    with nullcontext(ranks) if ranks else Ranks(max(map(len, splits))) as running:
        for split in splits:
            inputs["sizes"] = {**sizes, **dict.fromkeys(axes, sum(split))}
            check_law(
                "assert_sharding",
                drawn_calls(fn, inputs, normal=True),
                functools.partial(check, split, running),
                max_examples,
                shrink=False,  # a call that hangs takes long, and all calls are small
            )


def _splits(given: Sequence[Any]) -> list[tuple[int, ...]]:
    for sizes in given:
        if isinstance(sizes, tuple):
            return [cast("tuple[int, ...]", sizes)]
        if isinstance(sizes, list):
            return cast("list[tuple[int, ...]]", sizes)
    return list(_SPLITS)


def _of_rank(call: Call, shards: Mapping[str, Sequence[Tensor]], rank: int) -> Call:
    return call.mapped(lambda path, t: shards[path][rank] if path in shards else t)


def _split(tensor: Tensor, sizes: Sequence[int], axis: int) -> list[Tensor]:
    return list(cast("tuple[Tensor, ...]", tensor.split(list(sizes), axis)))


def _run_on_rank(group: Any, group_argument: str, call: Call) -> tuple[Numbers, Numbers, list[int]]:
    call = call.changed(**{group_argument: group})
    return *values_and_gradients(call), [_collectives(group, call, mode) for mode in (True, False)]


def _collectives(group: Any, call: Call, grad_enabled: bool) -> int:
    """Count the collectives of a forward pass, with or without gradients."""
    backend = group._get_backend(torch.device("cpu"))
    before: int = backend._get_sequence_number_for_group()
    with torch.set_grad_enabled(grad_enabled):
        run_call(call.mapped(leaf))
    after: int = backend._get_sequence_number_for_group()
    return after - before
