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
from termwise.lm import (
    Alignment,
    VocabProjection,
    align_spans,
    chunk_average_log_probs,
    projected_kl_loss,
    universal_logit_loss,
    valid_chunk_mask,
)
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
    with pytest.raises(
        tw.ContractError, match=r"student_offsets\[0\] needs Sequence\[Sequence\[int\]\], got "
    ):
        align_spans([0, 1], one)


def test_logits_are_shifted_by_one_token():
    assert logit_chunks(IDS).tolist() == [[0, 1, -1, -1], [1, 2, 2, -1]]
    assert logit_chunks(IDS[:, :0]).shape == (2, 0)


def test_offsets_are_taken_as_pipelines_hold_them():
    student, teacher = [[(0, 0), (0, 2), (2, 5)]], [[(0, 1), (1, 2), (2, 4), (4, 5)]]
    expected = pytree.tree_leaves(align_spans(student, teacher))
    for form in (torch.tensor, lambda spans: [[[*span] for span in own] for own in spans]):
        found = align_spans(form(student), form(teacher))
        assert all(map(torch.equal, pytree.tree_leaves(found), expected))
    with pytest.raises(tw.ContractError, match="student_offsets needs"):
        align_spans(torch.zeros(1, 3, 3, dtype=torch.int64), teacher)
    with pytest.raises(
        ValueError, match=r"needs spans \(start, stop\) .* got \(0, 1, 2\) at token 0"
    ):
        align_spans([[(0, 1, 2)]], teacher)


documents = st.lists(st.tuples(spans, spans), min_size=1, max_size=3)


@given(batch=documents, padding=st.integers(0, 2))
def test_packed_rows_are_their_documents(batch, padding):
    rows, numbers = ([], []), ([], [])
    for number, pair in enumerate(batch):
        for side in (0, 1):
            rows[side].extend(pair[side])
            numbers[side].extend([2 * number] * len(pair[side]))
    rows[0].extend([(0, 0)] * padding)
    numbers[0].extend([-1] * padding)
    packed = align_spans([rows[0]], [rows[1]], documents=([numbers[0]], [numbers[1]])).check()
    seen = [ids[0].tolist() for ids in (packed.student_chunk_id, packed.teacher_chunk_id)]
    chunks, starts = 0, [0, 0]
    for pair in batch:
        alone = align_spans(*[[side] for side in pair])
        ids = [alone.student_chunk_id[0].tolist(), alone.teacher_chunk_id[0].tolist()]
        held = [[-1, *own[1:]] if own else own for own in ids]
        common = sorted(({*held[0]} & {*held[1]}) - {-1})
        place = {chunk: chunks + number for number, chunk in enumerate(common)}
        for side in (0, 1):
            stop = starts[side] + len(held[side])
            assert seen[side][starts[side] : stop] == [place.get(n, -1) for n in held[side]]
            starts[side] = stop
        exact = alone.pair_exact[0, common].tolist()
        assert packed.pair_exact[0, chunks : chunks + len(common)].tolist() == exact
        chunks += len(common)
    assert packed.max_chunks == chunks


def test_a_packed_row_has_the_loss_of_its_documents():
    pairs = [([(0, 2), (2, 4), (4, 6)], [(0, 1), (1, 2), (2, 6)]), ([(0, 1), (1, 5)], [(0, 5)] * 1)]
    pairs.append(([(0, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)]))
    numbers = [[n for n, pair in enumerate(pairs) for _ in pair[side]] for side in (0, 1)]
    rows = [[[span for pair in pairs for span in pair[side]]] for side in (0, 1)]
    packed = align_spans(*rows, documents=([numbers[0]], torch.tensor([numbers[1]])))
    logits = [torch.randn(1, len(own), 5, dtype=torch.float64) for own in numbers]
    logits[0].requires_grad_()
    whole = universal_logit_loss(*logits, alignment=packed, normalizer=1)
    parts = []
    for n, pair in enumerate(pairs):
        own = [x[:, torch.tensor(numbers[side]) == n] for side, x in enumerate(logits)]
        alone = align_spans([pair[0]], [pair[1]])
        parts.append(universal_logit_loss(*own, alignment=alone, normalizer=1))
    assert whole.num_chunks == sum(part.num_chunks for part in parts) == 2
    losses = whole.loss, sum(part.loss for part in parts)
    torch.testing.assert_close(*losses, rtol=1e-13, atol=0)
    torch.testing.assert_close(*[torch.autograd.grad(x, logits[0])[0] for x in losses])


