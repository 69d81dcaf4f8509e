"""Kernels that each loss launches on an accelerator, counted on meta tensors of real sizes.

`python tests/bench/launches.py`; names after it choose some. Each loss runs forward and backward,
next to its plain formula, without memory or a device: every operator that is not a view is one
kernel, with the bytes it reads and writes and the floating-point operations of its matrix products.
Custom operators are run by their own bodies. `--large` takes sizes 16 times as large.
"""

import argparse
import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from termwise import energy, lm, sae
from termwise.joint_embedding import vicreg_loss

# Operators that launch nothing, besides views.
FREE = {
    "alias", "detach", "empty", "empty_like", "empty_strided", "is_same_size", "lift_fresh",
    "new_empty", "new_empty_strided", "promote_types", "_unsafe_view",
}  # fmt: skip


class Count(TorchDispatchMode):
    """Count what runs within it."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: collections.Counter[str] = collections.Counter()
        self.bytes = 0
        self.flops: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "termwise":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        found = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if func.is_view or name in FREE:
            return found
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        self.kernels[name] += 1
        self.bytes += sum(map(moved, inputs)) + sum(map(moved, outputs))
        product = getattr(torch.ops.aten, name.rstrip("_"), None)  # addmm_ is an addmm
        if (flops := flop_registry.get(product)) is not None:
            dtype = str(inputs[0].dtype).removeprefix("torch.")
            kwargs.pop("out", None)
            self.flops[dtype] += flops(*args, **kwargs, out_val=found)
        return found


def moved(x: Tensor) -> int:
    """Return the bytes of a tensor, without axes that repeat one element."""
    sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return torch.Size(sizes).numel() * x.element_size()


def counted(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Count:
    with Count() as count:
        torch.autograd.grad(loss(), leaves, allow_unused=True)
    return count


def meta(*size: int, dtype: torch.dtype = torch.float32, leaf: bool = False) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta").requires_grad_(leaf)


def leaf(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return meta(*size, dtype=dtype, leaf=True)


Built = tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss and its plain formula, for a number of rows."""

    rows: int
    """So many that the largest tensor has about 2^25 elements."""
    build: Callable[[int], Built]


D_MODEL, D_SAE, VOCAB = 1024, 32_768, 128_256
BFLOAT16 = torch.bfloat16
COEFFICIENT = 1e-3


def counts(f: Tensor) -> Tensor:
    return (f.detach() != 0).sum(1).float().mean()


def vanilla(n: int) -> Built:
    x, x_hat, f = meta(n, D_MODEL), leaf(n, D_MODEL), leaf(n, D_SAE)

    def plain() -> Tensor:
        counts(f)
        return F.mse_loss(x_hat, x) + COEFFICIENT * f.abs().sum(1).mean()

    return lambda: sae.vanilla_loss(x, f, x_hat, sparsity_coeff=COEFFICIENT).loss, plain, [f, x_hat]


def topk(n: int) -> Built:
    x, x_hat, f = meta(n, D_MODEL), leaf(n, D_MODEL), meta(n, D_SAE)

    def plain() -> Tensor:
        counts(f)
        return F.mse_loss(x_hat, x)

    return lambda: sae.topk_loss(x, f, x_hat).loss, plain, [x_hat]


def gated(n: int) -> Built:
    x, x_hat, gate, f = meta(n, D_MODEL), leaf(n, D_MODEL), leaf(n, D_SAE), meta(n, D_SAE)
    W_dec = meta(D_SAE, D_MODEL)

    def ours() -> Tensor:
        return sae.gated_loss(x, f, x_hat, gate, W_dec, sparsity_coeff=COEFFICIENT).loss

    def plain() -> Tensor:
        counts(f)
        positive = gate.relu()
        errors = F.mse_loss(x_hat, x) + F.mse_loss(positive @ W_dec, x)
        return errors + COEFFICIENT * positive.sum(1).mean()

    return ours, plain, [gate, x_hat]


class Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, threshold)
        active = (pre > threshold).float()
        return pre * active, active

    @staticmethod
    def backward(ctx: Any, of_f: Tensor, of_active: Tensor) -> tuple[Tensor, Tensor]:
        pre, threshold = ctx.saved_tensors
        kernel = ((pre - threshold).abs() < 0.25).float() / 0.5
        of_threshold = -(threshold * kernel * of_f + kernel * of_active).sum(0)
        return of_f * (pre > threshold).float(), of_threshold


def jumprelu(n: int) -> Built:
    x, pre, threshold, W_dec = meta(n, D_MODEL), leaf(n, D_SAE), leaf(D_SAE), leaf(D_SAE, D_MODEL)

    def ours() -> Tensor:
        return sae.jumprelu_loss(
            x, pre, W_dec, threshold=threshold, sparsity_coeff=COEFFICIENT, bandwidth=0.5
        ).loss

    def plain() -> Tensor:
        f, active = Jump.apply(pre, threshold)
        return F.mse_loss(f @ W_dec, x) + COEFFICIENT * active.sum(1).mean()

    return ours, plain, [pre, threshold, W_dec]


def crosscoder(n: int) -> Built:
    x, x_hat, f = meta(n, 2, D_MODEL), leaf(n, 2, D_MODEL), leaf(n, D_SAE)
    W_dec = leaf(D_SAE, 2, D_MODEL)

    def plain() -> Tensor:
        counts(f)
        errors = (x - x_hat).square().mean(2).sum(1).mean()
        return errors + COEFFICIENT * (f.abs() * W_dec.norm(dim=2).sum(1)).sum(1).mean()

    def ours() -> Tensor:
        return sae.crosscoder_loss(x, f, x_hat, W_dec, sparsity_coeff=COEFFICIENT).loss

    return ours, plain, [f, x_hat, W_dec]


PREFIXES = tuple(D_SAE >> place for place in reversed(range(8)))


def matryoshka(n: int) -> Built:
    x, f, W_dec, b_dec = meta(n, D_MODEL), leaf(n, D_SAE), leaf(D_SAE, D_MODEL), leaf(D_MODEL)

    def plain() -> Tensor:
        counts(f)
        error, x_hat, low = torch.zeros((), device="meta"), b_dec, 0
        for high in PREFIXES:
            x_hat, low = x_hat + f[:, low:high] @ W_dec[low:high], high
            error = error + F.mse_loss(x_hat, x)
        return error / len(PREFIXES) + COEFFICIENT * f.abs().sum(1).mean()

    def ours() -> Tensor:
        return sae.matryoshka_loss(
            x, f, W_dec, b_dec, prefixes=PREFIXES, sparsity_coeff=COEFFICIENT
        ).loss

    return ours, plain, [f, W_dec, b_dec]


def matryoshka_sparse(n: int) -> Built:
    k, x, W_dec = 64, meta(n, D_MODEL), leaf(D_SAE, D_MODEL)
    f = sae.SparseLatents(leaf(n, k), meta(n, k, dtype=torch.int64))

    def plain() -> Tensor:
        counts(f.values)
        error = torch.zeros((), device="meta")
        picked = W_dec[f.indices] * f.values[..., None]
        for high in PREFIXES:
            error = error + F.mse_loss((picked * (f.indices < high)[..., None]).sum(1), x)
        return error / len(PREFIXES) + COEFFICIENT * f.values.abs().sum(1).mean()

    def ours() -> Tensor:
        return sae.matryoshka_loss(
            x, f, W_dec, None, prefixes=PREFIXES, sparsity_coeff=COEFFICIENT
        ).loss

    return ours, plain, [f.values, W_dec]


def end_to_end(n: int) -> Built:
    logits, original = leaf(n, VOCAB, dtype=BFLOAT16), meta(n, VOCAB, dtype=BFLOAT16)

    def plain() -> Tensor:
        ours, theirs = (x.float().log_softmax(1) for x in (logits, original))
        return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")

    return lambda: sae.end_to_end_loss(logits, original).loss, plain, [logits]


