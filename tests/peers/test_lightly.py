"""lightly's VICReg, VICRegL where the two coincide, and KoLeo; DINOv3's Gram loss beside ours."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import KoLeoLoss, VICRegLLoss, VICRegLoss
from lightly.loss.vicreg_loss import covariance_loss, invariance_loss, variance_loss
from over_ranks import lightly_over_ranks
from torch.testing import assert_close

from termwise.joint_embedding import gram_anchor_loss, koleo_loss, vicreg_loss


def views(*shape, seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(*shape, dtype=torch.float64, generator=generator)).requires_grad_()
        for _ in range(2)
    ]


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (0.3, 2.0, 7.0)])
@pytest.mark.parametrize("shape", [(2, 3), (12, 5), (9, 40)])  # the last by Gram matrices
def test_vicreg_is_theirs_with_the_mean_over_views(shape, weights):
    z = views(*shape)
    invariance, variance, covariance = weights
    theirs = VICRegLoss(lambda_param=invariance, mu_param=variance, nu_param=covariance, eps=1e-3)(
        *z
    )
    ours = vicreg_loss(
        *z,
        sim_weight=invariance,
        var_weight=variance,
        cov_weight=covariance,
        eps=1e-3,
        variance_views="mean",
    ).loss
    assert_close(ours, theirs)
    assert_close(gradients(ours, z), gradients(theirs, z))


def test_defaults_differ_in_the_variance_term_alone_by_two():
    z = views(12, 5)
    ours = vicreg_loss(*z)
    assert_close(ours.sim, invariance_loss(*z))
    assert_close(ours.var, sum(variance_loss(one) for one in z))
    assert_close(ours.cov, sum(covariance_loss(one) for one in z))
    assert_close(vicreg_loss(*z, var_weight=12.5).loss, VICRegLoss()(*z))


def test_more_axes_are_a_mean_over_positions():
    z = views(12, 4, 3, 5)
    theirs = VICRegLoss()(*z)
    positions = torch.vmap(
        torch.vmap(partial(vicreg_loss, variance_views="mean"), in_dims=1), in_dims=1
    )
    ours = positions(*z).loss.mean()
    assert_close(ours, theirs)
    assert_close(gradients(ours, z), gradients(theirs, z))


def test_the_global_part_of_vicregl():
    z = views(12, 5)
    grids = [torch.rand(12, 3, 3, 2, dtype=torch.float64) for _ in z]
    features = [(one, torch.randn(12, 3, 3, 5, dtype=torch.float64)) for one in z]
    theirs = VICRegLLoss(alpha=1.0, num_matches=(4, 4))(features, grids).squeeze()
    ours = vicreg_loss(*z, variance_views="mean", covariance_views="mean").loss
    assert_close(ours, theirs)
    assert_close(gradients(ours, z), gradients(theirs, z))


def shared(ranks, z, weight, gather):
    parts = [one.chunk(3) for one in z]
    return ranks(lightly_over_ranks, *parts, [weight] * 3, [gather] * 3)


def test_over_ranks_gathered_gradients_are_those_of_the_whole_batch(ranks):
    z = [one.detach() for one in views(12, 5)]
    weight = torch.randn(5, 4, dtype=torch.float64)
    parameter = weight.clone().requires_grad_()
    whole = VICRegLoss()(*(one @ parameter for one in z))
    (gradient,) = torch.autograd.grad(whole, parameter)
    values = []
    for (their_value, theirs), (our_value, ours) in shared(ranks, z, weight, gather=True):
        assert_close(theirs, gradient)
        assert_close(ours, gradient)
        assert_close(our_value, whole.detach())
        values.append(their_value)
    assert len({round(value.item(), 6) for value in values}) == len(values)  # of each rank's rows


def test_over_ranks_without_gathering_theirs_is_another_loss(ranks):
    z = [one.detach() for one in views(12, 5)]
    weight = torch.randn(5, 4, dtype=torch.float64)
    for (_, theirs), (_, ours) in shared(ranks, z, weight, gather=False):
        assert (theirs - ours).abs().max() > 0.01


# --- KoLeo and Gram anchoring ---------------------------------------------------------------


def rows(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("n", [2, 9, 30])
def test_koleo_is_lightlys_but_for_an_eps_in_each_coordinate(n):
    z = rows(n, 6)
    ours, theirs = koleo_loss(z).loss, KoLeoLoss()(z)
    assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert_close(
        *(torch.autograd.grad(loss, z)[0] for loss in (ours, theirs)), rtol=1e-5, atol=1e-6
    )


def test_their_gradient_of_duplicates_does_not_part_them():
    z = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    (theirs,) = torch.autograd.grad(KoLeoLoss()(z), z)
    (ours,) = torch.autograd.grad(koleo_loss(z).loss, z)
    assert ours.count_nonzero() == 0
    assert_close(theirs[0], theirs[1])
    halves = torch.ones(2, 2, dtype=torch.float16)
    assert koleo_loss(halves).loss.isfinite()
    assert not KoLeoLoss()(halves).isfinite()


def dinov3(student, teacher, negatives, level):
    """`gram_loss.py` of DINOv3 at 6876159, written anew: clipping in this order."""
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    if level == "batch":
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    own, wanted = student @ student.mT, teacher @ teacher.mT
    if negatives != "keep":
        cleared = own < 0
        if negatives == "teacher":
            cleared = cleared & (wanted < 0)
        own, wanted = own.masked_fill(cleared, 0), wanted.masked_fill(wanted < 0, 0)
    return F.mse_loss(own, wanted)


@pytest.mark.parametrize("level", ["image", "batch"])
@pytest.mark.parametrize("negatives", ["both", "teacher", "keep"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 150, 5)])
def test_gram_anchoring_is_dinov3s(shape, negatives, level):
    student, teacher = rows(*shape), rows(*shape, seed=1).detach()
    ours = gram_anchor_loss(student, teacher, negatives=negatives, level=level).loss
    theirs = dinov3(student, teacher, negatives, level)
    assert_close(ours, theirs)
    assert_close(*(torch.autograd.grad(loss, student) for loss in (ours, theirs)))
