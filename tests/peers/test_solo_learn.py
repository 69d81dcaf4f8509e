"""solo-learn's losses beside ours, on one process and over ranks."""

import checkouts
import pytest
import torch
import torch.nn.functional as F
from over_ranks import solo_learn_over_ranks
from torch.testing import assert_close

from termwise.joint_embedding import (
    barlow_twins_loss,
    centered_softmax,
    dino_loss,
    info_nce_loss,
    nt_xent_loss,
    predictive_cosine_loss,
    sinkhorn,
    supervised_contrastive_loss,
    swapped_prediction_loss,
    updated_center,
    vicreg_loss,
)

solo = checkouts.load("solo.losses")
SinkhornKnopp = checkouts.load("solo.utils.sinkhorn_knopp").SinkhornKnopp

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# The third by Gram matrices in VICReg; the last in strips in the contrastive losses.
LARGER = [(12, 5), (9, 40), (400, 16)]
SIZES = pytest.mark.parametrize("size", [(2, 3), *LARGER], ids=str)
# Standardized columns of two rows are 1 and -1: in float32 both gradients are their rounding.
OF_STANDARDIZED = pytest.mark.parametrize(
    ("size", "dtype"),
    [
        ((2, 3), torch.float64),
        *((size, dtype) for size in LARGER for dtype in (torch.float32, torch.float64)),
    ],
    ids=str,
)


# Their Barlow Twins creates a batch normalization of the default dtype.
@pytest.fixture
def as_default():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def views(size, dtype=torch.float64, count=2):
    return [(normal(*size, seed=n, dtype=dtype) / 2).requires_grad_() for n in range(count)]


def assert_same(ours, theirs, leaves):
    """Compare values and gradients, also of leaves that get none."""
    rtol = 1e-5 if theirs.dtype == torch.float32 else 1e-9
    assert_close(ours, theirs, rtol=rtol, atol=rtol)
    found, wanted = (torch.autograd.grad(x, leaves, allow_unused=True) for x in (ours, theirs))
    assert wanted[0].count_nonzero() > 0
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_close(one, other, rtol=rtol, atol=rtol * other.abs().max())


# --- vicreg, vibcreg and barlow ---------------------------------------------------------------


@SIZES
@DTYPES
@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (0.3, 2.0, 7.0)])
def test_vicreg(size, weights, dtype):
    z = views(size, dtype)
    sim, var, cov = weights
    ours = vicreg_loss(*z, sim_weight=sim, var_weight=var, cov_weight=cov).loss
    assert_same(ours, solo.vicreg_loss_func(*z, *weights), z)


def test_vicregs_defaults_and_a_batch_of_one_row():
    z = views((12, 5))
    assert_close(vicreg_loss(*z).loss, solo.vicreg_loss_func(*z))
    assert solo.vicreg_loss_func(*views((1, 5))).isnan()
    with pytest.raises(ValueError, match="vicreg_loss needs"):
        vicreg_loss(*views((1, 5)))


@OF_STANDARDIZED
def test_vibcreg_is_terms_of_vicreg_the_last_of_standardized_columns(size, dtype):
    z = views(size, dtype)
    standardized = [(x - x.mean(0)) / x.std(0) for x in z]
    terms, cov = vicreg_loss(*z), vicreg_loss(*standardized).cov / size[1]
    assert_same(25 * terms.sim + 25 * terms.var + 200 * cov, solo.vibcreg_loss_func(*z), z)


@OF_STANDARDIZED
@pytest.mark.parametrize("weights", [(5e-3, 0.025), (0.3, 2.0)])
def test_barlow_twins(size, dtype, weights, as_default):
    as_default(dtype)
    z = views(size, dtype)
    ours = barlow_twins_loss(*z, off_weight=weights[0], loss_scale=weights[1]).loss
    assert_same(ours, solo.barlow_loss_func(*z, *weights), z)


def test_barlow_twins_of_float64_alone_is_refused_there():
    with pytest.raises(RuntimeError, match="mixed dtype"):
        solo.barlow_loss_func(*views((12, 5)))


def test_barlow_twins_by_default_is_40_times_theirs():
    z = views((12, 5), torch.float32)
    assert_same(barlow_twins_loss(*z).loss, 40 * solo.barlow_loss_func(*z), z)


# --- byol, simsiam and wmse -------------------------------------------------------------------


@SIZES
@DTYPES
@pytest.mark.parametrize("simplified", [True, False])
def test_cosines_with_a_detached_target(size, simplified, dtype):
    z = views(size, dtype)
    byol, simsiam = (predictive_cosine_loss(*z, form=form).loss for form in ("byol", "simsiam"))
    assert_same(byol, solo.byol_loss_func(*z, simplified=simplified), z)
    assert_same(simsiam, solo.simsiam_loss_func(*z, simplified=simplified), z)


