"""Liger's losses beside ours: its chunked ones in torch, its Triton kernels in the interpreter."""

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from liger_kernel.transformers import (
    LigerCrossEntropyLoss,
    LigerFusedLinearCrossEntropyLoss,
    LigerFusedLinearJSD,
    LigerJSD,
    LigerKLDIVLoss,
)
from liger_kernel.transformers.vocab_parallel_cross_entropy import LigerVocabParallelCrossEntropy
from torch.testing import assert_close

from termwise.lm import distillation_loss, linear_next_token_loss, next_token_loss

BETAS = [0.0, 1.0, 0.5, 0.1]
SINGLE = {"rtol": 2e-5, "atol": 2e-6, "check_dtype": False}  # kernels compute in float32


def ours_at(beta):
    if beta in (0.0, 1.0):
        return {"divergence": ("forward", "reverse")[int(beta)]}
    return {"divergence": "jensen_shannon", "beta": beta}


def batch(dtype=torch.float64, vocab=11):
    """Return hidden states and heads of student and teacher, of other widths, and labels."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    student = normal(3, 7, 4).requires_grad_(), normal(vocab, 4).requires_grad_()
    teacher = normal(3, 7, 6), normal(vocab, 6)
    labels = torch.randint(vocab, (3, 7), generator=generator)
    labels[:, :2], labels[1, 5:] = -100, -100
    return student, teacher, labels


def flat(x):
    """Take positions as their losses do: a row for each that predicts, shifted by the caller."""
    return x[:, :-1].flatten(0, 1).contiguous()


def shifted(labels):
    return labels[:, 1:].flatten().contiguous()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", BETAS)
def test_chunked_jsd_from_hidden_states(beta, temperature):
    student, teacher, labels = batch()
    loss_fn = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta,
        temperature=temperature,
        compiled=False,
        chunk_size=4,
    )
    theirs = loss_fn(flat(student[0]), student[1], flat(teacher[0]), teacher[1], shifted(labels))
    ours = distillation_loss(
        student[0] @ student[1].T,
        teacher[0] @ teacher[1].T,
        mask=labels != -100,
        temperature=temperature,
        **ours_at(beta),
    )
    assert_close(ours.divergence, theirs, **SINGLE)  # its sum over chunks is float32
    assert_close(ours.loss, temperature**2 * theirs, **SINGLE)
    mine = torch.autograd.grad(ours.divergence, student)
    its = torch.autograd.grad(theirs, student)
    assert_close(mine, its)


def test_the_hard_loss_is_next_token_loss_without_the_temperature():
    student, teacher, labels = batch()
    loss_fn = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.3,
        weight_soft_loss=0.7,
        beta=0.5,
        temperature=2.0,
        compiled=False,
        return_soft_hard_loss=True,
    )
    theirs, soft, hard = loss_fn(
        flat(student[0]), student[1], flat(teacher[0]), teacher[1], shifted(labels)
    )
    logits = student[0] @ student[1].T
    divergence = distillation_loss(
        logits,
        teacher[0] @ teacher[1].T,
        mask=labels != -100,
        temperature=2.0,
        divergence="jensen_shannon",
    ).divergence
    cross_entropy = next_token_loss(logits, labels).loss
    assert_close(divergence, soft, **SINGLE)
    assert_close(cross_entropy, hard, **SINGLE)
    ours = 0.3 * cross_entropy + 0.7 * divergence
    assert_close(ours, theirs, **SINGLE)
    mine = torch.autograd.grad(ours, student)
    its = torch.autograd.grad(theirs, student)
    assert_close(mine, its, **SINGLE)


def test_a_wider_teacher_takes_zeros_for_the_students_missing_logits():
    """Zeros, which are probabilities: to leave the tokens out, cut the teacher's head."""
    student, teacher, labels = batch()
    wider = torch.cat([teacher[1], torch.full((2, 6), -1.0, dtype=torch.float64)])
    loss_fn = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False
    )
    inputs = flat(student[0]), student[1], flat(teacher[0])
    theirs = loss_fn(*inputs, wider, shifted(labels))
    settings = {"mask": labels != -100, "divergence": "jensen_shannon"}
    logits = student[0] @ student[1].T
    padded = torch.nn.functional.pad(logits, (0, 2))
    ours = distillation_loss(padded, teacher[0] @ wider.T, **settings).divergence
    assert_close(ours, theirs, **SINGLE)
    cut = distillation_loss(logits, (teacher[0] @ wider.T)[..., :11], **settings).divergence
    assert_close(cut, loss_fn(*inputs, wider[:11], shifted(labels)), **SINGLE)
    assert (cut - ours).abs() > 0.005


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("beta", BETAS)
def test_the_jsd_kernel(beta, labelled):
    student, teacher, labels = batch(torch.float32)
    logits = (student[0] @ student[1].T).detach().requires_grad_()
    target = teacher[0] @ teacher[1].T
    log_q, log_p = (flat(x.log_softmax(-1)) for x in (logits, target))
    theirs = LigerJSD(beta)(log_q, log_p, shifted(labels) if labelled else None)
    ours = distillation_loss(
        logits, target, mask=labels != -100 if labelled else None, **ours_at(beta)
    ).loss
    assert_close(ours, theirs, **SINGLE)
    assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits), **SINGLE)


