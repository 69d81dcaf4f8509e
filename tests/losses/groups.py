"""Sums, means and counts over ranks; test_groups_over_ranks.py holds those whose parts are alike:
what ranks hold has the same shape, and nothing is cut."""

import math

import torch
from hypothesis import strategies as st

from losses import Declaration
from termwise import groups

NO_GRADIENT = dict.fromkeys(("assert_gradients", "assert_double_backward"), "no part of the result")
SUM = Declaration(
    function=groups.sum_over_ranks,
    formula=lambda x, group, **_: x,
    aliases=("result",),  # of one process
    permuted=(),
    shards={"group": None},
)
BOTH_WAYS = Declaration(
    function=groups.sum_over_ranks_both_ways,
    formula=lambda x, group: x,
    aliases=("result",),
    permuted=(),
    shards={"group": None},
)
MEAN = Declaration(
    function=groups.mean_over_ranks,
    formula=lambda rows, group, mask, **_: (rows if mask is None else rows[mask]).mean(0),
    sizes={"rows": st.integers(1, 4)},
    permuted=("rows",),
    masked={"mask": {"nothing": math.nan}},
    shards={"group": ("rows", {})},
    more={law: {"mask": None} for law in ("assert_finite", "assert_gradients", "assert_formula")},
)
COUNT = Declaration(
    function=groups.count_over_ranks,
    formula=lambda rows, group: torch.tensor(
        int(rows.sum()) if rows.dtype == torch.bool else len(rows)
    ),
    permuted=(),
    shards={"group": None},
    ignores=("rows",),
    not_held={**NO_GRADIENT, "assert_forward_mode": "no part of the result"},
)
MAX = Declaration(
    function=groups.max_over_ranks,
    formula=lambda x, group: x.detach(),
    aliases=("result",),
    permuted=(),
    shards={"group": None},
    not_held=NO_GRADIENT,
)
