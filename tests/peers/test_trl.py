"""TRL's distillation losses beside ours, and its GKD trainer with the loss swapped."""

import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gold.gold_trainer import ULDLoss
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from termwise.lm import (
    align_in_order,
    distillation_loss,
    next_token_loss,
    universal_logit_loss,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "docs/pages/examples"))

import trl_gkd

model = functools.partial(trl_gkd.model, width=32, dtype=torch.float64)
BETAS = [0.0, 1.0, 0.5, 0.1, 0.9]


def ours_at(beta):
    """Return the arguments of distillation_loss that a beta of theirs stands for."""
    if beta in (0.0, 1.0):
        return {"divergence": ("forward", "reverse")[int(beta)]}
    return {"divergence": "jensen_shannon", "beta": beta}


def batch(seed=0, vocab=11):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, 3, 7, vocab, dtype=torch.float64, generator=generator)
    labels = torch.randint(vocab, (3, 7), generator=generator)
    labels[:, :2], labels[1, 5:] = -100, -100
    return student.requires_grad_(), teacher, labels


@pytest.mark.parametrize("items", [None, 40])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", BETAS)
def test_generalized_jsd(beta, temperature, items):
    student, teacher, labels = batch()
    theirs = GKDTrainer.generalized_jsd_loss(
        student[:, :-1],
        teacher[:, :-1],
        labels[:, 1:],
        beta=beta,
        temperature=temperature,
        num_items_in_batch=items,
    )
    ours = distillation_loss(
        student,
        teacher,
        mask=labels != -100,
        temperature=temperature,
        normalizer=None if items is None else float(items),
        **ours_at(beta),
    )
    assert_close(ours.divergence, theirs)
    assert_close(ours.loss, temperature**2 * theirs)
    (mine,) = torch.autograd.grad(ours.divergence, student)
    (its,) = torch.autograd.grad(theirs, student)
    assert_close(mine, its)


def test_reductions_without_labels():
    student, teacher, _ = batch()
    theirs = {
        reduction: GKDTrainer.generalized_jsd_loss(
            student[:, :-1], teacher[:, :-1], beta=0.0, reduction=reduction
        )
        for reduction in ("batchmean", "sum", "mean")
    }
    ours = distillation_loss(student, teacher)
    assert_close(theirs["batchmean"], 6 * ours.loss)  # over samples; six positions in each
    assert_close(theirs["sum"], 18 * ours.loss)
    assert_close(theirs["mean"], ours.loss / 11)  # over tokens times vocabulary


def test_no_token_that_counts():
    student, teacher, labels = batch()
    theirs = GKDTrainer.generalized_jsd_loss(student, teacher, torch.full_like(labels, -100))
    ours = distillation_loss(student, teacher, mask=torch.zeros_like(labels, dtype=torch.bool))
    assert theirs.item() == ours.loss.item() == 0


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", BETAS)
def test_the_distillation_trainers_chunked_loss(beta, temperature):
    generator = torch.Generator().manual_seed(1)
    hidden, teacher_hidden = torch.randn(2, 3, 7, 4, dtype=torch.float64, generator=generator)
    head, teacher_head = torch.randn(2, 11, 4, dtype=torch.float64, generator=generator)
    hidden, head = hidden.requires_grad_(), head.requires_grad_()
    _, _, labels = batch()
    mask = labels != -100
    theirs, _, count = _chunked_divergence_loss(
        hidden[:, :-1],
        teacher_hidden[:, :-1],
        head,
        teacher_head,
        mask[:, 1:],
        beta,
        temperature=temperature,
    )
    ours = distillation_loss(
        hidden @ head.T,
        teacher_hidden @ teacher_head.T,
        mask=mask,
        temperature=temperature,
        **ours_at(beta),
    )
    tolerances = {"rtol": 2e-5, "atol": 2e-6}  # theirs is computed in float32
    assert count == ours.num_tokens
    assert_close(ours.divergence, theirs, check_dtype=False, **tolerances)
    mine = torch.autograd.grad(ours.divergence, (hidden, head))
    its = torch.autograd.grad(theirs, (hidden, head))
    assert_close(mine, its, check_dtype=False, **tolerances)


def uld(strategy, **changes):
    settings = {
        "uld_crossentropy_weight": 0.0,
        "uld_distillation_weight": 1.0,
        "uld_student_temperature": 1.0,
        "uld_teacher_temperature": 1.0,
        "uld_skip_student_eos": False,
        "uld_skip_teacher_eos": False,
        "use_extended_uld": False,
        "uld_token_merge_strategy": strategy,
        "uld_use_hybrid_loss": False,
    }
    return ULDLoss(SimpleNamespace(**{**settings, **changes}))


