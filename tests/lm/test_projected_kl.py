"""The projected KL against the formula, dense and slow, and what must not matter to it."""

import copy
import dataclasses
import io
import math
import pickle

import pytest
import torch
from losses._chunks import counted_chunks
from losses.projected_kl import PROJECTED_KL, matrix_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from termwise import _numbers
from termwise.lm import (
    Alignment,
    ProjectedKLLoss,
    ProjectedKLTerms,
    VocabProjection,
    count_valid_chunks,
    projected_kl_loss,
)
from termwise.lm import _chunk_blocks as chunk_blocks

EXACT = {"rtol": 1e-10, "atol": 1e-11}
MEANS = ["log", "log_normalized", "prob"]
DIRECTIONS = ["forward", "reverse"]


# --- the formula, one chunk at a time -------------------------------------------------------


# --- drawn problems -------------------------------------------------------------------------


@dataclasses.dataclass
class Problem:
    student: torch.Tensor
    teacher: torch.Tensor
    alignment: Alignment
    projection: VocabProjection

    def ours(self, **options):
        given = {"alignment": self.alignment, "projection": self.projection}
        return projected_kl_loss(self.student, self.teacher, **{**given, **options})

    def theirs(self, **options):
        given = {"alignment": self.alignment, "projection": self.projection}
        return PROJECTED_KL.expected(self.student, self.teacher, **given, **options)

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.student)[0]


def draw_ids(generator, batch, time, chunks, *, ordered):
    ids = torch.randint(-1, chunks, (batch, time), generator=generator)
    return ids.sort(1).values if ordered else ids


def draw_projection(generator, students, teachers, *, covering=False):
    indices = torch.randint(-1, teachers, (students, 3), generator=generator)
    indices[0, 0] = 0
    if covering:
        indices[:, 0] = torch.arange(students) % teachers
    weights = torch.rand(students, 3, generator=generator) + 0.1
    weights = weights.where(indices >= 0, 0)
    return VocabProjection.from_topk(
        indices, weights, student_vocab=students, teacher_vocab=teachers
    )


def draw_problem(
    seed, *, batch=2, times=(7, 6), vocabs=(6, 5), chunks=4, ordered=True, covering=False
):
    g = torch.Generator().manual_seed(seed)
    alignment = Alignment(
        student_chunk_id=draw_ids(g, batch, times[0], chunks, ordered=ordered),
        teacher_chunk_id=draw_ids(g, batch, times[1], chunks, ordered=ordered),
        pair_valid=torch.rand(batch, chunks, generator=g) < 0.8,
        pair_exact=torch.rand(batch, chunks, generator=g) < 0.7,
    )
    student, teacher = (
        3 * torch.randn(batch, time, vocab, generator=g, dtype=torch.float64)
        for time, vocab in zip(times, vocabs, strict=True)
    )
    projection = draw_projection(g, *vocabs, covering=covering)
    return Problem(student.requires_grad_(), teacher, alignment, projection)


def assert_is_the_oracle(problem, **options):
    ours, theirs = problem.ours(**options), problem.theirs(**options)
    for name, value in ours.items():
        torch.testing.assert_close(
            value.detach(),
            theirs[name].detach().to(value),
            **EXACT,
            msg=lambda m, n=name: f"{n} {m}",
        )
    torch.testing.assert_close(
        problem.gradient(ours.loss), problem.gradient(theirs["loss"]), **EXACT
    )


@pytest.fixture(params=[2**20, 10], ids=["one block", "many blocks"])
def block_size(request, monkeypatch):
    monkeypatch.setattr(chunk_blocks, "BLOCK", request.param)


@pytest.mark.parametrize("divergence", DIRECTIONS)
@pytest.mark.parametrize("teacher_mean", MEANS)
def test_given_columns(teacher_mean, divergence):
    problem = draw_problem(1)
    options = {"teacher_mean": teacher_mean, "divergence": divergence}
    columns = torch.tensor([0, 2, 3])
    assert_is_the_oracle(problem, teacher_columns=columns, **options)
    # Their order is of no account.
    for columns in (torch.tensor([3, 0, 2]), torch.tensor([2, 3, 0])):
        assert_is_the_oracle(problem, teacher_columns=columns, **options)


# --- what other code computes ---------------------------------------------------------------