@SIZES
@DTYPES
def test_wmses_simplified_loss_detaches_its_second_view_and_the_other_does_not(size, dtype):
    z = views(size, dtype)
    assert_same(predictive_cosine_loss(*z).loss, solo.wmse_loss_func(*z), z)
    ours = predictive_cosine_loss(*z, stop_gradient=False).loss
    assert_same(ours, solo.wmse_loss_func(*z, simplified=False), z)


# --- simclr, mocov2plus, mocov3, nnclr and ressl ----------------------------------------------


@SIZES
@DTYPES
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_simclr_of_two_views_is_nt_xent(size, temperature, dtype):
    z = views(size, dtype)
    theirs = solo.simclr_loss_func(torch.cat(z), torch.arange(size[0]).repeat(2), temperature)
    assert_same(nt_xent_loss(*z, temperature=temperature).loss, theirs, z)


@DTYPES
@pytest.mark.parametrize("classes", [2, 4, 12])
def test_simclr_of_classes_or_more_views_sums_positives_inside_of_the_log(classes, dtype):
    z = views((36, 5), dtype, count=1)
    labels = torch.arange(36) % classes
    theirs = solo.simclr_loss_func(*z, labels)
    options = {"temperature": 0.1, "positives": "inside"}
    assert_same(supervised_contrastive_loss(*z, labels, **options).loss, theirs, z)
    outside = supervised_contrastive_loss(*z, labels, temperature=0.1).loss
    assert outside > 1.1 * theirs


@pytest.mark.parametrize(
    ("dtype", "finite", "low"), [(torch.float32, 0.0114, 0.0111), (torch.float16, 0.092, 0.088)]
)
def test_simclr_at_low_temperatures(dtype, finite, low):
    z, labels = torch.eye(8, dtype=dtype), torch.arange(8) % 4  # log 7 at any temperature
    assert solo.simclr_loss_func(z, labels, finite).isfinite()
    assert solo.simclr_loss_func(z, labels, low).isnan()
    ours = supervised_contrastive_loss(z, labels, temperature=low, positives="inside").loss
    assert_close(ours, torch.tensor(7.0).log())


def test_simclr_of_a_sample_without_a_positive():
    z, labels = normal(24, 5), torch.arange(24) % 4
    labels[0] = 7
    assert solo.simclr_loss_func(z, labels) == torch.inf
    terms = supervised_contrastive_loss(z, labels, temperature=0.1, positives="inside")
    assert terms.n_without_positive == 1
    others = supervised_contrastive_loss(z[1:], labels[1:], temperature=0.1, positives="inside")
    assert terms.loss.isfinite()
    assert terms.loss > others.loss  # its row is still a negative


@SIZES
@DTYPES
@pytest.mark.parametrize("temperature", [0.1, 0.2])
@pytest.mark.parametrize("queue", [1, 7, 500])
def test_mocov2plus_with_a_queue_of_columns(size, queue, temperature, dtype):
    z = views(size, dtype)
    query, key = (F.normalize(x, dim=1) for x in z)
    negatives = F.normalize(normal(queue, size[1], seed=2, dtype=dtype), dim=1)
    theirs = solo.mocov2plus_loss_func(query, key, negatives.T, temperature)
    assert_same(info_nce_loss(*z, scale=1 / temperature, negatives=negatives).loss, theirs, z)


def test_mocov2plus_does_not_normalize():
    z, queue = views((12, 5)), normal(7, 5, seed=2)
    theirs = solo.mocov2plus_loss_func(*z, queue.T)
    assert_same(info_nce_loss(*z, scale=10.0, negatives=queue, normalize=False).loss, theirs, z)


@SIZES
@DTYPES
def test_mocov3_is_times_twice_the_temperature(size, dtype):
    z = views(size, dtype)
    ours = info_nce_loss(*z, scale=1 / 0.2).loss
    assert_same(2 * 0.2 * ours, solo.mocov3_loss_func(*z), z)


@SIZES
@DTYPES
def test_nnclr(size, dtype):
    z = views(size, dtype)
    assert_same(info_nce_loss(*z, scale=1 / 0.1).loss, solo.nnclr_loss_func(*z), z)


@SIZES
@DTYPES
def test_ressl_is_dino_of_one_view_with_a_queue_as_prototypes(size, dtype):
    query, key = views(size, dtype)
    queue = normal(20, size[1], seed=2, dtype=dtype)
    theirs = solo.ressl_loss_func(query, key, queue)
    teacher = centered_softmax(key @ queue.T, queue.new_zeros(20), temperature=0.04)
    ours = dino_loss((query @ queue.T)[None], teacher[None], same_view="keep").loss
    assert_same(ours, theirs, [query])


