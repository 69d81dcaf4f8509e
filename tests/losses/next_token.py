"""Next-token cross-entropy."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from losses import Declaration, Variant
from losses._bench import (
    LOGIT_SIZES,
    Case,
    hidden_and_head,
    normal,
    over_head,
    over_vocab,
    plain_next_token,
)
from losses._chunks import (
    LOGITS_GROUPS,
    NORMALIZER,
    SMALL_AND_LARGE,
    TEXT,
    counted_tokens,
    divided,
    masks,
    nothing,
    of_samples,
    predicting,
    share,
    some_tokens,
    tokens,
    zeros,
)
from losses._linear import HEAD_GROUPS, HEAD_PATHS, SOFTCAPS, head
from termwise import lm


def formula(logits, tokens, *, mask, sample_mask, normalizer, **_):
    mask = of_samples(mask, sample_mask, logits)
    total, right = nothing(logits), []
    for b, t, token in counted_tokens(tokens, mask):
        row = logits[b, t]
        total = total + row.exp().sum().log() - row[token]
        right.append(float(row[token] == row.max()))
    return {
        "loss": divided(total, normalizer, len(right)),
        "num_tokens": logits.new_tensor(len(right)),
        "accuracy": share(right, logits),
    }


def of_tokens(argument):
    """Declare tokens as the mask that they are: below 0 none is predicted."""
    return {"arguments": {argument: lambda tokens: predicting(tokens >= 0)}, "nothing": 0.0}


# What the benches measure.


def logits_and_tokens(batch: int, time: int, vocab: int) -> list[Tensor]:
    return [normal(batch, time, vocab).requires_grad_(), torch.randint(vocab, (batch, time))]


def hidden_and_tokens(batch: int, time: int, vocab: int) -> list[Tensor]:
    return [*hidden_and_head(batch, time, vocab), torch.randint(vocab, (batch, time))]


def plain_linear_next_token(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return plain_next_token(hidden @ weight.mT, tokens)


NEXT_TOKEN = Declaration(
    function=lm.next_token_loss,
    formula=formula,
    bench={
        "": Case(LOGIT_SIZES, logits_and_tokens, plain_next_token),
        "bfloat16": Case(
            ((2, 16, 100), (4, 64, 1000), (1, 49, 151_936)),
            logits_and_tokens,
            plain_next_token,
            rows=256,
            size_of=over_vocab,
            dtype=torch.bfloat16,
        ),
    },
    paths=SMALL_AND_LARGE,
    variants={"": Variant(module=lm.NextTokenLoss(), shapes=("rows time columns",), made=tokens)},
    sizes={**TEXT, "batch": st.integers(1, 3)},
    elements={"tokens": some_tokens("vocab")},
    overrides=NORMALIZER,
    weights={},
    shifted={"vocab": ("logits",)},
    shards=LOGITS_GROUPS,
    more={"assert_finite": {"tokens": zeros}},
    second=("right",),
    masked={**masks("logits"), "tokens": of_tokens("logits")},
)


def of_a_head(hidden, weight, tokens, *, bias, softcap, **options):
    return formula(head(hidden, weight, bias, softcap), tokens, **options)


LINEAR_NEXT_TOKEN = Declaration(
    function=lm.linear_next_token_loss,
    formula=of_a_head,
    bench={"": over_head(hidden_and_tokens, plain_linear_next_token)},
    variants={
        "": Variant(
            module=lm.LinearNextTokenLoss(softcap=2.0),
            options={"softcap": 2.0},
            shapes=("rows time columns", "columns columns"),
            made=tokens,
        )
    },
    sizes={**TEXT, "batch": st.integers(1, 3)},
    elements={"tokens": some_tokens("vocab")},
    overrides={**NORMALIZER, "softcap": SOFTCAPS},
    weights={},
    shards=HEAD_GROUPS,
    paths=HEAD_PATHS,
    second=("right", "refused"),
    masked={**masks("hidden"), "tokens": of_tokens("hidden")},
    more={"assert_finite": {"tokens": zeros}},
)
