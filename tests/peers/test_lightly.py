"""lightly's VICReg, NT-Xent and DCL beside ours, and its VICRegL where it is VICReg."""

from functools import partial

import pytest
import torch
from lightly.loss import DCLLoss, DCLWLoss, NTXentLoss, VICRegLLoss, VICRegLoss
from lightly.loss.vicreg_loss import covariance_loss, invariance_loss, variance_loss
from over_ranks import lightly_over_ranks
from torch.testing import assert_close

from termwise.joint_embedding import (
    decoupled_contrastive_loss,
    info_nce_loss,
    nt_xent_loss,
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


@pytest.mark.parametrize("n", [6, 400])  # as written, and in strips
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_and_decoupled_losses(n, temperature):
    z = views(n, 5)
    pairs = [
        (nt_xent_loss(*z, temperature=temperature), NTXentLoss(temperature=temperature)),
        (decoupled_contrastive_loss(*z, temperature=temperature), DCLLoss(temperature)),
    ]
    for ours, theirs in pairs:
        assert_close(ours.loss, theirs(*z))
        assert_close(gradients(ours.loss, z), gradients(theirs(*z), z))


@pytest.mark.filterwarnings("ignore:To copy construct")
def test_weighted_decoupled_loss():
    z = views(6, 5)
    theirs = DCLWLoss(temperature=0.1, sigma=0.5)(*z)
    ours = decoupled_contrastive_loss(*z, temperature=0.1, sigma=0.5).loss
    assert_close(ours, theirs)
    assert_close(gradients(ours, z), gradients(theirs, z))


def test_their_memory_bank_is_a_queue_of_negatives():
    queries, keys = views(6, 5)
    theirs = NTXentLoss(temperature=0.2, memory_bank_size=(9, 5)).double()
    theirs(queries.detach(), keys.detach())  # which fills the bank
    queue = theirs.memory_bank.bank.clone()
    ours = info_nce_loss(queries, keys, scale=1 / 0.2, negatives=queue).loss
    expected = theirs(queries, keys.detach())
    assert_close(ours, expected)
    assert_close(gradients(ours, [queries]), gradients(expected, [queries]))
