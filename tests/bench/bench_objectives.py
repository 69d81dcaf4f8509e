"""Losses over logits and latents, forward and backward, against their formulas as written.

`python tests/bench/bench_objectives.py`; names after it choose some. The baselines are a few
lines of PyTorch each, in float32; losses and gradients of both are compared.
"""

import argparse
import functools
from collections.abc import Callable

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from termwise import lm, sae

POSITIONS, VOCAB = 1024, 32_768
ROWS, D_MODEL, D_SAE, LAYERS = 1024, 512, 8192, 4
COEFFICIENT, WIDTH = 1e-3, 0.5
Loss = Callable[..., Tensor]


def next_token(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def distillation(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = (x[:, :-1].flatten(0, 1).div(2).log_softmax(1) for x in (student, teacher))
    return 4 * F.kl_div(q, p, log_target=True, reduction="batchmean")


def end_to_end(patched: Tensor, original: Tensor) -> Tensor:
    return F.kl_div(
        patched.log_softmax(1), original.log_softmax(1), log_target=True, reduction="batchmean"
    )


def gated(f_gate: Tensor, magnitude: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    gate, f = f_gate.relu(), magnitude.relu() * (f_gate > 0)
    aux = F.mse_loss(gate @ W_dec.detach(), x)
    return F.mse_loss(f @ W_dec, x) + COEFFICIENT * gate.sum(1).mean() + aux


def our_gated(f_gate: Tensor, magnitude: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    f = magnitude.relu() * (f_gate > 0)
    return sae.gated_loss(x, f, f @ W_dec, f_gate, W_dec, sparsity_coeff=COEFFICIENT).loss


class Jump(torch.autograd.Function):
    """JumpReLU and its count with the kernel's estimates, line by line."""

    @staticmethod
    def forward(ctx, pre: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, threshold)
        active = (pre > threshold).float()
        return pre * active, active

    @staticmethod
    def backward(ctx, of_f: Tensor, of_active: Tensor) -> tuple[Tensor, Tensor]:
        pre, threshold = ctx.saved_tensors
        kernel = ((pre - threshold).abs() < WIDTH / 2).float() / WIDTH
        of_threshold = -(threshold * kernel * of_f + kernel * of_active).sum(0)
        return of_f * (pre > threshold).float(), of_threshold


def jumprelu(pre: Tensor, threshold: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    f, active = Jump.apply(pre, threshold)
    return F.mse_loss(f @ W_dec, x) + COEFFICIENT * active.sum(1).mean()


def our_jumprelu(pre: Tensor, threshold: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    return sae.jumprelu_loss(
        x, pre, W_dec, threshold=threshold, sparsity_coeff=COEFFICIENT, bandwidth=WIDTH
    ).loss


def crosscoder(f: Tensor, x_hat: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    errors = (x - x_hat).square().mean(2).sum(1).mean()
    return errors + COEFFICIENT * (f.abs() * W_dec.norm(dim=2).sum(1)).sum(1).mean()


def our_crosscoder(f: Tensor, x_hat: Tensor, W_dec: Tensor, x: Tensor) -> Tensor:
    return sae.crosscoder_loss(x, f, x_hat, W_dec, sparsity_coeff=COEFFICIENT).loss


def normal(*size: int) -> Tensor:
    return torch.randn(*size)


def logits(scale: int) -> list[Tensor]:
    return [normal(4, POSITIONS // 4 // scale, VOCAB).requires_grad_()]


def with_tokens(scale: int) -> list[Tensor]:
    return [*logits(scale), torch.randint(VOCAB, (4, POSITIONS // 4 // scale))]


def with_teacher(scale: int) -> list[Tensor]:
    return [*logits(scale), normal(4, POSITIONS // 4 // scale, VOCAB)]


def of_two_runs(scale: int) -> list[Tensor]:
    return [normal(POSITIONS // scale, VOCAB).requires_grad_(), normal(POSITIONS // scale, VOCAB)]


def latents(scale: int) -> list[Tensor]:
    pre = normal(ROWS // scale, D_SAE).requires_grad_()
    return [pre, normal(D_SAE, D_MODEL).div(100).requires_grad_(), normal(len(pre), D_MODEL)]


def with_magnitude(scale: int) -> list[Tensor]:
    pre, W_dec, x = latents(scale)
    return [pre, normal(*pre.shape).requires_grad_(), W_dec, x]


def with_threshold(scale: int) -> list[Tensor]:
    pre, W_dec, x = latents(scale)
    return [pre, torch.full((D_SAE,), 0.5, requires_grad=True), W_dec, x]


def of_layers(scale: int) -> list[Tensor]:
    rows = ROWS // scale
    x_hat, W_dec = normal(rows, LAYERS, D_MODEL), normal(D_SAE, LAYERS, D_MODEL)
    leaves = [normal(rows, D_SAE), x_hat, W_dec]
    return [*(leaf.requires_grad_() for leaf in leaves), normal(rows, LAYERS, D_MODEL)]


CASES: dict[str, tuple[Loss, Loss, Callable[[int], list[Tensor]]]] = {
    "next_token": (next_token, lambda *x: lm.next_token_loss(*x).loss, with_tokens),
    "distillation": (
        distillation,
        lambda *x: lm.distillation_loss(*x, temperature=2.0).loss,
        with_teacher,
    ),
    "end_to_end": (end_to_end, lambda *x: sae.end_to_end_loss(*x).loss, of_two_runs),
    "gated": (gated, our_gated, with_magnitude),
    "jumprelu": (jumprelu, our_jumprelu, with_threshold),
    "crosscoder": (crosscoder, our_crosscoder, of_layers),
}


def step(loss: Loss, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    value = loss(*tensors)
    return value.detach(), *torch.autograd.grad(value, [x for x in tensors if x.requires_grad])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=", ".join(CASES))
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.peak:
        *losses, inputs = CASES[options.peak[0]]
        loss, little, tensors = losses[int(options.peak[1])], inputs(64), inputs(1)
        print(measure.peak_growth(lambda: step(loss, little), lambda: step(loss, tensors)))
        return

    print(
        f"torch {torch.__version__}, one thread, float32, forward and backward; {POSITIONS} "
        f"positions of {VOCAB} logits, {ROWS} rows of {D_SAE} latents, d_model {D_MODEL}, "
        f"{LAYERS} layers"
    )
    for name in options.names or CASES:
        written, ours, inputs = CASES[name]
        tensors = inputs(1)
        for one, other in zip(step(written, tensors), step(ours, tensors), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)
        steps = {"written": functools.partial(step, written, tensors)}
        seconds = measure.seconds(steps | {"ours": functools.partial(step, ours, tensors)}, 5)
        large, small = (
            measure.peak_in_fresh_processes(__file__, name, which, times=3) / 2**20
            for which in (0, 1)
        )
        gradients = sum(x.nbytes for x in tensors if x.requires_grad) / 2**20
        print(
            f"{name:12} {seconds['ours']:.3f} s of {seconds['written']:.3f} s: "
            f"{seconds['ours'] / seconds['written']:.2f}; peak {small:.0f} MiB of {large:.0f} MiB: "
            f"{small / large:.2f}; the gradients alone {gradients:.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
