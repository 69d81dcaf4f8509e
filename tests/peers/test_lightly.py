"""lightly's losses beside ours, on one process and over ranks."""

from functools import partial

import pytest
import torch
from lightly.loss import (
    BarlowTwinsLoss,
    DCLLoss,
    DCLWLoss,
    DINOLoss,
    IBOTPatchLoss,
    KoLeoLoss,
    MMCRLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    TiCoLoss,
    VICRegLLoss,
    VICRegLoss,
)
from lightly.loss.lejepa_loss import LeJEPALoss, SIGReg
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from lightly.loss.vicreg_loss import covariance_loss, invariance_loss, variance_loss
from lightly.loss.visreg_loss import VISRegLoss
from over_ranks import lightly_over_ranks
from torch.testing import assert_close

from termwise.joint_embedding import (
    barlow_twins_loss,
    centered_softmax,
    decoupled_contrastive_loss,
    dino_loss,
    ibot_loss,
    info_nce_loss,
    koleo_loss,
    lejepa_loss,
    mmcr_loss,
    multi_view_vicreg_loss,
    nt_xent_loss,
    predictive_cosine_loss,
    sigreg_loss,
    sinkhorn,
    swapped_prediction_loss,
    tico_loss,
    updated_center,
    updated_covariance,
    vicreg_loss,
    visreg_loss,
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


# --- along slices ---------------------------------------------------------------------------


def crops(views=5):
    return torch.randn(views, 16, 6, dtype=torch.float64, requires_grad=True)


def drawn_by(call, count=64):
    """Return what they return, and the slices that they draw: normal columns, scaled to 1."""
    torch.manual_seed(3)
    theirs = call()
    torch.manual_seed(3)
    slices = torch.randn(6, count, dtype=torch.float64)
    return theirs, slices / slices.norm(dim=0)


@pytest.mark.parametrize("numbers", [{}, {"knots": 9, "t_max": 5.0}])
def test_sigreg_is_theirs(numbers):
    z = crops()
    theirs, slices = drawn_by(lambda: SIGReg(num_vectors=64, **numbers).double()(z))
    ours = sigreg_loss(z, slices=slices, **numbers).loss
    tolerance = {"rtol": 1e-6, "atol": 1e-8}  # their knots are float32
    assert_close(ours, theirs, **tolerance)
    assert_close(gradients(ours, z), gradients(theirs, z), **tolerance)


@pytest.mark.parametrize("num_global", [1, 2, 4])
def test_lejepa_is_theirs_with_the_centre_of_global_views(num_global):
    z, count = crops(), num_global
    theirs, slices = drawn_by(
        lambda: LeJEPALoss(lambda_param=0.2, sigreg_num_vectors=64).double()(
            local_proj=z[count:], global_proj=z[:count]
        )
    )
    ours = lejepa_loss(z, num_global=count, centre="global", sigreg_weight=0.2, slices=slices).loss
    assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    assert_close(gradients(ours, z), gradients(theirs, z), rtol=1e-6, atol=1e-8)


def test_visreg_is_theirs_with_the_biased_standard_deviation_of_the_paper():
    z = crops()
    theirs, slices = drawn_by(
        lambda: VISRegLoss(
            lambda_param=0.6, num_slices=64, lambda_shape=2.0, lambda_center=3.0, lambda_scale=4.0
        )(local_proj=z[2:], global_proj=z[:2])
    )
    weights = {"shape_weight": 2.0, "center_weight": 3.0, "scale_weight": 4.0}
    ours = visreg_loss(z, num_global=2, weight=0.6, slices=slices, **weights).loss
    assert_close(ours, theirs)
    assert_close(gradients(ours, z), gradients(theirs, z))


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


def logits(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator) / 3


def test_two_steps_of_dino_and_its_center():
    theirs, center = DINOLoss(16).double(), torch.zeros(16, dtype=torch.float64)
    for step in range(2):
        student, teacher = logits(4, 6, 16, seed=step).requires_grad_(), logits(2, 6, 16, seed=9)
        expected = theirs([*teacher], [*student])
        rows = teacher.flatten(0, 1)
        probs = centered_softmax(rows, center, temperature=0.04).view_as(teacher)
        ours = dino_loss(student, probs).loss
        center = updated_center(center, rows)
        assert_close(ours, expected)
        assert_close(gradients(ours, [student]), gradients(expected, [student]))
        assert_close(center, theirs.center.flatten())


@pytest.mark.parametrize("shape", [(2, 3), (12, 5)])
def test_three_steps_of_tico_and_its_covariance(shape):
    theirs = TiCoLoss(beta=0.75, rho=20.0)
    covariance = torch.zeros(shape[1], shape[1], dtype=torch.float64)
    for step in range(3):
        z = views(*shape, seed=step)
        covariance = updated_covariance(covariance, z[0], momentum=0.75)
        ours = tico_loss(*z, covariance, contrast_weight=20.0, stop_gradient=False).loss
        expected = theirs(*z)
        assert_close(ours, expected)
        assert_close(gradients(ours, z), gradients(expected, z))
        assert_close(covariance, theirs.C)


@pytest.mark.parametrize("unmasked", [False, True])
def test_ibot_with_and_without_an_image_without_a_mask(unmasked):
    mask = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    mask[1] &= not unmasked
    masked = int(mask.sum())
    student, teacher = logits(masked, 16).requires_grad_(), logits(masked, 16, seed=1)
    center = torch.zeros(16, dtype=torch.float64)
    expected = IBOTPatchLoss(16).double()(teacher, student, mask)
    probs = centered_softmax(teacher, center, temperature=0.04)
    ours = ibot_loss(student, probs, mask.nonzero()[:, 0], images=3).loss
    assert_close(ours, expected)
    assert_close(gradients(ours, [student]), gradients(expected, [student]))


def test_sinkhorn_is_theirs_where_theirs_is_finite():
    scores = logits(64, 300)
    ours = sinkhorn(scores, temperature=0.05)
    assert (ours - lightly_sinkhorn(scores)).abs().max() < 4e-16
    high = scores.float()
    high[0, 0] = 4.0
    assert lightly_sinkhorn(high, epsilon=0.04).isnan().any()
    expected = lightly_sinkhorn(high.double(), epsilon=0.04)
    assert (sinkhorn(high, temperature=0.04) - expected).abs().max() < 4e-7


@pytest.mark.parametrize("queued", [False, True])
def test_swav_with_two_high_resolution_views(queued):
    views = logits(5, 8, 16).requires_grad_()
    queue = logits(2, 10, 16, seed=1) if queued else None
    expected = SwaVLoss()([*views[:2]], [*views[2:]], None if queue is None else [*queue])
    ours = swapped_prediction_loss(views, num_global=2, queue=queue).loss
    assert_close(ours, expected.squeeze())
    assert_close(gradients(ours, [views]), gradients(expected, [views]))


def test_their_memory_bank_is_a_queue_of_negatives():
    queries, keys = views(6, 5)
    theirs = NTXentLoss(temperature=0.2, memory_bank_size=(9, 5)).double()
    theirs(queries.detach(), keys.detach())  # which fills the bank
    queue = theirs.memory_bank.bank.clone()
    ours = info_nce_loss(queries, keys, scale=1 / 0.2, negatives=queue).loss
    expected = theirs(queries, keys.detach())
    assert_close(ours, expected)
    assert_close(gradients(ours, [queries]), gradients(expected, [queries]))


# --- KoLeo -----------------------------------------------------------------------------------


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
