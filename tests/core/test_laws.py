"""The test kit's laws over every public function that has a contract.

A function is here from the moment it is exported. `LAWS` says what a law cannot know: which sizes
make sense, the weights of the terms, over which axes ranks share the data. Without an entry a
function is called as its annotations alone allow.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from exports import EXPORTS, FUNCTIONS
from hypothesis import strategies as st
from jaxtyping import Bool, Float
from torch import Tensor

import termwise as tw
from termwise import energy, groups, lm, sae, testing


@dataclasses.dataclass(frozen=True)
class Laws:
    """What the laws are told of a function."""

    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    elements: dict[str, Any] = dataclasses.field(default_factory=dict)
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: dict[str, Any] | None = None
    """Of the terms, for a function that returns some."""
    terms: dict[str, Any] = dataclasses.field(default_factory=dict)
    """More for `assert_terms_sum`."""
    permuted: tuple[str, ...] = ("batch",)
    """Axes along which the order does not matter."""
    shards: dict[str, tuple[Any, dict[str, Any]] | None] = dataclasses.field(default_factory=dict)
    """For each group argument the axis that ranks share, and more for `assert_sharding`. None: no
    axis tells how to cut (ranks hold their own part of a projection or a teacher, or parts of one
    shape); tests/distributed holds those."""
    ignores: tuple[str, ...] = ()
    """Arguments of which a NaN need not reach the result."""
    more: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """More overrides, by law: so that every element counts, say."""
    large: float = 1e3
    """How large numbers are tried for finite results."""
    by: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Which tensors a law differentiates by or maps over, where not by all floating ones."""
    not_held: dict[str, str] = dataclasses.field(default_factory=dict)
    """Laws that do not hold, with a pattern of what they say: there is a reason beside it."""

    @property
    def inputs(self) -> testing.Inputs:
        return {"sizes": self.sizes, "elements": self.elements, "overrides": self.overrides}


def bowl(x: Tensor) -> Tensor:
    """An energy of events of any shape, not quadratic, that couples the elements of a row."""
    flat = x.flatten(1) if x.ndim > 1 else x[:, None]
    return (flat.square() / 2 - flat.cos() + 0.3 * flat * flat.roll(1, 1)).sum(1)


def rows_of_indices(sizes: dict[str, Any]) -> st.SearchStrategy[Tensor]:
    """Draw k latents of each row, none twice."""
    latents, k, batch = sizes.get("d_sae", sizes["k"]), sizes["k"], sizes["batch"]
    row = st.permutations(range(latents)).map(lambda order: order[:k])
    rows = st.lists(row, min_size=batch, max_size=batch)
    return rows.map(lambda drawn: torch.tensor(drawn, dtype=torch.int64).reshape(batch, k))


POSITIVE = st.integers(1, 64).map(lambda n: n / 32)
SHARES = st.integers(1, 31).map(lambda n: n / 32)
GROUPS = {"batch_group": ("batch", {})}
PROJECTIONS = {"projections": Float[Tensor, "projections batch *event"]}
LATENTS = {"d_sae": st.integers(2, 4), "k": st.integers(1, 2), "batch": st.integers(2, 4)}
SPARSE = {"f.indices": rows_of_indices}
SPLIT = {"mse": 1.0, "sparsity": 1.0}
# At p < 1 the penalty's gradient is infinite where a latent is 0.
POWERS = {"p": st.sampled_from((1.0, 2.0))}
# Rows without variance have none to explain: 0 / 0.
UNDEFINED = {"assert_finite": r"is \[?(nan|inf|-inf)"}
NO_GRADIENT = {"assert_gradients": "no part of what"}
NO_NUMBERS = {**NO_GRADIENT, "assert_vmaps": "no floating tensor"}
MEASURED = Laws(
    {"batch": st.integers(2, 4)},
    overrides={"mask": None},  # one that leaves no row leaves nothing to measure
    shards=GROUPS,
    not_held=UNDEFINED,
)
# The variance of the data has no gradient.
OF_VARIANCE = dataclasses.replace(MEASURED, by={"assert_gradients": ("x_hat",)})


# A mask that leaves no row leaves a mean of nothing: its gradient is 0, its differences are NaN.
EVERY_ROW = {"assert_gradients": {"mask": None}}


