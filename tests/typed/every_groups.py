"""What a type checker knows of `termwise.groups`. Never run: pyright and mypy read it."""

from typing import assert_type

from torch import Tensor
from torch.distributed import ProcessGroup

from termwise import groups


def over_ranks(x: Tensor, group: ProcessGroup, how: groups.GradReduction) -> None:
    assert_type(groups.sum_over_ranks(x, group, grad_reduction=how), Tensor)
    assert_type(groups.sum_over_ranks_both_ways(x, group), Tensor)
    assert_type(groups.mean_over_ranks(x, None, mask=x > 0, grad_reduction="sum"), Tensor)
    assert_type(groups.count_over_ranks(x, group), Tensor)
    assert_type(groups.max_over_ranks(x, group), Tensor)
    assert_type(how, groups.GradReduction)
