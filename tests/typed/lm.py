"""What a type checker knows of `termwise.lm` that calls.py cannot write. Never run."""

from typing import assert_type

from torch import Tensor
from torch.distributed import ProcessGroup

from termwise import lm
from termwise.lm import TargetedVarianceLoss, TargetedVarianceTerms, targeted_variance_loss


def functions(weight: Tensor, rows: Tensor, group: ProcessGroup) -> None:
    terms = targeted_variance_loss(weight, target=2, valid_rows=rows, vocab_group=group)
    assert_type(terms, TargetedVarianceTerms)
    for field in (terms.loss, terms.squared_error, terms.variance):
        assert_type(field, Tensor)


def modules(weight: Tensor, rows: Tensor, group: ProcessGroup) -> None:
    loss_fn = TargetedVarianceLoss(coefficient=0.5)
    assert_type(loss_fn(weight, valid_rows=rows, vocab_group=group), TargetedVarianceTerms)
    assert_type(loss_fn.target, float)


def aligned(offsets: list[list[tuple[int, int]]], x: Tensor) -> None:
    assert_type(lm.align_spans(offsets, offsets), lm.Alignment)
    assert_type(lm.align_spans(x, x, documents=(x, [[0, None]])), lm.Alignment)


def members_of_alignment(one: lm.Alignment) -> None:
    assert_type(one.max_chunks, int)
    assert_type(one.to("cpu"), lm.Alignment)
    assert_type(one.check(), lm.Alignment)
    assert_type(lm.Alignment.from_flat({}), lm.Alignment)
    assert_type(one.where(), lm.Alignment)


def members_of_teacher(one: lm.Teacher) -> None:
    assert_type(one.to("cpu"), lm.Teacher)


def members_of_vocab_partition(one: lm.VocabPartition) -> None:
    assert_type(one.to("cpu"), lm.VocabPartition)


def members_of_vocab_projection(one: lm.VocabProjection, x: Tensor) -> None:
    assert_type(
        lm.VocabProjection.from_topk(x, x, student_vocab=2, teacher_vocab=2), lm.VocabProjection
    )
    assert_type(
        lm.VocabProjection.from_pairs({(0, 1): 1.0}, student_vocab=2, teacher_vocab=2),
        lm.VocabProjection,
    )
    assert_type(lm.VocabProjection.from_tokens(["a"], ["a", None]), lm.VocabProjection)
    assert_type(lm.VocabProjection.from_tokenizers(object(), object()), lm.VocabProjection)
    assert_type(lm.VocabProjection.load("file"), lm.VocabProjection)
    assert_type(
        lm.VocabProjection.load_nemo("file", student_vocab=2, teacher_vocab=2), lm.VocabProjection
    )
    assert_type(one.save("file"), None)
    assert_type(one.to("cpu"), lm.VocabProjection)
    assert_type(one.rows(0, 1), lm.VocabProjection)
    assert_type(one.columns(x), lm.VocabProjection)
    assert_type(one.to_topk(), tuple[Tensor, Tensor])
    assert_type(one.project(x), Tensor)


def members_of_shared_logits(one: lm.SharedLogits, x: Tensor) -> None:
    assert_type(one.writes, int)
    assert_type(lm.SharedLogits.create((2, 3, 5)), lm.SharedLogits)
    assert_type(lm.SharedLogits.open(one.handle), lm.SharedLogits)
    assert_type(one.handle, lm.SharedLogitsHandle)
    assert_type(one[0:1], Tensor)
    assert_type(one.write(x), None)
    assert_type(one.close(), None)
