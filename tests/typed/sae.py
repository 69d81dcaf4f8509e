"""What a type checker knows of the sparse autoencoders. Never run: pyright and mypy read it."""

from typing import assert_type

from torch import Tensor

from termwise import sae


def functions(x: Tensor, f: Tensor, W: Tensor, b: Tensor, dead: Tensor) -> None:
    assert_type(sae.vanilla_loss(x, f, x, sparsity_coeff=1), sae.VanillaTerms)
    assert_type(sae.topk(f, k=3), sae.SparseLatents)
    assert_type(sae.topk_loss(x, sae.topk(f, k=3), x), sae.TopKTerms)
    assert_type(sae.auxiliary_k_loss(x, x, f, W, dead=dead, k_aux=2), Tensor)
    assert_type(sae.batch_topk(f, k=3), Tensor)
    assert_type(sae.jumprelu_loss(x, f, W, b, threshold=b, sparsity_coeff=1.0), sae.JumpReLUTerms)
    push = sae.jumprelu_loss(x, f, W, b, threshold=b, sparsity_coeff=1.0, dead="all")
    assert_type(push, sae.JumpReLUTerms)
    push = sae.jumprelu_loss(x, f, W, b, threshold=b, sparsity_coeff=1.0, dead=dead)
    assert_type(push, sae.JumpReLUTerms)
    assert_type(sae.gated_loss(x, f, x, f, W, b, sparsity_coeff=1.0), sae.GatedTerms)
    assert_type(sae.matryoshka_loss(x, f, W, b, prefixes=(1, 2)), sae.MatryoshkaTerms)
    assert_type(sae.crosscoder_loss(x, f, x, W, sparsity_coeff=1.0), sae.CrosscoderTerms)
    assert_type(sae.end_to_end_loss(x, x), sae.EndToEndTerms)
    assert_type(sae.sample_prefixes(16, 3), tuple[int, ...])
    assert_type(sae.fraction_of_variance_unexplained(x, x), Tensor)
    assert_type(sae.VarianceStatistics.of(x).variance, Tensor)
    assert_type(sae.DeadLatents.start(3).update(dead, 5), sae.DeadLatents)


def modules(x: Tensor, f: Tensor, W: Tensor, b: Tensor) -> None:
    assert_type(sae.get_objective(sae.Vanilla())(x, f, x), sae.VanillaTerms)
    assert_type(sae.get_objective(sae.TopK())(x, f, x), sae.TopKTerms)
    assert_type(sae.get_objective(sae.JumpReLU())(x, f, W, b, dead="all"), sae.JumpReLUTerms)
    assert_type(sae.get_objective(sae.Gated())(x, f, f, x, W, b), sae.GatedTerms)
    assert_type(sae.get_objective(sae.Matryoshka())(x, f, W, b), sae.MatryoshkaTerms)
    assert_type(sae.get_objective(sae.Crosscoder())(x, f, x, W), sae.CrosscoderTerms)
    assert_type(sae.get_objective(sae.EndToEnd())(x, x), sae.EndToEndTerms)
