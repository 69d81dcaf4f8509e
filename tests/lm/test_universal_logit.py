"""Universal logit distillation: pairs of answers, blocks, and what does not count."""

import pytest
import torch

import termwise as tw
from termwise.lm import (
    Alignment,
    UniversalLogitLoss,
    align_in_order,
    count_valid_chunks,
    partitioned_loss,
    universal_logit_loss,
    vocab_partition,
)
from termwise.lm import VocabProjection as Projection
from termwise.lm import _chunk_blocks as chunk_blocks


def inputs(batch=2, times=(6, 5), vocabs=(5, 7), chunks=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = [
        2 * torch.randn(batch, time, vocab, generator=generator, dtype=torch.float64)
        for time, vocab in zip(times, vocabs, strict=True)
    ]
    ids = [
        torch.randint(-1, chunks, (batch, time), generator=generator).sort(1).values
        for time in times
    ]
    valid = torch.rand(batch, chunks, generator=generator) < 0.8
    return logits[0].requires_grad_(), logits[1], Alignment(*ids, valid, valid)


def test_names_of_tokens_do_not_matter():
    student, teacher, alignment = inputs()
    ours = universal_logit_loss(student, teacher, alignment=alignment).loss
    theirs = universal_logit_loss(student.flip(2), teacher.roll(2, 2), alignment=alignment).loss
    torch.testing.assert_close(ours, theirs)


def test_a_student_as_sure_of_other_words_has_no_loss():
    student, _, _ = inputs()
    alignment = align_in_order(*[torch.ones(2, 6, dtype=torch.bool)] * 2)
    terms = universal_logit_loss(student, student.detach().flip(2), alignment=alignment)
    assert terms.loss.item() == pytest.approx(0, abs=1e-15)
    assert terms.num_chunks.item() == 10  # token 0 is predicted by none


def test_it_is_between_nothing_and_two():
    sure = torch.tensor([[[100.0, 0.0], [0.0, 0.0]]])
    wide = torch.zeros(1, 2, 10_000)
    alignment = align_in_order(*[torch.ones(1, 2, dtype=torch.bool)] * 2)
    loss = universal_logit_loss(sure, wide, alignment=alignment).loss
    assert loss.item() == pytest.approx(2 - 2e-4)
    torch.testing.assert_close(loss, universal_logit_loss(wide, sure, alignment=alignment).loss)


def test_where_no_token_is_paired_it_is_the_tail_of_the_partitioned_loss():
    student, teacher, _ = inputs(vocabs=(6, 6), times=(5, 5))
    alignment = align_in_order(*[torch.ones(2, 5, dtype=torch.bool)] * 2)
    projection = Projection.from_pairs({(0, 0): 0.5, (0, 1): 0.5}, student_vocab=6, teacher_vocab=6)
    partition = vocab_partition(projection, rule="strict")
    theirs = partitioned_loss(student, teacher, alignment=alignment, partition=partition)
    ours = universal_logit_loss(student, teacher, alignment=alignment)
    torch.testing.assert_close(ours.loss, theirs.loss)
    ours, theirs = (torch.autograd.grad(terms.loss, student)[0] for terms in (ours, theirs))
    torch.testing.assert_close(ours, theirs)


def test_answers_are_paired_in_order_up_to_the_shorter():
    student = torch.tensor([[False, True, True, False, True], [False] * 5])
    teacher = torch.tensor([[True, True, False, False], [True] * 4])
    alignment = align_in_order(student, teacher).check()
    assert alignment.student_chunk_id.tolist() == [[-1, 0, 1, -1, -1], [-1] * 5]
    assert alignment.teacher_chunk_id.tolist() == [[0, 1, -1, -1], [-1] * 4]
    assert alignment.pair_valid.tolist() == [[True, True, False, False], [False] * 4]
    assert not alignment.pair_exact.any()


def test_positions_that_do_not_count_may_hold_anything():
    student, teacher, alignment = inputs(seed=3)
    mask = torch.tensor([True, False])
    changed, other = student.detach().clone(), teacher.clone()
    changed[:, -1], changed[1], other[:, -1] = torch.nan, torch.inf, -torch.inf
    other[1, 0] = torch.nan
    unused = alignment.student_chunk_id[:, 1:] < 0
    changed[:, :-1][unused] = torch.inf
    changed.requires_grad_()
    ours = universal_logit_loss(changed, other, alignment=alignment, sample_mask=mask)
    theirs = universal_logit_loss(student, teacher, alignment=alignment, sample_mask=mask)
    assert ours.num_chunks > 0
    assert torch.equal(ours.loss, theirs.loss)
    (gradient,) = torch.autograd.grad(ours.loss, changed)
    assert torch.equal(gradient, torch.autograd.grad(theirs.loss, student)[0])


def test_a_logit_that_is_not_finite_shows():
    student, teacher, alignment = inputs(seed=3)
    for x in (student, teacher):
        broken = [torch.full_like(y, torch.nan) if y is x else y for y in (student, teacher)]
        assert universal_logit_loss(*broken, alignment=alignment).loss.isnan()


def test_no_chunk_is_no_loss_and_in_the_graph():
    student, teacher, alignment = inputs()
    nothing = torch.zeros(2, dtype=torch.bool)
    terms = universal_logit_loss(student, teacher, alignment=alignment, sample_mask=nothing)
    assert terms.metrics() == {"loss": 0.0, "num_chunks": 0.0}
    (gradient,) = torch.autograd.grad(terms.loss, student)
    assert torch.equal(gradient, torch.zeros_like(student))


def test_micro_batches_of_one_normalizer_add_up():
    student, teacher, alignment = inputs(4)
    whole = universal_logit_loss(student, teacher, alignment=alignment)
    count = count_valid_chunks(alignment)
    parts = [
        universal_logit_loss(
            student, teacher, alignment=alignment, sample_mask=mask, normalizer=count
        ).loss
        for mask in torch.tensor([[True, False, False, False], [False, True, True, True]])
    ]
    torch.testing.assert_close(sum(parts), whole.loss)


def test_bfloat16_gives_the_gradient_of_float64_to_rounding():
    student, teacher, alignment = inputs(vocabs=(200, 300))
    half = student.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = universal_logit_loss(half, teacher.bfloat16(), alignment=alignment)
        (ours,) = torch.autograd.grad(terms.loss, half)
    exact = half.detach().double().requires_grad_()
    expected = universal_logit_loss(exact, teacher.bfloat16().double(), alignment=alignment)
    (theirs,) = torch.autograd.grad(expected.loss, exact)
    assert terms.loss.dtype == torch.float32
    assert terms.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    # A tie in bfloat16 is one, and which logit of it comes first is left open.
    wrong = (ours.double() - theirs).abs() > 2**-7 * theirs.abs() + 1e-6
    assert wrong.float().mean() < 0.02


def test_it_compiles_whole_and_maps():
    student, teacher, alignment = inputs()
    compiled = torch.compile(universal_logit_loss, fullgraph=True, backend="aot_eager")
    ours = compiled(student, teacher, alignment=alignment)
    theirs = universal_logit_loss(student, teacher, alignment=alignment)
    torch.testing.assert_close(ours.loss, theirs.loss)
    ours, theirs = (torch.autograd.grad(terms.loss, student)[0] for terms in (ours, theirs))
    torch.testing.assert_close(ours, theirs)
    several = torch.stack([student.detach(), -student.detach()])
    gradient = torch.func.grad(lambda x: universal_logit_loss(x, teacher, alignment=alignment).loss)
    mapped = torch.vmap(gradient)(several)
    torch.testing.assert_close(mapped, torch.stack([gradient(x) for x in several]))


def test_blocks_of_whole_samples_give_the_same(monkeypatch):
    student, teacher, alignment = inputs(3, seed=2)
    expected = universal_logit_loss(student, teacher, alignment=alignment)
    (gradient,) = torch.autograd.grad(expected.loss, student)
    teacher[:, -1] = torch.nan  # as a device reads samples, what does not count is masked
    monkeypatch.setattr(chunk_blocks, "on_host", lambda x: False)
    terms = universal_logit_loss(student, teacher, alignment=alignment)
    torch.testing.assert_close(terms.loss, expected.loss)
    torch.testing.assert_close(torch.autograd.grad(terms.loss, student)[0], gradient)


def test_refusals():
    student, teacher, alignment = inputs()
    said = "^universal_logit_loss needs "
    with pytest.raises(ValueError, match=said + "temperature > 0, got 0$"):
        universal_logit_loss(student, teacher, alignment=alignment, temperature=0)
    with pytest.raises(
        TypeError, match=r"alignment\.student_chunk_id needs .* is 6, but it is 5 in"
    ):
        universal_logit_loss(student[:, 1:], teacher, alignment=alignment)
    with pytest.raises(ValueError, match=said + "student_vocab 5 without a vocab_group, got 6$"):
        universal_logit_loss(student, teacher, alignment=alignment, student_vocab=6)
    with pytest.raises(tw.ContractError, match="teacher_logits needs .* axis batch is 1, but it"):
        universal_logit_loss(student, teacher[:1], alignment=alignment)


def test_the_module_is_the_function():
    student, teacher, alignment = inputs()
    ours = UniversalLogitLoss(temperature=2.0, exact_only=True)
    theirs = universal_logit_loss(
        student, teacher, alignment=alignment, temperature=2.0, exact_only=True
    )
    assert ours(student, teacher, alignment=alignment).metrics() == theirs.metrics()
