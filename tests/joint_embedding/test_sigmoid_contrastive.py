"""SigLIP: hand values, precision near convergence, tiles, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from losses.sigmoid_contrastive import SIGMOID_CONTRASTIVE

import termwise as tw
from termwise.joint_embedding import _sigmoid_contrastive as module
from termwise.joint_embedding import sigmoid_contrastive_loss


@pytest.fixture(params=["as written", "in tiles"])
def path(request, monkeypatch):
    if request.param == "in tiles":
        monkeypatch.setattr(module, "_FEW_LOGITS", 0)


def pairs(n, dim, noise, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = F.normalize(torch.randn(n, dim, generator=generator), dim=1)
    other = noise / math.sqrt(dim) * torch.randn(n, dim, generator=generator)
    b = F.normalize(a + other, dim=1)
    return [x.to(dtype).requires_grad_() for x in (a, b)]


def log1p_exp(x):
    return math.log1p(math.exp(x))


# --- known values ---------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (3.0, 0.5), (25.0, -12.0)])
def test_orthonormal_rows(path, scale, bias):
    z = torch.eye(5, 8, dtype=torch.float64)
    terms = sigmoid_contrastive_loss(3 * z, z, scale=scale, bias=bias)
    assert terms.positive.item() == pytest.approx(log1p_exp(-(scale + bias)), rel=1e-13)
    assert terms.negative.item() == pytest.approx(4 * log1p_exp(bias), rel=1e-13)
    assert terms.loss == terms.positive + terms.negative
    assert terms.accuracy == 1


def test_logits_of_zero(path):
    a, b = pairs(7, 3, 1.0)
    terms = sigmoid_contrastive_loss(a, b, scale=0.0, bias=0.0)
    assert terms.loss.item() == pytest.approx(7 * math.log(2))
    assert terms.accuracy == 1  # ties


def test_two_rows_by_hand(path):
    # Logits 2 a b + 1: 3 and -1 in the first row, 1 and 7 in the second.
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 3.0]])
    terms = sigmoid_contrastive_loss(a, b, scale=2.0, bias=1.0, normalize=False)
    assert terms.positive.item() == pytest.approx((log1p_exp(-3) + log1p_exp(-7)) / 2)
    assert terms.negative.item() == pytest.approx((log1p_exp(-1) + log1p_exp(1)) / 2)
    assert terms.accuracy == 1
    swapped = sigmoid_contrastive_loss(a, b.flip(0), scale=2.0, bias=1.0, normalize=False)
    assert swapped.accuracy == 0


def test_one_row_has_no_negatives(path):
    terms = sigmoid_contrastive_loss(torch.ones(1, 2), torch.ones(1, 2), scale=1.0, bias=0.0)
    assert terms.negative == 0
    assert terms.accuracy == 1
    assert terms.loss.item() == pytest.approx(log1p_exp(-1))


def test_rotating_both_changes_nothing(path):
    a, b = pairs(6, 4, 1.0, torch.float64)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    ours, turned = (
        sigmoid_contrastive_loss(x, y, scale=5.0, bias=-2.0)
        for x, y in ((a, b), (a @ rotation, b @ rotation))
    )
    torch.testing.assert_close(ours.loss, turned.loss)


# --- precision ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "bias", "noise"),
    [(20.0, -10.0, 0.3), (20.0, -10.0, 0.7), (10.0, -10.0, 1.0), (100.0, -30.0, 2.0)],
)
def test_float32_is_float64_near_convergence(scale, bias, noise):
    a, b = pairs(1100, 256, noise)  # more than a tile, in both directions
    numbers = [torch.tensor(x).requires_grad_() for x in (scale, bias)]
    terms = sigmoid_contrastive_loss(a, b, scale=numbers[0], bias=numbers[1], normalize=False)
    inputs = [x.detach().double().requires_grad_() for x in (a, b, *numbers)]
    options = {"scale": inputs[2], "bias": inputs[3], "normalize": False}
    expected = SIGMOID_CONTRASTIVE.expected(*inputs[:2], **options)
    assert terms.loss.item() == pytest.approx(expected["loss"].item(), rel=1e-6)
    assert terms.accuracy.item() == pytest.approx(expected["accuracy"].item(), abs=2e-3)
    ours = torch.autograd.grad(terms.loss, (a, b, *numbers))
    theirs = torch.autograd.grad(expected["loss"], inputs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.double() - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("scale", [59.0, 61.0, 200.0])
def test_hard_negatives_do_not_overflow(path, scale):
    z = torch.ones(3, 2, requires_grad=True)
    terms = sigmoid_contrastive_loss(z, z, scale=scale, bias=0.0)
    assert terms.negative.item() == pytest.approx(2 * scale, rel=1e-6)
    assert torch.autograd.grad(terms.loss, z)[0].isfinite().all()


def test_float64_keeps_what_the_threshold_of_softplus_drops(path):
    z = torch.eye(2, dtype=torch.float64)
    terms = sigmoid_contrastive_loss(z, z, scale=60.0, bias=-25.0)
    assert terms.positive.item() == pytest.approx(math.exp(-35), rel=1e-12)
    assert terms.negative.item() == pytest.approx(math.exp(-25), rel=1e-10)
    terms = sigmoid_contrastive_loss(z, z, scale=0.0, bias=-21.0)
    assert terms.positive.item() == pytest.approx(21 + math.exp(-21), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_at_a_small_temperature_are_finite(path, dtype):
    a, b = pairs(9, 4, 2.0, dtype)
    terms = sigmoid_contrastive_loss(a, b, scale=1000.0, bias=-10.0)
    expected = sigmoid_contrastive_loss(a.float(), b.float(), scale=1000.0, bias=-10.0)
    assert terms.loss.dtype == torch.float32
    torch.testing.assert_close(dict(terms.items()), dict(expected.items()))
    for gradient in torch.autograd.grad(terms.loss, (a, b)):
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()


def test_a_nan_is_not_repaired(path):
    a, b = (x.detach() for x in pairs(4, 3, 1.0))
    a[1, 2] = math.nan
    terms = sigmoid_contrastive_loss(a, b, scale=1.0, bias=0.0)
    assert terms.positive.isnan()
    assert terms.negative.isnan()


# --- tiles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 4, 5, 9])
def test_tiles_below_at_and_above_the_batch(monkeypatch, n):
    monkeypatch.setattr(module, "_FEW_LOGITS", 0)
    monkeypatch.setattr("termwise._numbers.TILE", 4)
    monkeypatch.setattr("termwise._numbers.IN_CACHE", 12)  # three rows of four columns
    inputs = pairs(n, 3, 1.0, torch.float64)
    numbers = [torch.tensor(x, dtype=torch.float64).requires_grad_() for x in (4.0, -1.0)]
    options = dict(zip(("scale", "bias"), numbers, strict=True))
    terms = sigmoid_contrastive_loss(*inputs, **options)
    expected = SIGMOID_CONTRASTIVE.expected(*inputs, **options)
    torch.testing.assert_close(dict(terms.items()), expected)
    for name in ("loss", "positive", "negative"):
        ours, theirs = (
            torch.autograd.grad(x[name], [*inputs, *numbers], retain_graph=True)
            for x in (dict(terms.items()), expected)
        )
        torch.testing.assert_close(ours, theirs)


def test_in_tiles_it_compiles_whole(monkeypatch):
    monkeypatch.setattr(module, "_FEW_LOGITS", 0)
    a, b = pairs(6, 3, 1.0)
    loss = tw.joint_embedding.SigmoidContrastiveLoss()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    bias = torch.tensor(-1.0, requires_grad=True)
    ours, theirs = (run(a, b, scale=4.0, bias=bias).loss for run in (compiled, loss))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        *(torch.autograd.grad(value, (a, b, bias)) for value in (ours, theirs))
    )
    mapped = torch.vmap(lambda x: loss(x, b.detach(), scale=4.0, bias=0.0).loss)
    torch.testing.assert_close(
        mapped(torch.stack((a, b))),
        torch.stack([loss(x, b, scale=4.0, bias=0.0).loss for x in (a, b)]),
    )


# --- refusals -------------------------------------------------------------------------------


def test_no_row_is_refused():
    z = torch.zeros(0, 3)
    with pytest.raises(
        ValueError, match=r"^sigmoid_contrastive_loss needs a batch of at least 1 row, got 0$"
    ):
        sigmoid_contrastive_loss(z, z, scale=1.0, bias=0.0)


def test_maps_are_refused_with_both_ways_to_write_them():
    z = torch.zeros(2, 3, 4, 4)
    with pytest.raises(tw.ContractError, match=r"einops\.rearrange\(a, "):
        sigmoid_contrastive_loss(z, z, scale=1.0, bias=0.0)
