"""The cosine of BYOL and SimSiam: values by hand, the target's gradient, precision."""

import pytest
import torch
import torch.nn.functional as F

import termwise as tw
from termwise.joint_embedding import PredictiveCosineLoss, predictive_cosine_loss


def pair(n=6, dim=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(n, dim, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(2)
    ]


def test_by_hand():
    prediction = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    target = torch.tensor([[5.0, 0.0], [0.0, -1.0]])  # cosines 3/5 and -1
    terms = predictive_cosine_loss(prediction, target)
    assert terms.cosine.item() == pytest.approx(-0.2)
    assert terms.loss.item() == pytest.approx(2.4)
    simsiam = predictive_cosine_loss(prediction, target, form="simsiam")
    assert simsiam.loss.item() == pytest.approx(0.2)


def test_both_forms_are_what_the_papers_say():
    p, t = pair()
    cosine = F.cosine_similarity(p, t.detach()).mean()
    for form, expected in (("byol", 2 - 2 * cosine), ("simsiam", -cosine)):
        ours = predictive_cosine_loss(p, t, form=form)
        torch.testing.assert_close(ours.loss, expected)
        torch.testing.assert_close(ours.cosine, cosine)
        torch.testing.assert_close(
            torch.autograd.grad(ours.loss, p),
            torch.autograd.grad(expected, p, retain_graph=True),
        )


@pytest.mark.parametrize("form", ["byol", "simsiam"])
def test_the_target_is_detached_unless_told(form):
    """Two peers leave it to the caller: where that is forgotten, the target network is trained."""
    p, t = pair()
    terms = predictive_cosine_loss(p, t, form=form)
    assert torch.autograd.grad(terms.loss, t, allow_unused=True) == (None,)
    assert not predictive_cosine_loss(p.detach(), t, form=form).cosine.requires_grad
    terms = predictive_cosine_loss(p, t, form=form, stop_gradient=False)
    assert torch.autograd.grad(terms.loss, t)[0].norm() > 0


def test_near_agreement_nothing_cancels():
    p = pair(8, 128, torch.float32)[0].detach()
    t = p + 1e-4 * torch.randn_like(p)
    expected = 2 - 2 * F.cosine_similarity(p.double(), t.double()).mean()
    ours = predictive_cosine_loss(p, t).loss.item()
    assert ours == pytest.approx(expected.item(), rel=1e-3)  # 1e-8, where float32 has 2 - 2 = 0


def test_zeros_have_no_direction():
    p, t = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)
    terms = predictive_cosine_loss(p, t)
    assert terms.cosine == 0
    assert terms.loss.item() == pytest.approx(1)
    assert predictive_cosine_loss(p, t, form="simsiam").loss == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype):
    p, t = ((300 * x).to(dtype) for x in pair(8, 64))  # whose squares overflow in fp16
    ours = predictive_cosine_loss(p, t)
    assert ours.loss.dtype == torch.float32
    wide = predictive_cosine_loss(p.double(), t.double())
    torch.testing.assert_close(ours.loss.double(), wide.loss, rtol=1e-5, atol=0)


def test_refusals():
    p, t = pair()
    with pytest.raises(tw.ContractError, match=r'form needs Literal\["byol", "simsiam"\]'):
        PredictiveCosineLoss(form="moco")
    with pytest.raises(tw.ContractError, match="axis dim is 3, but it is 4 in prediction"):
        predictive_cosine_loss(p, t[:, :3])