def test_a_pair_of_texts_is_aligned_as_one():
    #            [CLS]   "ab"    "cd"   [SEP]   "x"      "yz"   [SEP]
    student = [(0, 0), (0, 2), (2, 4), (0, 0), (0, 1), (1, 3), (0, 0)]
    teacher = [(0, 0), (0, 4), (0, 0), (0, 1), (1, 2), (2, 3), (0, 0)]
    which = [[None, 0, 0, None, 1, 1, None]], [[None, 0, None, 1, 1, 1, None]]
    tokens = {"student_tokens": [[1, 5, 6, 2, 7, 8, 2]], "teacher_tokens": [[3, 5, 4, 6, 7, 8, 4]]}
    found = align_spans([student], [teacher], sequence_ids=which)
    assert found.student_chunk_id.tolist() == [[-1, 0, 0, -1, 1, 2, -1]]
    assert found.teacher_chunk_id.tolist() == [[-1, 0, -1, 1, 2, 2, -1]]
    found = align_spans([student], [teacher], sequence_ids=which, special={1: 3, 2: 4}, **tokens)
    assert found.student_chunk_id.tolist() == [[0, 1, 1, 2, 3, 4, 5]]
    assert found.teacher_chunk_id.tolist() == [[0, 1, 2, 3, 4, 4, 5]]
    assert found.pair_exact.all()
    texts = {"student_texts": [["abcd", "xyz"]], "teacher_texts": [["abcd", "xYz"]]}
    found = align_spans([student], [teacher], sequence_ids=which, **texts)
    assert found.pair_exact.tolist() == [[True, True, False]]


END = {"special": {9: 7}}


def ends(student_tokens, teacher_tokens, student=None, teacher=None):
    """Align "ab", "c" and special tokens; -1 in place of a token's id is the text."""
    text = {-1: (0, 2), -2: (2, 3)}
    spans = [
        own or [text.get(token, (0, 0)) for token in tokens]
        for own, tokens in ((student, student_tokens), (teacher, teacher_tokens))
    ]
    tokens = {"student_tokens": [student_tokens], "teacher_tokens": [teacher_tokens]}
    found = align_spans([spans[0]], [spans[1]], **END, **tokens)
    return found.student_chunk_id[0].tolist(), found.teacher_chunk_id[0].tolist()


def test_special_tokens_of_one_role_are_chunks_of_their_own():
    assert ends([1, -1, -2, 9], [-1, -2, 7]) == ([-1, 0, 1, 2], [0, 1, 2])
    assert ends([-1, 9, -2], [-1, 7, -2]) == ([0, 1, 2], [0, 1, 2])
    # Of other roles, of one side alone, and at different places they are none.
    assert ends([-1, -2, 9], [-1, -2, 8]) == ([0, 1, -1], [0, 1, -1])
    assert ends([-1, -2, 9], [-1, 7, -2]) == ([0, 1, -1], [0, -1, 1])
    assert ends([-1, 9], [-1, -2, 7]) == ([0, -1], [0, -1, -1])  # truncated
    # Padding that is an end too: the first one ends the text.
    assert ends([-1, -2, 9, 9, 9], [-1, -2, 7, 7]) == ([0, 1, 2, -1, -1], [0, 1, 2, -1])
    # Literal ends, which have spans in two different texts.
    literal = [(0, 2), (2, 3), (3, 13)], [(0, 2), (2, 3), (3, 7)]
    assert ends([-1, -2, 9], [-1, -2, 7], *literal) == ([0, 1, 2], [0, 1, 2])