def nemo(problem, columns_top_k, *, temperature=2.0, reverse=False):
    """NeMo-RL's way: one-hot products over all positions, its epsilons, its averages."""
    student, teacher, M = problem.student, problem.teacher, matrix_of(problem.projection)
    columns = teacher.flatten(0, 1).amax(0).topk(columns_top_k).indices.sort().values
    projected = (student / temperature).softmax(-1) @ M[:, columns]
    target = (teacher[..., columns] / temperature).log_softmax(-1)

    def chunk_mean(x, chunk_id):
        # Logit t predicts token t + 1; nothing follows the last one.
        shifted = torch.cat([chunk_id[:, 1:], torch.full_like(chunk_id[:, :1], -1)], 1)
        hot = (shifted[..., None] == torch.arange(problem.alignment.max_chunks)).to(x)
        sizes = hot.sum(1)
        return hot.transpose(1, 2) @ x / (sizes[..., None] + 1e-10), sizes

    q, student_sizes = chunk_mean(projected, problem.alignment.student_chunk_id)
    log_p, teacher_sizes = chunk_mean(target, problem.alignment.teacher_chunk_id)
    q = q / (q.sum(-1, keepdim=True) + 1e-10)
    log_q = (q + 1e-10).log()
    mask = (student_sizes > 0) & (teacher_sizes > 0) & problem.alignment.pair_valid
    pair = (log_p, log_q) if reverse else (log_q, log_p)
    kl = nn.functional.kl_div(*pair, reduction="none", log_target=True).sum(-1)
    return (kl * mask).sum() / mask.sum() * temperature**2


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_log_mean_is_nemo_rls(seed, reverse):
    # Every position in a chunk, for NeMo-RL chooses its columns over all of them.
    problem = draw_problem(seed, times=(8, 7), vocabs=(9, 8))
    problem.alignment.teacher_chunk_id[:] = torch.arange(7) % 4
    problem.alignment.pair_valid[:] = True
    problem.teacher[:, -1] = -9.0  # but the last one, which predicts nothing
    divergence = "reverse" if reverse else "forward"
    problem.alignment.student_chunk_id[:] = torch.arange(8) % 4
    options = {"temperature": 2.0, "divergence": divergence, "teacher_mean": "log"}
    ours = problem.ours(columns_top_k=5, **options)
    theirs = nemo(problem, 5, reverse=reverse)
    torch.testing.assert_close(ours.loss, theirs, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(
        problem.gradient(ours.loss), problem.gradient(theirs), rtol=1e-7, atol=1e-9
    )


# --- laws -----------------------------------------------------------------------------------


def identity(vocab):
    return VocabProjection.from_pairs(
        {(v, v): 1.0 for v in range(vocab)}, student_vocab=vocab, teacher_vocab=vocab
    )


def twins(seed=0, **options):
    """A student that is its teacher, position by position."""
    problem = draw_problem(seed, times=(7, 7), vocabs=(6, 6), **options)
    ids = problem.alignment.student_chunk_id
    alignment = dataclasses.replace(problem.alignment, teacher_chunk_id=ids)
    teacher = problem.student.detach().clone()
    return Problem(problem.student, teacher, alignment, identity(6))


@pytest.mark.parametrize("divergence", DIRECTIONS)
def test_equal_models_have_no_divergence(divergence):
    one_each = twins()
    one_each.alignment.student_chunk_id[:] = torch.tensor([3, 0, 1, 2, 3, -1, -1])
    one_each.alignment.pair_valid[:] = True
    for teacher_mean in MEANS:  # with one position in a chunk all three means are one
        terms = one_each.ours(divergence=divergence, teacher_mean=teacher_mean, eps=0.0)
        torch.testing.assert_close(terms.kl, torch.zeros_like(terms.kl), atol=1e-14, rtol=0)
        assert problem_is_flat(one_each, terms)
    terms = twins().ours(divergence=divergence, teacher_mean="prob", eps=0.0)
    torch.testing.assert_close(terms.kl, torch.zeros_like(terms.kl), atol=1e-14, rtol=0)
    assert terms.top1_agreement == 1
    assert terms.uncovered_teacher_mass.abs() < 1e-12
    # The means of several positions differ: arithmetic on one side, geometric on the other.
    assert twins().ours(divergence=divergence).kl > 1e-3
    assert twins().ours(divergence="forward", teacher_mean="log").kl < 0


def problem_is_flat(problem, terms):
    return problem.gradient(terms.loss).abs().max() < 1e-13


def test_samples_and_micro_batches_add_up():
    problem = draw_problem(5, batch=4)
    whole = problem.ours(temperature=2.0)
    normalizer = count_valid_chunks(problem.alignment)
    assert normalizer == whole.num_chunks
    parts = []
    for part in (slice(0, 1), slice(1, 4)):
        tensors = [getattr(problem.alignment, f.name)[part] for f in dataclasses.fields(Alignment)]
        parts.append(
            projected_kl_loss(
                problem.student[part],
                problem.teacher[part],
                alignment=Alignment(*tensors),
                projection=problem.projection,
                temperature=2.0,
                normalizer=normalizer,
            )
        )
    total = parts[0].loss + parts[1].loss
    torch.testing.assert_close(total, whole.loss, **EXACT)
    torch.testing.assert_close(problem.gradient(total), problem.gradient(whole.loss), **EXACT)


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("columns_top_k", [None, 3])
@pytest.mark.usefixtures("block_size")
def test_positions_that_do_not_count_may_hold_anything(poison, columns_top_k):
    problem = draw_problem(11, batch=3)
    mask = torch.tensor([True, False, True])
    options = {"columns_top_k": columns_top_k, "sample_mask": mask}
    clean = problem.ours(**options)
    chunks = list(counted_chunks(problem.alignment, sample_mask=mask))
    assert chunks
    unused = [torch.ones(x.shape[:2], dtype=torch.bool) for x in (problem.student, problem.teacher)]
    for b, ours, theirs in chunks:
        unused[0][b, ours], unused[1][b, theirs] = False, False
    student = problem.student.detach().masked_fill(unused[0][..., None], poison).requires_grad_()
    teacher = problem.teacher.masked_fill(unused[1][..., None], poison)
    dirty = Problem(student, teacher, problem.alignment, problem.projection)
    terms = dirty.ours(**options)
    torch.testing.assert_close(dict(terms.items()), dict(clean.items()), rtol=0, atol=0)
    gradient = dirty.gradient(terms.loss)
    torch.testing.assert_close(gradient, problem.gradient(clean.loss), rtol=0, atol=0)
    assert (gradient[unused[0]] == 0).all()


def test_padding_changes_nothing():
    problem = draw_problem(3)
    terms = problem.ours(columns_top_k=3)
    a = problem.alignment
    padded = Alignment(
        *[
            torch.nn.functional.pad(ids, (0, 3), value=-1)
            for ids in (a.student_chunk_id, a.teacher_chunk_id)
        ],
        *[torch.nn.functional.pad(flags, (0, 2)) for flags in (a.pair_valid, a.pair_exact)],
    )
    student, teacher = (
        torch.nn.functional.pad(x, (0, 0, 0, 3), value=9.0)
        for x in (problem.student, problem.teacher)
    )
    longer = Problem(student, teacher, padded, problem.projection).ours(columns_top_k=3)
    torch.testing.assert_close(dict(longer.items()), dict(terms.items()), rtol=0, atol=0)


def test_a_token_that_the_teacher_rules_out_is_no_nan():
    problem = draw_problem(2, covering=True)
    problem.teacher[..., 1] = -math.inf
    for teacher_mean in MEANS:
        terms = problem.ours(teacher_mean=teacher_mean)
        assert terms.loss.isfinite()
        assert problem.gradient(terms.loss).isfinite().all()
    assert problem.ours(divergence="reverse").loss == math.inf


def test_a_non_finite_logit_that_counts_is_not_repaired():
    problem = twins()
    problem.alignment.pair_valid[:] = True
    with torch.no_grad():
        b, ours, _ = next(counted_chunks(problem.alignment))
        problem.student[b, ours[0]] = math.nan
    assert problem.ours().loss.isnan()


def test_uncovered_mass_and_epsilon():
    # Two student tokens, both projected to teacher token 0; the teacher has half on token 1.
    projection = VocabProjection.from_pairs(
        {(0, 0): 1.0, (1, 0): 1.0}, student_vocab=2, teacher_vocab=2
    )
    ids, yes = torch.tensor([[-1, 0]]), torch.ones(1, 1, dtype=torch.bool)
    problem = Problem(
        torch.zeros(1, 2, 2, dtype=torch.float64, requires_grad=True),
        torch.zeros(1, 2, 2, dtype=torch.float64),
        Alignment(ids, ids, yes, yes),
        projection,
    )
    terms = problem.ours()
    assert terms.uncovered_teacher_mass == 0.5
    expected = math.log(0.5) - 0.5 * math.log(1e-10)
    assert terms.kl.item() == pytest.approx(expected, abs=1e-9)
    assert problem.ours(eps=0.0).kl == math.inf
    assert problem.ours(eps=0.0, divergence="reverse").kl.item() == pytest.approx(math.log(2))
    one_column = problem.ours(teacher_columns=torch.tensor([0]))
    assert one_column.kl.abs() < 1e-9
    assert one_column.uncovered_teacher_mass == 0.5


@pytest.mark.parametrize("why", ["pair_valid", "sample_mask", "empty", "no samples", "no chunks"])
def test_where_no_chunk_counts_the_loss_is_zero_and_connected(why):
    problem = draw_problem(0, batch=0 if why == "no samples" else 2)
    options = {"columns_top_k": 2}
    if why == "pair_valid":
        problem.alignment.pair_valid[:] = False
    elif why == "sample_mask":
        options["sample_mask"] = torch.zeros(2, dtype=torch.bool)
    elif why == "empty":
        problem.alignment.student_chunk_id[:] = -1
    elif why == "no chunks":
        none = torch.full((2, 7), -1), torch.full((2, 6), -1)
        problem.alignment = Alignment(*none, *[torch.zeros(2, 0, dtype=torch.bool)] * 2)
    with torch.no_grad():
        problem.student.fill_(math.nan)
    terms = problem.ours(**options)
    assert all(value == 0 for _, value in terms.items())
    assert (problem.gradient(terms.loss) == 0).all()
    zero = problem.ours(normalizer=count_valid_chunks(problem.alignment) * 0)
    assert zero.num_chunks or zero.loss == 0


def test_a_chunk_of_token_0_alone_does_not_count():
    ids, yes = torch.tensor([[0, 1, 1]]), torch.ones(1, 2, dtype=torch.bool)
    assert count_valid_chunks(Alignment(ids, ids, yes, yes)) == 1


def test_the_teacher_gets_no_gradient():
    problem = draw_problem(8)
    problem.teacher.requires_grad_()
    problem.ours().loss.backward()
    assert problem.teacher.grad is None


# --- dtypes, autocast, memory ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_rounds_only_the_gradient(dtype, autocast):
    problem = draw_problem(4, vocabs=(40, 30), covering=True)
    student = problem.student.detach().to(dtype).requires_grad_()
    teacher = problem.teacher.to(dtype)
    rounded = Problem(student, teacher, problem.alignment, problem.projection)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = rounded.ours(columns_top_k=20, temperature=2.0)
        gradient = rounded.gradient(terms.loss)
    exact = Problem(
        student.detach().double().requires_grad_(),
        teacher.double(),
        problem.alignment,
        problem.projection,
    )
    expected = exact.ours(columns_top_k=20, temperature=2.0)
    assert terms.loss.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(terms.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    wide = exact.gradient(expected.loss)
    unit = torch.finfo(dtype).eps / 2 + 4e-6
    error = (gradient.double() - wide).abs()
    assert (error <= unit * wide.abs() + 1e-6 * wide.abs().max() + 1e-7).all()


def test_scaled_and_retained_gradients():
    problem = draw_problem(6)
    whole = problem.gradient(problem.ours().loss)
    terms = problem.ours()
    for factor in (1.0, 3.0, 1.0):
        (again,) = torch.autograd.grad(factor * terms.loss, problem.student, retain_graph=True)
        torch.testing.assert_close(again, factor * whole, rtol=1e-15, atol=0)
    (last,) = torch.autograd.grad(-2 * terms.loss, problem.student)
    torch.testing.assert_close(last, -2 * whole, rtol=1e-15, atol=0)


# --- PyTorch's transformations --------------------------------------------------------------

LOSS = {"temperature": 2.0, "columns_top_k": 3}


def call(problem, student, teacher, function=projected_kl_loss, **options):
    return function(
        student, teacher, alignment=problem.alignment, projection=problem.projection, **options
    )


def test_vmap_and_grad_in_either_order():
    problem = draw_problem(0)
    students = torch.stack([problem.student.detach(), problem.student.detach() * 0.5])
    teachers = torch.stack([problem.teacher, problem.teacher + 1])

    def loss(student, teacher):
        return call(problem, student, teacher, **LOSS).loss

    expected = [torch.func.grad(loss)(s, t) for s, t in zip(students, teachers, strict=True)]
    inside = torch.vmap(torch.func.grad(loss))(students, teachers)
    outside = torch.func.grad(lambda s: torch.vmap(loss)(s, teachers).sum())(students)
    torch.testing.assert_close(inside, torch.stack(expected), **EXACT)
    torch.testing.assert_close(outside, torch.stack(expected), **EXACT)
    torch.testing.assert_close(expected[0], problem.gradient(problem.ours(**LOSS).loss), **EXACT)
    last = torch.vmap(loss, in_dims=(-1, -1))(students.movedim(0, -1), teachers.movedim(0, -1))
    torch.testing.assert_close(last, torch.vmap(loss)(students, teachers), **EXACT)


def test_batched_gradients_and_aux():
    problem = draw_problem(0)
    weights = torch.tensor([1.0, -2.0], dtype=torch.float64)
    terms = problem.ours(**LOSS)
    (batched,) = torch.autograd.grad(
        terms.loss, problem.student, weights, is_grads_batched=True, retain_graph=True
    )
    single = problem.gradient(terms.loss)
    torch.testing.assert_close(batched, weights[:, None, None, None] * single)

    def with_terms(student):
        terms = call(problem, student, problem.teacher, **LOSS)
        return terms.loss, terms

    gradient, aux = torch.func.grad(with_terms, has_aux=True)(problem.student.detach())
    assert isinstance(aux, ProjectedKLTerms)
    torch.testing.assert_close(gradient, single)


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
                    if isinstance(getattr(value, f.name), torch.Tensor)
                },
            )
            for name, value in (
                ("alignment", problem.alignment),
                ("projection", problem.projection),
            )
        }
        student = mode.from_tensor(plain).requires_grad_()
        terms = projected_kl_loss(student, mode.from_tensor(problem.teacher), **fake, **LOSS)
        assert torch.autograd.grad(terms.loss, student)[0].shape == student.shape