def vicreg(n: int) -> Built:
    z1, z2 = leaf(n, 2048), leaf(n, 2048)

    def plain() -> Tensor:
        loss = 25 * F.mse_loss(z1, z2)
        for z in (z1, z2):
            centred = z - z.mean(0)
            covariance = centred.T @ centred / (n - 1)
            diagonal = covariance.diagonal()
            loss = loss + 25 * F.relu(1 - torch.sqrt(diagonal + 1e-4)).mean()
            loss = loss + (covariance.square().sum() - diagonal.square().sum()) / z.shape[1]
        return loss

    return lambda: vicreg_loss(z1, z2).loss, plain, [z1, z2]


def variance(n: int) -> Built:
    weight = leaf(n, 4096, dtype=BFLOAT16)

    def plain() -> Tensor:
        return 0.1 * (weight.float().var(1, correction=0).mean() - 1).square()

    return lambda: lm.targeted_variance_loss(weight).loss, plain, [weight]


def next_token(n: int) -> Built:
    logits, tokens = leaf(1, n + 1, VOCAB, dtype=BFLOAT16), meta(1, n + 1, dtype=torch.int64)

    def plain() -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    return lambda: lm.next_token_loss(logits, tokens).loss, plain, [logits]


HIDDEN = 2048


def linear_next_token(n: int) -> Built:
    hidden, head = leaf(1, n + 1, HIDDEN, dtype=BFLOAT16), leaf(VOCAB, HIDDEN, dtype=BFLOAT16)
    tokens = meta(1, n + 1, dtype=torch.int64)

    def plain() -> Tensor:
        logits = hidden[0, :-1] @ head.mT
        return F.cross_entropy(logits.float(), tokens[0, 1:])

    return lambda: lm.linear_next_token_loss(hidden, head, tokens).loss, plain, [hidden, head]


def linear_distillation(n: int) -> Built:
    hidden, head = leaf(1, n + 1, HIDDEN, dtype=BFLOAT16), leaf(VOCAB, HIDDEN, dtype=BFLOAT16)
    teacher = meta(1, n + 1, HIDDEN), meta(VOCAB, HIDDEN)

    def plain() -> Tensor:
        logits = [hidden[0, :-1] @ head.mT, teacher[0][0, :-1] @ teacher[1].mT]
        q, p = (x.float().log_softmax(1) for x in logits)
        return F.kl_div(q, p, log_target=True, reduction="batchmean")

    def ours() -> Tensor:
        return lm.linear_distillation_loss(hidden, head, *teacher).loss

    return ours, plain, [hidden, head]


def distillation(divergence: Any) -> Callable[[int], Built]:
    def build(n: int) -> Built:
        student, teacher = leaf(1, n + 1, VOCAB, dtype=BFLOAT16), meta(1, n + 1, VOCAB)

        def plain() -> Tensor:
            q, p = (x[0, :-1].float().log_softmax(1) for x in (student, teacher))
            if divergence == "jensen_shannon":
                middle = torch.logaddexp(q, p) - 0.6931
                parts = [F.kl_div(middle, x, log_target=True, reduction="sum") for x in (p, q)]
                return (parts[0] + parts[1]) / (2 * n)
            return F.kl_div(q, p, log_target=True, reduction="batchmean")

        def ours() -> Tensor:
            return lm.distillation_loss(student, teacher, divergence=divergence).loss

        return ours, plain, [student]

    return build


Energy = Callable[[Tensor], Tensor]
WIDTH = 784


