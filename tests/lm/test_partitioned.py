"""The partitioned loss against the formula, dense and slow, and what must not matter to it."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from losses._chunks import counted_chunks
from losses.partitioned import PARTITIONED
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from termwise.lm import (
    Alignment,
    PartitionedLoss,
    PartitionedTerms,
    VocabPartition,
    count_valid_chunks,
    partitioned_loss,
)
from termwise.lm import _chunk_blocks as chunk_blocks

EXACT = {"rtol": 1e-10, "atol": 1e-11}
DIRECTIONS = ["forward", "reverse"]


@dataclasses.dataclass
class Problem:
    student: torch.Tensor
    teacher: torch.Tensor
    alignment: Alignment
    partition: VocabPartition

    def ours(self, **options):
        given = {"alignment": self.alignment, "partition": self.partition}
        return partitioned_loss(self.student, self.teacher, **{**given, **options})

    def theirs(self, **options):
        given = {"alignment": self.alignment, "partition": self.partition}
        return PARTITIONED.expected(self.student, self.teacher, **given, **options)

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.student)[0]


def draw_partition(generator, students, teachers, common):
    ours = torch.randperm(students, generator=generator)
    theirs = torch.randperm(teachers, generator=generator)
    common = min(common, students, teachers)
    order = ours[:common].argsort()
    return VocabPartition(
        common_student=ours[:common][order],
        common_teacher=theirs[:common][order],
        rest_student=ours[common:].sort().values,
        rest_teacher=theirs[common:].sort().values,
    )


def draw_problem(seed, *, batch=2, times=(7, 6), vocabs=(9, 8), chunks=4, common=4, ordered=True):
    g = torch.Generator().manual_seed(seed)

    def ids(time):
        drawn = torch.randint(-1, chunks, (batch, time), generator=g)
        return drawn.sort(1).values if ordered else drawn

    alignment = Alignment(
        student_chunk_id=ids(times[0]),
        teacher_chunk_id=ids(times[1]),
        pair_valid=torch.rand(batch, chunks, generator=g) < 0.8,
        pair_exact=torch.rand(batch, chunks, generator=g) < 0.7,
    )
    student, teacher = (
        2 * torch.randn(batch, time, vocab, generator=g, dtype=torch.float64)
        for time, vocab in zip(times, vocabs, strict=True)
    )
    partition = draw_partition(g, *vocabs, common)
    return Problem(student.requires_grad_(), teacher, alignment, partition)


def assert_is_the_oracle(problem, **options):
    ours, theirs = problem.ours(**options), problem.theirs(**options)
    for name, value in ours.items():
        torch.testing.assert_close(
            value.detach(), theirs[name].detach(), **EXACT, msg=lambda m, n=name: f"{n} {m}"
        )
    torch.testing.assert_close(
        problem.gradient(ours.loss), problem.gradient(theirs["loss"]), **EXACT
    )


def nemo(problem, top_k, *, temperature=2.0, reverse=False):
    """NeMo-RL's way: one-hot products over all positions, slices, sorted tails."""
    means = []
    for x, chunk_id in (
        (problem.student, problem.alignment.student_chunk_id),
        (problem.teacher, problem.alignment.teacher_chunk_id),
    ):
        shifted = torch.cat([chunk_id[:, 1:], torch.full_like(chunk_id[:, :1], -1)], 1)
        hot = (shifted[..., None] == torch.arange(problem.alignment.max_chunks)).to(x)
        sizes = hot.sum(1)
        log_probs = (x / temperature).log_softmax(-1)
        means.append((hot.transpose(1, 2) @ log_probs / (sizes[..., None] + 1e-10), sizes))
    (student, student_sizes), (teacher, teacher_sizes) = means
    mask = (student_sizes > 0) & (teacher_sizes > 0) & problem.alignment.pair_valid
    partition = problem.partition
    pair = student[..., partition.common_student], teacher[..., partition.common_teacher]
    pair = pair[::-1] if reverse else pair
    kl = nn.functional.kl_div(*pair, reduction="none", log_target=True).sum(-1)
    ours = student[..., partition.rest_student].exp().topk(top_k).values
    theirs = teacher[..., partition.rest_teacher].exp().topk(top_k).values
    l1 = (ours - theirs).abs().sum(-1)
    return ((kl + l1) * mask).sum() / mask.sum() * temperature**2


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_nemo_rls_gold_loss(seed, reverse):
    problem = draw_problem(seed)
    divergence = "reverse" if reverse else "forward"
    ours = problem.ours(tail_top_k=3, temperature=2.0, divergence=divergence)
    theirs = nemo(problem, 3, reverse=reverse)
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(
        problem.gradient(ours.loss), problem.gradient(theirs), rtol=1e-7, atol=1e-9
    )