@pytest.mark.parametrize("block", [1, 2**18])
def test_blocks_where_the_ids_cannot_be_looked_at(monkeypatch, block):
    # What runs on other devices than the CPU: whole samples, one or all, and masks.
    monkeypatch.setattr(_numbers, "IN_CACHE", block)
    monkeypatch.setattr(chunk_blocks, "on_host", lambda x: False)
    for seed in range(6):
        problem = draw_problem(seed, batch=3, ordered=seed % 2 == 0)
        mask = torch.tensor([True, False, True])
        for teacher_mean in MEANS:
            assert_is_the_oracle(problem, sample_mask=mask, teacher_mean=teacher_mean)
        with torch.no_grad():
            problem.student[1], problem.teacher[1] = math.nan, math.inf
        terms = problem.ours(sample_mask=mask)
        assert terms.loss.isfinite()
        assert (problem.gradient(terms.loss)[1] == 0).all()


# --- refusals and the module ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0.0}, "needs temperature > 0, got 0.0"),
        ({"temperature": math.nan}, "needs temperature > 0, got nan"),
        ({"columns_top_k": 0}, "needs columns_top_k >= 1, got 0"),
        (
            {"columns_top_k": 2, "teacher_columns": torch.tensor([1])},
            "needs columns_top_k or teacher_columns",
        ),
        ({"eps": -1.0}, "needs eps >= 0, got -1.0"),
        ({"normalizer": -1.0}, "needs normalizer >= 0, got -1.0"),
        ({"projection": identity(6)}, "6 student tokens to 5 teacher tokens, got one from 6 to 6"),
        (
            {"alignment": draw_problem(0, times=(6, 6)).alignment},
            r"alignment\.student_chunk_id needs .*: axis student_time is 6, but it is 7 in",
        ),
        (
            {"alignment": draw_problem(0, times=(7, 9)).alignment},
            r"\.teacher_chunk_id .* 9, but it",
        ),
    ],
    ids=str,
)
def test_refusals(options, said):
    with pytest.raises((TypeError, ValueError), match=said):
        draw_problem(0).ours(**options)


