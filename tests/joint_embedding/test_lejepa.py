"""LeJEPA: its two terms, the conventions of those who wrote it, and refusals."""

import pytest
import torch

from termwise.joint_embedding import lejepa_loss, sigreg_loss


@pytest.fixture
def z():
    return torch.randn(4, 6, 3, dtype=torch.float64)


SLICES = torch.nn.functional.normalize(torch.randn(3, 5, dtype=torch.float64), dim=0)


def test_sigreg_is_that_of_all_views(z):
    for options in ({}, {"num_global": 2, "centre": "global"}):
        terms = lejepa_loss(z, slices=SLICES, t_max=2.0, knots=9, **options)
        expected = sigreg_loss(z, slices=SLICES, t_max=2.0, knots=9).loss
        torch.testing.assert_close(terms.sigreg, expected)


def test_the_centre_is_that_of_all_views_or_of_the_global_ones(z):
    of_all = (z - z.mean(0)).square().mean()
    of_global = (z - z[:2].mean(0)).square().mean()
    ours = {
        (count, centre): lejepa_loss(z, num_global=count, centre=centre, num_slices=2).invariance
        for count in (None, 2)
        for centre in ("all", "global")
    }
    torch.testing.assert_close(ours[2, "global"], of_global)
    for key in ((None, "all"), (None, "global"), (2, "all")):
        torch.testing.assert_close(ours[key], of_all)


def test_views_one_apart_by_hand():
    # Views at 1 and -1 are 1 from their mean, and 4 (mean 2) from the first one alone.
    z = torch.stack((torch.ones(4, 3), -torch.ones(4, 3)))
    assert lejepa_loss(z, num_slices=2).invariance == 1
    assert lejepa_loss(z, num_global=1, centre="global", num_slices=2).invariance == 2


@pytest.mark.parametrize("convex", [True, False])
def test_weights(z, convex):
    terms = lejepa_loss(z, sigreg_weight=0.2, convex=convex, num_slices=2)
    torch.testing.assert_close(
        terms.loss, (0.8 if convex else 1.0) * terms.invariance + 0.2 * terms.sigreg
    )


def test_what_has_weight_0_is_left_out(z):
    z = z.float().mul(1e30).requires_grad_()  # the squared distance overflows
    terms = lejepa_loss(z, sigreg_weight=1.0, num_slices=2)
    assert terms.invariance.isinf()
    assert terms.loss == terms.sigreg
    z = torch.randn(2, 4, 3).requires_grad_()
    terms = lejepa_loss(z, sigreg_weight=0.0, num_slices=2)
    assert terms.loss == terms.invariance


def test_equal_views_of_a_normal_distribution_are_the_optimum():
    n, dim = 4000, 2
    places = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    normal = torch.special.ndtri(places)
    z = torch.stack((normal, normal[torch.randperm(n)]), 1).expand(2, n, dim)
    terms = lejepa_loss(z, slices=torch.eye(2, dtype=torch.float64))
    assert terms.invariance == 0
    assert terms.sigreg < 1e-3


@pytest.mark.parametrize(
    ("views", "options", "message"),
    [
        (1, {}, "lejepa_loss needs z with at least 2 views along its first axis, got 1"),
        (2, {"num_global": 3}, "lejepa_loss needs num_global between 1 and the 2 views of z"),
        (2, {"knots": 1}, "lejepa_loss needs t_max > 0 and knots >= 2, got 3.0 and 1"),
        (2, {"num_slices": 0}, "lejepa_loss needs at least one slice, got 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(views, options, message):
    with pytest.raises(ValueError, match=message):
        lejepa_loss(torch.zeros(views, 4, 3), **options)


def test_maps_are_refused_with_both_ways_to_write_them():
    for positions in ("v (b h w) c", "v b (c h w)"):
        assert positions in (lejepa_loss.__doc__ or "")
    with pytest.raises(TypeError, match="einops.rearrange"):
        lejepa_loss(torch.zeros(2, 4, 3, 5, 5))
