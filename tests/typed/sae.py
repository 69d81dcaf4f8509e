"""What a type checker knows of `termwise.sae` that calls.py cannot write. Never run."""

from typing import assert_type

from torch import Tensor

from termwise import sae


def overloads() -> None:
    assert_type(sae.get_objective(sae.Vanilla()), sae.VanillaObjective)
    assert_type(sae.get_objective(sae.TopK()), sae.TopKObjective)
    assert_type(sae.get_objective(sae.JumpReLU()), sae.JumpReLUObjective)
    assert_type(sae.get_objective(sae.Gated()), sae.GatedObjective)
    assert_type(sae.get_objective(sae.Matryoshka()), sae.MatryoshkaObjective)
    assert_type(sae.get_objective(sae.Crosscoder()), sae.CrosscoderObjective)
    assert_type(sae.get_objective(sae.EndToEnd()), sae.EndToEndObjective)


def latents(x: Tensor, f: Tensor, W: Tensor, b: Tensor, dead: Tensor) -> None:
    assert_type(sae.topk_loss(x, sae.topk(f, k=3), x), sae.TopKTerms)
    push = sae.jumprelu_loss(x, f, W, b, threshold=b, sparsity_coeff=1.0, dead="all")
    assert_type(push, sae.JumpReLUTerms)
    push = sae.jumprelu_loss(x, f, W, b, threshold=b, sparsity_coeff=1.0, dead=dead)
    assert_type(push, sae.JumpReLUTerms)
    assert_type(sae.sample_prefixes(16, 3), tuple[int, ...])


def modules(x: Tensor, f: Tensor, W: Tensor, b: Tensor) -> None:
    assert_type(sae.get_objective(sae.Vanilla())(x, f, x), sae.VanillaTerms)
    assert_type(sae.get_objective(sae.TopK())(x, f, x), sae.TopKTerms)
    assert_type(sae.get_objective(sae.JumpReLU())(x, f, W, b, dead="all"), sae.JumpReLUTerms)
    assert_type(sae.get_objective(sae.Gated())(x, f, f, x, W, b), sae.GatedTerms)
    assert_type(sae.get_objective(sae.Matryoshka())(x, f, W, b), sae.MatryoshkaTerms)
    assert_type(sae.get_objective(sae.Crosscoder())(x, f, x, W), sae.CrosscoderTerms)
    assert_type(sae.get_objective(sae.EndToEnd())(x, x), sae.EndToEndTerms)


def members_of_variance_statistics(one: sae.VarianceStatistics, x: Tensor) -> None:
    assert_type(one.variance, Tensor)
    assert_type(sae.VarianceStatistics.of(x), sae.VarianceStatistics)
    assert_type(one.over_ranks(None), sae.VarianceStatistics)
    assert_type(one.fraction_unexplained(one), Tensor)


def members_of_sparse_latents(one: sae.SparseLatents, x: Tensor) -> None:
    assert_type(one.dense(4), Tensor)
    assert_type(one.decode(x), Tensor)
    assert_type(one.fired(4), Tensor)


def members_of_activation_threshold(one: sae.ActivationThreshold, x: Tensor) -> None:
    assert_type(one.value, Tensor)
    assert_type(sae.ActivationThreshold.start(), sae.ActivationThreshold)
    assert_type(one.update(x), sae.ActivationThreshold)


def members_of_dead_latents(one: sae.DeadLatents, x: Tensor) -> None:
    assert_type(sae.DeadLatents.start(3), sae.DeadLatents)
    assert_type(one.update(x, 5), sae.DeadLatents)
    assert_type(one.dead(after=8), Tensor)
