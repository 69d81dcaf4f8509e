"""Assignments to prototypes, and the cross-entropies with them."""

import functools
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from losses import GROUPS, Declaration, Variant
from losses._bench import Case, normal
from termwise.joint_embedding import (
    DINOLoss,
    IBOTLoss,
    SwappedPredictionLoss,
    centered_softmax,
    dino_loss,
    ibot_loss,
    sinkhorn,
    swapped_prediction_loss,
    updated_center,
)

PATHS = ({}, {"termwise.joint_embedding._prototypes._SMALL": 0})
POSITIVE = st.floats(0.1, 1.0)
UNDIFFERENTIATED = dict.fromkeys(
    ("assert_gradients", "assert_double_backward"), "no part of the result of .* has a gradient"
)


def assigned(logits, *, temperature, iterations, **_):
    logits = logits.detach()
    q = torch.exp((logits - logits.max()) / temperature)
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


def summed(samples, temperature, prototypes):
    """Sum cross-entropy and the teacher's entropy of (logits, probabilities, weight)."""
    cross = entropy = torch.zeros((), dtype=torch.float64)
    for logits, p, weight in samples:
        logs = logits / temperature
        logs = logs - logs.exp().sum().log()
        cross = cross - weight * sum(p[k] * logs[k] for k in range(prototypes))
        entropy = entropy - weight * sum(p[k] * p[k].log() for k in range(prototypes))
    return cross, entropy


def named(cross, entropy, marginal, pairs=1):
    q = marginal / marginal.sum()
    return {
        "loss": pairs * cross,
        "cross_entropy": cross,
        "teacher_entropy": entropy,
        "kl": (cross - entropy).detach(),
        "marginal_entropy": -(q * q.log()).sum(),
    }


def dino(student_logits, teacher_probs, *, temperature, same_view, over_pairs, **_):
    p = teacher_probs.detach()
    views, n, k = student_logits.shape
    kept = [(s, t) for s in range(views) for t in range(len(p)) if same_view == "keep" or s != t]
    weight = 1 / (len(kept) * n)
    samples = [(student_logits[s, b], p[t, b], weight) for s, t in kept for b in range(n)]
    terms = summed(samples, temperature, k)
    return named(*terms, p.sum((0, 1)), len(kept) if over_pairs == "sum" else 1)


def ibot(student_logits, teacher_probs, image_index, *, images, temperature, over, **_):
    p, own = teacher_probs.detach(), image_index.tolist()
    size = [1 / (images * own.count(i)) if over == "images" else 1 / len(own) for i in own]
    samples = list(zip(student_logits, p, size, strict=True))
    terms = summed(samples, temperature, p.shape[1])
    marginal = sum((weight * row for _, row, weight in samples), start=0 * p.sum(0))
    return {**named(*terms, marginal), "n_masked": torch.tensor(float(len(own)))}


def swapped(logits, *, num_global, queue, temperature, sinkhorn_temperature, iterations, **_):
    p = torch.stack(
        [
            assigned(
                x if queue is None else torch.cat((x, queue[g].detach())),
                temperature=sinkhorn_temperature,
                iterations=iterations,
            )[: logits.shape[1]]
            for g, x in enumerate(logits[:num_global])
        ]
    )
    return dino(logits, p, temperature=temperature, same_view="skip", over_pairs="mean")


def teacher(rows):
    generator = torch.Generator().manual_seed(3)
    return {"teacher_probs": torch.randn(2, rows, 3, generator=generator).softmax(2)}


def patches(rows):
    return {
        "teacher_probs": teacher(rows)["teacher_probs"][0],
        "image_index": torch.arange(rows) % 4,
    }


SUMMED = {"same_view": "keep", "over_pairs": "sum"}


# What the benches measure.


def of_views(batch: int, prototypes: int) -> list[Tensor]:
    """Logits of 4 views of a student, and probabilities of 2 of its teacher."""
    teacher = normal(2, batch, prototypes).div(0.5).softmax(2)
    return [normal(4, batch, prototypes, scale=0.3).requires_grad_(), teacher]


def plain_dino(student: Tensor, teacher: Tensor) -> Tensor:
    logs, same = (student / 0.1).log_softmax(2), min(len(student), len(teacher))
    total = (logs.sum(0) * teacher.sum(0)).sum() - (logs[:same] * teacher[:same]).sum()
    return -total / (student.shape[1] * (len(student) * len(teacher) - same))