def of_energy(ours: Callable[..., Any], plain: Callable[..., Tensor]) -> Case:
    """Build a loss of (energy, x, other rows) and its plain formula, for a small network."""

    def build(n: int) -> Built:
        with torch.device("meta"):
            layers = [nn.Linear(WIDTH, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU()]
            model = nn.Sequential(*layers, nn.Linear(256, 1), nn.Flatten(0))
        rows = meta(n, WIDTH), meta(n, WIDTH)
        leaves = list(model.parameters())
        return lambda: ours(model, *rows).loss, lambda: plain(model, *rows), leaves

    return Case(2**15, build)


def slopes(model: Energy, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]


def differences(model: Energy, x: Tensor, other: Tensor) -> Tensor:
    return model(x).mean() - model(other).mean()


def squares(model: Energy, x: Tensor, other: Tensor) -> Tensor:
    return model(x).square().mean()


def penalties(model: Energy, x: Tensor, other: Tensor) -> Tensor:
    return slopes(model, x).square().sum(1).mean()


def denoised(model: Energy, x: Tensor, other: Tensor) -> Tensor:
    noise = torch.randn_like(x)
    return (slopes(model, x + 0.1 * noise) - noise / 0.1).square().sum(1).mean() / 2


def flows(model: Energy, x: Tensor, other: Tensor) -> Tensor:
    time = torch.rand(len(x), 1, device="meta")
    return (slopes(model, x * (1 - time) + other * time) + other - x).square().sum(1).mean()


def flow_matching(model: Energy, x: Tensor, other: Tensor) -> Any:
    return energy.flow_matching_loss(model, x, other, torch.rand(len(x), device="meta"))


CASES = {
    "sae.vanilla_loss": Case(1024, vanilla),
    "sae.topk_loss": Case(1024, topk),
    "sae.gated_loss": Case(1024, gated),
    "sae.jumprelu_loss": Case(1024, jumprelu),
    "sae.crosscoder_loss": Case(1024, crosscoder),
    "sae.matryoshka_loss": Case(1024, matryoshka),
    "sae.matryoshka_loss, sparse": Case(512, matryoshka_sparse),
    "sae.end_to_end_loss": Case(256, end_to_end),
    "joint_embedding.vicreg_loss": Case(4096, vicreg),
    "lm.targeted_variance_loss": Case(8192, variance),
    "lm.next_token_loss": Case(256, next_token),
    "lm.linear_next_token_loss": Case(256, linear_next_token),
    "lm.linear_distillation_loss": Case(256, linear_distillation),
    "lm.distillation_loss": Case(256, distillation("forward")),
    "lm.distillation_loss, reverse": Case(256, distillation("reverse")),
    "lm.distillation_loss, Jensen-Shannon": Case(256, distillation("jensen_shannon")),
    "energy.maximum_likelihood_loss": of_energy(energy.maximum_likelihood_loss, differences),
    "energy.energy_square_penalty": of_energy(
        lambda e, x, _: energy.energy_square_penalty(e, x), squares
    ),
    "energy.gradient_penalty": of_energy(lambda e, x, _: energy.gradient_penalty(e, x), penalties),
    "energy.denoising_score_matching_loss": of_energy(
        lambda e, x, _: energy.denoising_score_matching_loss(e, x, sigma=0.1), denoised
    ),
    "energy.flow_matching_loss": of_energy(flow_matching, flows),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=", ".join(CASES))
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    print("| loss | rows | kernels | GiB moved | matrix products, TFLOP |\n|---|---|---|---|---|")
    for name in options.names or CASES:
        rows = CASES[name].rows * (16 if options.large else 1)
        ours, plain, leaves = CASES[name].build(rows)
        pair = [counted(loss, leaves) for loss in (ours, plain)]
        kernels = " of ".join(str(count.kernels.total()) for count in pair)
        gib = " of ".join(f"{count.bytes / 2**30:.2f}" for count in pair)
        flops = " of ".join(
            ", ".join(f"{n / 1e12:.2f} {dtype}" for dtype, n in count.flops.items()) or "0"
            for count in pair
        )
        print(f"| {name} | {rows} | {kernels} | {gib} | {flops} |", flush=True)


if __name__ == "__main__":
    main()