def of_latents(**more: Any) -> Laws:
    overrides = {**SPARSE, **more.pop("overrides", {})}
    # Sparse latents may leave a row of the decoder out.
    ignores = ("W_dec", "decoder_norm", *more.pop("ignores", ()))
    shards = more.pop("shards", GROUPS)
    return Laws(LATENTS, overrides=overrides, ignores=ignores, shards=shards, **more)


AUXILIARY = of_latents(
    overrides={"k_aux": 1, "detach_residual": True},
    more={"assert_finite": {"dead": lambda sizes: torch.ones(sizes["d_sae"]).bool()}},
    by={"assert_gradients": ("pre", "W_dec")},  # the residual is a target
    ignores=("pre",),
)


def of_energy(weights: dict[str, Any] | None, **more: Any) -> Laws:
    overrides = {
        "energy": bowl,
        "regularization": None,
        "differentiation": "auto",
        **more.pop("overrides", {}),
    }
    return Laws(
        sizes={"event": st.sampled_from([(2,), (), (2, 2)]), "batch": st.integers(2, 4)},
        overrides=overrides,
        elements={"weights": POSITIVE, "time": SHARES, "uniform": SHARES},
        weights=weights,
        shards=more.pop("shards", GROUPS),
        **more,
    )


def minus(argument: str) -> Callable[[testing.Call], float]:
    return lambda call: -call[argument]


def squared_temperature(call: testing.Call) -> float:
    return call["temperature"] ** 2


PROJECTION = lm.VocabProjection.from_pairs(
    {(0, 0): 1.0, (1, 1): 1.0, (2, 1): 0.5, (2, 2): 0.5, (3, 3): 1.0, (4, 4): 1.0},
    student_vocab=5,
    teacher_vocab=5,
)
PARTITION = lm.vocab_partition(PROJECTION, rule="strict")
CHUNKS = {
    "chunks": 2,
    "student_time": st.integers(2, 3),
    "teacher_time": st.integers(2, 3),
    "student_vocab": 5,
    "teacher_vocab": 5,
    "batch": st.integers(1, 3),
}
NORMALIZER = {"normalizer": st.sampled_from((None, 2.0))}


def some_tokens(axis: str) -> Callable[[dict[str, Any]], st.SearchStrategy[int]]:
    return lambda sizes: st.integers(-1, sizes[axis] - 1)


CHUNK_IDS = {
    "alignment.student_chunk_id": st.integers(-1, 1),
    "alignment.teacher_chunk_id": st.integers(-1, 1),
}


def zeros(sizes: dict[str, Any]) -> Tensor:
    return torch.zeros(sizes["batch"], sizes["time"]).long()


def all_aligned(sizes: dict[str, Any]) -> lm.Alignment:
    """One chunk to a sample, of all its tokens."""
    batch = sizes["batch"]
    ids = (torch.zeros(batch, sizes[axis]).long() for axis in ("student_time", "teacher_time"))
    valid = torch.ones(batch, 1, dtype=torch.bool)
    return lm.Alignment(*ids, valid, valid)


def of_chunks(weights: dict[str, Any], **more: Any) -> Laws:
    return Laws(
        sizes=CHUNKS,
        elements=CHUNK_IDS,
        overrides={
            "projection": PROJECTION,
            "partition": PARTITION,
            "teacher_columns": None,
            "student_vocab": None,
            "columns_top_k": None,
            **NORMALIZER,
            **more.pop("overrides", {}),
        },
        weights=weights,
        shards={
            "batch_group": ("batch", {}),
            "vocab_group": more.pop("vocab", None),
            "sequence_group": (("student_time", "teacher_time"), {"grad_reduction": "sum"}),
        },
        more={"assert_finite": {"alignment": all_aligned}},
        # The teacher has no gradient.
        by={"assert_gradients": more.pop("by", ("student_logits",))},
        ignores=("projection.student_weights", "projection.teacher_weights"),  # of some columns
        # The reverse divergence from a probability that is 0 in float32 is infinite.
        large=5,
        **more,
    )


LOGITS_GROUPS = {
    "batch_group": ("batch", {}),
    "vocab_group": ("vocab", {"grad_reduction": "sum"}),
    "sequence_group": ("time", {"grad_reduction": "sum"}),
}
TEXT = {"time": st.integers(2, 3), "vocab": st.integers(2, 4)}


