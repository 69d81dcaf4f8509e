"""Alignments: what they refuse, spans against a slow oracle, and means over chunks."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import termwise as tw
from termwise.lm import Alignment, align_spans, chunk_average_log_probs, valid_chunk_mask
from termwise.lm._chunks import logit_chunks

IDS = torch.tensor([[0, 0, 1, -1], [0, 1, 2, 2]])
VALID = torch.tensor([[True, True, False], [True, True, True]])


def alignment(**changed):
    parts = {
        "student_chunk_id": IDS,
        "teacher_chunk_id": torch.tensor([[0, 1], [0, 2]]),
        "pair_valid": VALID,
        "pair_exact": VALID,
    }
    return Alignment(**{**parts, **changed})


def test_it_holds_what_it_is_given_and_is_a_pytree():
    ours = alignment()
    assert ours.max_chunks == 3
    assert ours.check() is ours
    for other in (ours.to("cpu"), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert all(map(torch.equal, pytree.tree_leaves(other), pytree.tree_leaves(ours)))
    assert len(pytree.tree_leaves(ours)) == 4
    with pytest.raises(AttributeError):
        ours.pair_valid = VALID  # frozen
    assert ours.to("meta").student_chunk_id.is_meta  # and nothing looked at what it holds


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"student_chunk_id": IDS.int()}, "needs student_chunk_id of 2 axes in torch.int64, got"),
        ({"student_chunk_id": IDS[0]}, r"needs student_chunk_id of 2 axes .* got \[4\] in"),
        ({"teacher_chunk_id": [[0]]}, "needs teacher_chunk_id .* got list"),
        ({"pair_valid": IDS}, "needs pair_valid of 2 axes in torch.bool, got"),
        ({"pair_exact": VALID[:, :2]}, r"pair_valid and pair_exact of one shape, .*\[2, 2\]"),
        ({"student_chunk_id": IDS[:1]}, r"one batch size.*student_chunk_id \[1, 4\]"),
        ({"pair_valid": VALID.to("meta")}, "on one device"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        alignment(**changed)


@pytest.mark.parametrize("side", ["student_chunk_id", "teacher_chunk_id"])
@pytest.mark.parametrize(("wrong", "got"), [(3, "0 to 3"), (-2, "-2 to 1")])
def test_check_refuses_ids_out_of_range(side, wrong, got):
    with pytest.raises(ValueError, match=f"needs {side} from -1 to 2, got {got}"):
        alignment(**{side: torch.tensor([[0, 1], [wrong, 1]])}).check()


def test_from_flat_reads_the_keys_of_nemo_rl():
    ours = alignment(pair_exact=~VALID)
    flat = {
        "teacher_1_student_chunk_id": ours.student_chunk_id,
        "teacher_1_teacher_chunk_id": ours.teacher_chunk_id,
        "teacher_1_pair_valid": ours.pair_valid,
        "teacher_1_pair_is_correct": ours.pair_exact,
        "teacher_1_num_chunks": torch.tensor([2, 3]),
        "input_ids": "anything",
    }
    read = Alignment.from_flat(flat, prefix="teacher_1_")
    assert pytree.tree_leaves(read) == pytree.tree_leaves(ours)
    with pytest.raises(ValueError, match="needs the keys alignment_student_chunk_id, alignment_te"):
        Alignment.from_flat(flat)
    with pytest.raises(ValueError, match="needs pair_valid of 2 axes"):
        Alignment.from_flat({**flat, "teacher_1_pair_valid": None}, prefix="teacher_1_")


def slow_chunks(student, teacher):
    """Chunks by definition: spans between neighbouring places that no token reaches across."""
    tokens = [span for span in (*student, *teacher) if span[0] < span[1]]
    ends = sorted({place for span in tokens for place in span})
    cuts = [place for place in ends if not any(a < place < b for a, b in tokens)]
    chunks = []
    for start, stop in itertools.pairwise(cuts):
        inside = [
            {i for i, (a, b) in enumerate(side) if a < b and start <= a and b <= stop}
            for side in (student, teacher)
        ]
        texts = [
            {place for i in inside[n] for place in range(*side[i])}
            for n, side in enumerate((student, teacher))
        ]
        if all(inside):
            chunks.append((*inside, texts[0] == texts[1]))
    return chunks


spans = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), max_size=9).map(
    lambda parts: [(start, start + size) for start, size in sorted(parts)]
)


@given(batch=st.lists(st.tuples(spans, spans), max_size=3))
def test_spans_are_aligned_by_definition(batch):
    found = align_spans([student for student, _ in batch], [teacher for _, teacher in batch])
    found.check()
    for sample, (student, teacher) in enumerate(batch):
        expected = slow_chunks(student, teacher)
        assert found.pair_valid[sample].sum() == len(expected)
        for chunk, (of_student, of_teacher, exact) in enumerate(expected):
            assert set(found.student_chunk_id[sample].eq(chunk).nonzero()[:, 0].tolist()) == (
                of_student
            )
            assert set(found.teacher_chunk_id[sample].eq(chunk).nonzero()[:, 0].tolist()) == (
                of_teacher
            )
            assert found.pair_exact[sample, chunk] == exact
        in_chunks = found.student_chunk_id[sample, : len(student)] >= 0
        assert in_chunks.sum() == sum(len(one) for one, _, _ in expected)
    assert not (found.pair_exact & ~found.pair_valid).any()


def test_specials_belong_to_no_chunk_and_a_split_character_is_one():
    #          <s>     a       the emoji, three tokens       b       </s>
    student = [(0, 0), (0, 1), (1, 2), (1, 2), (1, 2), (2, 3), (0, 0)]
    teacher = [(0, 2), (2, 3)]  # the first token takes a and the emoji
    found = align_spans([student], [teacher])
    assert found.student_chunk_id.tolist() == [[-1, 0, 0, 0, 0, 1, -1]]
    assert found.teacher_chunk_id.tolist() == [[0, 1]]
    assert found.pair_exact.tolist() == [[True, True]]


def test_text_of_one_side_alone_is_no_chunk_and_trimmed_text_is_not_exact():
    found = align_spans([[(0, 2), (2, 4), (5, 8)]], [[(0, 2), (4, 8)]])
    assert found.student_chunk_id.tolist() == [[0, -1, 1]]
    assert found.pair_exact.tolist() == [[True, False]]


def test_room_for_chunks_and_refusals():
    one = [[(0, 1), (1, 2)]]
    padded = align_spans(one, one, max_chunks=5)
    assert padded.pair_valid.tolist() == [[True, True, False, False, False]]
    assert align_spans([], []).max_chunks == 0
    assert align_spans([[]], [[]], max_chunks=2).student_chunk_id.shape == (1, 0)
    with pytest.raises(ValueError, match="needs max_chunks >= 2 for these texts, got 1"):
        align_spans(one, one, max_chunks=1)
    with pytest.raises(ValueError, match="as many samples of the student as of the teacher"):
        align_spans(one, [])
    for wrong in ((3, 2), (1, 2), (-2, 4)):
        with pytest.raises(ValueError, match=r"in the order of the text, .*'s sample 0"):
            align_spans(one, [[(2, 3), wrong]])
    with pytest.raises(tw.ContractError, match="student_offsets needs"):
        align_spans([0, 1], one)


def test_logits_are_shifted_by_one_token():
    assert logit_chunks(IDS).tolist() == [[0, 1, -1, -1], [1, 2, 2, -1]]
    assert logit_chunks(IDS[:, :0]).shape == (2, 0)


def slow_means(log_probs, chunk_id, max_chunks):
    batch, _, vocab = log_probs.shape
    means, sizes = torch.zeros(batch, max_chunks, vocab).double(), torch.zeros(batch, max_chunks)
    for b in range(batch):
        for c in range(max_chunks):
            rows = log_probs[b][chunk_id[b] == c]
            sizes[b, c] = len(rows)
            if len(rows):
                means[b, c] = rows.sum(0) / len(rows)
    return means, sizes.double()


@given(
    batch=st.integers(0, 3),
    time=st.integers(0, 6),
    chunks=st.integers(0, 4),
    seed=st.integers(0, 2**30),
)
def test_means_over_chunks_and_their_gradient(batch, time, chunks, seed):
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(batch, time, 3, generator=generator, dtype=torch.float64)
    ids = torch.randint(-1, max(chunks, 0), (batch, time), generator=generator)
    log_probs.requires_grad_()
    means, sizes = chunk_average_log_probs(log_probs, ids, chunks)
    expected, expected_sizes = slow_means(log_probs, ids, chunks)
    torch.testing.assert_close(means, expected, rtol=1e-13, atol=1e-14)
    assert torch.equal(sizes, expected_sizes)
    weights = torch.randn(means.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((means * weights).sum(), log_probs)[0]
    count = torch.where(ids[..., None] >= 0, 1, 0) if chunks else torch.zeros(batch, time, 1)
    place = ids.clamp_min(0)
    theirs = torch.zeros_like(ours)
    if chunks:
        share = weights / sizes.clamp_min(1)[..., None]
        theirs = share.gather(1, place[..., None].expand(-1, -1, 3)) * count
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("poison", [-torch.inf, torch.inf, torch.nan])
def test_unused_positions_are_never_read(poison):
    ids = torch.tensor([[0, -1, 0], [-1, 1, -1]])
    log_probs = torch.randn(2, 3, 4)
    clean, _ = chunk_average_log_probs(log_probs, ids, 2)
    dirty = log_probs.masked_fill(ids[..., None] < 0, poison).requires_grad_()
    means, sizes = chunk_average_log_probs(dirty, ids, 2)
    assert torch.equal(means, clean)
    means.square().sum().backward()
    assert torch.equal(dirty.grad[ids < 0], torch.zeros(3, 4))
    assert dirty.grad.isfinite().all()
    assert sizes.tolist() == [[2, 0], [0, 1]]


def test_a_minus_infinity_that_is_used_stays():
    log_probs = torch.tensor([[[-torch.inf, 0.0], [-1.0, -1.0]]])
    assert chunk_average_log_probs(log_probs, torch.tensor([[0, 0]]), 1)[0].tolist() == [
        [[-torch.inf, -0.5]]
    ]


def test_means_keep_width_lift_halves_and_can_be_differentiated_twice():
    ids = torch.tensor([[0, 0, 1]])
    half = torch.randn(1, 3, 2).bfloat16()
    means, sizes = chunk_average_log_probs(half, ids, 2)
    assert means.dtype == sizes.dtype == torch.float32
    assert torch.equal(means, chunk_average_log_probs(half.float(), ids, 2)[0])
    x = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: chunk_average_log_probs(x, ids, 2)[0].exp(), x)
    compiled = torch.compile(chunk_average_log_probs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, ids, 2), chunk_average_log_probs(x, ids, 2), rtol=0, atol=0
    )


def test_an_id_without_a_chunk_is_refused_and_not_another_samples():
    log_probs = torch.randn(2, 2, 3)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        chunk_average_log_probs(log_probs, torch.tensor([[0, 2], [0, 1]]), 2)
    with pytest.raises(ValueError, match="needs max_chunks >= 0, got -1"):
        chunk_average_log_probs(log_probs, torch.tensor([[0, -1], [0, -1]]), -1)
    with pytest.raises(tw.ContractError, match="chunk_id needs"):
        chunk_average_log_probs(log_probs, torch.tensor([[0], [0]]), 1)


def test_valid_chunks_have_both_sides_and_a_pair():
    student, teacher = torch.tensor([[2.0, 0, 1, 3]]), torch.tensor([[1.0, 2, 0, 1]])
    pair = torch.tensor([[True, True, True, False]])
    assert valid_chunk_mask(student, teacher, pair).tolist() == [[True, False, False, False]]
    assert valid_chunk_mask(student, student, ~pair).tolist() == [[False, False, False, True]]
