"""What each rank runs of the losses over logits: terms, and the gradient of its own logits."""

import distill_cases
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


def every_teacher(place, groups, options) -> tuple[Numbers, Tensor]:
    """Compute what a place of the mesh of 8 ranks holds; a Place of None is one process."""
    whole = distill_cases.problem(3)
    generator = torch.Generator().manual_seed(4)
    same = torch.randn(whole.student.shape, generator=generator, dtype=torch.float64)
    own, theirs = (
        torch.randint(-1, x.shape[2], x.shape[:2], generator=generator)
        for x in (whole.student, whole.teacher)
    )
    samples, columns = (
        distill_cases.part(sizes, at)
        for sizes, at in (
            (distill_cases.SAMPLES, place.batch),
            (distill_cases.TOKENS, place.vocab),
        )
    )
    times = {
        side: distill_cases.part(sizes, place.sequence)
        for side, sizes in distill_cases.TIMES.items()
    }
    a = whole.alignment
    alignment = lm.Alignment(
        a.student_chunk_id[samples, times["student"]],
        a.teacher_chunk_id[samples, times["teacher"]],
        a.pair_valid[samples],
        a.pair_exact[samples],
    )
    logits = whole.student[samples, times["student"], columns].clone().requires_grad_()
    teacher = whole.teacher[samples, times["teacher"]]
    lo, hi, _ = columns.indices(distill_cases.STUDENTS)
    tokens = theirs[samples, times["teacher"]]
    terms = lm.cross_tokenizer_loss(
        logits,
        own[samples, times["student"]],
        [
            lm.Teacher(same[samples, times["student"], columns]),
            lm.Teacher(teacher, alignment, whole.projection.rows(lo, hi), tokens=tokens),
            lm.Teacher(teacher, alignment, partition=whole.partition, tokens=tokens),
            lm.Teacher(teacher, alignment, tokens=tokens),
        ],
        student_vocab=distill_cases.STUDENTS,
        sample_mask=whole.sample_mask[samples],
        scale="match",
        temperature=1.5,
        **options,
        **groups,
    )
    terms.loss.backward()
    return values(terms), logits.grad


def every_teacher_at_once(group, options) -> tuple[Numbers, Tensor]:
    place = distill_cases.Place(*[int(bit) for bit in f"{group.rank():03b}"])
    return every_teacher(place, distill_cases.groups_of(group), options)


def linear(group, sharded, hidden, weight, bias, teacher_hidden, teacher_weight, tokens, mask):
    """Run both losses of a linear head: terms, and the gradients of hidden, weight and bias."""
    student = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    more = {"mask": mask, "softcap": 3.0, "bias": student[2], sharded: group}
    text = lm.linear_next_token_loss(*student[:2], tokens, **more)
    taught = lm.linear_distillation_loss(
        *student[:2], teacher_hidden, teacher_weight, tokens=tokens, temperature=1.5, **more
    )
    found = {**values(text), **{f"kd {name}": x for name, x in values(taught).items()}}
    return found, torch.autograd.grad(text.loss + taught.loss, student)
