"""Partitions of two vocabularies against the rule written out token by token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

import termwise as tw
from termwise.lm import VocabPartition, VocabProjection, vocab_partition


def oracle(rows, rule, students, teachers):
    """The partner of each teacher token, one row after another.

    `rows` holds {teacher token: weight} of each student token.
    """
    winners = {}  # teacher token -> (weight, student token)
    for student, row in enumerate(rows):
        if not row:
            continue
        weight = max(row.values())
        teacher = min(t for t, w in row.items() if w == weight)
        if rule == "strict" and not (len(row) == 1 and weight == 1):
            continue
        if rule == "relaxed" and not weight >= torch.tensor(0.6):
            continue
        held = winners.get(teacher)
        if held is None or (rule == "relaxed" and weight > held[0]):
            winners[teacher] = (weight, student)
    pairs = sorted((student, teacher) for teacher, (_, student) in winners.items())
    common = [s for s, _ in pairs], [t for _, t in pairs]
    return (
        *common,
        [s for s in range(students) if s not in common[0]],
        [t for t in range(teachers) if t not in common[1]],
    )


weights = st.sampled_from([0.0, 0.25, 0.5, 0.625, 0.75, 1.0])
row = st.dictionaries(st.integers(0, 4), weights, max_size=3)


@given(rows=st.lists(row, min_size=1, max_size=7), rule=st.sampled_from(["strict", "relaxed"]))
def test_partition_is_the_rule(rows, rule):
    pairs = {(s, t): w for s, row in enumerate(rows) for t, w in row.items()}
    if not pairs:
        return
    projection = VocabProjection.from_pairs(pairs, student_vocab=8, teacher_vocab=5)
    found = vocab_partition(projection, rule=rule)
    expected = oracle(rows, rule, 8, 5)
    assert [part.tolist() for part in pytree.tree_leaves(found)] == [*expected]


def test_nemo_rls_cases():
    indices = torch.tensor([[3, -1], [3, -1], [1, 2], [0, 4], [2, -1], [-1, -1]])
    values = torch.tensor([[1.0, 0], [1.0, 0], [0.6, 0.4], [1.0, 0.0], [0.5, 0], [0, 0]])
    projection = VocabProjection.from_topk(indices, values, student_vocab=6, teacher_vocab=5)
    strict = vocab_partition(projection, rule="strict")
    # Token 3 names a second one, though of weight 0; token 1 comes after token 0.
    assert (strict.common_student.tolist(), strict.common_teacher.tolist()) == ([0], [3])
    relaxed = vocab_partition(projection, rule="relaxed")  # 0.6 counts, as float32 has it
    assert relaxed.common_student.tolist() == [0, 2, 3]
    assert relaxed.common_teacher.tolist() == [3, 1, 0]
    assert relaxed.rest_student.tolist() == [1, 4, 5]
    assert relaxed.rest_teacher.tolist() == [2, 4]


def test_one_column_is_enough_and_no_pair_is_a_partition():
    one = VocabProjection.from_topk(
        torch.tensor([[1], [0], [1]]),
        torch.tensor([[1.0], [0.7], [1.0]]),
        student_vocab=3,
        teacher_vocab=3,
    )
    assert vocab_partition(one, rule="strict").common_student.tolist() == [0]
    assert vocab_partition(one, rule="relaxed").common_teacher.tolist() == [1, 0]
    weak = VocabProjection.from_pairs({(0, 0): 0.1}, student_vocab=2, teacher_vocab=1)
    found = vocab_partition(weak, rule="relaxed").to("cpu")
    assert [len(part) for part in pytree.tree_leaves(found)] == [0, 0, 2, 1]
    assert all(part.dtype == torch.int64 for part in pytree.tree_leaves(found))


def test_refusals():
    ids = torch.arange(2)
    with pytest.raises(ValueError, match="needs rest_teacher of 1 axis in torch.int64, got"):
        VocabPartition(ids, ids, ids, ids.int())
    with pytest.raises(ValueError, match="of one length, got 2 and 1"):
        VocabPartition(ids, ids[:1], ids, ids)
    one = VocabProjection.from_pairs({(0, 0): 1.0}, student_vocab=1, teacher_vocab=1)
    with pytest.raises(tw.ContractError, match="rule needs"):
        vocab_partition(one, rule="loose")