def masked_patches(masked: int, prototypes: int) -> list[Tensor]:
    """Four of each image."""
    student, teacher = of_views(masked, prototypes)
    return [student[0].detach().requires_grad_(), teacher[0], torch.arange(masked) // 4]


def plain_ibot(student: Tensor, teacher: Tensor, image: Tensor) -> Tensor:
    nats = -(teacher * (student / 0.1).log_softmax(1)).sum(1)
    images = len(student) // 4
    counts = torch.zeros(images, device=image.device).index_add(0, image, torch.ones_like(nats))
    return (nats / counts[image]).sum() / images


def our_ibot(student: Tensor, teacher: Tensor, image: Tensor) -> Tensor:
    return ibot_loss(student, teacher, image, images=len(student) // 4).loss


def logits_of_views(batch: int, prototypes: int) -> list[Tensor]:
    return of_views(batch, prototypes)[:1]


def plain_swapped(logits: Tensor) -> Tensor:
    with torch.no_grad():
        q = (logits[:2] / 0.05).exp()
        for _ in range(3):
            q = q / q.sum(1, keepdim=True)
            q = q / q.sum(2, keepdim=True)
    return plain_dino(logits, q)


ASSIGNED = (64, 128), (128, 1024), (64, 65_536)


over_prototypes = functools.partial(Case, ASSIGNED, size_of=lambda rows: (rows, 32_768))


DINO = Declaration(
    function=dino_loss,
    formula=dino,
    bench={"": over_prototypes(of_views, plain_dino, rows=256)},
    paths=PATHS,
    second=("right", "refused"),
    formula_at=({}, SUMMED),
    variants={
        "": Variant(
            module=DINOLoss(**SUMMED), options=SUMMED, shapes=("layers rows columns",), made=teacher
        )
    },
    sizes={"student_views": st.integers(2, 3), "teacher_views": st.integers(1, 2), "prototypes": 3},
    elements={"teacher_probs": POSITIVE},
    weights={
        "cross_entropy": lambda call: dino_pairs(call) if call["over_pairs"] == "sum" else 1.0
    },
    permuted=("batch", "prototypes"),
    shifted={"prototypes": ("student_logits",)},
    by={"assert_gradients": ("student_logits",)},  # the teacher has none
    shards=GROUPS,
)


def dino_pairs(call):
    views = [len(call[name]) for name in ("student_logits", "teacher_probs")]
    return math.prod(views) - (min(views) if call["same_view"] == "skip" else 0)


IBOT = Declaration(
    function=ibot_loss,
    formula=ibot,
    bench={"": over_prototypes(masked_patches, plain_ibot, our_ibot, rows=1024)},
    paths=PATHS,
    second=("right", "refused"),
    formula_at=({"over": "images"}, {"over": "patches"}),
    variants={
        "": Variant(
            module=IBOTLoss(temperature=0.2),
            options={"temperature": 0.2},
            made=patches,
            fixed={"images": 5},
        )
    },
    elements={"teacher_probs": POSITIVE, "image_index": st.integers(0, 1)},
    sizes={"prototypes": 3},
    overrides={"images": 3},
    weights={"cross_entropy": 1.0},
    permuted=("masked", "prototypes"),
    shifted={"prototypes": ("student_logits",)},
    by={"assert_gradients": ("student_logits",)},  # the teacher has none
    # Every rank draws the same number of images; tests/distributed has different ones.
    shards={"batch_group": ("masked", {})},
    more={"assert_sharding": {"over": "patches"}},
)
SWAPPED = Declaration(
    function=swapped_prediction_loss,
    formula=swapped,
    bench={
        "": over_prototypes(
            logits_of_views,
            plain_swapped,
            lambda x: swapped_prediction_loss(x, num_global=2).loss,
            rows=256,
        )
    },
    paths=PATHS,
    formula_at=({}, {"num_global": 1, "queue": None}),
    variants={
        "": Variant(
            module=SwappedPredictionLoss(iterations=1),
            options={"iterations": 1},
            shapes=("layers rows columns",),
        )
    },
    sizes={"views": 3, "global_views": 2, "queue": 2, "prototypes": 3},
    overrides={"num_global": 2, "iterations": st.integers(1, 3)},
    weights={"cross_entropy": 1.0},
    permuted=("batch", "prototypes"),
    shards=GROUPS,
    not_held={  # as targets they have none
        "assert_gradients": "gradient of loss with respect to logits",
        "assert_double_backward": "second derivative of loss with respect to logits",
    },
)
SINKHORN = Declaration(
    function=sinkhorn,
    formula=assigned,
    overrides={"temperature": 0.1, "iterations": st.integers(1, 4)},
    permuted=("batch", "prototypes"),
    shifted={"batch": ("logits",)},
    shards=GROUPS,
    not_held=UNDIFFERENTIATED,
)
CENTERED = Declaration(
    function=centered_softmax,
    formula=lambda logits, center, *, temperature: torch.softmax(
        (logits - center).detach() / temperature, 1
    ),
    overrides={"temperature": 0.1},
    permuted=("batch", "prototypes"),
    shifted={"prototypes": ("logits",)},
    not_held=UNDIFFERENTIATED,
)
CENTER = Declaration(
    function=updated_center,
    formula=lambda center, logits, *, momentum, **_: (
        momentum * center + (1 - momentum) * (logits.mean(0) if len(logits) else center)
    ).detach(),
    overrides={"momentum": 0.75},
    permuted=("batch", "prototypes"),
    shards=GROUPS,
    not_held=UNDIFFERENTIATED,
)