def test_an_end_of_turn_is_distilled():
    tokens = {"student_tokens": [[0, 1, 9]], "teacher_tokens": [[0, 1, 7]]}
    spans = [[(0, 1), (1, 2), (0, 0)]]
    projection = VocabProjection.from_tokens(
        ["a", "b", *[None] * 8], ["a", "b", *[None] * 8], special={9: 7}
    )
    logits = torch.zeros(1, 3, 10, requires_grad=True)
    teacher = torch.zeros(1, 3, 10)
    teacher[0, 1, 7] = 9.0
    for options, trained in (({}, False), ({**END, **tokens}, True)):
        alignment = align_spans(spans, spans, **options)
        terms = projected_kl_loss(logits, teacher, alignment=alignment, projection=projection)
        (gradient,) = torch.autograd.grad(terms.loss, logits)
        assert bool(gradient[0, 1, 9] < -0.1) is trained


def cut(text, size):
    return [(start, min(start + size, len(text))) for start in range(0, len(text), size)]


STUDENT_CHAT = "<|im_start|>assistant\nHello<|im_end|>"
TEACHER_CHAT = "<start>model of text\nHello<end>"


def test_different_texts_do_not_pass_for_equal():
    spans = [cut(TEACHER_CHAT[:31], 4)], [cut(TEACHER_CHAT, 4)]
    blind = align_spans(*spans)
    assert blind.pair_exact.all()  # spans alone cannot tell
    with pytest.raises(
        ValueError, match=r"none of 8 chunks of sample 0 .* '<\|im' for the student and '<sta' for"
    ):
        align_spans(*spans, student_texts=[STUDENT_CHAT], teacher_texts=[TEACHER_CHAT])
    one = TEACHER_CHAT[:4] + STUDENT_CHAT[4:]
    found = align_spans(*spans, student_texts=[one], teacher_texts=[TEACHER_CHAT])
    assert found.pair_exact.tolist() == [[True] + [False] * 7]
    same = align_spans(*spans, student_texts=[TEACHER_CHAT], teacher_texts=[TEACHER_CHAT])
    assert same.pair_exact.all()
    coded = [TEACHER_CHAT.encode()]
    assert align_spans(*spans, student_texts=coded, teacher_texts=coded).pair_exact.all()


def test_trimmed_spaces_of_one_text_are_no_error():
    texts = {"student_texts": [" a"], "teacher_texts": [" a"]}
    found = align_spans([[(1, 2)]], [[(0, 2)]], **texts)
    assert found.pair_exact.tolist() == [[False]]


def test_what_goes_together_is_asked_for():
    spans = [[(0, 1), (1, 2)]]
    for options, message in (
        ({"student_texts": ["ab"]}, "student_texts and teacher_texts together"),
        ({"student_tokens": [[1, 2]]}, "student_tokens and teacher_tokens together"),
        ({"special": {1: 1}}, "special and the tokens of both sides together"),
        (
            {"student_texts": ["ab"] * 2, "teacher_texts": ["ab"]},
            "student_texts of 1 samples, got 2",
        ),
        (
            {"student_texts": ["a"], "teacher_texts": ["ab"]},
            "within student_texts, got 2 at token 1",
        ),
        ({"documents": ([[0, 0]], [[0]])}, r"documents\[1\] of \[2\] tokens"),
        (
            {"documents": ([[0, 1]], [[0, 1]]), "student_texts": ["ab"], "teacher_texts": ["ab"]},
            "a text for each of the 2 documents",
        ),
    ):
        with pytest.raises(ValueError, match=f"^align_spans needs .*{message}"):
            align_spans(spans, spans, **options)


def test_offsets_that_restart_are_refused_with_what_to_write():
    spans = [[(0, 2), (2, 4), (0, 3)]]
    with pytest.raises(
        ValueError, match=r"got \(0, 3\) at token 2 .* packed rows, or sequence_ids"
    ):
        align_spans(spans, spans)
    with pytest.raises(ValueError, match=r"documents\[1\] of \[3\] tokens, .* got \[2\]$"):
        align_spans(spans, spans, documents=([[0, 0, 1]], [[0, 0]]))


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


def test_means_keep_width_and_lift_halves():
    ids = torch.tensor([[0, 0, 1]])
    half = torch.randn(1, 3, 2).bfloat16()
    means, sizes = chunk_average_log_probs(half, ids, 2)
    assert means.dtype == sizes.dtype == torch.float32
    assert torch.equal(means, chunk_average_log_probs(half.float(), ids, 2)[0])
    x = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
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