def test_refusals_by_the_contract():
    problem = draw_problem(0)
    with pytest.raises(TypeError, match="teacher_logits needs .*batch is 1, but it is 2"):
        call(problem, problem.student, problem.teacher[:1])
    with pytest.raises(TypeError, match="divergence needs"):
        problem.ours(divergence="sideways")
    with pytest.raises(TypeError, match="sample_mask"):
        problem.ours(sample_mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(
        TypeError, match="sample_mask needs .* batch is 3, but it is 2 in alignment"
    ):
        count_valid_chunks(problem.alignment, sample_mask=torch.ones(3, dtype=torch.bool))


def test_the_module_is_the_function():
    problem = draw_problem(0)
    numbers = {
        "temperature": 2.0,
        "divergence": "reverse",
        "columns_top_k": 3,
        "teacher_mean": "prob",
        "exact_only": True,
        "eps": 1e-8,
        "grad_reduction": "sum",
    }
    module = ProjectedKLLoss(problem.projection, **numbers)
    mask = torch.tensor([False, True])
    expected = problem.ours(sample_mask=mask, normalizer=7, **numbers)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    )
    for one in (module, *copies):
        terms = one(
            problem.student,
            problem.teacher,
            alignment=problem.alignment,
            sample_mask=mask,
            normalizer=7,
        )
        assert isinstance(terms, ProjectedKLTerms)
        torch.testing.assert_close(dict(terms.items()), dict(expected.items()), rtol=0, atol=0)
    assert "temperature=2.0, divergence='reverse', columns_top_k=3" in repr(module)
