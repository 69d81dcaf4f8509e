"""KoLeo: points on a circle, duplicates, groups, tiles, refusals."""

import math

import pytest
import torch
from losses.koleo import KOLEO

import termwise as tw
from termwise.joint_embedding import koleo_loss


def on_a_circle(n, dtype=torch.float64):
    angles = torch.arange(n, dtype=dtype) * (2 * math.pi / n)
    return torch.stack((angles.cos(), angles.sin()), 1)


def rows(n, dim, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64).to(dtype)


# --- known values ---------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 7, 40])
def test_points_on_a_circle(n):
    distance = 2 * math.sin(math.pi / n)
    terms = koleo_loss(5 * on_a_circle(n), eps=0.0)
    assert terms.loss.item() == pytest.approx(-math.log(distance), abs=1e-12)
    assert terms.nearest_distance.item() == pytest.approx(distance)
    assert terms.min_distance.item() == pytest.approx(distance)


def test_two_neighbours_on_a_circle():
    z = on_a_circle(5).roll(1, 0)
    torch.testing.assert_close(koleo_loss(z, top_k=2).loss, koleo_loss(z).loss)
    far = 2 * math.sin(2 * math.pi / 5)
    more = koleo_loss(z, top_k=4, eps=0.0).loss.item()
    assert more == pytest.approx(-(math.log(2 * math.sin(math.pi / 5)) + math.log(far)) / 2)


def test_three_rows_by_hand():
    # Cosines 0.8, 0 and 0.6: the first two are each other's neighbour, the third has the second.
    z = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]], dtype=torch.float64)
    terms = koleo_loss(z, eps=0.0)
    near, far = math.sqrt(0.4), math.sqrt(0.8)
    assert terms.loss.item() == pytest.approx(-(2 * math.log(near) + math.log(far)) / 3)
    assert terms.nearest_distance.item() == pytest.approx((2 * near + far) / 3)
    assert terms.min_distance.item() == pytest.approx(near)


def test_the_length_of_rows_and_their_rotation_do_not_matter():
    z = rows(8, 3)
    rotation = torch.linalg.qr(rows(3, 3, seed=1)).Q
    turned = koleo_loss(torch.arange(1.0, 9.0)[:, None] * z @ rotation)
    torch.testing.assert_close(turned.loss, koleo_loss(z).loss)


def test_descent_spreads_points():
    z = rows(6, 2).requires_grad_()
    before = koleo_loss(z).min_distance
    optimizer = torch.optim.SGD([z], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        koleo_loss(z).loss.backward()
        optimizer.step()
    assert koleo_loss(z).min_distance > max(before, 0.8)  # 1 is the most


# --- duplicates and precision ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_duplicates_are_finite_and_have_no_gradient(dtype):
    z = torch.tensor([[1.0, 2.0], [1.0, 2.0]], dtype=dtype, requires_grad=True)
    terms = koleo_loss(z)
    assert terms.loss.item() == pytest.approx(-math.log(1e-8))
    assert terms.min_distance == 0
    terms.loss.backward()
    assert z.grad.count_nonzero() == 0


def test_a_duplicate_leaves_other_gradients_finite():
    z = torch.cat((rows(3, 2), rows(3, 2)[:1])).requires_grad_()
    koleo_loss(z).loss.backward()
    assert z.grad.isfinite().all()
    assert z.grad[1:3].count_nonzero() > 0


def test_distances_of_close_rows_have_their_digits():
    # By sqrt(2 - 2 cos) the distance 1e-4 would be 0 or 3.5e-4 in float32.
    z = torch.tensor([[1.0, 0.0], [1.0, 1e-4]])
    assert koleo_loss(z).min_distance.item() == pytest.approx(1e-4, rel=1e-3)


def test_a_nan_is_not_repaired():
    z = rows(4, 3)
    z[2, 1] = math.nan
    assert koleo_loss(z).loss.isnan()


# --- groups and tiles -----------------------------------------------------------------------


def test_groups_are_losses_of_their_own():
    z = rows(12, 2)
    terms = koleo_loss(z, group_size=4, top_k=2)
    each = [koleo_loss(part, top_k=2) for part in z.split(4)]
    torch.testing.assert_close(terms.loss, sum(one.loss for one in each) / 3)
    torch.testing.assert_close(terms.min_distance, min(one.min_distance for one in each))


@pytest.mark.parametrize("group_size", [None, 3, 6])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("n", [6, 12])
def test_tiles(monkeypatch, n, top_k, group_size):
    monkeypatch.setattr("termwise._numbers.TILE", 4)
    monkeypatch.setattr("termwise._numbers.IN_CACHE", 20)  # five rows of four columns
    z = rows(n, 3).requires_grad_()
    terms = koleo_loss(z, top_k=top_k, group_size=group_size)
    expected = KOLEO.expected(z, top_k=top_k, group_size=group_size)
    torch.testing.assert_close(dict(terms.items()), expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, z) for value in (terms.loss, expected["loss"]))
    )


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (0, {}, "koleo_loss needs more samples than top_k=1, got 0"),
        (1, {}, "koleo_loss needs more samples than top_k=1, got 1"),
        (3, {"top_k": 3}, "koleo_loss needs more samples than top_k=3, got 3"),
        (
            4,
            {"top_k": 2, "group_size": 2},
            "koleo_loss needs more samples than top_k=2, got 4 in groups of 2",
        ),
        (
            4,
            {"group_size": 3},
            "koleo_loss needs a number of samples that group_size divides, got 4 samples and 3",
        ),
        (4, {"top_k": 0}, "koleo_loss needs top_k >= 1 and eps >= 0, got 0 and 1e-08"),
        (4, {"eps": -1.0}, "koleo_loss needs top_k >= 1 and eps >= 0, got 1 and -1.0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(n, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        koleo_loss(torch.zeros(n, 2), **options)


def test_maps_are_refused_with_both_ways_to_write_them():
    with pytest.raises(tw.ContractError, match=r"einops\.rearrange\(z, "):
        koleo_loss(torch.zeros(2, 3, 4, 4))
