"""Temperatures, normalizers and weights: what every loss of language models says of them."""

import functools
import inspect
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from declared import CASES
from torch.testing._internal.distributed.fake_pg import FakeStore

from termwise import lm
from termwise.lm import Alignment, Teacher, VocabProjection, vocab_partition

GENERATOR = torch.Generator().manual_seed(0)
X, Y = (torch.randn(2, 4, 3, generator=GENERATOR) for _ in range(2))
TOKENS = torch.arange(8).reshape(2, 4) % 3
IDS = torch.tensor([0, 0, 1, 2]).expand(2, 4)
VALID = torch.ones(2, 3, dtype=torch.bool)
ALIGNED = Alignment(IDS, IDS, VALID, VALID)
PROJECTION = VocabProjection.from_pairs(
    {(0, 0): 1.0, (1, 1): 1.0, (2, 1): 0.5, (2, 2): 0.5}, student_vocab=3, teacher_vocab=3
)
PARTITION = vocab_partition(PROJECTION, rule="strict")
# Each loss over tokens, as it is declared, of two samples of four tokens.
LOSSES = {
    name.removeprefix("lm."): case
    for name, case in CASES.items()
    if "normalizer" in inspect.signature(case.loss).parameters and name.startswith("lm.")
}
EVERY = pytest.mark.parametrize("name", LOSSES)
SAID = {"cross_tokenizer_loss": "(next_token|distillation)_loss"}


@EVERY
@pytest.mark.parametrize("value", [-3, -0.5, math.nan, math.inf])
def test_normalizers_that_are_none_are_refused(name, value):
    needs = "a finite normalizer" if value == math.inf else "normalizer >= 0"
    with pytest.raises(ValueError, match=f"^{SAID.get(name, name)} needs {needs}, got {value}$"):
        LOSSES[name].changed(2, normalizer=value)


@EVERY
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_temperatures_that_are_none_are_refused(name, value):
    if "temperature" not in inspect.signature(LOSSES[name].loss).parameters:
        return
    needs = "a finite temperature" if value == math.inf else "temperature > 0"
    with pytest.raises(ValueError, match=f"^{SAID.get(name, name)} needs {needs}, got {value}$"):
        LOSSES[name].changed(2, temperature=value)


@EVERY
def test_a_count_is_a_normalizer_in_any_form(name):
    expected = LOSSES[name].changed(2, normalizer=7.0).loss
    for normalizer in (7, torch.tensor(7), torch.tensor(7.0), torch.tensor(7, dtype=torch.int32)):
        torch.testing.assert_close(LOSSES[name].changed(2, normalizer=normalizer).loss, expected)


@EVERY
def test_a_negative_tensor_is_no_number(name):
    # To look into it would wait for the device.
    assert LOSSES[name].changed(2, normalizer=torch.tensor(-3)).loss.isnan()


@EVERY
def test_nothing_over_0_is_nothing(name):
    if name == "cross_tokenizer_loss":
        return  # made of the others
    nothing = {"sample_mask": torch.zeros(2, dtype=torch.bool)}
    for normalizer in (0, torch.tensor(0)):
        assert LOSSES[name].changed(2, **nothing, normalizer=normalizer).loss == 0


IMPOSSIBLE = X.clone()
IMPOSSIBLE[..., 1] = -math.inf
INFINITE = {
    "same tokenizer": Teacher(Y),
    "partition": Teacher(Y, ALIGNED, partition=PARTITION),
}


@pytest.mark.parametrize("teacher", INFINITE.values(), ids=INFINITE.keys())
def test_what_has_weight_0_is_left_out(teacher):
    tokens = TOKENS.masked_fill(TOKENS == 1, 0)
    loss = functools.partial(lm.cross_tokenizer_loss, IMPOSSIBLE.clone().requires_grad_(), tokens)
    without = lm.next_token_loss(IMPOSSIBLE, tokens).loss
    terms = loss(teacher, kd_weight=0.0)
    assert terms.kd.isinf()
    assert torch.equal(terms.loss, without)
    other = Teacher(IMPOSSIBLE.flip(1))
    expected = loss(other).loss
    teachers = [
        lm.Teacher(teacher.logits, teacher.alignment, partition=teacher.partition, weight=0)
    ]
    x = IMPOSSIBLE.clone().requires_grad_()
    terms = lm.cross_tokenizer_loss(x, tokens, [other, *teachers])
    assert terms.teacher_kd[1].isinf()
    torch.testing.assert_close(terms.loss, expected)
    (gradient,) = torch.autograd.grad(terms.loss, x)
    assert gradient.isfinite().all()


def test_no_weight_at_all_is_a_loss_of_0_in_the_graph():
    x = X.clone().requires_grad_()
    loss = lm.cross_tokenizer_loss(x, TOKENS, Teacher(Y), kd_weight=0.0, ce_weight=0.0).loss
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))


def test_a_teacher_that_is_not_chosen_is_left_out():
    x = IMPOSSIBLE.clone().requires_grad_()
    tokens = TOKENS.masked_fill(TOKENS == 1, 0)
    right = torch.nn.functional.one_hot(tokens.roll(-1, 1), 3) * 9.0
    sure = right.masked_fill(IMPOSSIBLE.isneginf(), -math.inf)
    terms = lm.cross_tokenizer_loss(x, tokens, [Teacher(sure), Teacher(Y)], combine="select")
    assert terms.teacher_kd[1].isinf()
    assert terms.loss.isfinite()
    assert torch.autograd.grad(terms.loss, x)[0].isfinite().all()


def test_a_score_scale_of_0_trusts_no_teacher_without_tokens():
    known = Teacher(Y, ALIGNED, tokens=TOKENS)
    unknown = Teacher(Y, ALIGNED, tokens=torch.full_like(TOKENS, -1))
    terms = lm.cross_tokenizer_loss(
        X, TOKENS, [known, unknown], score="cross_entropy", score_scale=0.0
    )
    assert terms.teacher_weight.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("part", ["common_weight", "tail_weight"])
def test_a_part_of_weight_0_is_left_out(part):
    x = IMPOSSIBLE.clone().requires_grad_()
    terms = lm.partitioned_loss(x, Y, alignment=ALIGNED, partition=PARTITION, **{part: 0.0})
    assert terms.kl_common.isinf()
    if part == "common_weight":
        torch.testing.assert_close(terms.loss, terms.l1_tail)
        assert torch.autograd.grad(terms.loss, x)[0].isfinite().all()


@pytest.fixture
def two_ranks():
    """Return the group of two ranks, of which only this process is there: nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.group.WORLD
    dist.destroy_process_group()


@EVERY
@pytest.mark.parametrize("axes", [*itertools.combinations(("batch", "vocab", "sequence"), 2)])
def test_one_group_is_not_of_two_axes(name, axes, two_ranks):
    first, second = (f"{axis}_group" for axis in axes)
    with pytest.raises(ValueError, match=f"^{name} needs other groups for {first} and {second}"):
        LOSSES[name].changed(2, **{first: two_ranks, second: two_ranks})