# --- laws -----------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIRECTIONS)
def test_equal_models_have_no_loss(divergence):
    problem = draw_problem(1, times=(7, 7), vocabs=(8, 8))
    ids = problem.alignment.student_chunk_id
    partition = VocabPartition(*[torch.arange(5)] * 2, *[torch.arange(5, 8)] * 2)
    twins = Problem(
        problem.student,
        problem.student.detach().clone(),
        dataclasses.replace(problem.alignment, teacher_chunk_id=ids),
        partition,
    )
    terms = twins.ours(divergence=divergence)
    assert terms.num_chunks > 1
    torch.testing.assert_close(terms.loss, torch.zeros_like(terms.loss), atol=1e-14, rtol=0)
    assert terms.top1_agreement == 1


def test_micro_batches_add_up():
    problem = draw_problem(5, batch=4)
    whole = problem.ours(temperature=2.0)
    parts = []
    for part in (slice(0, 1), slice(1, 4)):
        tensors = [getattr(problem.alignment, f.name)[part] for f in dataclasses.fields(Alignment)]
        parts.append(
            partitioned_loss(
                problem.student[part],
                problem.teacher[part],
                alignment=Alignment(*tensors),
                partition=problem.partition,
                temperature=2.0,
                normalizer=count_valid_chunks(problem.alignment),
            )
        )
    total = parts[0].loss + parts[1].loss
    torch.testing.assert_close(total, whole.loss, **EXACT)
    torch.testing.assert_close(problem.gradient(total), problem.gradient(whole.loss), **EXACT)


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("by_samples", [False, True])
def test_positions_that_do_not_count_may_hold_anything(poison, by_samples, monkeypatch):
    if by_samples:  # what runs on other devices than the CPU
        monkeypatch.setattr(chunk_blocks, "on_host", lambda x: False)
    problem = draw_problem(11, batch=3, ordered=False)
    mask = torch.tensor([True, False, True])
    assert_is_the_oracle(problem, sample_mask=mask)
    clean = problem.ours(sample_mask=mask)
    unused = [torch.ones(x.shape[:2], dtype=torch.bool) for x in (problem.student, problem.teacher)]
    for b, ours, theirs in counted_chunks(problem.alignment, sample_mask=mask):
        unused[0][b, ours], unused[1][b, theirs] = False, False
    student = problem.student.detach().masked_fill(unused[0][..., None], poison).requires_grad_()
    teacher = problem.teacher.masked_fill(unused[1][..., None], poison)
    dirty = Problem(student, teacher, problem.alignment, problem.partition)
    terms = dirty.ours(sample_mask=mask)
    torch.testing.assert_close(dict(terms.items()), dict(clean.items()), rtol=0, atol=0)
    gradient = dirty.gradient(terms.loss)
    torch.testing.assert_close(gradient, problem.gradient(clean.loss), rtol=0, atol=0)
    assert (gradient[unused[0]] == 0).all()


def test_tokens_that_are_ruled_out_are_no_nan():
    problem = draw_problem(2)
    problem.teacher[..., problem.partition.common_teacher[0]] = -math.inf
    problem.teacher[..., problem.partition.rest_teacher[0]] = -math.inf
    with torch.no_grad():
        problem.student[..., problem.partition.rest_student[0]] = -math.inf
    terms = problem.ours()
    assert terms.loss.isfinite()
    assert problem.gradient(terms.loss).isfinite().all()