def answers(vocabs=(7, 9), lengths=((3, 6), (4, 7))):
    """Return logits of both models, and labels whose answer is the end of each row."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for vocab, (start, stop) in zip(vocabs, lengths, strict=True):
        logits = torch.randn(2, stop, vocab, dtype=torch.float64, generator=generator)
        labels = torch.randint(vocab, (2, stop), generator=generator)
        labels[:, :start] = -100
        found.append((logits, labels))
    return found


@pytest.mark.parametrize(("temperature", "skip"), [(1.0, False), (2.0, False), (1.0, True)])
def test_universal_logit_distillation_with_their_bayesian_positions(temperature, skip):
    (student, student_labels), (teacher, teacher_labels) = answers()
    student.requires_grad_()
    loss_fn = uld(
        "bayesian",
        uld_student_temperature=temperature,
        uld_teacher_temperature=temperature,
        uld_skip_student_eos=skip,
        uld_skip_teacher_eos=skip,
    )
    theirs = loss_fn(
        student,
        teacher,
        student_labels,
        teacher_labels,
        student_labels.clamp_min(0),
        teacher_labels.clamp_min(0),
    )
    if skip:
        student_labels[:, -1] = teacher_labels[:, -1] = -100
    alignment = align_in_order(student_labels != -100, teacher_labels != -100)
    ours = universal_logit_loss(student, teacher, alignment=alignment, temperature=temperature)
    assert_close(ours.loss, theirs)  # answers of one length: a mean of means is the mean
    assert_close(torch.autograd.grad(ours.loss, student), torch.autograd.grad(theirs, student))


def test_their_observed_positions_are_one_later():
    (student, student_labels), (teacher, teacher_labels) = answers()
    loss_fn = uld("observed")
    ids = student_labels.clamp_min(0), teacher_labels.clamp_min(0)
    theirs = loss_fn(student, teacher, student_labels, teacher_labels, *ids)
    at = [
        logits[:, -3:].softmax(-1).sort(-1, descending=True).values for logits in (student, teacher)
    ]
    assert_close(theirs, (F.pad(at[0], (0, 2)) - at[1]).abs().sum(-1).mean())
    alignment = align_in_order(student_labels != -100, teacher_labels != -100)
    ours = universal_logit_loss(student, teacher, alignment=alignment).loss
    assert (ours - theirs).abs() > 0.01


def test_a_split_word_is_a_product_there():
    """Two student tokens, one of the teacher: one distribution times the other's probability."""
    (student, student_labels), (teacher, teacher_labels) = answers(lengths=((3, 5), (3, 4)))
    student, student_labels = student[:1], student_labels[:1]
    teacher, teacher_labels = teacher[:1], teacher_labels[:1]
    student_spans = torch.tensor([[[0, 0], [0, 0], [0, 0], [0, 1], [1, 2]]])
    teacher_spans = torch.tensor([[[0, 0], [0, 0], [0, 0], [0, 2]]])
    for strategy, base, at, positions in (
        ("bayesian", 1, 0, student[0, 2:4]),
        ("observed", 0, 1, student[0, 3:5]),
    ):
        theirs = uld(strategy, use_extended_uld=True)(
            student,
            teacher,
            student_labels,
            teacher_labels,
            student_labels.clamp_min(0),
            teacher_labels.clamp_min(0),
            student_spans,
            teacher_spans,
        )
        probabilities = positions.softmax(-1)
        merged = probabilities[base] * probabilities[at, student_labels[0, 3 + at]]
        assert merged.sum() < 1
        target = teacher[0, 2 if strategy == "bayesian" else 3].softmax(-1)
        gap = (
            F.pad(merged.sort(descending=True).values, (0, 2)) - target.sort(descending=True).values
        )
        assert_close(theirs, gap.abs().sum())


def test_cross_entropy_of_the_causal_models():
    student, _, labels = batch()
    theirs = model(0).loss_function(student, labels, vocab_size=11)
    assert_close(next_token_loss(student, labels).loss, theirs, check_dtype=False)
    theirs = model(0).loss_function(student, labels, vocab_size=11, num_items_in_batch=40)
    ours = next_token_loss(student, labels, normalizer=40.0)
    assert_close(ours.loss, theirs, check_dtype=False, rtol=1e-6, atol=1e-6)


# Ten steps of the real trainer, as the example runs them: tiny random models, a tokenizer trained
# there. In float64, so that Adam, which divides by small numbers, keeps two equal runs equal.


def trained(kind, **options):
    """Return each step's loss and the parameters after ten steps of the trainer."""
    trainer = trl_gkd.main(kind, torch.float64, **options)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: value.detach() for name, value in trainer.model.named_parameters()}


@pytest.mark.parametrize(("beta", "lmbda"), [(0.5, 0.0), (0.0, 0.0), (1.0, 0.0), (0.5, 1.0)])
def test_ten_steps_of_the_gkd_trainer_with_the_loss_swapped(beta, lmbda):
    """On the data's answers (lmbda 0), and on those that the student samples (1)."""
    their_losses, theirs = trained(GKDTrainer, beta=beta, lmbda=lmbda)
    our_losses, ours = trained(trl_gkd.Distiller, beta=beta, lmbda=lmbda)
    assert len(our_losses) == 10
    assert our_losses[-1] != our_losses[0]
    assert_close(torch.tensor(our_losses), torch.tensor(their_losses), rtol=1e-6, atol=1e-8)
    start = dict(model(1).named_parameters())
    for name, value in theirs.items():
        assert (value - start[name]).abs().max() > 1e-3  # it was trained
        assert_close(ours[name], value, rtol=0, atol=1e-8)
