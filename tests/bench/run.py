"""Losses beside the best plain formula and the peer: small, middle, large, eager, compiled.

`python tests/bench/run.py --out docs/pages/numbers.md` measures all and writes the table between
the page's markers; names choose some, `--device cuda` another device (no GPU has run it yet). The
plain formula is the fastest that a few lines of PyTorch give. The floor is one pass that reads each
input and writes each gradient, with the matrix products that cannot be left out.
"""

import argparse
import dataclasses
import functools
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from termwise import energy, lm, sae
from termwise.joint_embedding import vicreg_loss

Loss = Callable[..., Tensor]
COEFFICIENT, BANDWIDTH, SIGMA, PREFIXES = 1e-3, 0.5, 0.1, 4
BEGIN, END = "<!-- measured by tests/bench/run.py -->", "<!-- end of what run.py measured -->"


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss in three sizes. Inputs that require a gradient get one."""

    sizes: tuple[tuple[int, ...], ...]
    inputs: Callable[..., list[Tensor]]
    plain: Loss
    ours: Loss
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


def trl_at(beta: float) -> Callable[[], Loss]:
    def load() -> Loss:
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
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


def lightly() -> Loss:
    os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # one built for CUDA beside a torch for CPU: none of it is called
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}", "(Tensor d, Tensor s, float iou) -> Tensor"
            )
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
def model(dim: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(dim, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1)]
    return nn.Sequential(*layers, nn.Flatten(0))


def data_and_parameters(batch: int, dim: int) -> list[Tensor]:
    return [normal(batch, dim), normal(batch, dim), *model(dim).parameters()]


def plain_denoising(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    point = (x + SIGMA * noise).requires_grad_()
    energies = model(x.shape[1])(point).sum()
    (score,) = torch.autograd.grad(energies, point, create_graph=True)
    return 0.5 * (score - noise / SIGMA).square().sum(1).mean()


def our_denoising(x: Tensor, noise: Tensor, *_: Tensor) -> Tensor:
    return energy.denoising_score_matching_loss(model(x.shape[1]), x, sigma=SIGMA, noise=noise).loss


def plain_sliced(x: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    point = x.detach().requires_grad_()
    (score,) = torch.autograd.grad(model(x.shape[1])(point).sum(), point, create_graph=True)
    (product,) = torch.autograd.grad((score * v).sum(), point, create_graph=True)
    return (0.5 * score.square().sum(1) - (product * v).sum(1)).mean()


def our_sliced(x: Tensor, v: Tensor, *_: Tensor) -> Tensor:
    return energy.sliced_score_matching_loss(model(x.shape[1]), x, projections=v[None]).loss


def plain_score_matching(x: Tensor, _: Tensor, *__: Tensor) -> Tensor:
    point = x.detach().requires_grad_()
    (score,) = torch.autograd.grad(model(x.shape[1])(point).sum(), point, create_graph=True)
    directions = torch.eye(x.shape[1])[:, None].expand(-1, *x.shape)
    (rows,) = torch.autograd.grad(
        score, point, directions, create_graph=True, is_grads_batched=True
    )
    return 0.5 * score.square().sum(1).mean() - rows.diagonal(dim1=0, dim2=2).sum(1).mean()


def our_score_matching(x: Tensor, _: Tensor, *__: Tensor) -> Tensor:
    return energy.score_matching_loss(model(x.shape[1]), x).loss


LOGITS = (2, 16, 100), (4, 64, 1000), (1, 65, 32_000)
HEADS = (1, 17, 1000), (2, 64, 8000), (2, 256, 32_000)
LATENTS = (64, 256, 64), (256, 2048, 512), (1024, 8192, 512)
CASES = {
    "next_token": Case(
        LOGITS, logits_and_tokens, plain_next_token, lambda *x: lm.next_token_loss(*x).loss
    ),
    "next_token, bfloat16": Case(
        ((2, 16, 100), (4, 64, 1000), (1, 49, 151_936)),
        logits_and_tokens,
        plain_next_token,
        lambda *x: lm.next_token_loss(*x).loss,
        dtype=torch.bfloat16,
    ),
    "distillation, forward KL": Case(
        LOGITS,
        two_logits,
        plain_forward_kl,
        lambda *x: lm.distillation_loss(*x).loss,
        ("TRL", trl_at(0.0)),
    ),
    "distillation, Jensen-Shannon": Case(
        LOGITS,
        two_logits,
        plain_jensen_shannon,
        lambda *x: lm.distillation_loss(*x, divergence="jensen_shannon").loss,
        ("TRL", trl_at(0.5)),
    ),
    "end_to_end": Case(
        ((32, 100), (256, 1000), (64, 32_000)),
        patched_and_original,
        plain_end_to_end,
        lambda *x: sae.end_to_end_loss(*x).loss,
    ),
    "linear_next_token": Case(
        HEADS,
        hidden_and_tokens,
        plain_linear_next_token,
        lambda *x: lm.linear_next_token_loss(*x).loss,
        products=head_products,
    ),
    "linear_distillation, forward KL": Case(
        HEADS,
        two_hidden,
        plain_linear_kl,
        lambda *x: lm.linear_distillation_loss(*x).loss,
        products=head_products,
    ),
    "targeted_variance": Case(
        ((256, 64), (4096, 512), (50_000, 1024)), embeddings, plain_variance, our_variance
    ),
    "vanilla": Case(LATENTS, x_f_x_hat, plain_vanilla, our_vanilla),
    "gated": Case(LATENTS, two_encoders, plain_gated, our_gated, products=gated_products),
    "jumprelu": Case(
        LATENTS, with_threshold, plain_jumprelu, our_jumprelu, products=decoder_products
    ),
    "crosscoder": Case(LATENTS, of_layers, plain_crosscoder, our_crosscoder),
    "matryoshka": Case(
        LATENTS,
        with_prefixes,
        plain_matryoshka,
        our_matryoshka,
        products=lambda f, W_dec, x: decoder_products(f, f, W_dec, x),
    ),
    "vicreg": Case(
        ((32, 64), (256, 128), (2048, 2048)),
        two_views,
        plain_vicreg,
        lambda *z: vicreg_loss(*z).loss,
        ("lightly", lightly),
        view_products,
    ),
    "vicreg, wide": Case(
        ((32, 256), (64, 1024), (256, 8192)),
        two_views,
        plain_vicreg,
        lambda *z: vicreg_loss(*z).loss,
        ("lightly", lightly),
        view_products,
    ),
    "denoising_score_matching": Case(
        ((32, 64), (256, 128), (128, 784)),
        data_and_parameters,
        plain_denoising,
        our_denoising,
        compiled=False,
    ),
    "sliced_score_matching": Case(
        ((32, 64), (256, 128), (128, 784)),
        data_and_parameters,
        plain_sliced,
        our_sliced,
        compiled=False,
    ),
    "score_matching": Case(
        ((32, 16), (128, 64), (128, 784)),
        data_and_parameters,
        plain_score_matching,
        our_score_matching,
        compiled=False,
    ),
}


def step(loss: Loss, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    value = loss(*tensors)
    leaves = [x for x in tensors if x.requires_grad]
    return value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True)


def floor(case: Case, tensors: list[Tensor]) -> None:
    for x in tensors:
        x.detach().sum()
        if x.requires_grad:
            torch.empty_like(x).fill_(1)
    if case.products is not None:
        case.products(*tensors)


def made(case: Case, size: tuple[int, ...], device: str) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = []
    for x in case.inputs(*size):
        if isinstance(x, nn.Parameter):  # of the model, which is there once
            tensors.append(x)
        else:
            moved = x.detach().to(device, case.dtype if x.is_floating_point() else None)
            tensors.append(moved.requires_grad_(x.requires_grad))
    return tensors


def seconds(functions: dict[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """Time functions in turn, for a budget of seconds each and at least three times."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    rounds = 3.0
    while len(next(iter(taken.values()))) < rounds:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            taken[name].append(time.perf_counter() - start)
        if len(next(iter(taken.values()))) == 3:
            longest = max(statistics.median(times) for times in taken.values())
            rounds = max(3.0, min(200.0, budget / longest))
    return {name: statistics.median(times) for name, times in taken.items()}


