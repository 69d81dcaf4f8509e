"""What a type checker knows of `termwise.sae`. Never run: pyright and mypy read it."""

from collections.abc import Sequence
from typing import Literal, assert_type

from torch import Tensor

from termwise import sae


def functions(prefixes: Sequence[int], x: Tensor) -> None:
    assert_type(sae.crosscoder_loss(x, x, x, x, sparsity_coeff=1.0), sae.CrosscoderTerms)
    assert_type(sae.end_to_end_loss(x, x), sae.EndToEndTerms)
    assert_type(sae.gated_loss(x, x, x, x, x, sparsity_coeff=1.0), sae.GatedTerms)
    assert_type(sae.jumprelu(x, x), Tensor)
    assert_type(sae.jumprelu_l0(x, x), Tensor)
    assert_type(sae.jumprelu_loss(x, x, x, sparsity_coeff=1.0), sae.JumpReLUTerms)
    assert_type(sae.matryoshka_loss(x, x, x, x, prefixes=prefixes), sae.MatryoshkaTerms)
    assert_type(sae.cosine_similarity(x, x), Tensor)
    assert_type(sae.explained_variance(x, x), Tensor)
    assert_type(sae.fraction_of_variance_unexplained(x, x), Tensor)
    assert_type(sae.loss_recovered(x, x, x), Tensor)
    assert_type(sae.mean_squared_err(x, x), Tensor)
    assert_type(sae.normalized_mse(x, x), Tensor)
    assert_type(sae.get_objective(sae.Vanilla()), sae.VanillaObjective)
    assert_type(sae.get_objective(sae.TopK()), sae.TopKObjective)
    assert_type(sae.get_objective(sae.JumpReLU()), sae.JumpReLUObjective)
    assert_type(sae.get_objective(sae.Gated()), sae.GatedObjective)
    assert_type(sae.get_objective(sae.Matryoshka()), sae.MatryoshkaObjective)
    assert_type(sae.get_objective(sae.Crosscoder()), sae.CrosscoderObjective)
    assert_type(sae.get_objective(sae.EndToEnd()), sae.EndToEndObjective)
    assert_type(sae.lp_penalty(x, p=1.0), Tensor)
    assert_type(sae.tanh_penalty(x), Tensor)
    assert_type(sae.sample_prefixes(2, 2), tuple[int, ...])
    assert_type(sae.auxiliary_k_loss(x, x, x, x, dead=x, k_aux=2), Tensor)
    assert_type(sae.batch_topk(x, k=2), Tensor)
    assert_type(
        sae.matryoshka_auxiliary_k_loss(x, x, x, x, x, prefixes=prefixes, dead=x, k_aux=2), Tensor
    )
    assert_type(sae.threshold_gate(x, x), Tensor)
    assert_type(sae.topk(x, k=2), sae.SparseLatents)
    assert_type(sae.topk_loss(x, x, x), sae.TopKTerms)
    assert_type(sae.vanilla_loss(x, x, x, sparsity_coeff=1.0), sae.VanillaTerms)


def modules(x: Tensor) -> None:
    assert_type(sae.CrosscoderObjective(sae.Crosscoder())(x, x, x, x), sae.CrosscoderTerms)
    assert_type(sae.EndToEndObjective(sae.EndToEnd())(x, x), sae.EndToEndTerms)
    assert_type(sae.GatedObjective(sae.Gated())(x, x, x, x, x), sae.GatedTerms)
    assert_type(sae.JumpReLUObjective(sae.JumpReLU())(x, x, x), sae.JumpReLUTerms)
    assert_type(sae.MatryoshkaObjective(sae.Matryoshka())(x, x, x, x), sae.MatryoshkaTerms)
    assert_type(sae.TopKObjective(sae.TopK())(x, x, x), sae.TopKTerms)
    assert_type(sae.VanillaObjective(sae.Vanilla())(x, x, x), sae.VanillaTerms)


def fields_of_crosscoder_terms(terms: sae.CrosscoderTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.mse_per_layer, Tensor)
    assert_type(terms.mse, Tensor)
    assert_type(terms.sparsity, Tensor)
    assert_type(terms.aux, Tensor)
    assert_type(terms.l0, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), sae.CrosscoderTerms)


def fields_of_end_to_end_terms(terms: sae.EndToEndTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.kl, Tensor)
    assert_type(terms.reconstruction, Tensor)
    assert_type(terms.sparsity, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), sae.EndToEndTerms)


def fields_of_gated_terms(terms: sae.GatedTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.mse, Tensor)
    assert_type(terms.sparsity, Tensor)
    assert_type(terms.aux, Tensor)
    assert_type(terms.l0, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), sae.GatedTerms)


def fields_of_jump_re_luterms(terms: sae.JumpReLUTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.mse, Tensor)
    assert_type(terms.sparsity, Tensor)
    assert_type(terms.pre_act, Tensor)
    assert_type(terms.l0, Tensor)
    assert_type(terms.threshold_mean, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), sae.JumpReLUTerms)


