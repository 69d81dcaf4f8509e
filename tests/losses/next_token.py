"""Next-token cross-entropy."""

from losses import Declaration, Variant
from losses._chunks import (
    LOGITS_GROUPS,
    NORMALIZER,
    SMALL_AND_LARGE,
    TEXT,
    counted_tokens,
    divided,
    nothing,
    share,
    some_tokens,
    tokens,
    zeros,
)
from termwise import lm


def formula(logits, tokens, *, mask, normalizer, **_):
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


NEXT_TOKEN = Declaration(
    function=lm.next_token_loss,
    formula=formula,
    paths=SMALL_AND_LARGE,
    variants={"": Variant(module=lm.NextTokenLoss(), shapes=("rows time columns",), made=tokens)},
    sizes=TEXT,
    elements={"tokens": some_tokens("vocab")},
    overrides=NORMALIZER,
    weights={},
    shifted={"vocab": ("logits",)},
    shards=LOGITS_GROUPS,
    more={"assert_finite": {"tokens": zeros}},
    second=True,
)
