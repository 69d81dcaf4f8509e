"""The partitioned loss: paired tokens by divergence, others by their sorted probabilities."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from losses import Variant
from losses._bench import alignment_of, chunk_means, over_chunks
from losses._chunks import (
    LOGITS,
    NARROW,
    aligned,
    counted_chunks,
    divided,
    nothing,
    of_chunks,
    share,
)
from termwise import lm


def formula(student_logits, teacher_logits, *, alignment, partition, temperature, **options):
    counts = (options[name] for name in ("mask", "sample_mask", "exact_only"))
    kl = distance = nothing(student_logits)
    agreements, masses = [], []
    for b, ours, theirs in counted_chunks(alignment, *counts):
        s, t = [
            torch.stack([(x[b, t] / temperature).log_softmax(0) for t in rows]).mean(0)
            for x, rows in ((student_logits, ours), (teacher_logits.detach(), theirs))
        ]
        a, q = s[partition.common_student], t[partition.common_teacher]
        first, second = (q, a) if options["divergence"] == "forward" else (a, q)
        kl = kl + (first.exp() * (first - second)).sum()
        agreements.append(float(len(a) > 0 and a.argmax() == q.argmax()))
        masses.append(q.exp().sum().item())
        tails = [s[partition.rest_student].exp(), t[partition.rest_teacher].exp()]
        k = min(options["tail_top_k"], *map(len, tails))
        tails = [tail.sort(descending=True).values[:k] for tail in tails]
        distance = distance + (tails[0] - tails[1]).abs().sum()
    n = len(agreements)
    kl, distance = (divided(x, options["normalizer"], n) for x in (kl, distance))
    both = options["common_weight"] * kl + options["tail_weight"] * distance
    return {
        "loss": temperature**2 * both,
        "kl_common": kl,
        "l1_tail": distance,
        "num_chunks": kl.new_tensor(n),
        "top1_agreement": share(agreements, kl),
        "common_teacher_mass": share(masses, kl),
    }


# Two tokens of either side have no partner.
SOME_PAIRED = lm.VocabPartition(
    *(torch.tensor(ids) for ids in ([1, 3, 4], [0, 1, 4], [0, 2], [2, 3]))
)
PARTITION = lm.vocab_partition(NARROW, rule="strict")


# What the benches measure.


def partition_of(vocab: int, like: Tensor) -> lm.VocabPartition:
    common, rest = torch.arange(vocab, device=like.device).chunk(2)
    return lm.VocabPartition(common, common, rest, rest)


def plain_partitioned(student: Tensor, teacher: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    a, b = (chunk_means(x.log_softmax(2), ids).chunk(2, dim=1) for x in (student, teacher))
    p, q = (x[1].exp().topk(min(8192, x[1].shape[1]), dim=1)[0] for x in (a, b))
    kl = F.kl_div(a[0], b[0], log_target=True, reduction="batchmean")
    return kl + (p - q).abs().sum(1).mean()


def our_partitioned(student: Tensor, teacher: Tensor, *others: Tensor) -> Tensor:
    return lm.partitioned_loss(
        student,
        teacher,
        alignment=alignment_of(*others[:2]),
        partition=partition_of(student.shape[2], student),
    ).loss


PARTITIONED = of_chunks(
    function=lm.partitioned_loss,
    formula=formula,
    bench={"": over_chunks(plain_partitioned, our_partitioned, ties=True)},
    formula_at=({}, {"partition": SOME_PAIRED, "tail_top_k": st.sampled_from((1, 8192))}),
    variants={
        "": Variant(
            module=lm.PartitionedLoss(PARTITION, tail_top_k=2),
            options={"partition": PARTITION, "tail_top_k": 2},
            shapes=LOGITS,
            made=aligned,
            masks=("sample_mask",),
        )
    },
    weights={
        "kl_common": lambda call: call["temperature"] ** 2 * call["common_weight"],
        "l1_tail": lambda call: call["temperature"] ** 2 * call["tail_weight"],
    },
    detached=True,
)