def peak(case: Case, which: str, size: tuple[int, ...], device: str) -> int:
    loss = getattr(case, which)
    # An eighth of the rows warms up: the smallest size may take another path, and load less.
    rows = max(range(2), key=lambda axis: size[axis] if len(size) == 3 else -axis)
    eighth = [-(-n // 8) if axis == rows else n for axis, n in enumerate(size)]
    little, tensors = made(case, tuple(eighth), device), made(case, size, device)
    if device != "cpu":
        step(loss, little)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(loss, tensors)
        return torch.cuda.max_memory_allocated() - before
    return measure.peak_growth(lambda: step(loss, little), lambda: step(loss, tensors))


def compared(case: Case, tensors: list[Tensor], peer: Loss | None) -> dict[str, Loss]:
    """Return what is timed, once values and gradients were seen to agree."""
    losses = {"plain": case.plain, "ours": case.ours} | ({"peer": peer} if peer else {})
    expected = step(case.plain, tensors)
    for name, loss in losses.items():
        for one, other in zip(expected, step(loss, tensors), strict=True):
            if one is None or other is None:
                continue
            scale = float(one.abs().max()) + 1e-12
            rough = case.dtype == torch.bfloat16
            torch.testing.assert_close(
                other.double() / scale,
                one.double() / scale,
                rtol=0,
                atol=0.02 if rough else 1e-3,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    return losses


def rows_of(name: str, case: Case, options: argparse.Namespace) -> Iterator[str]:
    peer = None
    if case.peer is not None:
        try:
            peer = case.peer[1]()
        except ImportError:
            print(f"{case.peer[0]} is not installed: no column of it", flush=True)
    for index, size in enumerate(case.sizes[: options.sizes]):
        tensors = made(case, size, options.device)
        losses = compared(case, tensors, peer)
        steps: dict[str, Callable[[], object]] = {
            label: functools.partial(step, loss, tensors) for label, loss in losses.items()
        }
        steps["floor"] = functools.partial(floor, case, tensors)
        eager = seconds(steps, options.budget)
        ours = eager["ours"]
        cells = [f"{1e3 * ours:.3g} ms", f"{ours / eager['plain']:.2f}"]
        cells += [f"{ours / eager['peer']:.2f} ({case.peer[0]})" if peer and case.peer else ""]
        cells += [f"{ours / eager['floor']:.1f}"]
        if case.compiled and not options.eager:
            torch.compiler.reset()
            compiled = {
                label: torch.compile(losses[label], fullgraph=True, dynamic=False)
                for label in ("plain", "ours")
            }
            steps = {k: functools.partial(step, loss, tensors) for k, loss in compiled.items()}
            for run in steps.values():
                run()
            taken = seconds(steps, options.budget)
            cells += [f"{taken['ours'] / taken['plain']:.2f}"]
        else:
            cells += [""]
        if index and not options.no_memory:
            of_plain, of_ours = (
                measure.peak_in_fresh_processes(
                    __file__, name, which, index, options.device, times=3
                )
                for which in ("plain", "ours")
            )
            cells += [f"{of_ours / 2**20:.3g} MiB", f"{of_ours / max(of_plain, 1):.2f}"]
        else:
            cells += ["", ""]
        row = f"| {name} | {' x '.join(map(str, size))} | {' | '.join(cells)} |"
        print(row, flush=True)
        yield row


def machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"one thread of {found[1] if found else 'this processor'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--out", type=Path, help="page to write the table into, at its markers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=int, default=3, help="1: small, 2: middle too, 3: all")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each function")
    parser.add_argument("--eager", action="store_true", help="nothing compiled")
    parser.add_argument("--no-memory", action="store_true", help="no processes for peaks")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        name, which, index, device = options.peak
        case = CASES[name]
        print(peak(case, which, case.sizes[int(index)], device))
        return
    unknown = [name for name in options.names if name not in CASES]
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    head = (
        f"PyTorch {torch.__version__}, {machine(options.device)}; forward and backward, medians of "
        "alternating runs.\n\n"
        "| loss | size | eager | of plain | of the peer | of the floor | compiled, of plain "
        "compiled | peak | of plain |\n|---|---|---|---|---|---|---|---|---|"
    )
    print(head)
    rows = [row for name in options.names or CASES for row in rows_of(name, CASES[name], options)]
    if options.out:
        page = options.out.read_text()
        before, rest = page.split(BEGIN)
        table = "\n".join([BEGIN, "", head, *rows, "", END])
        options.out.write_text(before + table + rest.split(END)[1])


if __name__ == "__main__":
    main()
