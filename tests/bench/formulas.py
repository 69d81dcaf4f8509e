"""What the benches measure: each loss beside the best plain formula, on the same inputs.

The plain formula is the fastest that a few lines of PyTorch give, without the counts that a loss
returns beside it. `run.py` times the cases that have sizes, `launches.py` counts the kernels of
those that have a number of rows.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from termwise import energy, lm, sae
from termwise.joint_embedding import (
    barlow_twins_loss,
    decoupled_contrastive_loss,
    dino_loss,
    gram_anchor_loss,
    ibot_loss,
    info_nce_loss,
    koleo_loss,
    lejepa_loss,
    mmcr_loss,
    multi_view_vicreg_loss,
    nt_xent_loss,
    predictive_cosine_loss,
    sigmoid_contrastive_loss,
    sigreg_loss,
    supervised_contrastive_loss,
    swapped_prediction_loss,
    variance_covariance_loss,
    vicreg_loss,
    visreg_loss,
)

Loss = Callable[..., Tensor]
COEFFICIENT, BANDWIDTH, SIGMA, PREFIXES = 1e-3, 0.5, 0.1, 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss. Inputs that require a gradient get one."""

    sizes: tuple[tuple[int, ...], ...]
    """Small, middle and large on a CPU; none: it is not timed."""
    inputs: Callable[..., list[Tensor]]
    plain: Loss
    ours: Loss
    rows: int | None = None
    """So many on an accelerator that the largest tensor has about 2^25 elements."""
    size_of: Callable[[int], tuple[int, ...]] = lambda rows: (rows, 32_768, 1024)
    """The size of so many rows."""
    peer: tuple[str, Callable[[], Loss]] | None = None
    products: Callable[..., object] | None = None
    dtype: torch.dtype = torch.float32
    compiled: bool = True


def normal(*size: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*size) * scale


def positive(*size: int) -> Tensor:
    """Half of them near 0, but not 0, where |f| has no derivative and ours is that from above."""
    return torch.randn(*size).relu() + 1e-3


# Rows of logits.


def logits_and_tokens(batch: int, time: int, vocab: int) -> list[Tensor]:
    return [normal(batch, time, vocab).requires_grad_(), torch.randint(vocab, (batch, time))]


def two_logits(batch: int, time: int, vocab: int) -> list[Tensor]:
    return [normal(batch, time, vocab).requires_grad_(), normal(batch, time, vocab)]


def plain_next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


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


def patched_and_original(rows: int, vocab: int) -> list[Tensor]:
    return [normal(rows, vocab).requires_grad_(), normal(rows, vocab)]


def plain_end_to_end(patched: Tensor, original: Tensor) -> Tensor:
    q, p = (x.float().log_softmax(1) for x in (patched, original))
    return F.kl_div(q, p, log_target=True, reduction="batchmean")


def import_torchvision() -> None:
    """Import what peers import, also one built for CUDA beside a torch for CPU: none is called."""
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}", "(Tensor d, Tensor s, float iou) -> Tensor"
            )
        import torchvision  # noqa: F401


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


def hidden_and_head(batch: int, time: int, vocab: int) -> list[Tensor]:
    hidden = normal(batch, time, 256).requires_grad_()
    return [hidden, normal(vocab, 256, scale=0.06).requires_grad_()]


def hidden_and_tokens(batch: int, time: int, vocab: int) -> list[Tensor]:
    return [*hidden_and_head(batch, time, vocab), torch.randint(vocab, (batch, time))]


def two_hidden(batch: int, time: int, vocab: int) -> list[Tensor]:
    teacher = [x.detach() for x in hidden_and_head(batch, time, vocab)]
    return [*hidden_and_head(batch, time, vocab), *teacher]


