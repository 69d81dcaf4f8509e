"""Over ranks with different and uneven rows, `tw.groups` gives what one process computes."""

import pytest
import torch
from jaxtyping import Float
from rows import rows
from torch import Tensor
from torch.distributed import ProcessGroup

from termwise import groups, testing

SIZES = ([4, 3], [2, 0, 5])


def spread(
    x: Float[Tensor, "batch dim"],
    *,
    batch_group: ProcessGroup | None = None,
    grad_reduction: groups.GradReduction = "mean",
) -> Float[Tensor, ""]:
    """Mean fourth power of the distance from the mean: not linear in sums, a mean in between."""
    # What follows the mean differs from rank to rank: its gradient has to be summed too.
    mean = groups.sum_over_ranks_both_ways(x.sum(0), batch_group)
    mean = mean / groups.count_over_ranks(x, batch_group)
    fourth = (x - mean).square().sum(1).square()
    return groups.mean_over_ranks(fourth, batch_group, grad_reduction=grad_reduction).log()


def overlap(
    x: Float[Tensor, "batch dim"],
    y: Float[Tensor, "batch dim"],
    *,
    batch_group: ProcessGroup | None = None,
    grad_reduction: groups.GradReduction = "mean",
) -> Float[Tensor, ""]:
    parts = torch.stack([(x * y).sum(), x.square().sum(), y.square().sum()])
    a, b, c = groups.sum_over_ranks(parts, batch_group, grad_reduction=grad_reduction).unbind()
    return 1 - 2 * a / (1 + b + c)


def total_mass(
    x: Float[Tensor, "rows vocab"], *, vocab_group: ProcessGroup | None = None
) -> Float[Tensor, ""]:
    """Sum log-sum-exp over columns that ranks share: what the softmax subtracts cancels."""
    highest = groups.max_over_ranks(torch.cat([x, x.new_full((len(x), 1), -1e9)], 1).amax(1), None)
    highest = groups.max_over_ranks(highest, vocab_group)
    powers = (x - highest[:, None]).exp().sum(1)
    total = groups.sum_over_ranks(powers, vocab_group, grad_reduction="sum")
    return (total.log() + highest).sum()


@pytest.mark.parametrize("loss", [spread, overlap])
def test_a_loss_of_them_is_one_process(ranks, loss):
    for sizes in SIZES:
        testing.assert_sharding(
            loss, "batch", "batch_group", ranks=ranks, sizes={"batch": tuple(sizes)}
        )


def test_columns_are_shared(ranks):
    testing.assert_sharding(total_mass, "vocab", "vocab_group", grad_reduction="sum", ranks=ranks)


def measures(group, x, mask, weight):
    return {
        "sum": groups.sum_over_ranks(x.sum(0), group),
        "mean": groups.mean_over_ranks(x, group),
        "masked": groups.mean_over_ranks(x * weight, group, mask=mask),
        "rows": groups.count_over_ranks(x, group),
        "true": groups.count_over_ranks(mask, group),
        "max": groups.max_over_ranks(
            torch.cat([x, x.new_full((1, x.shape[1]), -1e3)]).amax(0), group
        ),
    }


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values(ranks, sizes):
    shards = rows(sizes)
    masks = [torch.arange(len(shard)) % 2 == 0 for shard in shards]
    # What is masked out may hold anything.
    weights = [torch.where(mask[:, None], 1.0, torch.nan) for mask in masks]
    expected = measures(None, torch.cat(shards), torch.cat(masks), torch.cat(weights))
    assert expected["rows"] == sum(sizes)
    torch.testing.assert_close(expected["mean"], torch.cat(shards).mean(0))
    for found in ranks(measures, shards, masks, weights):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def largest(group, x):
    return groups.max_over_ranks(x, group)


def test_a_nan_on_any_rank_reaches_the_maximum(ranks):
    parts = [torch.tensor([1.0, torch.nan, 3.0]), torch.tensor([2.0, 5.0, -torch.inf])]
    for order in (parts, parts[::-1]):
        for found in ranks(largest, order):
            torch.testing.assert_close(found, torch.tensor([2.0, torch.nan, 3.0]), equal_nan=True)


def second_derivative(group, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(
        groups.sum_over_ranks(x.square().sum(), group).square(), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first.sum().backward()
    return first.detach()


def test_a_second_derivative_is_refused(ranks):
    ranks(second_derivative, rows([2, 3]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_mean_is_of_the_dtype_of_a_loss(dtype):
    found = groups.mean_over_ranks(torch.ones(3, 2, dtype=dtype), None)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.shape == (2,)
