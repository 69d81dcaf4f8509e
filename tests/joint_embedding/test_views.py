"""Many views: sums from the mean of the global ones against a loop over pairs."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from termwise.joint_embedding._views import refuse_views, spread


@given(st.integers(2, 5), st.data())
def test_spread_is_the_loop_over_pairs(views, data):
    num_global = data.draw(st.none() | st.integers(1, views))
    z = torch.randn(views, 3, 2, dtype=torch.float64)
    count = views if num_global is None else num_global
    pairs = [(g, v) for g, v in itertools.product(range(count), range(views)) if g != v]
    looped = sum(((z[g] - z[v]) ** 2).mean() for g, v in pairs) / len(pairs)
    apart = spread(z, num_global, 3, group=None, grad_reduction="mean")
    torch.testing.assert_close(apart.between_views(), looped)
    centre = z[:count].sum(0) / count
    torch.testing.assert_close(apart.from_the_mean(), ((z - centre) ** 2).sum() / z.numel())


def test_views_far_from_zero_lose_no_digits():
    z = torch.tensor([[[1e4]], [[1e4 + 1]]])
    assert spread(z, None, 1, group=None, grad_reduction="mean").between_views() == 1


def test_views_are_refused():
    z = torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match=r"x_loss needs z with at least 2 views along .* got 1"):
        refuse_views(z, None, "x_loss")
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"num_global between 1 and the 3 views .* {count}"):
            refuse_views(z.expand(3, 3, 2), count, "x_loss")
