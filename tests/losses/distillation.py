"""Distillation from a teacher with the same tokenizer."""

import functools
import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from losses import Declaration, Variant
from losses._bench import (
    LOGIT_SIZES,
    Case,
    Loss,
    hidden_and_head,
    import_torchvision,
    normal,
    over_head,
    over_vocab,
)
from losses._chunks import (
    LOGITS,
    LOGITS_GROUPS,
    NORMALIZER,
    SMALL_AND_LARGE,
    TEXT,
    counted_tokens,
    divided,
    marked,
    masks,
    nothing,
    of_samples,
    relative_entropy,
    squared_temperature,
)
from losses._linear import HEAD_GROUPS, HEAD_PATHS, SOFTCAPS, head
from losses.next_token import formula as cross_entropy
from termwise import lm


def distinct(sizes):
    """Return logits of which no two are equal: which of two equal ones is in the top is open."""
    shape = [sizes[axis] for axis in ("batch", "time", "vocab")]
    places = torch.arange(math.prod(shape), dtype=torch.float64)
    return (places * 0.618 % 1).reshape(shape)


DISTINCT = {"teacher_logits": distinct}


def formula(student_logits, teacher_logits, *, divergence, beta, temperature, mask, **options):
    k, total, count = options["teacher_top_k"], nothing(student_logits), 0
    everywhere = torch.zeros(student_logits.shape[:2])
    mask = of_samples(mask, options["sample_mask"], student_logits)
    for b, t, _ in counted_tokens(everywhere, mask):
        q = (student_logits[b, t] / temperature).softmax(0)
        p = (teacher_logits[b, t].detach() / temperature).softmax(0)
        if k is not None:
            order = sorted(range(len(p)), key=lambda v: -float(p[v]))
            q, p = q[order], p[order]
            if options["tail"] == "bucket":
                q, p = (torch.cat([x[:k], x[k:].sum()[None]]) for x in (q, p))
            elif options["tail"] == "zero":
                p = torch.cat([p[:k] / p[:k].sum(), 0 * p[k:]])
            else:
                q, p = (x[:k] / x[:k].sum() for x in (q, p))
        m = beta * p + (1 - beta) * q
        total = (
            total
            + {
                "forward": lambda: relative_entropy(p, q),  # noqa: B023
                "reverse": lambda: relative_entropy(q, p),  # noqa: B023
                "jensen_shannon": lambda: (
                    beta * relative_entropy(p, m) + (1 - beta) * relative_entropy(q, m)  # noqa: B023
                ),
            }[divergence]()
        )
        count += 1
    mean = divided(total, options["normalizer"], count)
    loss = temperature**2 * mean
    return {"loss": loss, "divergence": mean, "num_tokens": mean.new_tensor(count)}


SOFT = {"divergence": "jensen_shannon", "temperature": 2.0}


# What the benches measure.


def two_logits(batch: int, time: int, vocab: int) -> list[Tensor]:
    return [normal(batch, time, vocab).requires_grad_(), normal(batch, time, vocab)]


def plain_forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = (x[:, :-1].flatten(0, 1).float().log_softmax(1) for x in (student, teacher))
    return F.kl_div(q, p, log_target=True, reduction="batchmean")


def plain_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return plain_forward_kl(teacher, student)


def plain_jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = (x[:, :-1].flatten(0, 1).float().log_softmax(1) for x in (student, teacher))
    mean = torch.logaddexp(q, p) - math.log(2)
    of_teacher = F.kl_div(mean, p, log_target=True, reduction="batchmean")
    return (of_teacher + F.kl_div(mean, q, log_target=True, reduction="batchmean")) / 2


def trl_at(beta: float) -> Callable[[], Loss]:
    def load() -> Loss:
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        import_torchvision()
        from trl.experimental.gkd import GKDTrainer

        def loss(student: Tensor, teacher: Tensor) -> Tensor:
            return GKDTrainer.generalized_jsd_loss(
                student[:, :-1], teacher[:, :-1], beta=beta, reduction="sum"
            ) / (student.shape[0] * (student.shape[1] - 1))

        return loss

    return load


