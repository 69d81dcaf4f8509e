"""What each rank runs for losses over chunks: its shard of a problem, and its groups."""

import dataclasses
from unittest import mock

import torch
import torch.distributed as dist

from termwise.lm import (
    Alignment,
    VocabPartition,
    VocabProjection,
    _chunk_blocks,
    count_valid_chunks,
    linear_projected_kl_loss,
    partitioned_loss,
    projected_kl_loss,
)

STUDENTS, TEACHERS, D_MODEL = 7, 6, 3
# Uneven everywhere: samples, student tokens, and positions of either model.
SAMPLES, TOKENS = [1, 2], [3, 4]
TIMES = {"student": [5, 3], "teacher": [2, 5]}


@dataclasses.dataclass
class Problem:
    """The whole batch."""

    student: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor
    teacher: torch.Tensor
    alignment: Alignment
    projection: VocabProjection
    partition: VocabPartition
    sample_mask: torch.Tensor


def problem(seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)
    batch, chunks = sum(SAMPLES), 4
    times = [sum(TIMES[side]) for side in ("student", "teacher")]

    def randn(*shape):
        return 2 * torch.randn(shape, generator=g, dtype=torch.float64)

    indices = torch.randint(0, TEACHERS - 1, (STUDENTS, 2), generator=g)  # one is not covered
    return Problem(
        randn(batch, times[0], STUDENTS),
        randn(batch, times[0], D_MODEL),
        randn(STUDENTS, D_MODEL),
        randn(batch, times[1], TEACHERS),
        Alignment(
            *[torch.randint(-1, chunks, (batch, t), generator=g).sort(1).values for t in times],
            torch.rand(batch, chunks, generator=g) < 0.9,
            torch.rand(batch, chunks, generator=g) < 0.7,
        ),
        VocabProjection.from_topk(
            indices,
            torch.rand(STUDENTS, 2, generator=g),
            student_vocab=STUDENTS,
            teacher_vocab=TEACHERS,
        ),
        VocabPartition(
            torch.tensor([1, 4, 5]),
            torch.tensor([0, 5, 2]),
            torch.tensor([0, 2, 3, 6]),
            torch.tensor([1, 3, 4]),
        ),
        torch.tensor([True, False, True]),
    )


@dataclasses.dataclass
class Place:
    """Which of the two shards along each axis a rank holds; None where the axis is whole."""

    batch: int | None = None
    vocab: int | None = None
    sequence: int | None = None


def part(sizes: list[int], place: int | None) -> slice:
    if place is None:
        return slice(None)
    start = sum(sizes[:place])
    return slice(start, start + sizes[place])


def run(whole: Problem, place: Place, groups: dict, loss: str, options: dict):
    """Return the terms, the count, and the gradients of this rank's shards."""
    samples, tokens = part(SAMPLES, place.batch), part(TOKENS, place.vocab)
    students = part(TIMES["student"], place.sequence)
    teachers = part(TIMES["teacher"], place.sequence)
    a = whole.alignment
    alignment = Alignment(
        a.student_chunk_id[samples, students],
        a.teacher_chunk_id[samples, teachers],
        a.pair_valid[samples],
        a.pair_exact[samples],
    )
    lo, hi, _ = tokens.indices(STUDENTS)
    options = {
        **options,
        **groups,
        "alignment": alignment,
        "sample_mask": whole.sample_mask[samples],
    }
    teacher = whole.teacher[samples, teachers]
    if loss == "linear":
        inputs = [whole.hidden[samples, students], whole.weight[tokens]]
        function = linear_projected_kl_loss
    else:
        inputs = [whole.student[samples, students, tokens]]
        function = partitioned_loss if loss == "partitioned" else projected_kl_loss
    if loss == "partitioned":
        options["partition"] = whole.partition
    else:
        options["projection"] = whole.projection.rows(lo, hi)
    inputs = [x.clone().requires_grad_() for x in inputs]
    terms = function(*inputs, teacher, **options)
    gradients = torch.autograd.grad(terms.loss, inputs)
    counted = count_valid_chunks(
        alignment,
        sample_mask=options["sample_mask"],
        batch_group=groups.get("batch_group"),
        sequence_group=groups.get("sequence_group"),
    )
    return {name: value.detach() for name, value in terms.items()}, counted, gradients


AXES = ("batch", "vocab", "sequence")
_made: dict = {}


def groups_of(group) -> dict:
    """Make the groups of a 2 x 2 x 2 mesh, once; every rank makes all of them."""
    if not _made:
        mesh = torch.arange(8).view(2, 2, 2)
        for axis, name in enumerate(AXES):
            for ranks in mesh.movedim(axis, 2).reshape(4, 2).tolist():
                made = dist.new_group(ranks)
                if group.rank() in ranks:
                    _made[f"{name}_group"] = made
    return _made


def all_at_once(group, seed, loss, options, on_host):
    """On the 8 ranks of the mesh, on the path of the CPU or on that of other devices."""
    place = Place(*[int(bit) for bit in f"{group.rank():03b}"])
    with mock.patch.object(_chunk_blocks, "on_host", return_value=on_host):
        return run(problem(seed), place, groups_of(group), loss, options)


def one_axis(group, seed, axis, loss, options):
    """On 2 ranks that share one axis alone."""
    place = Place(**{axis: group.rank()})
    return run(problem(seed), place, {f"{axis}_group": group}, loss, options)


def compiled(group, seed, axis):
    """Return the loss and gradient of a compiled call, and of its second derivative's refusal."""
    whole, place = problem(seed), group.rank()
    tokens = part(TOKENS, place)
    student = whole.student[..., tokens].clone().requires_grad_()
    lo, hi, _ = tokens.indices(STUDENTS)
    function = torch.compile(projected_kl_loss, fullgraph=True, backend="aot_eager")
    terms = function(
        student,
        whole.teacher,
        alignment=whole.alignment,
        projection=whole.projection.rows(lo, hi),
        vocab_group=group,
    )
    (gradient,) = torch.autograd.grad(terms.loss, student)
    torch.compiler.reset()
    return terms.loss.detach(), gradient