def test_where_no_chunk_counts_the_loss_is_zero_and_connected():
    problem = draw_problem(0)
    problem.alignment.pair_valid[:] = False
    with torch.no_grad():
        problem.student.fill_(math.nan)
    terms = problem.ours()
    assert all(value == 0 for _, value in terms.items())
    assert (problem.gradient(terms.loss) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_rounds_only_the_gradient(dtype, autocast):
    problem = draw_problem(4, vocabs=(40, 30), common=20)
    student = problem.student.detach().to(dtype).requires_grad_()
    teacher = problem.teacher.to(dtype)
    rounded = Problem(student, teacher, problem.alignment, problem.partition)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = rounded.ours(temperature=2.0)
        gradient = rounded.gradient(terms.loss)
    exact = Problem(
        student.detach().double().requires_grad_(),
        teacher.double(),
        problem.alignment,
        problem.partition,
    )
    expected = exact.ours(temperature=2.0)
    torch.testing.assert_close(terms.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    wide = exact.gradient(expected.loss)
    assert gradient.dtype == dtype
    unit = torch.finfo(dtype).eps / 2 + 4e-6
    error = (gradient.double() - wide).abs()
    assert (error <= unit * wide.abs() + 1e-6 * wide.abs().max() + 1e-7).all()


# --- PyTorch's transformations --------------------------------------------------------------


def call(problem, student, teacher, function=partitioned_loss):
    return function(
        student, teacher, alignment=problem.alignment, partition=problem.partition, tail_top_k=3
    )


def test_transforms():
    problem = draw_problem(0)
    students = torch.stack([problem.student.detach(), problem.student.detach() * 0.5])
    teachers = torch.stack([problem.teacher, problem.teacher + 1])

    def loss(student, teacher):
        return call(problem, student, teacher).loss

    expected = [torch.func.grad(loss)(s, t) for s, t in zip(students, teachers, strict=True)]
    inside = torch.vmap(torch.func.grad(loss))(students, teachers)
    outside = torch.func.grad(lambda s: torch.vmap(loss)(s, teachers).sum())(students)
    torch.testing.assert_close(inside, torch.stack(expected), **EXACT)
    torch.testing.assert_close(outside, torch.stack(expected), **EXACT)
    terms = problem.ours(tail_top_k=3)
    (gradient,) = torch.autograd.grad(terms.loss, problem.student, create_graph=True)
    torch.testing.assert_close(gradient.detach(), expected[0], **EXACT)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.square().sum().backward()


def test_nothing_waits_for_the_device():
    problem = draw_problem(0)
    plain = problem.student.detach()
    with FakeTensorMode() as mode:
        fake = {
            name: dataclasses.replace(
                value,
                **{
                    f.name: mode.from_tensor(getattr(value, f.name))
                    for f in dataclasses.fields(value)
                },
            )
            for name, value in (("alignment", problem.alignment), ("partition", problem.partition))
        }
        student = mode.from_tensor(plain).requires_grad_()
        terms = partitioned_loss(student, mode.from_tensor(problem.teacher), **fake)
        assert torch.autograd.grad(terms.loss, student)[0].shape == student.shape


# --- refusals and the module ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -1.0}, "needs temperature > 0, got -1.0"),
        ({"tail_top_k": 0}, "needs tail_top_k >= 1, got 0"),
        ({"normalizer": -1.0}, "needs normalizer >= 0, got -1.0"),
        (
            {"partition": draw_problem(0, vocabs=(9, 7)).partition},
            "partition of 9 student and 8 teacher tokens, got one of 9 and 7",
        ),
        (
            {"alignment": draw_problem(0, times=(6, 6)).alignment},
            r"alignment\.student_chunk_id needs .*: axis student_time is 6, but it is 7 in",
        ),
    ],
    ids=str,
)
def test_refusals(options, said):
    with pytest.raises((TypeError, ValueError), match=said):
        draw_problem(0).ours(**options)


def test_the_module_is_the_function():
    problem = draw_problem(0)
    numbers = {
        "tail_top_k": 2,
        "common_weight": 0.5,
        "tail_weight": 2.0,
        "temperature": 2.0,
        "divergence": "reverse",
        "exact_only": True,
        "grad_reduction": "sum",
    }
    module = PartitionedLoss(problem.partition, **numbers)
    mask = torch.tensor([False, True])
    expected = problem.ours(sample_mask=mask, normalizer=7, **numbers)
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        terms = one(
            problem.student,
            problem.teacher,
            alignment=problem.alignment,
            sample_mask=mask,
            normalizer=7,
        )
        assert isinstance(terms, PartitionedTerms)
        torch.testing.assert_close(dict(terms.items()), dict(expected.items()), rtol=0, atol=0)
    assert "common=4, rest_student=5, rest_teacher=4), tail_top_k=2" in repr(module)
