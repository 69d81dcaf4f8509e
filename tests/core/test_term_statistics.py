"""Gradients of terms against their formula, and running means over steps and over ranks."""

import dataclasses
import math

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import termwise as tw
from termwise.joint_embedding import vicreg_loss


@tw.terms
class PairTerms(tw.Terms):
    near: Float[Tensor, ""]
    far: Float[Tensor, ""]
    count: Float[Tensor, ""]
    each: Float[Tensor, " batch"]
    rare: Float[Tensor, ""] | None = None


def pair(x: Tensor, w: Tensor, *, rare: bool = False) -> PairTerms:
    near, far = (x * w).square().sum(), (x - w).sum() ** 2
    return PairTerms(
        loss=near + far,
        near=near,
        far=far,
        count=torch.tensor(float(len(x))),
        each=x[:, 0],
        rare=near.detach() if rare else None,
    )


def test_gradients_are_shown_as_a_table():
    x = torch.tensor([[3.0, 0.0]], requires_grad=True)
    near, far = 2 * x.sum(), (x * torch.tensor([[4.0, 0.0]])).sum()
    terms = PairTerms(loss=near + far, near=near, far=far, count=near.detach(), each=x[:, 0])
    found = tw.term_gradients(terms, ["near", "far"], [x])
    assert repr(found) == (
        "TermGradients(\n"
        "          norm     cosine[near]  cosine[far]\n"
        "    near  2.82843  1.000         0.707\n"
        "    far   4        0.707         1.000\n"
        ")"
    )
    assert "<tr><th>far</th><td>4</td><td>0.707</td><td>1.000</td></tr>" in found._repr_html_()
    nowhere = dataclasses.replace(
        found, norms=found.norms.to("meta"), cosines=found.cosines.to("meta")
    )
    assert "    near  ...   ...           ..." in repr(nowhere)


