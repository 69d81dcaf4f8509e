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
    gram_anchor_loss,
    koleo_loss,
    sigmoid_contrastive_loss,
    vicreg_loss,
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


def view_products(*views: Tensor) -> None:
    for z in views:
        z = z.detach()
        if z.shape[1] > z.shape[0]:
            (z @ z.mT) @ z
        else:
            z @ (z.mT @ z)


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
}
