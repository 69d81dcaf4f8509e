"""Next-token cross-entropy."""

from hypothesis import strategies as st

from losses import Declaration, Variant
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
from losses._linear import HEAD_GROUPS, SOFTCAPS, head
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


NEXT_TOKEN = Declaration(
    function=lm.next_token_loss,
    formula=formula,
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
    second=("refused",),
    masked={**masks("hidden"), "tokens": of_tokens("hidden")},
    more={"assert_finite": {"tokens": zeros}},
)
