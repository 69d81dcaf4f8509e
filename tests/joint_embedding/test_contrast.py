"""What contrastive losses share: strips, precision near convergence, paths and refusals."""

import math

import pytest
import torch
from losses._contrast import noisy_views as views
from losses.decoupled_contrastive import DECOUPLED_CONTRASTIVE
from losses.info_nce import INFO_NCE
from losses.nt_xent import NT_XENT
from losses.supervised_contrastive import SUPERVISED_CONTRASTIVE
from torch import Tensor

from termwise.joint_embedding import (
    _contrast,
    decoupled_contrastive_loss,
    info_nce_loss,
    nt_xent_loss,
    supervised_contrastive_loss,
)

STRIP = 4  # rows, in the fixture path


def orthonormal(n, dim=8):
    return torch.eye(dim, dtype=torch.float64)[:n]


def clip(a, b, **options):
    return info_nce_loss(a, b, **{"scale": 5.0, "symmetric": True, **options})


def supervised(z1, z2, **options):
    """Classes of 2, of 4 where two samples share a class, and one that is alone."""
    labels = torch.arange(len(z1)) // 2 * 3
    z = torch.cat((z1, z2, z1[:1] + z2[:1]))
    return supervised_contrastive_loss(z, torch.cat((labels, labels, labels[:1] - 99)), **options)


def supervised_formula(z1, z2, **options):
    labels = torch.arange(len(z1)) // 2 * 3
    z = torch.cat((z1, z2, z1[:1] + z2[:1]))
    labels = torch.cat((labels, labels, labels[:1] - 99))
    return SUPERVISED_CONTRASTIVE.expected(z, labels, **options)


LOSSES = {
    "clip": (clip, lambda a, b: INFO_NCE.expected(a, b, scale=5.0, symmetric=True)),
    "one way": (
        lambda a, b: info_nce_loss(a, b, scale=5.0),
        lambda a, b: INFO_NCE.expected(a, b, scale=5.0),
    ),
    "nt_xent": (nt_xent_loss, NT_XENT.expected),
    "decoupled": (decoupled_contrastive_loss, DECOUPLED_CONTRASTIVE.expected),
    "outside": (supervised, supervised_formula),
    "inside": (
        lambda a, b: supervised(a, b, positives="inside"),
        lambda a, b: supervised_formula(a, b, positives="inside"),
    ),
}


@pytest.mark.parametrize("n", [2, 3, STRIP, STRIP + 1, 2 * STRIP, 2 * STRIP + 3])
@pytest.mark.parametrize("name", LOSSES)
def test_a_strip_may_hold_both_a_view_and_its_positive(path, name, n):
    """Whose mirror image is to be hidden too, with n below, at and above the rows of a strip."""
    z = views(n, 3)
    run, formula = LOSSES[name]
    terms, expected = run(*z), formula(*z)
    for key, value in expected.items():
        torch.testing.assert_close(terms[key], value.to(torch.float64), rtol=1e-13, atol=1e-13)
    ours = torch.autograd.grad(terms.loss, z)
    theirs = torch.autograd.grad(expected["loss"], z)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


# --- optima, by hand ------------------------------------------------------------------------


def test_orthonormal_samples(path):
    z, n, s = orthonormal(5), 5, 3.0
    found = {
        clip(z, z, scale=s): math.log(1 + (n - 1) * math.exp(-s)),
        nt_xent_loss(z, z, temperature=1 / s): math.log(1 + 2 * (n - 1) * math.exp(-s)),
        decoupled_contrastive_loss(z, z, temperature=1 / s): math.log(2 * (n - 1)) - s,
        # All pairs are equally close, so that the weights are 1.
        decoupled_contrastive_loss(z, z, temperature=1 / s, sigma=0.5): math.log(2 * (n - 1)) - s,
    }
    for terms, value in found.items():
        assert terms.loss.item() == pytest.approx(value, rel=1e-13)
        assert terms.accuracy.item() == 1


def test_collapsed_samples(path):
    z, n = torch.ones(5, 3, dtype=torch.float64), 5
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert clip(z, z).loss.item() == pytest.approx(math.log(n))
    assert nt_xent_loss(z, z).loss.item() == pytest.approx(math.log(2 * n - 1))
    assert decoupled_contrastive_loss(z, z).loss.item() == pytest.approx(
        math.log(2 * n - 2) + 10 - 10  # every logit is 1 / T
    )
    for where in ("outside", "inside"):
        # 1 or 2 positives among 4 others: inside, their number is in the sum.
        inside = [math.log(4), math.log(4), *[math.log(4 / 2)] * 3]
        value = math.log(4) if where == "outside" else sum(inside) / 5
        terms = supervised_contrastive_loss(z, labels, positives=where)
        assert terms.loss.item() == pytest.approx(value)


