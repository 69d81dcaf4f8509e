"""Losses over chunks, sharded by samples, vocabulary and positions at once, are one process's."""

import distill_cases
import pytest
import torch
from distill_cases import AXES, SAMPLES, TIMES, TOKENS, Place, part

EXACT = {"rtol": 1e-11, "atol": 1e-12}
PROJECTED = [
    {"teacher_mean": "log_normalized", "temperature": 2.0, "columns_top_k": 4},
    {"teacher_mean": "log", "divergence": "reverse"},
    {"teacher_mean": "prob", "teacher_columns": torch.tensor([0, 2, 5])},
]
CASES = [
    *[("projected", options) for options in PROJECTED],
    ("partitioned", {"tail_top_k": 2, "temperature": 2.0}),
    ("partitioned", {"divergence": "reverse", "exact_only": True}),
    ("linear", {"columns_top_k": 4, "temperature": 2.0}),
]


def one_process(seed, loss, options):
    return distill_cases.run(distill_cases.problem(seed), Place(), {}, loss, options)


def assert_is_one_process(results, places, seed, loss, options, *, scale):
    terms, counted, gradients = one_process(seed, loss, options)
    assert terms["num_chunks"] >= 2
    for (own_terms, own_count, own), place in zip(results, places, strict=True):
        torch.testing.assert_close(own_terms, terms, **EXACT)
        if not options.get("exact_only"):
            assert own_count == counted == terms["num_chunks"]
        samples, tokens = part(SAMPLES, place.batch), part(TOKENS, place.vocab)
        students = part(TIMES["student"], place.sequence)
        if loss == "linear":
            expected = gradients[0][samples, students]
            torch.testing.assert_close(own[0], scale * expected, **EXACT)
        else:
            expected = gradients[0][samples, students, tokens]
            torch.testing.assert_close(own[0], scale * expected, **EXACT)
    if loss == "linear":  # the weight's, added up over samples and positions
        for shard in {place.vocab for place in places}:
            parts = [r[2][1] for r, p in zip(results, places, strict=True) if p.vocab == shard]
            expected = gradients[1][part(TOKENS, shard)]
            torch.testing.assert_close(sum(parts), scale * expected, **EXACT)


@pytest.mark.parametrize(("loss", "options"), CASES, ids=str)
@pytest.mark.parametrize("how", ["mean", "sum"])
@pytest.mark.parametrize("on_host", [True, False], ids=["host", "device"])
def test_all_three_at_once_on_eight_ranks(eight_ranks, loss, options, how, on_host):
    given = {**options, "grad_reduction": how}
    results = eight_ranks(distill_cases.all_at_once, *[[x] * 8 for x in (3, loss, given, on_host)])
    places = [Place(*[int(bit) for bit in f"{rank:03b}"]) for rank in range(8)]
    # Averaged over batch_group, as "mean" has it, the gradients are the whole batch's.
    scale = 2 if how == "mean" else 1
    assert_is_one_process(results, places, 3, loss, options, scale=scale)


@pytest.mark.parametrize(("loss", "options"), CASES, ids=str)
@pytest.mark.parametrize("axis", AXES)
def test_one_axis_on_two_ranks(ranks, axis, loss, options):
    given = {**options, "grad_reduction": "sum"}
    results = ranks(distill_cases.one_axis, *[[x] * 2 for x in (5, axis, loss, given)])
    places = [Place(**{axis: rank}) for rank in range(2)]
    assert_is_one_process(results, places, 5, loss, options, scale=1)


def test_it_compiles_whole_with_a_group(ranks):
    whole = distill_cases.problem(3)
    whole.sample_mask[:] = True
    terms, _, gradients = distill_cases.run(whole, Place(), {}, "projected", {})
    results = ranks(distill_cases.compiled, [3, 3], ["vocab", "vocab"])
    for rank, (loss, gradient) in enumerate(results):
        torch.testing.assert_close(loss, terms["loss"], **EXACT)
        torch.testing.assert_close(gradient, gradients[0][..., part(TOKENS, rank)], **EXACT)
