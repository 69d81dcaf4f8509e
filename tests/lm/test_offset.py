"""A number added to all logits of a row changes nothing: for every loss over logits, in float32."""

import pytest
import torch

from termwise import lm, sae
from termwise.lm import Alignment, Teacher, VocabProjection, vocab_partition

OFFSET = 2.0**13 + 2.0**11  # 10,240, which the logits below can be added to without rounding
BATCH, TIME, VOCAB = 2, 6, 9
IDS = torch.tensor([0, 0, 1, 1, 1, 2]).expand(BATCH, TIME)
VALID = torch.ones(BATCH, 3, dtype=torch.bool)
ALIGNED = {"alignment": Alignment(IDS, IDS, VALID, VALID)}
PROJECTION = VocabProjection.from_pairs(
    {(i, (2 * i + j) % VOCAB): 0.5 for i in range(VOCAB) for j in (0, 1)},
    student_vocab=VOCAB,
    teacher_vocab=VOCAB,
)
PARTITION = vocab_partition(PROJECTION, rule="relaxed")
TOKENS = torch.arange(BATCH * TIME).reshape(BATCH, TIME) % VOCAB


def draw(seed):
    """Multiples of 1/64, which an offset of 10,240 leaves as they are."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(BATCH, TIME, VOCAB, generator=generator) * 64).round() / 64


def projected(**options):
    def loss(x, y):
        return lm.projected_kl_loss(x, y, **ALIGNED, projection=PROJECTION, **options)

    return loss


def linear(**options):
    # The logits are the hidden states themselves: the head is the identity.
    def loss(x, y):
        return lm.linear_projected_kl_loss(
            x, torch.eye(VOCAB), y, **ALIGNED, projection=PROJECTION, **options
        )

    return loss


def crossed(**options):
    def loss(x, y):
        teachers = [Teacher(y), Teacher(y.roll(1, 2), **options.get("second", {}))]
        more = {name: value for name, value in options.items() if name != "second"}
        return lm.cross_tokenizer_loss(x, TOKENS, teachers, **more)

    return loss


LOSSES = {
    "next token": lambda x, y: lm.next_token_loss(x, TOKENS),
    **{
        f"{divergence} at {temperature}": lambda x, y, d=divergence, t=temperature: (
            lm.distillation_loss(x, y, divergence=d, temperature=t, beta=0.3)
        )
        for divergence in ("forward", "reverse", "jensen_shannon")
        for temperature in (1.0, 1.5)
    },
    **{
        f"top 3, {tail}": lambda x, y, tail=tail: lm.distillation_loss(
            x, y, teacher_top_k=3, tail=tail, temperature=1.5
        )
        for tail in ("renormalize", "bucket", "zero")
    },
    **{
        f"projected, {mean}": projected(teacher_mean=mean, temperature=1.5)
        for mean in ("log", "log_normalized", "prob")
    },
    "projected, reverse": projected(divergence="reverse", columns_top_k=4),
    "linear": linear(temperature=1.5),
    "partitioned": lambda x, y: lm.partitioned_loss(x, y, **ALIGNED, partition=PARTITION),
    "partitioned, reverse": lambda x, y: lm.partitioned_loss(
        x, y, **ALIGNED, partition=PARTITION, divergence="reverse", temperature=1.5
    ),
    "universal": lambda x, y: lm.universal_logit_loss(x, y, **ALIGNED, temperature=1.5),
    "crossed": crossed(second={**ALIGNED, "projection": PROJECTION}, temperature=1.5),
    "crossed, averaged": crossed(combine="average_logits"),
    "crossed, by entropy": crossed(score="entropy"),
    "crossed, by the highest": crossed(score="max_prob"),
    "end to end": lambda x, y: sae.end_to_end_loss(x.flatten(0, 1), y.flatten(0, 1)),
}


def value_and_gradient(loss, x, y):
    x = x.clone().requires_grad_()
    value = loss(x, y).loss
    return value, torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_an_offset_of_ten_thousand_changes_nothing(name):
    loss, x, y = LOSSES[name], draw(0), draw(1)
    expected = value_and_gradient(loss, x, y)
    for own, other in ((OFFSET, 0.0), (0.0, -OFFSET), (OFFSET, OFFSET)):
        shifted = value_and_gradient(loss, x + own, y + other)
        torch.testing.assert_close(shifted, expected, rtol=2e-6, atol=1e-7)


def test_large_logits_have_the_gradient_of_float64():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 9, 300, generator=generator) + 1e4
    tokens = torch.randint(300, (2, 9), generator=generator)
    ours = value_and_gradient(lambda x, y: lm.next_token_loss(x, tokens), x, None)[1]
    exact = value_and_gradient(lambda x, y: lm.next_token_loss(x, tokens), x.double(), None)[1]
    assert (ours - exact).norm() / exact.norm() < 1e-6


def test_ties_of_huge_bfloat16_logits_count():
    x = torch.full((1, 2, 3), 1e7, dtype=torch.bfloat16)
    found = lm.next_token_loss(x, torch.zeros(1, 2, dtype=torch.int64)).loss
    torch.testing.assert_close(found, torch.tensor(3.0).log())