@pytest.mark.parametrize(("classes", "m"), [(2, 2), (3, 4)])
def test_classes_at_a_simplex(path, classes, m):
    """Its corners have cosines of -1 / (K - 1): the optimum of the supervised loss."""
    corners = torch.eye(classes, dtype=torch.float64) - 1 / classes
    labels = torch.arange(classes).repeat(m)
    terms = supervised_contrastive_loss(corners[labels], labels, temperature=0.5)
    far = math.exp(-(1 + 1 / (classes - 1)) / 0.5)
    assert terms.loss.item() == pytest.approx(math.log(m - 1 + m * (classes - 1) * far), rel=1e-12)
    inside = supervised_contrastive_loss(
        corners[labels], labels, temperature=0.5, positives="inside"
    )
    value = math.log1p(m * (classes - 1) * far / (m - 1))
    assert inside.loss.item() == pytest.approx(value, rel=1e-12)


# --- laws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_rotating_and_scaling_embeddings_changes_nothing(path, name):
    run, z = LOSSES[name][0], views(6, 4)
    rotation = torch.linalg.qr(views(4, 4)[0].detach()).Q
    turned = run(*(3 * x @ rotation for x in z))
    if name not in ("outside", "inside"):  # their last sample is a sum
        turned = run(z[0] @ rotation * 2, z[1] @ rotation * 5)
    torch.testing.assert_close(turned.loss, run(*z).loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["clip", "one way", "nt_xent", "decoupled"])
def test_permuting_both_alike_changes_nothing(path, name):
    run, (a, b) = LOSSES[name][0], views(7, 4)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    torch.testing.assert_close(run(a[order], b[order]).loss, run(a, b).loss)


# --- precision ------------------------------------------------------------------------------


def exact(run, tensors):
    wide = [x.detach().double().requires_grad_() for x in tensors]
    loss = run(*wide)["loss"]
    return loss, torch.autograd.grad(loss, wide)


def assert_precise(run, formula, tensors, value=1e-6, gradient=1e-5):
    loss, theirs = exact(formula, tensors)
    ours = run(*tensors).loss
    assert ours.dtype == torch.float32
    assert abs(ours.item() / loss.item() - 1) < value
    for mine, wanted in zip(torch.autograd.grad(ours, tensors), theirs, strict=True):
        error = (mine.double() - wanted).norm() / wanted.norm()
        assert error < gradient, error.item()
    return loss.item()


