"""What every loss over chunks makes of its masks, dtypes and numbers, and what it refuses."""

import functools

import pytest
import torch

from termwise.lm import (
    Alignment,
    Teacher,
    VocabProjection,
    align_spans,
    chunk_average_log_probs,
    count_valid_chunks,
    cross_tokenizer_loss,
    linear_projected_kl_loss,
    partitioned_loss,
    projected_kl_loss,
    universal_logit_loss,
    valid_chunk_mask,
    vocab_partition,
)

PROJECTION = VocabProjection.from_pairs(
    {(0, 0): 1.0, (1, 1): 0.6, (1, 2): 0.4, (2, 3): 1.0}, student_vocab=3, teacher_vocab=4
)
generator = torch.Generator().manual_seed(0)
STUDENT = torch.randn(1, 4, 3, generator=generator, dtype=torch.float64)
TEACHER = torch.randn(1, 4, 4, generator=generator, dtype=torch.float64)
IDS = torch.tensor([[-1, 0, 0, 1]])
BOTH = torch.ones(1, 2, dtype=torch.bool)
ALIGNMENT = Alignment(IDS, IDS, BOTH, BOTH)


def linear(student, teacher, **options):
    """A head that is the identity, so that its logits are the hidden states."""
    return linear_projected_kl_loss(
        student, torch.eye(3, dtype=student.dtype), teacher, projection=PROJECTION, **options
    )


LOSSES = {
    "projected_kl_loss": functools.partial(projected_kl_loss, projection=PROJECTION),
    "linear_projected_kl_loss": linear,
    "partitioned_loss": functools.partial(
        partitioned_loss, partition=vocab_partition(PROJECTION, rule="relaxed")
    ),
    "universal_logit_loss": universal_logit_loss,
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def value_and_gradient(name, student=STUDENT, teacher=TEACHER, **options):
    student = student.clone().requires_grad_()
    terms = LOSSES[name](student, teacher, **{"alignment": ALIGNMENT, **options})
    return terms, torch.autograd.grad(terms.loss, student)[0]


@every_loss
def test_a_chunk_counts_if_all_its_student_tokens_do(name):
    mask = torch.tensor([[False, True, False, True]])
    terms, gradient = value_and_gradient(name, mask=mask)
    assert terms.num_chunks == 1
    only = Alignment(IDS, IDS, torch.tensor([[False, True]]), BOTH)
    expected, expected_gradient = value_and_gradient(name, alignment=only)
    assert terms.metrics() == expected.metrics()
    assert torch.equal(gradient, expected_gradient)
    assert gradient[0, 2].any()  # which predicts token 3
    assert not gradient[0, [0, 1, 3]].any()
    assert count_valid_chunks(ALIGNMENT, mask=mask) == 1
    assert ALIGNMENT.where(student_mask=mask).pair_valid.tolist() == [[False, True]]
    assert ALIGNMENT.where(teacher_mask=mask).pair_valid.tolist() == [[False, True]]
    nothing, gradient = value_and_gradient(name, mask=torch.zeros_like(mask))
    assert nothing.loss == 0
    assert not gradient.any()


@every_loss
def test_a_mask_of_another_size_is_refused(name):
    for function in (LOSSES[name], lambda *_, **options: count_valid_chunks(**options)):
        with pytest.raises((TypeError, ValueError), match="mask"):
            function(STUDENT, TEACHER, alignment=ALIGNMENT, mask=BOTH)
    with pytest.raises(ValueError, match=r"^Alignment.where needs teacher_mask of \[1, 4\], got"):
        ALIGNMENT.where(teacher_mask=BOTH)


@every_loss
@pytest.mark.parametrize("wide", ["student", "teacher"])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_two_widths_meet_in_the_wider(name, wide, narrow):
    student, teacher = STUDENT.to(narrow), TEACHER.to(narrow)
    if wide == "student":
        student = STUDENT
    else:
        teacher = TEACHER
    terms, gradient = value_and_gradient(name, student, teacher)
    expected, expected_gradient = value_and_gradient(name, student.double(), teacher.double())
    assert terms.loss.dtype == torch.float64
    assert terms.metrics() == expected.metrics()
    assert gradient.dtype == student.dtype
    assert torch.equal(gradient, expected_gradient.to(student.dtype))


@every_loss
@pytest.mark.parametrize("side", ["student_chunk_id", "teacher_chunk_id"])
@pytest.mark.parametrize("wrong", [2, -2, 99])
def test_ids_out_of_range_are_named(name, side, wrong):
    ids = {"student_chunk_id": IDS, "teacher_chunk_id": IDS}
    ids[side] = torch.tensor([[-1, 0, wrong, 1]])
    alignment = Alignment(**ids, pair_valid=BOTH, pair_exact=BOTH)
    found = f"an alignment with {side} from -1 to 1, got {min(wrong, -1)} to {max(wrong, 1)}"
    with pytest.raises(ValueError, match=f"^{name} needs {found}; Alignment.check"):
        LOSSES[name](STUDENT, TEACHER, alignment=alignment)
    with pytest.raises(ValueError, match=f"^count_valid_chunks needs {found}"):
        count_valid_chunks(alignment)


@pytest.mark.parametrize("wrong", [2, -2, -100])
def test_ids_of_means_out_of_range_are_named(wrong):
    ids = torch.tensor([[-1, 0, wrong, 1]])
    message = f"^chunk_average_log_probs needs chunk_id from -1 to 1, got {min(wrong, -1)} to "
    with pytest.raises(IndexError, match=message):
        chunk_average_log_probs(STUDENT, ids, 2)


@every_loss
def test_a_normalizer_is_a_number_of_any_type(name):
    expected, expected_gradient = value_and_gradient(name, normalizer=4.0)
    for normalizer in (4, torch.tensor(4), torch.tensor(4.0), torch.tensor(4, dtype=torch.int32)):
        terms, gradient = value_and_gradient(name, normalizer=normalizer)
        assert terms.metrics() == expected.metrics()
        assert torch.equal(gradient, expected_gradient)
    teacher = Teacher(TEACHER, ALIGNMENT, normalizer=torch.tensor(4))
    tokens = torch.tensor([[0, 1, 2, 0]])
    terms = cross_tokenizer_loss(STUDENT, tokens, teacher, normalizer=torch.tensor(6))
    theirs = universal_logit_loss(STUDENT, TEACHER, alignment=ALIGNMENT, normalizer=4)
    assert terms.kd == theirs.loss


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_integers_of_any_width(dtype):
    tokens = torch.tensor([[0, 1, 2, -100]])
    teacher = Teacher(TEACHER, ALIGNMENT, tokens=torch.tensor([[0, 3, 2, -1]]))
    narrow = Teacher(TEACHER, ALIGNMENT, tokens=torch.tensor([[0, 3, 2, -1]], dtype=dtype))
    both = [
        cross_tokenizer_loss(STUDENT, *args, score="cross_entropy").metrics()
        for args in ((tokens, [teacher]), (tokens.to(dtype), [narrow]))
    ]
    assert both[0] == both[1]
    for name in ("projected_kl_loss", "linear_projected_kl_loss"):
        ours, theirs = (
            value_and_gradient(name, teacher_columns=torch.tensor([3, 0], dtype=one))
            for one in (dtype, torch.int64)
        )
        assert ours[0].metrics() == theirs[0].metrics()
        assert torch.equal(ours[1], theirs[1])
    means = [chunk_average_log_probs(STUDENT, IDS.to(one), 2)[0] for one in (dtype, torch.int64)]
    assert torch.equal(*means)
    topk = torch.tensor([[1, -1], [0, 2]])
    sizes = {"student_vocab": 2, "teacher_vocab": 3}
    narrow, wide = (
        VocabProjection.from_topk(topk.to(one), (topk >= 0).float(), **sizes)
        for one in (dtype, torch.int64)
    )
    assert torch.equal(narrow.student_columns, wide.student_columns)
    assert narrow.columns(torch.tensor([2, 0], dtype=dtype)).teacher_vocab == 2


@pytest.mark.parametrize("name", ["projected_kl_loss", "linear_projected_kl_loss"])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([1, 2, 1], "every teacher column once, got some twice"),
        ([0, 4], "teacher_columns from 0 to 3, got 0 to 4"),
        ([-1, 0], "teacher_columns from 0 to 3, got -1 to 0"),
        ([], "1 teacher column or more, got none"),
    ],
)
def test_columns_that_cannot_be_right_are_refused(name, columns, message):
    columns = torch.tensor(columns, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"^{name} needs {message}"):
        LOSSES[name](STUDENT, TEACHER, alignment=ALIGNMENT, teacher_columns=columns)


