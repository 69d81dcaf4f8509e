"""lightly's VICReg, Barlow Twins, MMCR and cosine beside ours, and VICRegL where it coincides."""

from functools import partial

import pytest
import torch
from lightly.loss import (
    BarlowTwinsLoss,
    MMCRLoss,
    NegativeCosineSimilarity,
    VICRegLLoss,
    VICRegLoss,
)
from lightly.loss.vicreg_loss import covariance_loss, invariance_loss, variance_loss
from over_ranks import lightly_over_ranks
from torch.testing import assert_close

from termwise.joint_embedding import (
    barlow_twins_loss,
    mmcr_loss,
    multi_view_vicreg_loss,
    predictive_cosine_loss,
    vicreg_loss,
)


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


def test_vicregl_with_local_views_is_ours_of_many_views():
    z = torch.stack([*views(12, 5), *views(12, 5, seed=1), views(12, 5, seed=2)[0]])
    z = z.detach().requires_grad_()
    features = [(one, one) for one in z]
    theirs = VICRegLLoss()._global_loss(features[:2], features[2:]).squeeze()
    ours = multi_view_vicreg_loss(z, num_global=2).loss
    assert_close(ours, theirs)
    assert_close(gradients(ours, [z]), gradients(theirs, [z]))


@pytest.mark.parametrize("shape", [(2, 3), (12, 5), (9, 40), (100, 300)])
def test_barlow_twins(shape):
    z = views(*shape)
    theirs, ours = BarlowTwinsLoss(lambda_param=0.02)(*z), barlow_twins_loss(*z, off_weight=0.02)
    assert_close(ours.loss, theirs)
    assert_close(gradients(ours.loss, z), gradients(theirs, z))
    assert_close(barlow_twins_loss(*z).loss, BarlowTwinsLoss()(*z))


@pytest.mark.parametrize("shape", [(4, 9), (12, 5)])
def test_mmcr_of_normalized_embeddings(shape):
    z = torch.stack([*views(*shape), *views(*shape, seed=1)]).detach().requires_grad_()
    unit = torch.nn.functional.normalize(z, dim=2).transpose(0, 1)
    theirs, ours = MMCRLoss(lmda=0.3)(unit[:, :2], unit[:, 2:]), mmcr_loss(z, local_weight=0.3).loss
    assert_close(ours, theirs)
    assert_close(gradients(ours, [z]), gradients(theirs, [z]))


def test_mmcr_of_other_lengths_is_theirs_alone():
    z = torch.stack(views(6, 4)).detach()
    halves = z.transpose(0, 1).tensor_split(2, 1)
    theirs = [MMCRLoss()(*(scale * half for half in halves)) for scale in (1, 2)]
    assert_close(theirs[1], 2 * theirs[0])  # it falls without bound as embeddings grow
    assert_close(mmcr_loss(2 * z, local_weight=5e-3).loss, mmcr_loss(z, local_weight=5e-3).loss)


def test_cosine_with_and_without_the_targets_gradient():
    z = views(6, 4)
    theirs = NegativeCosineSimilarity()(*z)
    ours = predictive_cosine_loss(*z, form="simsiam", stop_gradient=False).loss
    assert_close(ours, theirs)
    assert_close(gradients(ours, z), gradients(theirs, z))
    detached = predictive_cosine_loss(*z, form="simsiam").loss
    assert_close(gradients(detached, z[:1]), gradients(NegativeCosineSimilarity()(*z), z[:1]))


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
