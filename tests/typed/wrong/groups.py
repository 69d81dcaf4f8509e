"""Uses of `termwise.groups` that a type checker refuses. Never run."""

from torch import Tensor
from torch.distributed import ProcessGroup

from termwise import groups


def over_ranks(x: Tensor, group: ProcessGroup) -> None:
    groups.sum_over_ranks(x)  # error: reportCallIssue: Argument missing for parameter "group"
    groups.sum_over_ranks(x, group, "sum")  # error: reportCallIssue: Expected 2 positional arguments
    groups.sum_over_ranks(x, group, grad_reduction="max")  # error: reportArgumentType: parameter "grad_reduction"
    groups.sum_over_ranks_both_ways(x, "world")  # error: reportArgumentType: parameter "group"
    groups.mean_over_ranks(x, group, weights=x)  # error: reportCallIssue: No parameter named "weights"
    groups.count_over_ranks(3, group)  # error: reportArgumentType: parameter "rows"
    groups.max_over_ranks(x.tolist, group)  # error: reportArgumentType: parameter "x"