def test_columns_given_twice_are_no_plausible_number_where_nobody_may_look():
    function = torch.compile(projected_kl_loss, fullgraph=True, backend="aot_eager")
    options = {"alignment": ALIGNMENT, "projection": PROJECTION}
    student = STUDENT.clone().requires_grad_()
    terms = function(student, TEACHER, teacher_columns=torch.tensor([1, 2, 1]), **options)
    assert terms.loss.isnan()
    (gradient,) = torch.autograd.grad(terms.loss, student)
    assert gradient[0, :3].isnan().all()


def test_logits_that_are_padded_are_refused_with_what_to_write():
    padded = torch.zeros(1, 4, 8)
    for logits, side in (
        ((padded, TEACHER.float()), "student"),
        ((STUDENT.float(), padded), "teacher"),
    ):
        for name in ("projected_kl_loss", "partitioned_loss"):
            with pytest.raises(ValueError, match=rf"{side}_logits\[\.\.\., :[34]\]"):
                LOSSES[name](*logits, alignment=ALIGNMENT)


@every_loss
def test_an_attention_mask_is_refused_with_what_to_write(name):
    attention = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"mask needs .*int64.* pass mask.bool\(\)"):
        LOSSES[name](STUDENT, TEACHER, alignment=ALIGNMENT, mask=attention)


def test_counts_may_be_integers():
    sizes = torch.tensor([[2, 0, 1]])
    pair = torch.tensor([[True, True, False]])
    expected = [[True, False, False]]
    for student in (sizes, sizes.float(), sizes.int()):
        assert valid_chunk_mask(student, sizes, pair).tolist() == expected


def test_a_chunk_of_the_prompt_and_the_answer_is_left_out():
    spans = [[(0, 3), (3, 7), (7, 9)]]
    other = [[(0, 5), (5, 7), (7, 9)]]
    alignment = align_spans(spans, other)
    answer = torch.tensor([[False, True, True]])
    assert alignment.where(student_mask=answer).pair_valid.tolist() == [[False, True]]
