"""What the benches measure of each loss, beside its declaration: inputs, plain formula, sizes.

The plain formula is the fastest that a few lines of PyTorch give, without the counts that a loss
returns beside it. Here is what several losses share.
"""

import dataclasses
import functools
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from termwise import lm

Loss = Callable[..., Tensor]
COEFFICIENT, SIGMA = 1e-3, 0.1


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss. Inputs that require a gradient get one."""

    sizes: tuple[tuple[int, ...], ...]
    """Small, middle and large on a CPU; none: it is not timed."""
    inputs: Callable[..., list[Tensor]]
    plain: Loss
    ours: Loss | None = None
    """The loss itself, where it takes the inputs as they are."""
    rows: int | None = None
    """So many on an accelerator that the largest tensor has about 2^25 elements."""
    size_of: Callable[[int], tuple[int, ...]] = lambda rows: (rows, 32_768, 1024)
    """The size of so many rows."""
    peer: tuple[str, Callable[[], Loss]] | None = None
    products: Callable[..., object] | None = None
    dtype: torch.dtype = torch.float32
    compiled: bool = True
    ties: bool = False
    """Whether it sorts, so that at nearly equal values its gradient is that of either order."""


def normal(*size: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*size) * scale


def positive(*size: int) -> Tensor:
    """Half of them near 0, but not 0, where |f| has no derivative and ours is that from above."""
    return torch.randn(*size).relu() + 1e-3


def plain_next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


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


def hidden_and_head(batch: int, time: int, vocab: int) -> list[Tensor]:
    hidden = normal(batch, time, 256).requires_grad_()
    return [hidden, normal(vocab, 256, scale=0.06).requires_grad_()]


def head_products(hidden: Tensor, weight: Tensor, *teacher: Tensor) -> None:
    logits = hidden.detach() @ weight.detach().mT
    logits @ weight.detach()
    logits.flatten(0, 1).mT @ hidden.detach().flatten(0, 1)
    if len(teacher) == 2:
        teacher[0] @ teacher[1].mT


def chunked(time: int, vocab: int, hidden: int = 0) -> list[Tensor]:
    """Logits of two models, chunks of two tokens, and a projection with two entries a token."""
    student = normal(1, time, hidden or vocab).requires_grad_()
    ids = (torch.arange(time) // 2)[None]
    entries = torch.arange(2 * vocab) // 2
    pointers = 2 * torch.arange(vocab + 1)
    projection = [pointers, entries, torch.full((2 * vocab,), 0.5)]
    return [student, normal(1, time, vocab), ids, ids[:, ::2] >= 0, *projection]


def alignment_of(ids: Tensor, valid: Tensor) -> lm.Alignment:
    return lm.Alignment(ids, ids, valid, valid)


def projection_of(pointers: Tensor, entries: Tensor, weights: Tensor) -> lm.VocabProjection:
    vocab = len(pointers) - 1
    one_way = pointers, entries, weights
    return lm.VocabProjection(vocab, vocab, *one_way, *one_way)


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


def x_f_x_hat(rows: int, d_sae: int, d_model: int) -> list[Tensor]:
    f = positive(rows, d_sae).requires_grad_()
    return [normal(rows, d_model), f, normal(rows, d_model).requires_grad_()]


def two_encoders(rows: int, d_sae: int, d_model: int) -> list[Tensor]:
    pre, magnitude = (normal(rows, d_sae).requires_grad_() for _ in range(2))
    W_dec = normal(d_sae, d_model, scale=d_sae**-0.5).requires_grad_()
    return [pre, magnitude, W_dec, normal(rows, d_model)]


def decoder_products(pre: Tensor, _: Tensor, W_dec: Tensor, x: Tensor) -> None:
    pre.detach() @ W_dec.detach()
    x @ W_dec.detach().mT
    pre.detach().mT @ x


def two_embeddings(batch: int, dim: int) -> list[Tensor]:
    return [normal(batch, dim).requires_grad_() for _ in range(2)]


def pairs(batch: int, dim: int) -> list[Tensor]:
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    return [*two_embeddings(batch, dim), scale.requires_grad_(), bias.requires_grad_()]


def lightly() -> Loss:
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
    import_torchvision()
    from lightly.loss import VICRegLoss

    return VICRegLoss(mu_param=50.0, eps=1e-4)


def four_views(batch: int, dim: int) -> list[Tensor]:
    return [normal(4, batch, dim).requires_grad_()]


def view_products(*views: Tensor) -> None:
    for z in views:
        z = z.detach()
        if z.shape[1] > z.shape[0]:
            (z @ z.mT) @ z
        else:
            z @ (z.mT @ z)


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


def projections(z: Tensor, a: Tensor) -> None:
    z = z.detach()
    (z @ a) @ a.mT


def between_views(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of all views but with themselves, where they are, and the other view's."""
    z = F.normalize(torch.cat((z1, z2)), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    logits = (z @ z.mT / temperature).masked_fill(itself, -torch.inf)
    return logits, itself, torch.arange(len(z), device=z.device).roll(len(z1))


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


def plain_flow(x: Tensor, other: Tensor, *_: Tensor) -> Tensor:
    time = torch.rand(len(x), 1, device=x.device)
    _, score = slopes(x * (1 - time) + other * time)
    return (score + other - x).square().sum(1).mean()


def log_density(x: Tensor) -> Tensor:
    return -x.square().sum(-1)


def over_vocab(rows: int) -> tuple[int, ...]:
    return 1, rows + 1, 128_256


def over_batches(plain: Loss, ours: Loss, *sizes: tuple[int, int], rows: int = 2**15) -> Case:
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


LOGIT_SIZES = (2, 16, 100), (4, 64, 1000), (1, 65, 32_000)
HEADS = (1, 17, 1000), (2, 64, 8000), (2, 256, 32_000)
LATENTS = (64, 256, 64), (256, 2048, 512), (1024, 8192, 512)
BATCHES = (32, 64), (256, 128), (128, 784)
CHUNKED = (16, 1000), (64, 8000), (512, 32_768)
over_head = functools.partial(Case, HEADS, size_of=over_vocab, rows=256, products=head_products)
over_latents = functools.partial(Case, LATENTS, rows=1024)
over_chunks = functools.partial(
    Case, CHUNKED, chunked, rows=1024, size_of=lambda rows: (rows, 32_768)
)
# 2^26 logits of 4096 rows, of two views each.
of_pairs = functools.partial(
    Case, ((64, 128), (256, 128), (2048, 256)), rows=4096, size_of=lambda rows: (rows, 256)
)