def test_precision_near_convergence(path, monkeypatch):
    """Where a difference of log-sums is off by 2e-3, and its gradients too, in float32."""
    monkeypatch.setattr(_contrast, "_rows_at_once", lambda rows, width: 64)
    monkeypatch.setattr(_contrast, "_SMALL", 0 if path == "strips" else 2**21)
    a, b = views(512, 128, noise=0.7, dtype=torch.float32)
    scale = torch.tensor(24.0, requires_grad=True)

    def symmetric(a, b, scale):
        return info_nce_loss(a, b, scale=scale, symmetric=True)

    def formula(a, b, scale):
        return INFO_NCE.expected(a, b, scale=scale, symmetric=True)

    assert assert_precise(symmetric, formula, [a, b, scale]) < 1e-3
    sharp = {"temperature": 1 / 24}
    pairs = [a, b]
    assert (
        assert_precise(
            lambda *z: nt_xent_loss(*z, **sharp), lambda *z: NT_XENT.expected(*z, **sharp), pairs
        )
        < 1e-2
    )
    z = torch.cat((a, b)).detach().requires_grad_()
    labels = torch.arange(len(a)).repeat(2)
    for where in ("outside", "inside"):
        assert_precise(
            lambda z, where=where: supervised_contrastive_loss(z, labels, positives=where, **sharp),
            lambda z, where=where: SUPERVISED_CONTRASTIVE.expected(
                z, labels, positives=where, **sharp
            ),
            [z],
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_finite_at_a_hundredth(path, dtype):
    """Logits of 100, and positives 200 below the maximum."""
    a, b = views(9, 6, dtype=dtype)
    b = (-a).detach().requires_grad_()
    for terms in (
        clip(a, b, scale=100.0),
        nt_xent_loss(a, b, temperature=0.01),
        supervised(a, b, temperature=0.01),
        decoupled_contrastive_loss(a, b, temperature=0.01, sigma=0.01),
    ):
        assert terms.loss.dtype == torch.float32
        assert terms.loss.isfinite()
        gradients = torch.autograd.grad(terms.loss, (a, b))
        assert all(g.isfinite().all() and g.dtype == dtype for g in gradients)
    wide = INFO_NCE.expected(a.double(), b.double(), scale=100.0, symmetric=True)["loss"]
    assert wide > 60
    torch.testing.assert_close(
        clip(a, b, scale=100.0).loss.double(), wide, rtol=1e-6, atol=0, check_dtype=False
    )


def test_logits_far_beyond_an_exponential(path):
    a, b = 30 * torch.eye(2), 40 * torch.eye(2).flip(1)
    terms = clip(a, b, scale=2.0, normalize=False)
    # Logits: 2400 for each wrong pair, 0 for the right one.
    assert terms.loss.item() == pytest.approx(2400)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_no_nan_is_repaired(path, name, bad):
    a, b = (x.detach() for x in views(6, 4))
    a[3, 1] = bad
    assert not LOSSES[name][0](a, b).loss.isfinite()


# --- derivatives ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_with_respect_to_one_view(path, name):
    a, b = views(6, 4)
    both = torch.autograd.grad(LOSSES[name][0](a, b).loss, (a, b))
    for index, frozen in enumerate(((a, b.detach()), (a.detach(), b))):
        (alone,) = torch.autograd.grad(LOSSES[name][0](*frozen).loss, frozen[index])
        torch.testing.assert_close(alone, both[index])


def test_inputs_are_left_alone(path):
    a, b = views(6, 4)
    copies = [x.detach().clone() for x in (a, b)]
    for run, _ in LOSSES.values():
        run(a, b).loss.backward()
    assert torch.equal(a, copies[0])
    assert torch.equal(b, copies[1])


def test_strided_inputs(path):
    a, b = views(8, 6)
    for run, _ in LOSSES.values():
        ours = run(a[::2, ::2], b.T[::2].T[::2])
        theirs = run(a[::2, ::2].contiguous(), b.T[::2].T[::2].contiguous())
        torch.testing.assert_close(ours.loss, theirs.loss)


def test_no_matrix_of_all_pairs(monkeypatch):
    """No tensor of the strips' path has as many elements as there are pairs."""
    n, largest = 1024, 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            for x in found if isinstance(found, (tuple, list)) else [found]:
                if isinstance(x, Tensor):
                    largest = max(largest, x.untyped_storage().nbytes() // x.element_size())
            return found

    kernel = _contrast._kernel

    def watched(inputs):
        with Largest():
            return kernel(inputs)

    a, b = views(n, 8, dtype=torch.float32)
    inputs = []
    monkeypatch.setattr(
        _contrast, "with_gradients", lambda op, given, count: inputs.append(given) or kernel(given)
    )
    for run, _ in LOSSES.values():
        run(a, b)
        watched(inputs.pop())
    assert largest <= 2 * 256 * (2 * n + 1)


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda z: nt_xent_loss(z, z, temperature=0.0),
            "nt_xent_loss needs temperature > 0, got 0.0",
        ),
        (
            lambda z: nt_xent_loss(z[:0], z[:0]),
            "nt_xent_loss needs at least 2 embeddings over all ranks, got 0",
        ),
        (lambda z: nt_xent_loss(z[:, :0], z[:, :0]), "nt_xent_loss needs dim >= 1, got 0"),
        (
            lambda z: supervised_contrastive_loss(z[:, :0], torch.zeros(3, dtype=torch.int64)),
            "supervised_contrastive_loss needs dim >= 1, got 0",
        ),
        (
            lambda z: info_nce_loss(z[:, :0], z[:, :0], scale=1.0),
            "info_nce_loss needs dim >= 1, got 0",
        ),
        (
            lambda z: decoupled_contrastive_loss(z[:1], z[:1]),
            "decoupled_contrastive_loss needs at least 4 embeddings over all ranks, got 2",
        ),
        (
            lambda z: decoupled_contrastive_loss(z, z, sigma=-1.0),
            "decoupled_contrastive_loss needs temperature > 0 and sigma > 0, got 0.1 and -1.0",
        ),
        (
            lambda z: supervised_contrastive_loss(z[:1], torch.zeros(1, dtype=torch.int64)),
            "supervised_contrastive_loss needs at least 2 embeddings over all ranks, got 1",
        ),
        (
            lambda z: supervised_contrastive_loss(
                z, torch.zeros(3, dtype=torch.int64), base_temperature=0.0
            ),
            "supervised_contrastive_loss needs temperature > 0 and base_temperature > 0, got 0.07 "
            "and 0.0",
        ),
        (
            lambda z: info_nce_loss(z[:0], z[:0], scale=1.0),
            "info_nce_loss needs at least 1 embeddings over all ranks, got 0",
        ),
        (
            lambda z: info_nce_loss(z, z[:2], scale=1.0),
            "info_nce_loss needs a key for each query, got 3 queries and 2 keys: pass positives "
            "where queries share keys",
        ),
        (
            lambda z: info_nce_loss(z[:2], z, scale=1.0, symmetric=True),
            "info_nce_loss needs one key for each query and neither positives nor negatives if "
            "symmetric, got 2 queries and 3 keys",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(path, run, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        run(torch.ones(3, 2))
    assert str(refused.value) == message


def test_maps_are_refused_with_both_ways_to_write_rows():
    maps = torch.zeros(2, 3, 4, 4)
    with pytest.raises(TypeError, match=r"einops.rearrange\(z1, .*einops.rearrange\(z1, "):
        nt_xent_loss(maps, maps)