def two_hidden(batch: int, time: int, vocab: int) -> list[Tensor]:
    teacher = [x.detach() for x in hidden_and_head(batch, time, vocab)]
    return [*hidden_and_head(batch, time, vocab), *teacher]


def plain_linear_kl(hidden: Tensor, weight: Tensor, other: Tensor, head: Tensor) -> Tensor:
    return plain_forward_kl(hidden @ weight.mT, other @ head.mT)


over_logits = functools.partial(Case, LOGIT_SIZES, two_logits, size_of=over_vocab, rows=256)


DISTILLATION = Declaration(
    function=lm.distillation_loss,
    formula=formula,
    bench={
        "forward KL": over_logits(plain_forward_kl, peer=("TRL", trl_at(0.0))),
        "reverse KL": over_logits(
            plain_reverse_kl, lambda *x: lm.distillation_loss(*x, divergence="reverse").loss
        ),
        "Jensen-Shannon": over_logits(
            plain_jensen_shannon,
            lambda *x: lm.distillation_loss(*x, divergence="jensen_shannon").loss,
            peer=("TRL", trl_at(0.5)),
        ),
    },
    formula_at=(
        {},
        {"teacher_top_k": 2, **DISTINCT},
        {"teacher_top_k": 1, "tail": "bucket", **DISTINCT},
        {"teacher_top_k": 2, "tail": "zero", "divergence": "forward", **DISTINCT},
    ),
    paths=SMALL_AND_LARGE,
    variants={
        "": Variant(module=lm.DistillationLoss(**SOFT), options=SOFT, shapes=LOGITS, made=marked)
    },
    sizes=TEXT,
    # A tail is of teacher_top_k only.
    overrides={**NORMALIZER, "teacher_top_k": None, "tail": "renormalize", "beta": 0.25},
    weights={"divergence": squared_temperature},
    shifted={"vocab": ("student_logits", "teacher_logits")},
    optimum=lambda call: {"teacher_logits": call["student_logits"].detach() + 3},
    permuted=("batch", "vocab"),
    shards=LOGITS_GROUPS,
    by={"assert_gradients": ("student_logits",)},  # the teacher has none
    more={"assert_permutation_invariant": {"mask": None, "sample_mask": None}},
    second=("right",),
    masked=masks("student_logits", "teacher_logits"),
)


def of_heads(hidden, weight, teacher_hidden, teacher_weight, *, tokens, **options):
    x = head(hidden, weight, options["bias"], options["softcap"])
    y = head(teacher_hidden, teacher_weight, options["teacher_bias"], options["teacher_softcap"])
    mask = options.pop("mask")
    if tokens is not None:
        mask = tokens >= 0 if mask is None else mask & (tokens >= 0)
    found = formula(x, y, **options, mask=mask, teacher_top_k=None)
    found["loss"] = options["kd_weight"] * found["loss"]
    found["cross_entropy"] = found["accuracy"] = None
    if tokens is not None:
        text = cross_entropy(
            x, tokens, mask=mask, **{name: options[name] for name in ("sample_mask", "normalizer")}
        )
        found["loss"] = found["loss"] + options["ce_weight"] * text["loss"]
        found |= {"cross_entropy": text["loss"], "accuracy": text["accuracy"]}
    return found


LINEAR_DISTILLATION = Declaration(
    function=lm.linear_distillation_loss,
    formula=of_heads,
    bench={"": over_head(two_hidden, plain_linear_kl)},
    variants={
        "": Variant(
            module=lm.LinearDistillationLoss(**SOFT),
            options=SOFT,
            shapes=("rows time columns", "columns columns") * 2,
            made=marked,
        )
    },
    sizes={**TEXT, "batch": st.integers(2, 3)},
    overrides={
        **NORMALIZER,
        "tokens": None,
        "beta": 0.25,
        "softcap": SOFTCAPS,
        "teacher_softcap": SOFTCAPS,
    },
    weights={"divergence": lambda call: squared_temperature(call) * call["kd_weight"]},
    detached=True,
    shards=HEAD_GROUPS,
    paths=HEAD_PATHS,
    second=("right", "refused"),
    masked=masks("hidden", "teacher_hidden"),
    by={"assert_gradients": ("hidden", "weight")},  # the teacher has none
)