@pytest.mark.parametrize("beta", BETAS)
def test_the_fused_jsd(beta):
    student, teacher, labels = batch(torch.float32)
    theirs = LigerFusedLinearJSD(jsd_beta=beta, temperature=2.0)(
        flat(student[0]), student[1], flat(teacher[0]), teacher[1], shifted(labels)
    )
    ours = distillation_loss(
        student[0] @ student[1].T,
        teacher[0] @ teacher[1].T,
        mask=labels != -100,
        temperature=2.0,
        **ours_at(beta),
    ).divergence
    assert_close(ours, theirs, **SINGLE)
    assert_close(torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student), **SINGLE)


def test_the_kl_loss_is_the_forward_divergence_of_all_positions():
    """By its documented formula: the kernel's float argument is more than the interpreter takes."""
    assert issubclass(LigerKLDIVLoss, torch.nn.KLDivLoss)
    student, teacher, _ = batch()
    logits = (student[0] @ student[1].T).detach().requires_grad_()
    target = teacher[0] @ teacher[1].T
    log_q, log_p = (flat(x.log_softmax(-1)) for x in (logits, target))
    theirs = (log_p.exp() * (log_p - log_q)).sum() / len(log_p)  # reduction="batchmean"
    ours = distillation_loss(logits, target).loss
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy(reduction):
    student, _, labels = batch(torch.float32)
    logits = (student[0] @ student[1].T).detach()
    found = []
    for is_ours in (True, False):  # theirs writes its gradient over the logits
        rows = logits.clone().requires_grad_()
        if is_ours:
            normalizer = None if reduction == "mean" else 1.0
            loss = next_token_loss(rows, labels, normalizer=normalizer).loss
        else:
            # -100 for the last, so that no row is cut off or copied
            after = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
            given = (rows * 1.0).flatten(0, 1)
            loss = LigerCrossEntropyLoss(reduction=reduction)(given, after)
            assert not given.equal(logits.flatten(0, 1))
        found.append((loss, torch.autograd.grad(loss, rows)[0]))
    assert_close(*found, **SINGLE)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fused_linear_cross_entropy(reduction):
    (hidden, head), _, labels = batch(torch.float32)
    loss_fn = LigerFusedLinearCrossEntropyLoss(reduction=reduction)
    theirs = loss_fn(head, flat(hidden), shifted(labels))
    normalizer = None if reduction == "mean" else 1.0
    ours = linear_next_token_loss(hidden, head, labels, normalizer=normalizer).loss
    assert_close(ours, theirs, **SINGLE)
    mine, its = (torch.autograd.grad(loss, (hidden, head)) for loss in (ours, theirs))
    assert_close(mine, its, **SINGLE)


def test_vocab_parallel_cross_entropy_gives_each_token_time_first():
    student, _, labels = batch(torch.float32)
    logits = (student[0] @ student[1].T).detach()
    theirs = LigerVocabParallelCrossEntropy()(
        logits[:, :-1].transpose(0, 1).contiguous(), labels[:, 1:].T.contiguous()
    )
    assert theirs.shape == (6, 3)
    assert_close(next_token_loss(logits, labels, normalizer=1.0).loss, theirs.sum(), **SINGLE)