def fields_of_matryoshka_terms(terms: sae.MatryoshkaTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.mse, Tensor)
    assert_type(terms.mse_per_prefix, Tensor)
    assert_type(terms.sparsity, Tensor)
    assert_type(terms.aux, Tensor)
    assert_type(terms.l0, Tensor)
    assert_type(terms.l1, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), sae.MatryoshkaTerms)


def fields_of_top_kterms(terms: sae.TopKTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.mse, Tensor)
    assert_type(terms.aux, Tensor)
    assert_type(terms.l0, Tensor)
    assert_type(terms.n_dead, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), sae.TopKTerms)


def fields_of_vanilla_terms(terms: sae.VanillaTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.mse, Tensor)
    assert_type(terms.sparsity, Tensor)
    assert_type(terms.l0, Tensor)
    assert_type(terms.l1, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), sae.VanillaTerms)


def members_of_crosscoder(one: sae.Crosscoder) -> None:
    assert_type(one.sparsity_coeff, float)
    assert_type(one.aux_coeff, float)
    assert_type(one.decoder_norm, Literal["l1", "l2"])
    assert_type(one.feature_reduction, Literal["mean", "sum"])
    assert_type(one.grad_reduction, Literal["mean", "sum"])


def members_of_end_to_end(one: sae.EndToEnd) -> None:
    assert_type(one.kl_coeff, float)
    assert_type(one.reconstruction_coeff, float)
    assert_type(one.sparsity_coeff, float)
    assert_type(one.feature_reduction, Literal["mean", "sum"])
    assert_type(one.grad_reduction, Literal["mean", "sum"])


def members_of_gated(one: sae.Gated) -> None:
    assert_type(one.sparsity_coeff, float)
    assert_type(one.stop_decoder, bool)
    assert_type(one.feature_reduction, Literal["mean", "sum"])
    assert_type(one.grad_reduction, Literal["mean", "sum"])


def members_of_jump_re_lu(one: sae.JumpReLU) -> None:
    assert_type(one.sparsity_coeff, float)
    assert_type(one.bandwidth, float)
    assert_type(one.penalty, Literal["l0", "l0_relative", "tanh"])
    assert_type(one.l0_target, float | None)
    assert_type(one.tanh_scale, float)
    assert_type(one.pre_act_coeff, float)
    assert_type(one.input_gradient, bool)
    assert_type(one.threshold_gradient, Literal["latents", "gate"])
    assert_type(one.feature_reduction, Literal["mean", "sum"])
    assert_type(one.grad_reduction, Literal["mean", "sum"])


def members_of_matryoshka(one: sae.Matryoshka) -> None:
    assert_type(one.n_prefixes, int)
    assert_type(one.sparsity_coeff, float)
    assert_type(one.aux_coeff, float)
    assert_type(one.law, Literal["nabeshima", "saev"])
    assert_type(one.p, float)
    assert_type(one.feature_reduction, Literal["mean", "sum"])
    assert_type(one.grad_reduction, Literal["mean", "sum"])


def members_of_variance_statistics(one: sae.VarianceStatistics, x: Tensor) -> None:
    assert_type(one.count, Tensor)
    assert_type(one.sum, Tensor)
    assert_type(one.sum_of_squares, Tensor)
    assert_type(one.variance, Tensor)
    assert_type(sae.VarianceStatistics.of(x), sae.VarianceStatistics)
    assert_type(one.over_ranks(None), sae.VarianceStatistics)
    assert_type(one.fraction_unexplained(one), Tensor)


def members_of_sparse_latents(one: sae.SparseLatents, x: Tensor) -> None:
    assert_type(one.values, Tensor)
    assert_type(one.indices, Tensor)
    assert_type(one.dense(4), Tensor)
    assert_type(one.decode(x), Tensor)
    assert_type(one.fired(4), Tensor)


def members_of_activation_threshold(one: sae.ActivationThreshold, x: Tensor) -> None:
    assert_type(one.total, Tensor)
    assert_type(one.weight, Tensor)
    assert_type(one.value, Tensor)
    assert_type(sae.ActivationThreshold.start(), sae.ActivationThreshold)
    assert_type(one.update(x), sae.ActivationThreshold)


def members_of_dead_latents(one: sae.DeadLatents, x: Tensor) -> None:
    assert_type(one.tokens_since_fired, Tensor)
    assert_type(sae.DeadLatents.start(3), sae.DeadLatents)
    assert_type(one.update(x, 5), sae.DeadLatents)
    assert_type(one.dead(after=8), Tensor)


def members_of_top_k(one: sae.TopK) -> None:
    assert_type(one.aux_coeff, float)
    assert_type(one.feature_reduction, Literal["mean", "sum"])
    assert_type(one.grad_reduction, Literal["mean", "sum"])


def members_of_vanilla(one: sae.Vanilla) -> None:
    assert_type(one.sparsity_coeff, float)
    assert_type(one.p, float)
    assert_type(one.feature_reduction, Literal["mean", "sum"])
    assert_type(one.grad_reduction, Literal["mean", "sum"])