def two_teachers(sizes: dict[str, Any]) -> tuple[lm.Teacher, ...]:
    """One teacher with the student's tokenizer, and one with another."""
    batch, time, vocab = sizes["batch"], sizes["time"], sizes["vocab"]
    logits = torch.sin(torch.arange(float(batch * time * vocab))).reshape(batch, time, vocab)
    ids = (torch.arange(time) // 2).clamp(max=1).expand(batch, time).clone()
    valid = torch.ones(batch, 2, dtype=torch.bool)
    aligned = lm.Alignment(ids, ids, valid, valid)
    return lm.Teacher(logits), lm.Teacher(logits.flip(2), aligned, weight=0.5)


LAWS: dict[Callable[..., Any], Laws] = {
    tw.joint_embedding.vicreg_loss: Laws(
        sizes={"batch": st.integers(2, 4)},
        weights={"sim": "sim_weight", "var": "var_weight", "cov": "cov_weight"},
        permuted=("batch", "dim"),
        shards=GROUPS,
        # The path that exchanges rows and columns; test_losses_over_ranks.py tries every path.
        more={"assert_sharding": {"covariance_path": "gram"}},
    ),
    sae.vanilla_loss: of_latents(
        overrides=POWERS, weights=SPLIT, terms={"also_in_graph": ["l1"]}, more=EVERY_ROW
    ),
    sae.topk_loss: of_latents(
        overrides={"dead": Bool[Tensor, " d_sae"]},
        weights={"mse": 1.0, "aux": "aux_coeff"},
        ignores=("f", "f.values"),  # only counted
        more=EVERY_ROW,
    ),
    sae.jumprelu_loss: of_latents(
        overrides={
            "penalty": st.sampled_from(("l0", "tanh")),
            "l0_target": None,
            "dead": Bool[Tensor, " d_sae"],
            "log_threshold": None,
            "threshold": Float[Tensor, " d_sae"],
            "f": None,  # which have to go together; test_jumprelu.py gives them
            "x_hat": None,
        },
        weights={**SPLIT, "pre_act": "pre_act_coeff"},
        # A kernel estimates those by pre and threshold.
        by={"assert_gradients": ("x", "W_dec", "b_dec", "target")},
        more=EVERY_ROW,
    ),
    sae.jumprelu: of_latents(
        shards={},
        by={"assert_gradients": ("pre",)},
        more={"assert_gradients": {"input_gradient": False}},
    ),
    # A count, whose only gradient is the kernel's estimate; here every element is in its window.
    sae.jumprelu_l0: of_latents(
        shards={},
        more={"assert_gradients": {"bandwidth": 64.0}},
        not_held={"assert_gradients": r"gradient by (pre|threshold) is"},
    ),
    sae.gated_loss: of_latents(
        weights={**SPLIT, "aux": 1.0},
        overrides={"stop_decoder": False, "b_dec": None},
        ignores=("f", "f.values"),  # only counted
        more=EVERY_ROW,
    ),
    sae.matryoshka_loss: of_latents(
        overrides={**POWERS, "prefixes": lambda sizes: (1, sizes["d_sae"]), "weights": None},
        weights={**SPLIT, "aux": "aux_coeff"},
        terms={"also_in_graph": ["mse_per_prefix", "l1"]},
        more=EVERY_ROW,
    ),
    sae.crosscoder_loss: of_latents(
        weights={**SPLIT, "aux": "aux_coeff"},
        terms={"also_in_graph": ["mse_per_layer"]},
        more=EVERY_ROW,
    ),
    sae.end_to_end_loss: of_latents(
        overrides={"x": None, "x_hat": None},
        weights={"kl": "kl_coeff", "reconstruction": "reconstruction_coeff", "sparsity": 1.0},
        by={"assert_gradients": ("logits", "f", "f.values")},  # the original model has none
        more=EVERY_ROW,
    ),
    sae.auxiliary_k_loss: AUXILIARY,
    sae.matryoshka_auxiliary_k_loss: dataclasses.replace(
        AUXILIARY,
        overrides={**AUXILIARY.overrides, "prefixes": lambda sizes: (1, sizes["d_sae"])},
        by={"assert_gradients": ("pre",)},  # W_dec is in the residual too, which is a target
        ignores=(*AUXILIARY.ignores, "f", "f.values", "b_dec"),
    ),
    sae.batch_topk: of_latents(
        overrides={"k": 1},
        ignores=("pre", "score"),
        # The latents are each rank's own part, whose gradient a sum over parts cannot compare.
        shards={"batch_group": None},
    ),
    sae.topk: of_latents(overrides={"k": st.integers(1, 2)}, shards={}, ignores=("pre", "score")),
    sae.threshold_gate: of_latents(
        shards={},
        by={"assert_gradients": ("pre",)},
    ),
    sae.lp_penalty: of_latents(overrides=POWERS, shards={}),
    sae.tanh_penalty: of_latents(shards={}),
    sae.cosine_similarity: Laws(shards=GROUPS, overrides={"mask": None}),
    sae.explained_variance: OF_VARIANCE,
    sae.fraction_of_variance_unexplained: OF_VARIANCE,
    sae.normalized_mse: MEASURED,
    sae.loss_recovered: Laws(permuted=(), not_held=UNDEFINED),
    sae.mean_squared_err: Laws(permuted=(), not_held=UNDEFINED),
    energy.maximum_likelihood_loss: of_energy(
        {
            "energy_data": 1.0,
            "energy_model": minus("negative_weight"),
            "regularization": "regularization_weight",
        },
        by={"assert_gradients": ("x",)},  # the negatives are samples, and have none
    ),
    energy.contrastive_divergence_loss: of_energy(
        {
            "energy_data": 1.0,
            "energy_model": minus("negative_weight"),
            "energy_squares": "energy_square_weight",
            "regularization": "regularization_weight",
        },
        overrides={"negatives": Float[Tensor, "negatives *event"]},
        by={"assert_gradients": ("x",)},
    ),
    energy.contrastive_divergence_kl_term: of_energy(
        {"energy": 1.0, "entropy": minus("entropy_weight")},
        overrides={"neighbours": Float[Tensor, "neighbours *event"]},
        by={"assert_gradients": ("samples",)},  # the others are where they are
        # Equal samples have an entropy of minus infinity.
        not_held={"assert_finite": "is (inf|nan|-inf)"},
    ),
    energy.noise_contrastive_loss: of_energy(
        {"data": 1.0, "noise": 1.0}, shards={"batch_group": (("batch", "noise"), {})}
    ),
    energy.ranking_noise_contrastive_loss: of_energy({"data": 1.0, "normalizer": 1.0}),
    energy.conditional_noise_contrastive_loss: of_energy(
        {"classification": 2.0},
        overrides=dict.fromkeys(("log_forward", "log_backward"), Float[Tensor, "noises batch"]),
    ),
    energy.energy_discrepancy_loss: of_energy(
        {}, overrides={"noise": Float[Tensor, "{copies}+1 batch *event"]}
    ),
    energy.score_matching_loss: of_energy({"score_square": 0.5, "laplacian": -1.0}),
    energy.sliced_score_matching_loss: of_energy(
        {"score_square": 0.5, "curvature": -1.0}, overrides=PROJECTIONS
    ),
    energy.finite_difference_score_matching_loss: of_energy(
        {"score_square": 0.5, "curvature": -1.0}, overrides=PROJECTIONS
    ),
    energy.denoising_score_matching_loss: of_energy(
        {"score_square": 0.5, "cross": -1.0, "noise_square": 0.5},
        overrides={
            "sigma": st.sampled_from((0.5, 2.0)),
            "weighting": st.sampled_from(("none", "sigma2")),
            "noise": Float[Tensor, "batch *event"],
        },
        terms={"also_in_graph": ["per_sigma"]},
    ),
    energy.flow_matching_loss: of_energy(
        {"velocity_square": 1.0, "cross": 1.0, "target_square": 1.0},
        overrides={"sigma_min": 0.25},
    ),
    energy.equilibrium_matching_loss: of_energy(
        {"gradient_square": 1.0, "cross": 1.0, "target_square": 1.0},
        overrides={"cutoff": st.sampled_from((0.25, 0.5))},
    ),
    energy.energy_matching_loss: of_energy(
        {"flow": 1.0, "contrast": "contrastive_weight"},
        overrides={"cutoff": st.sampled_from((0.25, 1.0))},
        by={"assert_gradients": ("x0", "x1")},
    ),
    energy.energy_square_penalty: of_energy({}),
    energy.gradient_penalty: of_energy({}),
    energy.hessian_trace: of_energy(None, shards={}),
    energy.langevin: of_energy(
        None,
        overrides={
            "adjust": "metropolis",
            "noise_scale": None,
            "noise": Float[Tensor, "{steps} batch *event"],
            "uniform": Float[Tensor, "{steps} batch"],
            "differentiable_steps": 0,
            "generator": None,
            "steps": st.integers(1, 2),
        },
        shards={},
        not_held=NO_GRADIENT,  # only by the energy's parameters
        ignores=("noise", "uniform"),  # of a step that is not taken
    ),
    # test_groups_over_ranks.py holds these: what ranks hold has the same shape, nothing is cut.
    groups.sum_over_ranks: Laws(permuted=(), shards={"group": None}),
    groups.sum_over_ranks_both_ways: Laws(permuted=(), shards={"group": None}),
    groups.mean_over_ranks: Laws(
        {"rows": st.integers(1, 4)},
        permuted=("rows",),
        shards={"group": ("rows", {})},
        more={"assert_finite": {"mask": None}, "assert_gradients": {"mask": None}},
    ),
    groups.count_over_ranks: Laws(
        permuted=(), shards={"group": None}, ignores=("rows",), not_held=NO_GRADIENT
    ),
    groups.max_over_ranks: Laws(permuted=(), shards={"group": None}, not_held=NO_GRADIENT),
    lm.targeted_variance_loss: Laws(
        weights={"squared_error": "coefficient"},
        terms={"also_in_graph": ["variance"]},
        permuted=("vocab", "dim"),
        shards={"vocab_group": ("vocab", {"grad_reduction": "sum"})},
    ),
    lm.chunk_average_log_probs: Laws(
        elements={"chunk_id": st.integers(-1, 1)},
        overrides={"max_chunks": 2},
        shards={"sequence_group": ("time", {"grad_reduction": "sum"})},
        more={"assert_finite": {"chunk_id": zeros}},
    ),
    lm.valid_chunk_mask: Laws(
        ignores=("student_sizes", "teacher_sizes"),  # only compared with 0
        not_held=NO_GRADIENT,
    ),
    lm.align_in_order: Laws(not_held=NO_NUMBERS),
    lm.count_valid_chunks: Laws(
        CHUNKS,
        CHUNK_IDS,
        not_held=NO_NUMBERS,
        shards={
            "batch_group": ("batch", {}),
            "sequence_group": (("student_time", "teacher_time"), {}),
        },
    ),
    lm.next_token_loss: Laws(
        TEXT,
        {"tokens": some_tokens("vocab")},
        NORMALIZER,
        weights={},
        shards=LOGITS_GROUPS,
        more={"assert_finite": {"tokens": zeros}},
    ),
    lm.distillation_loss: Laws(
        TEXT,
        {},
        # A tail is of teacher_top_k only.
        {**NORMALIZER, "teacher_top_k": None, "tail": "renormalize", "beta": 0.25},
        weights={"divergence": squared_temperature},
        shards=LOGITS_GROUPS,
        by={"assert_gradients": ("student_logits",)},  # the teacher has none
    ),
    lm.projected_kl_loss: of_chunks({"kl": squared_temperature}),
    lm.linear_projected_kl_loss: of_chunks({"kl": squared_temperature}, by=("hidden", "weight")),
    lm.partitioned_loss: of_chunks(
        {
            "kl_common": lambda call: call["temperature"] ** 2 * call["common_weight"],
            "l1_tail": lambda call: call["temperature"] ** 2 * call["tail_weight"],
        },
        terms={"detached": True},
    ),
    lm.universal_logit_loss: of_chunks(
        {},
        overrides={"student_vocab": 5},
        vocab=(
            "student_vocab",
            {"grad_reduction": "sum", "sizes": {"student_vocab": [(3, 2), (2, 0, 3)]}},
        ),
    ),
    lm.cross_tokenizer_loss: Laws(
        TEXT,
        {"tokens": some_tokens("vocab")},
        {
            "teachers": two_teachers,
            "combine": "sum",
            "score": None,
            "log_vocab": False,
            "teacher_top_k": None,
            "columns_top_k": None,
            "scale": "fixed",
            "student_vocab": lambda sizes: sizes["vocab"],
            **NORMALIZER,
        },
        weights={
            "kd": lambda call: call["kd_weight"],
            "cross_entropy": "ce_weight",
        },
        terms={"also_in_graph": ["teacher_kd"]},
        shards={
            "batch_group": ("batch", {}),
            "vocab_group": None,
            "sequence_group": (
                ("time", "student_time", "teacher_time"),
                {"grad_reduction": "sum"},
            ),
        },
        by={"assert_gradients": ("student_logits",)},
        # A chunk with a token that does not count is left out: here all count.
        more={"assert_finite": {"tokens": zeros}},
        ignores=("teachers.0.logits", "teachers.1.logits"),
    ),
}


def public() -> dict[str, Callable[..., Any]]:
    return {
        name: EXPORTS[name]
        for name in FUNCTIONS
        if not name.startswith(("termwise.", "testing."))
        and takes_tensors(EXPORTS[name])
        # It reads tensors as lists, where batches are made: there is no graph to hold a law.
        and name != "lm.align_spans"
    }


def takes_tensors(function: Callable[..., Any]) -> bool:
    hints = [p.annotation for p in inspect.signature(function).parameters.values()]
    return any("Tensor" in str(hint) and "Callable" not in str(hint)[:40] for hint in hints)


def laws_of(function: Callable[..., Any]) -> Laws:
    return LAWS.get(function, Laws())


def held(function: Callable[..., Any], law: str, *arguments: Any, **more: Any) -> None:
    laws = laws_of(function)
    run = getattr(testing, law)
    told = {**laws.inputs, **more}
    told["overrides"] = {**told["overrides"], **laws.more.get(law, {})}
    if law in laws.by:
        told["arguments"] = laws.by[law]
    if law in laws.not_held:
        usual = hypothesis.settings.get_current_profile_name()
        hypothesis.settings.load_profile("unshrunk")
        try:
            with pytest.raises((AssertionError, ValueError), match=laws.not_held[law]):
                run(function, *arguments, **told)
        finally:
            hypothesis.settings.load_profile(usual)
    else:
        run(function, *arguments, **told)


EVERY = pytest.mark.parametrize("function", public().values(), ids=public().keys())


@EVERY
def test_contract(function):
    held(function, "assert_contract", max_examples=3)


@EVERY
def test_pure(function):
    held(function, "assert_pure", max_examples=5)


@EVERY
def test_finite(function):
    laws = laws_of(function)
    limits = ("mask", "target", "sample_mask", "valid_rows")  # what leaves elements out
    parameters = inspect.signature(function).parameters
    every = {
        name: None for name in limits if name in parameters and parameters[name].default is None
    }
    overrides = {**laws.overrides, **every}
    ignores = [path for path in laws.ignores if path.partition(".")[0] in parameters]
    told = {"ignores": ignores, "scale": laws.large, "overrides": overrides}
    held(function, "assert_finite", max_examples=5, **told)


@EVERY
def test_gradients(function):
    held(function, "assert_gradients", max_examples=2)


@EVERY
def test_compiles(function):
    # test_every_*_loss.py runs each loss through the whole of aot_eager.
    backend = "eager" if laws_of(function).weights is not None else "aot_eager"
    held(function, "assert_compiles", backend=backend)


@EVERY
def test_vmaps(function):
    held(function, "assert_vmaps", max_examples=2)


@EVERY
def test_order_does_not_matter(function):
    laws = laws_of(function)
    for axis in laws.permuted:
        held(function, "assert_permutation_invariant", axis, max_examples=3)


@EVERY
def test_terms_sum(function):
    returned = inspect.signature(function).return_annotation
    weights = laws_of(function).weights
    if not (isinstance(returned, type) and issubclass(returned, tw.Terms)):
        assert weights is None
        return
    assert weights is not None, "name the weights of the terms: {} where the loss has no parts"
    held(function, "assert_terms_sum", weights, max_examples=5, **laws_of(function).terms)


@EVERY
def test_sharding(function, ranks):
    laws = laws_of(function)
    parameters = inspect.signature(function).parameters
    found = {name for name in parameters if name == "group" or name.endswith("_group")}
    assert found == set(laws.shards)
    for group, shared in laws.shards.items():
        if shared is None:
            continue
        axis, more = shared
        sizes = {**laws.sizes, **more.get("sizes", {})}
        told = {**more, "sizes": sizes, "ranks": ranks, "max_examples": 1}
        held(function, "assert_sharding", axis, group, **told)
