"""`assert_sharding` and `Ranks`: what they find, what they refuse, and how they go on after it."""

import os
import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup
from vicreg_like import DEFECTS, right

from termwise import testing
from termwise._groups import terminal_sum
from termwise.testing import _ranks

SIZES = {"sizes": {"dim": st.integers(1, 2)}, "max_examples": 1}


def share_of_rows(
    x: Float[Tensor, "batch dim"], w: Float[Tensor, " dim"], group: ProcessGroup | None = None
) -> Float[Tensor, ""]:
    """Sum x w over all ranks; each rank's gradient is its share."""
    return terminal_sum((x * w).sum(), group, 1.0)


def own_rows(x: Float[Tensor, " batch"], group: ProcessGroup | None = None) -> Float[Tensor, ""]:
    return x.square().sum()


def doubled_rows(
    x: Float[Tensor, "batch dim"], group: ProcessGroup | None = None
) -> Float[Tensor, "batch dim"]:
    return x * 2 if group is None else x * 2 + group.rank()


def sends_by_grad_mode(
    x: Float[Tensor, " batch"], group: ProcessGroup | None = None
) -> Float[Tensor, ""]:
    """Sum over ranks, which is sent once more where a gradient is wanted."""
    if group is not None and torch.is_grad_enabled():
        dist.all_reduce(torch.ones(1), group=group)
    return terminal_sum(x.sum(), group, 1.0)


def found(fn: Any, *given: Any, **options: Any) -> str:
    with pytest.raises(AssertionError) as failure:
        testing.assert_sharding(fn, *given, **(SIZES | options))
    return str(failure.value)


def test_a_gradient_without_its_scale_is_found(ranks):
    testing.assert_sharding(right, "batch", "batch_group", ranks=ranks, **SIZES)
    text = found(DEFECTS["gradient not scaled"], "batch", "batch_group", ranks=ranks)
    assert re.match(
        r"assert_sharding: gradient_not_scaled: the gradient with respect to z1 is .*, "
        r"but .* combined by mean over ranks, "
        r"with a norm 0\.5 times as large, with batch split over ranks as \[3, 1\]\n\n"
        r"from vicreg_like import gradient_not_scaled\n",
        text,
    ), text


def test_how_gradients_combine(ranks):
    together = {"sizes": {"batch": (2, 0, 3)}, "ranks": ranks}
    testing.assert_sharding(share_of_rows, "batch", "group", grad_reduction="sum", **together)
    text = found(share_of_rows, "batch", "group", **together)
    assert "combined by mean" in text
    assert "a norm 0.333333 times as large, with batch split over ranks as [2, 0, 3]" in text
    # The shares of w's gradient add up: it is not whole on any rank.
    text = found(
        share_of_rows,
        "batch",
        "group",
        grad_reduction="sum",
        whole=["w"],
        max_examples=3,
        **together,
    )
    assert "the gradient with respect to w is" in text


def test_what_each_rank_returns(ranks):
    text = found(own_rows, "batch", "group", ranks=ranks)
    assert re.search(
        r"result is .*, but .* on rank \d, with batch split over ranks as \[3, 1\]\n", text
    )
    text = found(doubled_rows, "batch", "group", ranks=ranks)
    assert " on rank 1, " in text  # rank 0 has its rows of the whole


def test_collectives_that_depend_on_the_grad_mode_are_found(ranks):
    options = {"grad_reduction": "sum", "ranks": ranks}
    assert "rank 0 makes 2 collectives with gradients, but 1 under torch.no_grad()" in found(
        sends_by_grad_mode, "batch", "group", **options
    )


def test_what_is_no_sharding_is_refused(ranks):
    def local(x: Float[Tensor, " batch"], group: ProcessGroup | None = None) -> Float[Tensor, ""]:
        return x.sum()

    with pytest.raises(ValueError, match="share_of_rows takes no batch_group, only x, w"):
        testing.assert_sharding(share_of_rows, "batch", "batch_group", ranks=ranks)
    with pytest.raises(ValueError, match="share_of_rows has no axis rows, only batch, dim"):
        testing.assert_sharding(share_of_rows, "rows", "group", ranks=ranks)
    with pytest.raises(
        ValueError, match="ranks must import .*local, so define it at the top level"
    ):
        testing.assert_sharding(local, "batch", "group", ranks=ranks)


def add(group: ProcessGroup, number: int, other: int) -> int:
    total = torch.tensor(number * other)
    dist.all_reduce(total, group=group)
    return int(total)


def raise_on(group: ProcessGroup, rank: int) -> int:
    if group.rank() == rank:
        raise ArithmeticError(f"of rank {rank}")
    return add(group, 1, 1)  # the other rank waits for this one


def end_on(group: ProcessGroup, rank: int) -> int:
    if group.rank() == rank:
        os._exit(3)
    return 0


def sleep_on(group: ProcessGroup, rank: int) -> int:
    if group.rank() == rank:
        time.sleep(30)
    return 0


def test_ranks_go_on_after_a_failure(monkeypatch):
    with pytest.raises(ValueError, match="Ranks needs a count of 2 or more, got 1"):
        testing.Ranks(1)
    with testing.Ranks(2) as two:
        assert two(add, [1, 2], [10, 100]) == [210, 210]
        with pytest.raises(ValueError, match="arguments for 2 or 2 ranks, got 3"):
            two(add, [1, 2, 3], [1, 2, 3])
        with pytest.raises(RuntimeError, match="rank 1: (.|\n)*ArithmeticError: of rank 1"):
            two(raise_on, [1, 1])
        assert two(add, [1, 1], [1, 1]) == [2, 2]
        with pytest.raises(RuntimeError, match="rank 0 has ended"):
            two(end_on, [0, 0])
        assert two(add, [1, 1], [1, 2]) == [3, 3]
        with monkeypatch.context() as patch:
            patch.setattr(_ranks, "_SECONDS", 1)
            with pytest.raises(TimeoutError, match=r"ranks \[1\] did not answer within 1 seconds"):
                two(sleep_on, [1, 1])
        assert two(add, [1, 1], [2, 2]) == [4, 4]