def plain_linear_next_token(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return plain_next_token(hidden @ weight.mT, tokens)


def plain_linear_kl(hidden: Tensor, weight: Tensor, other: Tensor, head: Tensor) -> Tensor:
    return plain_forward_kl(hidden @ weight.mT, other @ head.mT)


def head_products(hidden: Tensor, weight: Tensor, *teacher: Tensor) -> None:
    logits = hidden.detach() @ weight.detach().mT
    logits @ weight.detach()
    logits.flatten(0, 1).mT @ hidden.detach().flatten(0, 1)
    if len(teacher) == 2:
        teacher[0] @ teacher[1].mT


# Chunks of two tokenizers.


def chunked(time: int, vocab: int, hidden: int = 0) -> list[Tensor]:
    """Logits of two models, chunks of two tokens, and a projection with two entries a token."""
    student = normal(1, time, hidden or vocab).requires_grad_()
    ids = (torch.arange(time) // 2)[None]
    entries = torch.arange(2 * vocab) // 2
    pointers = 2 * torch.arange(vocab + 1)
    projection = [pointers, entries, torch.full((2 * vocab,), 0.5)]
    return [student, normal(1, time, vocab), ids, ids[:, ::2] >= 0, *projection]


def chunked_head(time: int, vocab: int) -> list[Tensor]:
    hidden, *others = chunked(time, vocab, 256)
    return [hidden, *others, normal(vocab, 256, scale=0.06).requires_grad_()]


def aligned(ids: Tensor, valid: Tensor) -> lm.Alignment:
    return lm.Alignment(ids, ids, valid, valid)


def projection_of(pointers: Tensor, entries: Tensor, weights: Tensor) -> lm.VocabProjection:
    vocab = len(pointers) - 1
    one_way = pointers, entries, weights
    return lm.VocabProjection(vocab, vocab, *one_way, *one_way)


def partition_of(vocab: int, like: Tensor) -> lm.VocabPartition:
    common, rest = torch.arange(vocab, device=like.device).chunk(2)
    return lm.VocabPartition(common, common, rest, rest)


def chunk_means(x: Tensor, ids: Tensor) -> Tensor:
    chunk, rows = ids[0, 1:], x[0, :-1]
    sizes = rows.new_zeros(ids.shape[1] // 2).index_add(0, chunk, rows.new_ones(len(rows)))
    sums = rows.new_zeros(len(sizes), rows.shape[1]).index_add(0, chunk, rows)
    return sums / sizes[:, None]


def plain_projected_kl(student: Tensor, teacher: Tensor, ids: Tensor, *others: Tensor) -> Tensor:
    _, _, entries, weights = others
    p = chunk_means(student.softmax(2), ids)
    q = torch.zeros_like(p).index_add(1, entries, p.index_select(1, entries) * weights)
    q = q / (q.sum(1, keepdim=True) + 1e-10) + 1e-10
    target = chunk_means(teacher, ids).log_softmax(1)
    return F.kl_div(q.log(), target, log_target=True, reduction="batchmean")


def our_projected_kl(student: Tensor, teacher: Tensor, *others: Tensor) -> Tensor:
    ids, valid, *projection = others
    return lm.projected_kl_loss(
        student, teacher, alignment=aligned(ids, valid), projection=projection_of(*projection)
    ).loss


def plain_linear_projected_kl(hidden: Tensor, *others: Tensor) -> Tensor:
    *chunks, weight = others
    return plain_projected_kl(hidden @ weight.mT, *chunks)


def our_linear_projected_kl(hidden: Tensor, teacher: Tensor, *others: Tensor) -> Tensor:
    ids, valid, *projection, weight = others
    return lm.linear_projected_kl_loss(
        hidden,
        weight,
        teacher,
        alignment=aligned(ids, valid),
        projection=projection_of(*projection),
    ).loss


def plain_universal_logit(student: Tensor, teacher: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    p, q = (chunk_means(x.softmax(2), ids).sort(1, descending=True)[0] for x in (student, teacher))
    return (p - q).abs().sum(1).mean()


def our_universal_logit(student: Tensor, teacher: Tensor, *others: Tensor) -> Tensor:
    return lm.universal_logit_loss(student, teacher, alignment=aligned(*others[:2])).loss


def plain_partitioned(student: Tensor, teacher: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    a, b = (chunk_means(x.log_softmax(2), ids).chunk(2, dim=1) for x in (student, teacher))
    p, q = (x[1].exp().topk(min(8192, x[1].shape[1]), dim=1)[0] for x in (a, b))
    kl = F.kl_div(a[0], b[0], log_target=True, reduction="batchmean")
    return kl + (p - q).abs().sum(1).mean()


def our_partitioned(student: Tensor, teacher: Tensor, *others: Tensor) -> Tensor:
    return lm.partitioned_loss(
        student,
        teacher,
        alignment=aligned(*others[:2]),
        partition=partition_of(student.shape[2], student),
    ).loss


def our_cross_tokenizer(student: Tensor, teacher: Tensor, *others: Tensor) -> Tensor:
    ids, valid, *projection = others
    of_teacher = lm.Teacher(teacher, aligned(ids, valid), projection=projection_of(*projection))
    return lm.cross_tokenizer_loss(student, ids, of_teacher).loss


def plain_cross_tokenizer(student: Tensor, teacher: Tensor, ids: Tensor, *_: Tensor) -> Tensor:
    return plain_next_token(student, ids) + plain_projected_kl(student, teacher, ids, *_)


# Latents.


def x_f_x_hat(rows: int, d_sae: int, d_model: int) -> list[Tensor]:
    f = positive(rows, d_sae).requires_grad_()
    return [normal(rows, d_model), f, normal(rows, d_model).requires_grad_()]


def plain_vanilla(x: Tensor, f: Tensor, x_hat: Tensor) -> Tensor:
    return F.mse_loss(x_hat, x) + COEFFICIENT * f.abs().sum(1).mean()


def our_vanilla(x: Tensor, f: Tensor, x_hat: Tensor) -> Tensor:
    return sae.vanilla_loss(x, f, x_hat, sparsity_coeff=COEFFICIENT).loss


def plain_topk(x: Tensor, f: Tensor, x_hat: Tensor) -> Tensor:
    return F.mse_loss(x_hat, x)


def x_latents_x_hat(rows: int, d_sae: int, d_model: int) -> list[Tensor]:
    x, f, x_hat = x_f_x_hat(rows, d_sae, d_model)
    return [x, f.detach(), x_hat]


def two_encoders(rows: int, d_sae: int, d_model: int) -> list[Tensor]:
    pre, magnitude = (normal(rows, d_sae).requires_grad_() for _ in range(2))
    W_dec = normal(d_sae, d_model, scale=d_sae**-0.5).requires_grad_()
    return [pre, magnitude, W_dec, normal(rows, d_model)]


def plain_gated(f_gate: Tensor, magnitude: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    gate, f = f_gate.relu(), magnitude.relu() * (f_gate > 0)
    aux = F.mse_loss(gate @ W_dec.detach(), x)
    return F.mse_loss(f @ W_dec, x) + COEFFICIENT * gate.sum(1).mean() + aux


def our_gated(f_gate: Tensor, magnitude: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    f = magnitude.relu() * (f_gate > 0)
    return sae.gated_loss(x, f, f @ W_dec, f_gate, W_dec, sparsity_coeff=COEFFICIENT).loss


class Jump(torch.autograd.Function):
    """JumpReLU and its count with the kernel's estimates, line by line."""

    @staticmethod
    def forward(pre: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        active = (pre > threshold).float()
        return pre * active, active

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, of_f: Tensor, of_active: Tensor) -> tuple[Tensor, Tensor]:
        pre, threshold = ctx.saved_tensors
        kernel = ((pre - threshold).abs() < BANDWIDTH / 2).float() / BANDWIDTH
        of_threshold = -(threshold * kernel * of_f + kernel * of_active).sum(0)
        return of_f * (pre > threshold).float(), of_threshold


def with_threshold(rows: int, d_sae: int, d_model: int) -> list[Tensor]:
    pre, _, W_dec, x = two_encoders(rows, d_sae, d_model)
    return [pre, torch.full((d_sae,), 0.5, requires_grad=True), W_dec, x]


def plain_jumprelu(pre: Tensor, threshold: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    f, active = Jump.apply(pre, threshold)
    return F.mse_loss(f @ W_dec, x) + COEFFICIENT * active.sum(1).mean()


def our_jumprelu(pre: Tensor, threshold: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    return sae.jumprelu_loss(
        x, pre, W_dec, threshold=threshold, sparsity_coeff=COEFFICIENT, bandwidth=BANDWIDTH
    ).loss


def decoder_products(pre: Tensor, _: Tensor, W_dec: Tensor, x: Tensor) -> None:
    pre.detach() @ W_dec.detach()
    x @ W_dec.detach().mT
    pre.detach().mT @ x


def gated_products(pre: Tensor, magnitude: Tensor, W_dec: Tensor, x: Tensor) -> None:
    decoder_products(magnitude, pre, W_dec, x)
    pre.detach() @ W_dec.detach()
    x @ W_dec.detach().mT


def of_layers(rows: int, d_sae: int, d_model: int) -> list[Tensor]:
    x_hat, W_dec = normal(rows, 4, d_model), normal(d_sae, 4, d_model, scale=d_sae**-0.5)
    leaves = [positive(rows, d_sae), x_hat, W_dec]
    return [*(leaf.requires_grad_() for leaf in leaves), normal(rows, 4, d_model)]


def plain_crosscoder(f: Tensor, x_hat: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    errors = (x - x_hat).square().mean(2).sum(1).mean()
    return errors + COEFFICIENT * (f.abs() * W_dec.norm(dim=2).sum(1)).sum(1).mean()


def our_crosscoder(f: Tensor, x_hat: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    return sae.crosscoder_loss(x, f, x_hat, W_dec, sparsity_coeff=COEFFICIENT).loss


def with_prefixes(rows: int, d_sae: int, d_model: int) -> list[Tensor]:
    W_dec = normal(d_sae, d_model, scale=d_sae**-0.5).requires_grad_()
    return [positive(rows, d_sae).requires_grad_(), W_dec, normal(rows, d_model)]


def prefixes_of(d_sae: int) -> list[int]:
    return [d_sae >> level for level in reversed(range(PREFIXES))]


def plain_matryoshka(f: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    x_hat, total, start = torch.zeros_like(x), 0.0, 0
    for end in prefixes_of(f.shape[1]):
        x_hat = x_hat + f[:, start:end] @ W_dec[start:end]
        total, start = total + F.mse_loss(x_hat, x), end
    return total / PREFIXES


def our_matryoshka(f: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    return sae.matryoshka_loss(x, f, W_dec, None, prefixes=prefixes_of(f.shape[1])).loss


def kept(rows: int, d_sae: int, d_model: int) -> list[Tensor]:
    """64 latents of each row, and where they are."""
    values = positive(rows, 64).requires_grad_()
    W_dec = normal(d_sae, d_model, scale=d_sae**-0.5).requires_grad_()
    return [values, torch.randint(d_sae, (rows, 64)), W_dec, normal(rows, d_model)]


def plain_sparse_matryoshka(values: Tensor, indices: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    picked, total = W_dec[indices] * values[..., None], 0.0
    for end in prefixes_of(len(W_dec)):
        x_hat = (picked * (indices < end)[..., None]).sum(1)
        total = total + F.mse_loss(x_hat, x)
    return total / PREFIXES


def our_sparse_matryoshka(values: Tensor, indices: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    f = sae.SparseLatents(values, indices)
    return sae.matryoshka_loss(x, f, W_dec, None, prefixes=prefixes_of(len(W_dec))).loss


# Second moments.


def two_views(batch: int, dim: int) -> list[Tensor]:
    return [normal(batch, dim).requires_grad_() for _ in range(2)]


def plain_vicreg(z1: Tensor, z2: Tensor) -> Tensor:
    batch, dim = z1.shape
    loss = 25 * F.mse_loss(z1, z2)
    for z in (z1, z2):
        z = z - z.mean(0)
        variances = z.square().sum(0) / (batch - 1)
        products = z @ z.mT if dim > batch else z.mT @ z  # alike in the sum of their squares
        off_diagonal = products.square().sum() / (batch - 1) ** 2 - variances.square().sum()
        loss = loss + 25 * F.relu(1 - (variances + 1e-4).sqrt()).mean() + off_diagonal / dim
    return loss


# Pairs, neighbours and patches.


def pairs(batch: int, dim: int) -> list[Tensor]:
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    return [*two_views(batch, dim), scale.requires_grad_(), bias.requires_grad_()]


def plain_sigmoid(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    logits = scale * a @ b.mT + bias
    signs = 2 * torch.eye(len(a), device=a.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(a)


def our_sigmoid(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return sigmoid_contrastive_loss(a, b, scale=scale, bias=bias).loss


def one_view(batch: int, dim: int) -> list[Tensor]:
    return [normal(batch, dim).requires_grad_()]


def plain_koleo(z: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    with torch.no_grad():
        nearest = (z @ z.mT).fill_diagonal_(-1).argmax(1)
    return -(F.pairwise_distance(z, z[nearest], eps=1e-8) + 1e-8).log().mean()


def lightly_koleo() -> Loss:
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
    import_torchvision()
    from lightly.loss import KoLeoLoss

    return KoLeoLoss()


def two_models(images: int, patches: int, dim: int) -> list[Tensor]:
    return [normal(images, patches, dim).requires_grad_(), normal(images, patches, dim)]


def plain_gram(student: Tensor, teacher: Tensor) -> Tensor:
    own, wanted = (F.normalize(x, dim=2) for x in (student, teacher))
    return F.mse_loss((own @ own.mT).relu(), (wanted @ wanted.mT).relu())


def lightly() -> Loss:
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
    import_torchvision()
    from lightly.loss import VICRegLoss

    return VICRegLoss(mu_param=50.0, eps=1e-4)


def plain_variance_covariance(z: Tensor) -> Tensor:
    batch, dim = z.shape
    z = z - z.mean(0)
    variances = z.square().sum(0) / (batch - 1)
    products = z @ z.mT if dim > batch else z.mT @ z
    off_diagonal = products.square().sum() / (batch - 1) ** 2 - variances.square().sum()
    return 25 * F.relu(1 - (variances + 1e-4).sqrt()).mean() + off_diagonal / dim


def four_views(batch: int, dim: int) -> list[Tensor]:
    return [normal(4, batch, dim).requires_grad_()]


def plain_multi_view(z: Tensor) -> Tensor:
    views, batch, dim = z.shape
    pairs = 2 * views / (views - 1) * (z - z.mean(0)).square().mean()
    z = z - z.mean(1, keepdim=True)
    variances = z.square().sum(1) / (batch - 1)
    products = z @ z.mT if dim > batch else z.mT @ z
    off_diagonal = products.square().sum() / (batch - 1) ** 2 - variances.square().sum()
    hinge = F.relu(1 - (variances + 1e-4).sqrt()).mean()
    return 25 * pairs + 25 * hinge + off_diagonal / (dim * views)


def plain_barlow(z1: Tensor, z2: Tensor) -> Tensor:
    batch, dim = z1.shape
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))
    diagonal = (a * b).sum(0) / batch
    few_rows = 2 * batch <= dim
    square = (a @ a.mT * (b @ b.mT)).sum() if few_rows else (a.mT @ b).square().sum()
    off_diagonal = square / batch**2 - diagonal.square().sum()
    return (1 - diagonal).square().sum() + 5e-3 * off_diagonal


def lightly_barlow() -> Loss:
    lightly()
    from lightly.loss import BarlowTwinsLoss

    return BarlowTwinsLoss()


def plain_mmcr(z: Tensor) -> Tensor:
    z = F.normalize(z, dim=2)
    local = torch.linalg.svdvals(z.transpose(0, 1)).sum() / z.shape[1]
    return 5e-3 * local - torch.linalg.svdvals(z.mean(0)).sum()


def lightly_mmcr() -> Loss:
    lightly()
    from lightly.loss import MMCRLoss

    def loss(z: Tensor) -> Tensor:
        unit = F.normalize(z, dim=2).transpose(0, 1)
        return MMCRLoss()(*unit.tensor_split(2, 1))

    return loss


def lightly_cosine() -> Loss:
    lightly()
    from lightly.loss import NegativeCosineSimilarity

    return NegativeCosineSimilarity()


def prediction_and_target(batch: int, dim: int) -> list[Tensor]:
    return [normal(batch, dim).requires_grad_(), normal(batch, dim)]


def view_products(*views: Tensor) -> None:
    for z in views:
        z = z.detach()
        if z.shape[1] > z.shape[0]:
            (z @ z.mT) @ z
        else:
            z @ (z.mT @ z)


# Slices.


def along_slices(batch: int, dim: int, slices: int) -> list[Tensor]:
    a = normal(dim, slices)
    return [normal(batch, dim).requires_grad_(), a / a.norm(dim=0)]


def views_along_slices(batch: int, dim: int, slices: int) -> list[Tensor]:
    _, a = along_slices(1, dim, slices)
    return [normal(2, batch, dim).requires_grad_(), a]


def plain_sigreg(z: Tensor, a: Tensor) -> Tensor:
    t = torch.linspace(0, 3, 17, device=z.device)
    target = (-0.5 * t.square()).exp()
    weights = torch.cat([t.new_full((1,), 0.5), t.new_ones(15), t.new_full((1,), 0.5)]) * 3 / 8
    angles = (z @ a)[..., None] * t
    squares = (angles.cos().mean(-3) - target).square() + angles.sin().mean(-3).square()
    return (squares @ (weights * target)).mean() * z.shape[-2]


def plain_lejepa(z: Tensor, a: Tensor) -> Tensor:
    return 0.95 * (z - z.mean(0)).square().mean() + 0.05 * plain_sigreg(z, a)


def plain_visreg(z: Tensor, a: Tensor) -> Tensor:
    n, mean = z.shape[1], z.mean(1)
    centred = z - mean[:, None]
    std = centred.square().mean(1).sqrt()
    projected = (centred / (std.detach() + 1e-4)[:, None]) @ a
    places = torch.arange(1, n + 1, device=z.device, dtype=torch.float64) / (n + 1)
    quantiles = torch.special.ndtri(places).to(z.dtype)
    shape = (projected.mT.sort(2).values - quantiles).square().mean()
    spread = mean.square().mean() + (1 - std).square().mean() + shape
    return 0.1 * (z - z.mean(0)).square().mean() + 0.9 * spread


def projections(z: Tensor, a: Tensor) -> None:
    z = z.detach()
    (z @ a) @ a.mT


# Prototypes.


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


# Contrast.


def views_and_scale(batch: int, dim: int) -> list[Tensor]:
    return [*two_views(batch, dim), torch.full((), 14.3).requires_grad_()]


def plain_clip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = scale * F.normalize(a, dim=1) @ F.normalize(b, dim=1).mT
    labels = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.mT, labels)) / 2


def our_clip(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    return info_nce_loss(a, b, scale=scale, symmetric=True).loss


def between_views(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of all views but with themselves, where they are, and the other view's."""
    z = F.normalize(torch.cat((z1, z2)), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.mT / temperature).masked_fill(itself, -torch.inf)
    return logits, itself, torch.arange(len(z), device=z.device).roll(len(z1))


def plain_nt_xent(z1: Tensor, z2: Tensor) -> Tensor:
    logits, _, other = between_views(z1, z2, 0.5)
    return F.cross_entropy(logits, other)


def plain_decoupled(z1: Tensor, z2: Tensor) -> Tensor:
    logits, itself, other = between_views(z1, z2, 0.5)
    negatives = logits.masked_fill(itself.roll(len(z1), 1), -torch.inf)
    return (negatives.logsumexp(1) - logits.gather(1, other[:, None])[:, 0]).mean()


def of_ten_classes(batch: int, dim: int) -> list[Tensor]:
    labels = torch.arange(batch) % 10
    return [normal(batch, dim).requires_grad_(), labels]


def plain_supervised(z: Tensor, labels: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.mT / 0.5).masked_fill(itself, -torch.inf)
    positive = (labels[:, None] == labels) & ~itself
    total = (logits.log_softmax(1).masked_fill(~positive, 0)).sum(1)
    return -(total / positive.sum(1)).mean()


def pair_products(a: Tensor, b: Tensor, *_: Tensor) -> None:
    """Of the value and of both gradients."""
    logits = a.detach() @ b.detach().mT
    logits @ b.detach()
    logits.mT @ a.detach()


def embeddings(rows: int, dim: int) -> list[Tensor]:
    return [normal(rows, dim, scale=0.02).requires_grad_()]


def plain_variance(weight: Tensor) -> Tensor:
    return 0.1 * (weight.float().var(1, correction=0).mean() - 1).square()


def our_variance(weight: Tensor) -> Tensor:
    return lm.targeted_variance_loss(weight).loss


# Energies.


@functools.cache
def network(dim: int, device: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(device):
        layers = [nn.Linear(dim, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU()]
        return nn.Sequential(*layers, nn.Linear(128, 1), nn.Flatten(0))


def model(x: Tensor) -> nn.Module:
    return network(x.shape[1], x.device.type)


def data_and_parameters(batch: int, dim: int) -> list[Tensor]:
    x = normal(batch, dim)
    return [x, normal(batch, dim), *model(x).parameters()]


def slopes(x: Tensor) -> tuple[Tensor, Tensor]:
    point = x.detach().requires_grad_()
    return point, torch.autograd.grad(model(x)(point).sum(), point, create_graph=True)[0]


def plain_denoising(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    _, score = slopes(x + SIGMA * noise)
    return 0.5 * (score - noise / SIGMA).square().sum(1).mean()


def our_denoising(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    return energy.denoising_score_matching_loss(model(x), x, sigma=SIGMA, noise=noise).loss


def plain_sliced(x: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    point, score = slopes(x)
    (product,) = torch.autograd.grad((score * v).sum(), point, create_graph=True)
    return (0.5 * score.square().sum(1) - (product * v).sum(1)).mean()


def our_sliced(x: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return energy.sliced_score_matching_loss(model(x), x, projections=v[None]).loss


def plain_score_matching(x: Tensor, _: Tensor, *__: Tensor) -> Tensor:
    point, score = slopes(x)
    directions = torch.eye(x.shape[1], device=x.device)[:, None].expand(-1, *x.shape)
    (rows,) = torch.autograd.grad(
        score, point, directions, create_graph=True, is_grads_batched=True
    )
    return 0.5 * score.square().sum(1).mean() - rows.diagonal(dim1=0, dim2=2).sum(1).mean()


def our_score_matching(x: Tensor, _: Tensor, *__: Tensor) -> Tensor:
    return energy.score_matching_loss(model(x), x).loss


def plain_flow(x: Tensor, other: Tensor, *_: Tensor) -> Tensor:
    time = torch.rand(len(x), 1, device=x.device)
    _, score = slopes(x * (1 - time) + other * time)
    return (score + other - x).square().sum(1).mean()


def our_flow(x: Tensor, other: Tensor, *_: Tensor) -> Tensor:
    time = torch.rand(len(x), device=x.device)
    return energy.flow_matching_loss(model(x), x, other, time).loss


# Energies that see no derivative of x, beside noise whose log-density is -|x|^2.


def log_density(x: Tensor) -> Tensor:
    return -x.square().sum(-1)


def plain_noise_contrastive(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    of_data, of_noise = (model(y)(y) + log_density(y) for y in (x, noise))
    return F.softplus(of_data).mean() + F.softplus(-of_noise).mean()


def our_noise_contrastive(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    logs = {"log_noise_x": log_density(x), "log_noise_noise": log_density(noise)}
    return energy.noise_contrastive_loss(model(x), x, noise, log_z=x.new_zeros(()), **logs).loss


def plain_ranking(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    both = torch.stack([-model(y)(y) - log_density(y) for y in (x, noise)])
    return -both.log_softmax(0)[0].mean()


def our_ranking(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    logs = {"log_noise_x": log_density(x), "log_noise_noise": log_density(noise)[None]}
    return energy.ranking_noise_contrastive_loss(model(x), x, noise[None], **logs).loss


def plain_conditional(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    return 2 * F.softplus(model(x)(x) - model(x)(noise)).mean()


def our_conditional(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    return energy.conditional_noise_contrastive_loss(model(x), x, noise[None]).loss


def plain_contrastive(x: Tensor, other: Tensor, *_: Tensor) -> Tensor:
    return model(x)(x).mean() - model(x)(other).mean()


def our_contrastive(x: Tensor, other: Tensor, *_: Tensor) -> Tensor:
    return energy.contrastive_divergence_loss(model(x), x, other).loss


def plain_discrepancy(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    moved = x + SIGMA * noise
    copies = torch.stack([moved + SIGMA * noise, moved - SIGMA * noise])
    gaps = model(x)(x) - model(x)(copies.flatten(0, 1)).view(2, -1)
    return (F.pad(gaps, (0, 0, 1, 0)).logsumexp(0) - math.log(2)).mean()


def our_discrepancy(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    draws = torch.stack([noise, noise, -noise])
    return energy.energy_discrepancy_loss(model(x), x, t=SIGMA**2, copies=2, noise=draws).loss


def plain_differences(x: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    up, here, down = (model(x)(y) for y in (x + SIGMA * v, x, x - SIGMA * v))
    slope, bend = (up - down) / (2 * SIGMA), (up + down - 2 * here) / SIGMA**2
    return (0.5 * slope.square() - bend).mean()


def our_differences(x: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return energy.finite_difference_score_matching_loss(
        model(x), x, step=SIGMA, projections=v[None]
    ).loss


def plain_equilibrium(x: Tensor, other: Tensor, *_: Tensor) -> Tensor:
    time = torch.rand(len(x), 1, device=x.device)
    _, score = slopes(x * (1 - time) + other * time)
    weight = 4 * ((1 - time) / 0.2).clamp(max=1)
    return (score - weight * (x - other)).square().sum(1).mean()


def our_equilibrium(x: Tensor, other: Tensor, *_: Tensor) -> Tensor:
    time = torch.rand(len(x), device=x.device)
    return energy.equilibrium_matching_loss(model(x), x, other, time).loss


def our_energy_matching(x: Tensor, other: Tensor, *_: Tensor) -> Tensor:
    time = torch.rand(len(x), device=x.device)
    return energy.energy_matching_loss(model(x), x, other, time).loss


def over_vocab(rows: int) -> tuple[int, ...]:
    return 1, rows + 1, 128_256


def of_energy(plain: Loss, ours: Loss, *sizes: tuple[int, int], rows: int = 2**15) -> Case:
    """Not compiled: Dynamo follows no gradient that is taken inside."""
    return Case(
        sizes,
        data_and_parameters,
        plain,
        ours,
        rows=rows,
        size_of=lambda rows: (rows, 784),
        compiled=False,
    )


LOGITS = (2, 16, 100), (4, 64, 1000), (1, 65, 32_000)
HEADS = (1, 17, 1000), (2, 64, 8000), (2, 256, 32_000)
LATENTS = (64, 256, 64), (256, 2048, 512), (1024, 8192, 512)
BATCHES = (32, 64), (256, 128), (128, 784)
over_logits = functools.partial(Case, LOGITS, two_logits, size_of=over_vocab, rows=256)
over_head = functools.partial(Case, HEADS, size_of=over_vocab, rows=256, products=head_products)
over_latents = functools.partial(Case, LATENTS, rows=1024)
ASSIGNED = (64, 128), (128, 1024), (64, 65_536)
over_prototypes = functools.partial(Case, ASSIGNED, size_of=lambda rows: (rows, 32_768))
over_chunks = functools.partial(Case, (), chunked, rows=1024, size_of=lambda rows: (rows, 32_768))
# 2^26 logits of 4096 rows, of two views each.
of_pairs = functools.partial(
    Case, ((64, 128), (256, 128), (2048, 256)), rows=4096, size_of=lambda rows: (rows, 256)
)
CASES = {
    "lm.next_token_loss": Case(
        LOGITS, logits_and_tokens, plain_next_token, lambda *x: lm.next_token_loss(*x).loss
    ),
    "lm.next_token_loss, bfloat16": Case(
        ((2, 16, 100), (4, 64, 1000), (1, 49, 151_936)),
        logits_and_tokens,
        plain_next_token,
        lambda *x: lm.next_token_loss(*x).loss,
        rows=256,
        size_of=over_vocab,
        dtype=torch.bfloat16,
    ),
    "lm.distillation_loss, forward KL": over_logits(
        plain_forward_kl, lambda *x: lm.distillation_loss(*x).loss, peer=("TRL", trl_at(0.0))
    ),
    "lm.distillation_loss, reverse KL": over_logits(
        plain_reverse_kl, lambda *x: lm.distillation_loss(*x, divergence="reverse").loss
    ),
    "lm.distillation_loss, Jensen-Shannon": over_logits(
        plain_jensen_shannon,
        lambda *x: lm.distillation_loss(*x, divergence="jensen_shannon").loss,
        peer=("TRL", trl_at(0.5)),
    ),
    "lm.linear_next_token_loss": over_head(
        hidden_and_tokens,
        plain_linear_next_token,
        lambda *x: lm.linear_next_token_loss(*x).loss,
    ),
    "lm.linear_distillation_loss": over_head(
        two_hidden, plain_linear_kl, lambda *x: lm.linear_distillation_loss(*x).loss
    ),
    "lm.projected_kl_loss": over_chunks(plain_projected_kl, our_projected_kl),
    "lm.linear_projected_kl_loss": Case(
        (),
        chunked_head,
        plain_linear_projected_kl,
        our_linear_projected_kl,
        rows=1024,
        size_of=lambda rows: (rows, 32_768),
    ),
    "lm.universal_logit_loss": over_chunks(plain_universal_logit, our_universal_logit),
    "lm.partitioned_loss": over_chunks(plain_partitioned, our_partitioned),
    "lm.cross_tokenizer_loss": over_chunks(plain_cross_tokenizer, our_cross_tokenizer),
    "lm.targeted_variance_loss": Case(
        ((256, 64), (4096, 512), (50_000, 1024)),
        embeddings,
        plain_variance,
        our_variance,
        rows=8192,
        size_of=lambda rows: (rows, 4096),
    ),
    "sae.vanilla_loss": over_latents(x_f_x_hat, plain_vanilla, our_vanilla),
    "sae.topk_loss": over_latents(
        x_latents_x_hat, plain_topk, lambda x, f, x_hat: sae.topk_loss(x, f, x_hat).loss
    ),
    "sae.gated_loss": over_latents(two_encoders, plain_gated, our_gated, products=gated_products),
    "sae.jumprelu_loss": over_latents(
        with_threshold, plain_jumprelu, our_jumprelu, products=decoder_products
    ),
    "sae.crosscoder_loss": over_latents(of_layers, plain_crosscoder, our_crosscoder),
    "sae.matryoshka_loss": over_latents(
        with_prefixes,
        plain_matryoshka,
        our_matryoshka,
        products=lambda f, W_dec, x: decoder_products(f, f, W_dec, x),
    ),
    "sae.matryoshka_loss, sparse": Case(
        ((64, 2048, 64), (256, 16_384, 512)),
        kept,
        plain_sparse_matryoshka,
        our_sparse_matryoshka,
        rows=512,
        compiled=False,
    ),
    "sae.end_to_end_loss": Case(
        ((32, 100), (256, 1000), (64, 32_000)),
        patched_and_original,
        plain_end_to_end,
        lambda *x: sae.end_to_end_loss(*x).loss,
        rows=256,
        size_of=lambda rows: (rows, 128_256),
    ),
    "joint_embedding.vicreg_loss": Case(
        ((32, 64), (256, 128), (2048, 2048)),
        two_views,
        plain_vicreg,
        lambda *z: vicreg_loss(*z).loss,
        rows=4096,
        size_of=lambda rows: (rows, 2048),
        peer=("lightly", lightly),
        products=view_products,
    ),
    "joint_embedding.vicreg_loss, wide": Case(
        ((32, 256), (64, 1024), (256, 8192)),
        two_views,
        plain_vicreg,
        lambda *z: vicreg_loss(*z).loss,
        peer=("lightly", lightly),
        products=view_products,
    ),
    "joint_embedding.sigmoid_contrastive_loss": Case(
        ((64, 128), (256, 128), (4096, 512)),
        pairs,
        plain_sigmoid,
        our_sigmoid,
        rows=16_384,
        size_of=lambda rows: (rows, 512),
    ),
    "joint_embedding.koleo_loss": Case(
        ((64, 128), (256, 128), (4096, 512)),
        one_view,
        plain_koleo,
        lambda z: koleo_loss(z).loss,
        rows=8192,
        size_of=lambda rows: (rows, 512),
        peer=("lightly", lightly_koleo),
    ),
    "joint_embedding.gram_anchor_loss": Case(
        ((1, 64, 128), (4, 196, 384), (8, 784, 384)),
        two_models,
        plain_gram,
        lambda *x: gram_anchor_loss(*x).loss,
        rows=128,
        size_of=lambda rows: (rows, 512, 512),
    ),
    "joint_embedding.sigreg_loss": Case(
        ((64, 128, 64), (256, 128, 256), (1024, 512, 1024)),
        along_slices,
        plain_sigreg,
        lambda z, a: sigreg_loss(z, slices=a).loss,
        rows=2048,
        size_of=lambda rows: (rows, 512, 1024),
        products=projections,
    ),
    "joint_embedding.lejepa_loss": Case(
        ((64, 128, 64), (256, 128, 256), (512, 512, 1024)),
        views_along_slices,
        plain_lejepa,
        lambda z, a: lejepa_loss(z, slices=a).loss,
        rows=1024,
        size_of=lambda rows: (rows, 512, 1024),
        products=projections,
    ),
    "joint_embedding.visreg_loss": Case(
        ((64, 128, 64), (256, 128, 256), (512, 512, 4096)),
        views_along_slices,
        plain_visreg,
        lambda z, a: visreg_loss(z, slices=a).loss,
        rows=2048,
        size_of=lambda rows: (rows, 512, 4096),
        products=projections,
    ),
    "joint_embedding.dino_loss": over_prototypes(
        of_views, plain_dino, lambda *x: dino_loss(*x).loss, rows=256
    ),
    "joint_embedding.ibot_loss": over_prototypes(masked_patches, plain_ibot, our_ibot, rows=1024),
    "joint_embedding.swapped_prediction_loss": over_prototypes(
        logits_of_views,
        plain_swapped,
        lambda x: swapped_prediction_loss(x, num_global=2).loss,
        rows=256,
    ),
    "joint_embedding.multi_view_vicreg_loss": Case(
        ((64, 128), (256, 128), (1024, 1024)),
        four_views,
        plain_multi_view,
        lambda z: multi_view_vicreg_loss(z).loss,
        rows=4096,
        size_of=lambda rows: (rows, 2048),
    ),
    "joint_embedding.variance_covariance_loss": Case(
        ((64, 128), (256, 128), (2048, 2048)),
        lambda *size: two_views(*size)[:1],
        plain_variance_covariance,
        lambda z: variance_covariance_loss(z).loss,
        rows=4096,
        size_of=lambda rows: (rows, 2048),
        products=view_products,
    ),
    "joint_embedding.barlow_twins_loss": Case(
        ((64, 128), (256, 128), (256, 8192)),
        two_views,
        plain_barlow,
        lambda *z: barlow_twins_loss(*z).loss,
        rows=4096,
        size_of=lambda rows: (rows, 2048),
        peer=("lightly", lightly_barlow),
    ),
    "joint_embedding.mmcr_loss": Case(
        ((64, 128), (256, 128), (512, 256)),
        four_views,
        plain_mmcr,
        lambda z: mmcr_loss(z, local_weight=5e-3).loss,
        rows=1024,
        size_of=lambda rows: (rows, 512),
        peer=("lightly", lightly_mmcr),
    ),
    "joint_embedding.predictive_cosine_loss": Case(
        ((64, 128), (256, 128), (4096, 256)),
        prediction_and_target,
        lambda p, t: -F.cosine_similarity(p, t).mean(),
        lambda p, t: predictive_cosine_loss(p, t, form="simsiam").loss,
        rows=2**15,
        size_of=lambda rows: (rows, 1024),
        peer=("lightly", lightly_cosine),
    ),
    "joint_embedding.info_nce_loss": of_pairs(
        views_and_scale, plain_clip, our_clip, products=pair_products, rows=8192
    ),
    "joint_embedding.nt_xent_loss": of_pairs(
        two_views, plain_nt_xent, lambda *z: nt_xent_loss(*z).loss
    ),
    "joint_embedding.supervised_contrastive_loss": of_pairs(
        of_ten_classes,
        plain_supervised,
        lambda *x: supervised_contrastive_loss(*x, temperature=0.5).loss,
        rows=8192,
    ),
    "joint_embedding.decoupled_contrastive_loss": of_pairs(
        two_views,
        plain_decoupled,
        lambda *z: decoupled_contrastive_loss(*z, temperature=0.5).loss,
    ),
    "energy.denoising_score_matching_loss": of_energy(plain_denoising, our_denoising, *BATCHES),
    "energy.sliced_score_matching_loss": of_energy(plain_sliced, our_sliced, *BATCHES),
    "energy.score_matching_loss": of_energy(
        plain_score_matching, our_score_matching, (32, 16), (128, 64), (128, 784), rows=2**11
    ),
    "energy.maximum_likelihood_loss": of_energy(
        lambda x, y, *_: model(x)(x).mean() - model(x)(y).mean(),
        lambda x, y, *_: energy.maximum_likelihood_loss(model(x), x, y).loss,
    ),
    "energy.energy_square_penalty": of_energy(
        lambda x, *_: model(x)(x).square().mean(),
        lambda x, *_: energy.energy_square_penalty(model(x), x).loss,
    ),
    "energy.gradient_penalty": of_energy(
        lambda x, *_: slopes(x)[1].square().sum(1).mean(),
        lambda x, *_: energy.gradient_penalty(model(x), x).loss,
    ),
    "energy.flow_matching_loss": of_energy(plain_flow, our_flow),
    "energy.energy_matching_loss": of_energy(plain_flow, our_energy_matching),
    "energy.equilibrium_matching_loss": of_energy(plain_equilibrium, our_equilibrium),
    "energy.contrastive_divergence_loss": of_energy(plain_contrastive, our_contrastive),
    "energy.noise_contrastive_loss": of_energy(plain_noise_contrastive, our_noise_contrastive),
    "energy.ranking_noise_contrastive_loss": of_energy(plain_ranking, our_ranking),
    "energy.conditional_noise_contrastive_loss": of_energy(plain_conditional, our_conditional),
    "energy.energy_discrepancy_loss": of_energy(plain_discrepancy, our_discrepancy),
    "energy.finite_difference_score_matching_loss": of_energy(plain_differences, our_differences),
}
