"""Calls of `termwise.sae` that a type checker refuses. Never run."""

from collections.abc import Sequence

from torch import Tensor

from termwise import sae


def holder_crosscoder(one: sae.Crosscoder) -> None:
    print(one.sparsity_coeffs)  # error: reportAttributeAccessIssue: Cannot access attribute "sparsity_coeffs" for class "Crosscoder"
    sae.Crosscoder(sparsity_coeffs=1)  # error: reportCallIssue: No parameter named "sparsity_coeffs"


def module_crosscoder_objective(x: Tensor) -> None:
    sae.CrosscoderObjective()  # error: reportCallIssue: Argument missing for parameter "cfg"
    sae.CrosscoderObjective(sae.Crosscoder(), 1.0)  # error: reportCallIssue: Expected 1 positional argument
    sae.CrosscoderObjective(sae.Crosscoder())(x, x, x)  # error: reportCallIssue: Argument missing for parameter "W_dec"
    sae.CrosscoderObjective(sae.Crosscoder())(x, x, x, x, 1.0)  # error: reportCallIssue: Expected 4 positional arguments
    sae.CrosscoderObjective(sae.Crosscoder())(x, x, x, x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    sae.CrosscoderObjective(sae.Crosscoder())(x, x, x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "W_dec" of type "Tensor" in function "__call__"


def record_crosscoder_terms(terms: sae.CrosscoderTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "CrosscoderTerms"
    terms.l0 = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "l0" for class "CrosscoderTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "CrosscoderTerms"
    sae.CrosscoderTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "mse_per_layer", "mse", "sparsity", "aux", "l0"
    sae.CrosscoderTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_crosscoder_loss(x: Tensor) -> None:
    sae.crosscoder_loss(x, x, x, sparsity_coeff=1.0)  # error: reportCallIssue: Argument missing for parameter "W_dec"
    sae.crosscoder_loss(x, x, x, x, 1.0, sparsity_coeff=1.0)  # error: reportCallIssue: Expected 4 positional arguments
    sae.crosscoder_loss(x, x, x, x, sparsity_coeff=1.0, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    sae.crosscoder_loss(x, x, x, x, sparsity_coeff=1.0, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    sae.crosscoder_loss(x, x, x, "x", sparsity_coeff=1.0)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "W_dec" of type "Tensor"


def holder_end_to_end(one: sae.EndToEnd) -> None:
    print(one.kl_coeffs)  # error: reportAttributeAccessIssue: Cannot access attribute "kl_coeffs" for class "EndToEnd"
    sae.EndToEnd(kl_coeffs=1)  # error: reportCallIssue: No parameter named "kl_coeffs"


def module_end_to_end_objective(x: Tensor) -> None:
    sae.EndToEndObjective()  # error: reportCallIssue: Argument missing for parameter "cfg"
    sae.EndToEndObjective(sae.EndToEnd(), 1.0)  # error: reportCallIssue: Expected 1 positional argument
    sae.EndToEndObjective(sae.EndToEnd())(x)  # error: reportCallIssue: Argument missing for parameter "original_logits"
    sae.EndToEndObjective(sae.EndToEnd())(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    sae.EndToEndObjective(sae.EndToEnd())(x, x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    sae.EndToEndObjective(sae.EndToEnd())(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "original_logits" of type "Tensor" in function "__call__"


def record_end_to_end_terms(terms: sae.EndToEndTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "EndToEndTerms"
    terms.sparsity = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "sparsity" for class "EndToEndTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "EndToEndTerms"
    sae.EndToEndTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "kl", "reconstruction", "sparsity"
    sae.EndToEndTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_end_to_end_loss(x: Tensor) -> None:
    sae.end_to_end_loss(x)  # error: reportCallIssue: Argument missing for parameter "original_logits"
    sae.end_to_end_loss(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    sae.end_to_end_loss(x, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    sae.end_to_end_loss(x, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    sae.end_to_end_loss(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "original_logits" of type "Tensor"


def holder_gated(one: sae.Gated) -> None:
    print(one.sparsity_coeffs)  # error: reportAttributeAccessIssue: Cannot access attribute "sparsity_coeffs" for class "Gated"
    sae.Gated(sparsity_coeffs=1)  # error: reportCallIssue: No parameter named "sparsity_coeffs"


def module_gated_objective(x: Tensor) -> None:
    sae.GatedObjective()  # error: reportCallIssue: Argument missing for parameter "cfg"
    sae.GatedObjective(sae.Gated(), 1.0)  # error: reportCallIssue: Expected 1 positional argument
    sae.GatedObjective(sae.Gated())(x, x, x, x)  # error: reportCallIssue: Argument missing for parameter "W_dec"
    sae.GatedObjective(sae.Gated())(x, x, x, x, x, 1.0, 1.0)  # error: reportCallIssue: Expected 6 positional arguments
    sae.GatedObjective(sae.Gated())(x, x, x, x, x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    sae.GatedObjective(sae.Gated())(x, x, x, x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "W_dec" of type "Tensor" in function "__call__"


def record_gated_terms(terms: sae.GatedTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "GatedTerms"
    terms.l0 = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "l0" for class "GatedTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "GatedTerms"
    sae.GatedTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "mse", "sparsity", "aux", "l0"
    sae.GatedTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_gated_loss(x: Tensor) -> None:
    sae.gated_loss(x, x, x, x, sparsity_coeff=1.0)  # error: reportCallIssue: Argument missing for parameter "W_dec"
    sae.gated_loss(x, x, x, x, x, 1.0, 1.0, sparsity_coeff=1.0)  # error: reportCallIssue: Expected 6 positional arguments
    sae.gated_loss(x, x, x, x, x, sparsity_coeff=1.0, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    sae.gated_loss(x, x, x, x, x, sparsity_coeff=1.0, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    sae.gated_loss(x, x, x, x, "x", sparsity_coeff=1.0)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "W_dec" of type "Tensor"


def holder_jump_re_lu(one: sae.JumpReLU) -> None:
    print(one.sparsity_coeffs)  # error: reportAttributeAccessIssue: Cannot access attribute "sparsity_coeffs" for class "JumpReLU"
    sae.JumpReLU(sparsity_coeffs=1)  # error: reportCallIssue: No parameter named "sparsity_coeffs"


def module_jump_re_luobjective(x: Tensor) -> None:
    sae.JumpReLUObjective()  # error: reportCallIssue: Argument missing for parameter "cfg"
    sae.JumpReLUObjective(sae.JumpReLU(), 1.0)  # error: reportCallIssue: Expected 1 positional argument
    sae.JumpReLUObjective(sae.JumpReLU())(x, x)  # error: reportCallIssue: Argument missing for parameter "W_dec"
    sae.JumpReLUObjective(sae.JumpReLU())(x, x, x, 1.0, 1.0)  # error: reportCallIssue: Expected 4 positional arguments
    sae.JumpReLUObjective(sae.JumpReLU())(x, x, x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    sae.JumpReLUObjective(sae.JumpReLU())(x, x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "W_dec" of type "Tensor" in function "__call__"


def record_jump_re_luterms(terms: sae.JumpReLUTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "JumpReLUTerms"
    terms.threshold_mean = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "threshold_mean" for class "JumpReLUTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "JumpReLUTerms"
    sae.JumpReLUTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "mse", "sparsity", "pre_act", "l0", "threshold_mean"
    sae.JumpReLUTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_jumprelu(x: Tensor) -> None:
    sae.jumprelu(x)  # error: reportCallIssue: Argument missing for parameter "threshold"
    sae.jumprelu(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    sae.jumprelu(x, x, input_gradietn=None)  # error: reportCallIssue: No parameter named "input_gradietn"
    sae.jumprelu(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "threshold" of type "Tensor"


def calls_of_jumprelu_l0(x: Tensor) -> None:
    sae.jumprelu_l0(x)  # error: reportCallIssue: Argument missing for parameter "threshold"
    sae.jumprelu_l0(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    sae.jumprelu_l0(x, x, input_gradietn=None)  # error: reportCallIssue: No parameter named "input_gradietn"
    sae.jumprelu_l0(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "threshold" of type "Tensor"


def calls_of_jumprelu_loss(x: Tensor) -> None:
    sae.jumprelu_loss(x, x, sparsity_coeff=1.0)  # error: reportCallIssue: Argument missing for parameter "W_dec"
    sae.jumprelu_loss(x, x, x, 1.0, 1.0, sparsity_coeff=1.0)  # error: reportCallIssue: Expected 4 positional arguments
    sae.jumprelu_loss(x, x, x, sparsity_coeff=1.0, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    sae.jumprelu_loss(x, x, x, sparsity_coeff=1.0, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    sae.jumprelu_loss(x, x, "x", sparsity_coeff=1.0)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "W_dec" of type "Tensor"
    sae.jumprelu_loss(x, x, x, sparsity_coeff=1.0, dead="some")  # error: reportArgumentType: Argument of type "Literal['some']" cannot be assigned to parameter "dead" of type "Tensor | Literal['all'] | None"


def holder_matryoshka(one: sae.Matryoshka) -> None:
    print(one.n_prefixse)  # error: reportAttributeAccessIssue: Cannot access attribute "n_prefixse" for class "Matryoshka"
    sae.Matryoshka(n_prefixse=1)  # error: reportCallIssue: No parameter named "n_prefixse"


def module_matryoshka_objective(x: Tensor) -> None:
    sae.MatryoshkaObjective()  # error: reportCallIssue: Argument missing for parameter "cfg"
    sae.MatryoshkaObjective(sae.Matryoshka(), 1.0)  # error: reportCallIssue: Expected 1 positional argument
    sae.MatryoshkaObjective(sae.Matryoshka())(x, x, x)  # error: reportCallIssue: Argument missing for parameter "b_dec"
    sae.MatryoshkaObjective(sae.Matryoshka())(x, x, x, x, 1.0)  # error: reportCallIssue: Expected 4 positional arguments
    sae.MatryoshkaObjective(sae.Matryoshka())(x, x, x, x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    sae.MatryoshkaObjective(sae.Matryoshka())(x, x, x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "b_dec" of type "Tensor | None" in function "__call__"


def record_matryoshka_terms(terms: sae.MatryoshkaTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "MatryoshkaTerms"
    terms.l1 = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "l1" for class "MatryoshkaTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "MatryoshkaTerms"
    sae.MatryoshkaTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "mse", "mse_per_prefix", "sparsity", "aux", "l0", "l1"
    sae.MatryoshkaTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_matryoshka_loss(prefixes: Sequence[int], x: Tensor) -> None:
    sae.matryoshka_loss(x, x, x, prefixes=prefixes)  # error: reportCallIssue: Argument missing for parameter "b_dec"
    sae.matryoshka_loss(x, x, x, x, 1.0, prefixes=prefixes)  # error: reportCallIssue: Expected 4 positional arguments
    sae.matryoshka_loss(x, x, x, x, prefixes=prefixes, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    sae.matryoshka_loss(x, x, x, x, prefixes=prefixes, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    sae.matryoshka_loss(x, x, x, "x", prefixes=prefixes)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "b_dec" of type "Tensor | None"


def holder_variance_statistics(one: sae.VarianceStatistics) -> None:
    print(one.coutn)  # error: reportAttributeAccessIssue: Cannot access attribute "coutn" for class "VarianceStatistics"
    sae.VarianceStatistics(coutn=1)  # error: reportCallIssue: Arguments missing for parameters "count", "sum", "sum_of_squares"


def calls_of_cosine_similarity(x: Tensor) -> None:
    sae.cosine_similarity(x)  # error: reportCallIssue: Argument missing for parameter "x_hat"
    sae.cosine_similarity(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    sae.cosine_similarity(x, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    sae.cosine_similarity(x, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    sae.cosine_similarity(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x_hat" of type "Tensor"


def calls_of_explained_variance(x: Tensor) -> None:
    sae.explained_variance(x)  # error: reportCallIssue: Argument missing for parameter "x_hat"
    sae.explained_variance(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    sae.explained_variance(x, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    sae.explained_variance(x, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    sae.explained_variance(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x_hat" of type "Tensor"


def calls_of_fraction_of_variance_unexplained(x: Tensor) -> None:
    sae.fraction_of_variance_unexplained(x)  # error: reportCallIssue: Argument missing for parameter "x_hat"
    sae.fraction_of_variance_unexplained(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    sae.fraction_of_variance_unexplained(x, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    sae.fraction_of_variance_unexplained(x, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    sae.fraction_of_variance_unexplained(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x_hat" of type "Tensor"


def calls_of_loss_recovered(x: Tensor) -> None:
    sae.loss_recovered(x, x)  # error: reportCallIssue: Argument missing for parameter "ablated_loss"
    sae.loss_recovered(x, x, x, 1.0)  # error: reportCallIssue: Expected 3 positional arguments
    sae.loss_recovered(x, x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "ablated_loss" of type "Tensor"


def calls_of_mean_squared_err(x: Tensor) -> None:
    sae.mean_squared_err(x)  # error: reportCallIssue: Argument missing for parameter "x"
    sae.mean_squared_err(x, x, 1.0, 1.0)  # error: reportCallIssue: Expected 3 positional arguments
    sae.mean_squared_err(x, x, nomr=None)  # error: reportCallIssue: No parameter named "nomr"
    sae.mean_squared_err(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x" of type "Tensor"


def calls_of_normalized_mse(x: Tensor) -> None:
    sae.normalized_mse(x)  # error: reportCallIssue: Argument missing for parameter "x_hat"
    sae.normalized_mse(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    sae.normalized_mse(x, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    sae.normalized_mse(x, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    sae.normalized_mse(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x_hat" of type "Tensor"


def calls_of_get_objective() -> None:
    sae.get_objective()  # error: reportCallIssue: No overloads for "get_objective" match the provided arguments
    sae.get_objective(sae.Vanilla(), 1.0)  # error: reportCallIssue: No overloads for "get_objective" match the provided arguments


def calls_of_lp_penalty(x: Tensor) -> None:
    sae.lp_penalty(p=1.0)  # error: reportCallIssue: Argument missing for parameter "f"
    sae.lp_penalty(x, 1.0, p=1.0)  # error: reportCallIssue: Expected 1 positional argument
    sae.lp_penalty(x, p=1.0, decoder_nomr=None)  # error: reportCallIssue: No parameter named "decoder_nomr"
    sae.lp_penalty("x", p=1.0)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "f" of type "Tensor | SparseLatents"


def calls_of_tanh_penalty(x: Tensor) -> None:
    sae.tanh_penalty()  # error: reportCallIssue: Argument missing for parameter "f"
    sae.tanh_penalty(x, 1.0)  # error: reportCallIssue: Expected 1 positional argument
    sae.tanh_penalty(x, decoder_nomr=None)  # error: reportCallIssue: No parameter named "decoder_nomr"
    sae.tanh_penalty("x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "f" of type "Tensor | SparseLatents"


def calls_of_sample_prefixes() -> None:
    sae.sample_prefixes(2)  # error: reportCallIssue: Argument missing for parameter "n"
    sae.sample_prefixes(2, 2, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    sae.sample_prefixes(2, 2, generatro=None)  # error: reportCallIssue: No parameter named "generatro"
    sae.sample_prefixes(2, 2, law="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "law" of type "PrefixLaw"


def holder_sparse_latents(one: sae.SparseLatents) -> None:
    print(one.valuse)  # error: reportAttributeAccessIssue: Cannot access attribute "valuse" for class "SparseLatents"
    sae.SparseLatents(valuse=1)  # error: reportCallIssue: Arguments missing for parameters "values", "indices"


def holder_activation_threshold(one: sae.ActivationThreshold) -> None:
    print(one.totla)  # error: reportAttributeAccessIssue: Cannot access attribute "totla" for class "ActivationThreshold"
    sae.ActivationThreshold(totla=1)  # error: reportCallIssue: Arguments missing for parameters "total", "weight"


def holder_dead_latents(one: sae.DeadLatents) -> None:
    print(one.tokens_since_firde)  # error: reportAttributeAccessIssue: Cannot access attribute "tokens_since_firde" for class "DeadLatents"
    sae.DeadLatents(tokens_since_firde=1)  # error: reportCallIssue: Argument missing for parameter "tokens_since_fired"


def holder_top_k(one: sae.TopK) -> None:
    print(one.aux_coeffs)  # error: reportAttributeAccessIssue: Cannot access attribute "aux_coeffs" for class "TopK"
    sae.TopK(aux_coeffs=1)  # error: reportCallIssue: No parameter named "aux_coeffs"


def module_top_kobjective(x: Tensor) -> None:
    sae.TopKObjective()  # error: reportCallIssue: Argument missing for parameter "cfg"
    sae.TopKObjective(sae.TopK(), 1.0)  # error: reportCallIssue: Expected 1 positional argument
    sae.TopKObjective(sae.TopK())(x, x)  # error: reportCallIssue: Argument missing for parameter "x_hat"
    sae.TopKObjective(sae.TopK())(x, x, x, 1.0)  # error: reportCallIssue: Expected 3 positional arguments
    sae.TopKObjective(sae.TopK())(x, x, x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    sae.TopKObjective(sae.TopK())(x, x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x_hat" of type "Tensor" in function "__call__"


def record_top_kterms(terms: sae.TopKTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "TopKTerms"
    terms.n_dead = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "n_dead" for class "TopKTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "TopKTerms"
    sae.TopKTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "mse", "aux", "l0", "n_dead"
    sae.TopKTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_auxiliary_k_loss(x: Tensor) -> None:
    sae.auxiliary_k_loss(x, x, x, dead=x, k_aux=2)  # error: reportCallIssue: Argument missing for parameter "W_dec"
    sae.auxiliary_k_loss(x, x, x, x, 1.0, dead=x, k_aux=2)  # error: reportCallIssue: Expected 4 positional arguments
    sae.auxiliary_k_loss(x, x, x, x, dead=x, k_aux=2, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    sae.auxiliary_k_loss(x, x, x, x, dead=x, k_aux=2, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    sae.auxiliary_k_loss(x, x, x, "x", dead=x, k_aux=2)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "W_dec" of type "Tensor"


def calls_of_batch_topk(x: Tensor) -> None:
    sae.batch_topk(k=2)  # error: reportCallIssue: Argument missing for parameter "pre"
    sae.batch_topk(x, 1.0, k=2)  # error: reportCallIssue: Expected 1 positional argument
    sae.batch_topk(x, k=2, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    sae.batch_topk("x", k=2)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "pre" of type "Tensor"


def calls_of_matryoshka_auxiliary_k_loss(x: Tensor) -> None:
    sae.matryoshka_auxiliary_k_loss(x, x, x, x, prefixes=[1], dead=x, k_aux=2)  # error: reportCallIssue: Argument missing for parameter "b_dec"
    sae.matryoshka_auxiliary_k_loss(x, x, x, x, x, 1.0, prefixes=[1], dead=x, k_aux=2)  # error: reportCallIssue: Expected 5 positional arguments
    sae.matryoshka_auxiliary_k_loss(x, x, x, x, x, prefixes=[1], dead=x, k_aux=2, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    sae.matryoshka_auxiliary_k_loss(x, x, x, x, x, prefixes=[1], dead=x, k_aux=2, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    sae.matryoshka_auxiliary_k_loss(x, x, x, x, "x", prefixes=[1], dead=x, k_aux=2)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "b_dec" of type "Tensor | None"


def calls_of_threshold_gate(x: Tensor) -> None:
    sae.threshold_gate(x)  # error: reportCallIssue: Argument missing for parameter "threshold"
    sae.threshold_gate(x, x, 1.0)  # error: reportCallIssue: Expected 2 positional arguments
    sae.threshold_gate(x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "threshold" of type "float | Tensor"


def calls_of_topk(x: Tensor) -> None:
    sae.topk(k=2)  # error: reportCallIssue: Argument missing for parameter "pre"
    sae.topk(x, 1.0, k=2)  # error: reportCallIssue: Expected 1 positional argument
    sae.topk("x", k=2)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "pre" of type "Tensor"


def calls_of_topk_loss(x: Tensor) -> None:
    sae.topk_loss(x, x)  # error: reportCallIssue: Argument missing for parameter "x_hat"
    sae.topk_loss(x, x, x, 1.0)  # error: reportCallIssue: Expected 3 positional arguments
    sae.topk_loss(x, x, x, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    sae.topk_loss(x, x, x, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    sae.topk_loss(x, x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x_hat" of type "Tensor"


def holder_vanilla(one: sae.Vanilla) -> None:
    print(one.sparsity_coeffs)  # error: reportAttributeAccessIssue: Cannot access attribute "sparsity_coeffs" for class "Vanilla"
    sae.Vanilla(sparsity_coeffs=1)  # error: reportCallIssue: No parameter named "sparsity_coeffs"


def module_vanilla_objective(x: Tensor) -> None:
    sae.VanillaObjective()  # error: reportCallIssue: Argument missing for parameter "cfg"
    sae.VanillaObjective(sae.Vanilla(), 1.0)  # error: reportCallIssue: Expected 1 positional argument
    sae.VanillaObjective(sae.Vanilla())(x, x)  # error: reportCallIssue: Argument missing for parameter "x_hat"
    sae.VanillaObjective(sae.Vanilla())(x, x, x, 1.0)  # error: reportCallIssue: Expected 3 positional arguments
    sae.VanillaObjective(sae.Vanilla())(x, x, x, batch_gropu=None)  # error: reportCallIssue: No parameter named "batch_gropu"
    sae.VanillaObjective(sae.Vanilla())(x, x, "x")  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x_hat" of type "Tensor" in function "__call__"


def record_vanilla_terms(terms: sae.VanillaTerms, x: Tensor) -> None:
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss" for class "VanillaTerms"
    terms.l1 = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "l1" for class "VanillaTerms"
    print(terms.lost)  # error: reportAttributeAccessIssue: Cannot access attribute "lost" for class "VanillaTerms"
    sae.VanillaTerms(loss=x)  # error: reportCallIssue: Arguments missing for parameters "mse", "sparsity", "l0", "l1"
    sae.VanillaTerms(x)  # error: reportCallIssue: Expected 0 positional arguments


def calls_of_vanilla_loss(x: Tensor) -> None:
    sae.vanilla_loss(x, x, sparsity_coeff=1.0)  # error: reportCallIssue: Argument missing for parameter "x_hat"
    sae.vanilla_loss(x, x, x, 1.0, sparsity_coeff=1.0)  # error: reportCallIssue: Expected 3 positional arguments
    sae.vanilla_loss(x, x, x, sparsity_coeff=1.0, grad_reductino=None)  # error: reportCallIssue: No parameter named "grad_reductino"
    sae.vanilla_loss(x, x, x, sparsity_coeff=1.0, grad_reduction="none of these")  # error: reportArgumentType: Argument of type "Literal['none of these']" cannot be assigned to parameter "grad_reduction" of type "GradReduction"
    sae.vanilla_loss(x, x, "x", sparsity_coeff=1.0)  # error: reportArgumentType: Argument of type "Literal['x']" cannot be assigned to parameter "x_hat" of type "Tensor"
