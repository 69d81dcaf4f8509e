"""What each rank runs of the losses over logits: terms, and the gradient of its own logits."""

import torch
from cases import Numbers, values
from torch import Tensor

from termwise import lm

GROUPS = ("batch_group", "vocab_group", "sequence_group")


def next_token(group, sharded, logits, tokens, mask) -> tuple[Numbers, Tensor]:
    logits = logits.requires_grad_()
    terms = lm.next_token_loss(logits, tokens, mask=mask, **{sharded: group})
    terms.loss.backward()
    return values(terms), logits.grad


def distillation(group, sharded, logits, teacher, mask, options) -> tuple[Numbers, Tensor]:
    logits = logits.requires_grad_()
    terms = lm.distillation_loss(logits, teacher, mask=mask, **options, **{sharded: group})
    terms.loss.backward()
    return values(terms), logits.grad


def distillation_second_derivative(group, logits, teacher):
    logits = logits.requires_grad_()
    loss = lm.distillation_loss(logits, teacher, vocab_group=group).loss
    try:
        torch.autograd.grad(loss, logits, create_graph=True)
    except NotImplementedError as error:
        return str(error)


def universal_logit(group, sharded, logits, teacher, *alignment) -> tuple[Numbers, Tensor]:
    *alignment, student_vocab = alignment
    logits = logits.requires_grad_()
    terms = lm.universal_logit_loss(
        logits,
        teacher,
        alignment=lm.Alignment(*alignment),
        temperature=1.5,
        student_vocab=student_vocab,
        **{sharded: group},
    )
    terms.loss.backward()
    return values(terms), logits.grad


def cross_tokenizer(
    group, sharded, logits, tokens, same, teacher, teacher_tokens, alignment, values_of, options
) -> tuple[Numbers, Tensor]:
    logits = logits.requires_grad_()
    aligned = lm.Alignment(*alignment)
    projection, partition, student_vocab = values_of
    teachers = [
        lm.Teacher(same),
        lm.Teacher(teacher, aligned, projection, tokens=teacher_tokens),
        lm.Teacher(teacher, aligned, partition=partition, tokens=teacher_tokens),
        lm.Teacher(teacher, aligned, tokens=teacher_tokens),
    ]
    terms = lm.cross_tokenizer_loss(
        logits, tokens, teachers, student_vocab=student_vocab, **options, **{sharded: group}
    )
    terms.loss.backward()
    return values(terms), logits.grad