# --- dino and swav ----------------------------------------------------------------------------

# Batch and prototypes: as written, and in blocks.
PROTOTYPES = pytest.mark.parametrize("size", [(2, 3), (12, 16), (32, 9000)], ids=str)


@PROTOTYPES
@DTYPES
def test_dino_and_its_center_with_a_warm_up_of_the_temperature(size, dtype):
    loss_fn = solo.DINOLoss(size[1], 0.04, 0.07, 2, 3).to(dtype)
    center = torch.zeros(size[1], dtype=dtype)
    for epoch, temperature in enumerate((0.04, 0.07, 0.07)):
        loss_fn.epoch = epoch
        student = normal(2, *size, seed=epoch, dtype=dtype).requires_grad_()
        rows = normal(2, *size, seed=9 + epoch, dtype=dtype).flatten(0, 1) / 3
        theirs = loss_fn(student.flatten(0, 1), rows)
        teacher = centered_softmax(rows, center, temperature=temperature)
        center = updated_center(center, rows)
        assert_same(dino_loss(student, teacher.view(2, *size)).loss, theirs, [student])
        assert_close(center, loss_fn.center[0])


@PROTOTYPES
@DTYPES
@pytest.mark.parametrize("crops", [2, 5])
@pytest.mark.parametrize("queued", [False, True])
def test_swav_of_two_large_crops(size, crops, queued, dtype):
    """As solo/methods/swav.py calls both."""
    logits = normal(crops, *size, dtype=dtype).div(3).requires_grad_()
    queue = normal(2, 2 * size[0], size[1], seed=1, dtype=dtype) / 3 if queued else None
    sk, assignments = SinkhornKnopp(), []
    for view in range(2):
        scores = logits[view].detach()
        scores = torch.cat((scores, queue[view])) if queued else scores
        assignments.append(sk(scores)[: size[0]])
    theirs = solo.swav_loss_func([*logits], assignments)
    assert_same(swapped_prediction_loss(logits, num_global=2, queue=queue).loss, theirs, [logits])


@PROTOTYPES
@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_where_theirs_is_finite(size, iterations):
    logits = normal(*size) / 2
    theirs = SinkhornKnopp(iterations, 0.05)(logits)
    assert (sinkhorn(logits, temperature=0.05, iterations=iterations) - theirs).abs().max() < 1e-14
    high = logits.float()
    for first, finite in ((4.43, True), (4.44, False)):
        high[0, 0] = first
        assert SinkhornKnopp(iterations, 0.05)(high).isfinite().all() == finite
    exact = sinkhorn(high.double(), temperature=0.05, iterations=iterations)
    ours = sinkhorn(high, temperature=0.05, iterations=iterations)
    assert (ours - exact).abs().max() < 1e-6


# --- over ranks -------------------------------------------------------------------------------


def test_over_ranks(ranks):
    z, weight = [x.detach() for x in views((12, 5))], normal(5, 4, seed=3)
    parameter = weight.clone().requires_grad_()

    def gradient(loss):
        return torch.autograd.grad(loss, parameter, retain_graph=True)[0]

    whole = [x @ parameter for x in z]
    wanted = [
        vicreg_loss(*whole).loss,
        nt_xent_loss(*whole, temperature=0.1).loss,
        barlow_twins_loss(*whole, loss_scale=0.025).loss,
    ]
    # Their Barlow Twins standardizes each rank's own rows.
    pairs = zip(*(x.chunk(3) for x in whole), strict=True)
    normed = [[F.batch_norm(x, None, None, training=True) for x in pair] for pair in pairs]
    squares = (sum(a.T @ b for a, b in normed) / 12 - torch.eye(4).double()).square()
    own = 0.025 * (5e-3 * squares.sum() + (1 - 5e-3) * squares.trace())
    gradients, of_own = [gradient(loss) for loss in wanted], gradient(own)

    parts = [x.chunk(3) for x in z]
    found = ranks(solo_learn_over_ranks, *parts, [weight] * 3)
    for theirs_and_ours in found:
        theirs, ours = theirs_and_ours[:3], theirs_and_ours[3:]
        for (value, slope), loss, expected in zip(ours, wanted, gradients, strict=True):
            assert_close(value, loss.detach())
            assert_close(slope, expected)
        assert_close(theirs[0][1], gradients[0])
        assert_close(theirs[1][1], gradients[1])
        assert_close(theirs[2][0], own.detach())
        assert_close(3 * theirs[2][1], of_own)
    for loss in (0, 1):  # the values are those of the ranks' own rows
        values = [one[loss][0] for one in found]
        assert_close(torch.stack(values).mean(), wanted[loss].detach())
        assert torch.stack(values).std() > 0.01