def leaves(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(5, 3, generator=generator), torch.randn(3, generator=generator)
    return x.double().requires_grad_(), w.double().requires_grad_()


def test_norms_and_cosines_are_those_of_the_gradients():
    x, w = leaves()
    terms = pair(x, w)
    found = tw.term_gradients(terms, {"near": 2.0, "far": torch.tensor(-0.5)}, [x, w])
    near = torch.cat([(2 * 2.0 * x * w**2).reshape(-1), (2 * 2.0 * x**2 * w).sum(0)]).detach()
    pull = 2 * (x - w).sum().detach()
    far = -0.5 * pull * torch.cat([torch.ones(15), -5 * torch.ones(3)]).double()
    torch.testing.assert_close(found.norms, torch.stack([near.norm(), far.norm()]))
    cosine = near @ far / (near.norm() * far.norm())
    one = torch.ones_like(cosine)
    torch.testing.assert_close(
        found.cosines, torch.stack([torch.stack([one, cosine]), torch.stack([cosine, one])])
    )
    assert found.names == ("near", "far")
    metrics = found.metrics("train/")
    assert list(metrics) == ["train/norm[near]", "train/norm[far]", "train/cosine[near, far]"]
    assert metrics["train/cosine[near, far]"] == cosine.item()
    assert not found.norms.requires_grad
    assert x.grad is None  # nothing is left behind
    terms.loss.backward()  # and the graph still is


def test_the_gradient_of_the_loss_is_the_sum_of_the_weighted_ones():
    z = torch.randn(6, 4, dtype=torch.float64).requires_grad_()
    terms = vicreg_loss(z, z.detach().flip(0))
    weights = {"sim": 25.0, "var": 25.0, "cov": 1.0}
    found = tw.term_gradients(terms, weights, [z])
    whole = found.norms @ found.cosines @ found.norms  # |sum of g|^2
    (gradient,) = torch.autograd.grad(terms.loss, z)
    torch.testing.assert_close(whole, gradient.square().sum())


def test_what_a_term_does_not_reach_counts_as_zero():
    x, w = leaves()
    other = torch.ones(2, requires_grad=True, dtype=torch.float64)
    both = tw.term_gradients(pair(x, w), ["near"], [w, other, torch.ones(3)])
    alone = tw.term_gradients(pair(x, w), ["near"], [w])
    torch.testing.assert_close(both.norms, alone.norms)
    unreached = tw.term_gradients(pair(x, w), ["near"], [other])
    assert unreached.norms.item() == 0
    assert unreached.cosines.isnan().all()


@pytest.mark.parametrize(
    ("names", "inputs", "message"),
    [
        (
            ["size"],
            None,
            r"a scalar term in the graph of PairTerms, one of loss, near, far; got 'si",
        ),
        (["count"], None, "one of loss, near, far; got 'count'"),
        (["each"], None, "one of loss, near, far; got 'each'"),
        ([], None, "the name of at least one term, got none"),
        (["near"], [], "an input that requires a gradient, got none"),
    ],
)
def test_term_gradients_refuses(names, inputs, message):
    x, w = leaves()
    with pytest.raises(ValueError, match=f"term_gradients needs {message}|{message}"):
        tw.term_gradients(pair(x, w), names, [x, w] if inputs is None else inputs)


def test_one_tensor_is_an_input_and_one_string_is_no_list_of_names():
    x, w = leaves()
    alone, listed = (tw.term_gradients(pair(x, w), ["near"], of) for of in (x, [x]))
    assert alone.norms.item() == listed.norms.item() > 0
    with pytest.raises(TypeError, match=r"term_gradients needs .*got the string 'near': pass \["):
        tw.term_gradients(pair(x, w), "near", [x])


def gradients_on_a_rank(group, z, how):
    weight = torch.eye(3, dtype=torch.float64).requires_grad_()
    terms = vicreg_loss(z @ weight, z.flip(1) @ weight, batch_group=group, grad_reduction=how)
    found = tw.term_gradients(
        terms, {"sim": 25.0, "cov": 1.0}, [weight], batch_group=group, grad_reduction=how
    )
    return found.metrics()


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_gradients_over_ranks_are_those_of_one_process(ranks, how):
    z = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = gradients_on_a_rank(None, z, how)
    for found in ranks(gradients_on_a_rank, z.split([5, 2]), [how, how]):
        assert found == pytest.approx(expected, rel=1e-12)


def test_the_average_is_weighted_and_frozen():
    empty = tw.TermAverage()
    average, weights = empty, [2.0, torch.tensor(6.0), 0.5]
    steps = [pair(*leaves(seed), rare=seed == 1) for seed in range(3)]
    for step, weight in zip(steps, weights, strict=True):
        average = average.update(step, weight)
    metrics = average.metrics("val/")
    for name in ("loss", "near", "far"):
        expected = sum(float(w) * step[name].item() for w, step in zip(weights, steps, strict=True))
        assert metrics[f"val/{name}"] == pytest.approx(expected / 8.5, rel=1e-14)
    each = sum(float(w) * step.each for w, step in zip(weights, steps, strict=True)) / 8.5
    assert [metrics[f"val/each[{i}]"] for i in range(5)] == pytest.approx(each.tolist(), rel=1e-14)
    assert metrics["val/rare"] == steps[1].rare.item()  # of the one step that has it
    assert empty.metrics() == {}
    assert not average.sums["loss"].requires_grad


def test_the_average_of_many_small_steps_is_exact():
    average = tw.TermAverage()
    step = pair(torch.ones(1, 1), torch.full((1,), 0.1))
    for _ in range(1000):
        average = average.update(step)
    assert average.metrics()["near"] == pytest.approx(step.near.item(), rel=1e-14)


def test_weights_that_sum_to_nothing_are_nan_and_a_nan_is_kept():
    step = pair(*leaves())
    assert math.isnan(tw.TermAverage().update(step, 0.0).metrics()["loss"])
    bad = pair(torch.full((1, 3), math.nan), torch.ones(3))
    kept = tw.TermAverage().update(pair(torch.ones(1, 3), torch.ones(3))).update(bad)
    assert math.isnan(kept.metrics()["near"])


def test_another_shape_is_refused():
    average = tw.TermAverage().update(pair(*leaves()))
    with pytest.raises(ValueError, match=r"update needs each of shape \[5\] as .*, got \[1\]"):
        average.update(pair(torch.ones(1, 3), torch.ones(3)))


def average_on_a_rank(group, values):
    average = tw.TermAverage()
    for value in values:
        z = torch.tensor([[value, 0.0], [0.0, 1.0]])
        average = average.update(vicreg_loss(z, z + value), weight=value)
    return average.metrics(group=group)


def test_the_average_over_ranks_is_that_of_all_steps(ranks):
    expected = average_on_a_rank(None, [1.0, 2.0, 3.0, 4.0])
    for found in ranks(average_on_a_rank, [[1.0], [2.0, 3.0, 4.0]]):
        assert found == pytest.approx(expected, rel=1e-14)
    for found in ranks(average_on_a_rank, [[], [1.0, 2.0, 3.0, 4.0]]):  # a rank without a step
        assert found == pytest.approx(expected, rel=1e-14)
