"""The penalties of single rows: slopes at 0, sparse latents, halves and refusals."""

import math

import pytest
import torch

import termwise as tw
from termwise import sae
from termwise.sae._latents import SparseLatents
from termwise.sae._penalties import lp_penalty, tanh_penalty


def latents(n, d_sae, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(n, d_sae, generator=generator, dtype=torch.float64) * 2
    norm = torch.rand(d_sae, generator=generator, dtype=torch.float64) + 0.5
    return f.to(dtype).requires_grad_(), norm.to(dtype).requires_grad_()


@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("kind", ["tanh", "lp"])
def test_sparse_latents_are_dense_ones(kind, weighed):
    dense, norm = latents(5, 12)
    indices = torch.stack([torch.randperm(12)[:4] for _ in range(5)])
    values = dense.gather(1, indices)
    whole = torch.zeros(5, 12, dtype=dense.dtype).scatter(1, indices, values)
    options = {"decoder_norm": norm if weighed else None}
    options |= {"scale": 0.7} if kind == "tanh" else {"p": 1.5}
    penalty = tanh_penalty if kind == "tanh" else lp_penalty
    ours, theirs = penalty(SparseLatents(values, indices), **options), penalty(whole, **options)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), dense, retain_graph=True),
        torch.autograd.grad(theirs.sum(), dense),
    )


def every_l1(f, norm):
    """Each loss that takes |f|, with a coefficient of 1."""
    x = torch.zeros(len(f.values if isinstance(f, SparseLatents) else f), 2, dtype=torch.float64)
    W_dec = norm[:, None] * torch.tensor([1.0, 0.0], dtype=torch.float64)
    options = {"sparsity_coeff": 1.0}
    layers, rows = x[:, None], W_dec[:, None]
    return {
        "lp": lp_penalty(f, p=1.0).mean(),
        "lp, weighed": lp_penalty(f, p=1.0, decoder_norm=norm).mean(),
        "tanh": tanh_penalty(f, scale=0.5, decoder_norm=norm).mean(),
        "vanilla": sae.vanilla_loss(x, f, x, **options).sparsity,
        "vanilla, weighed": sae.vanilla_loss(x, f, x, decoder_norm=norm, **options).sparsity,
        "matryoshka": sae.matryoshka_loss(x, f, W_dec, None, prefixes=(1, 3), **options).sparsity,
        "crosscoder": sae.crosscoder_loss(layers, f, layers, rows, **options).sparsity,
        "end to end": sae.end_to_end_loss(x, x, f=f, **options).sparsity,
    }


def slopes_at_zero(norm):
    """The derivative of each of them with respect to a latent of 0 in one of 4 rows."""
    ones = torch.ones_like(norm)
    weighed = {"lp, weighed", "vanilla, weighed", "crosscoder"}
    names = every_l1(torch.zeros(4, 5, dtype=torch.float64), norm)
    slopes = {name: norm if name in weighed else ones for name in names}
    return {name: slope / 4 for name, slope in slopes.items()} | {"tanh": 0.5 * norm / 4}


@pytest.mark.parametrize("sparse", [False, True])
def test_a_latent_of_zero_has_the_derivative_one(sparse):
    norm = latents(1, 5)[1].detach()
    zeros = torch.tensor([0.0, -0.0], dtype=torch.float64).repeat(10).view(4, 5).requires_grad_()
    f = SparseLatents(zeros, torch.arange(5).expand(4, 5)) if sparse else zeros
    for name, penalty in every_l1(f, norm).items():
        (slope,) = torch.autograd.grad(penalty, zeros, retain_graph=True)
        expected = slopes_at_zero(norm)[name].expand(4, 5)
        torch.testing.assert_close(slope, expected, msg=name)


def test_only_jumprelu_passes_it_on():
    norm = latents(1, 5)[1].detach()
    pre = (torch.rand(4, 5, dtype=torch.float64) + 0.1).requires_grad_()
    theta = torch.full((5,), 1.2, dtype=torch.float64, requires_grad=True)
    # All pre-activations are below the threshold and in the kernel, of height theta / bandwidth.
    jumped = sae.jumprelu(pre, theta, bandwidth=4.0)
    for name, penalty in every_l1(jumped, norm).items():
        (slope,) = torch.autograd.grad(penalty, theta, retain_graph=True)
        torch.testing.assert_close(slope, -4 * slopes_at_zero(norm)[name] * 1.2 / 4.0, msg=name)
    chosen = sae.topk(-pre, k=3)
    for f in ((-pre).relu(), sae.batch_topk(-pre, k=2), chosen):
        for name, penalty in every_l1(f, norm).items():
            (slope,) = torch.autograd.grad(penalty, pre, retain_graph=True)
            assert slope.count_nonzero() == 0, name


@pytest.mark.parametrize("weighed", [False, True])
def test_below_one_a_latent_of_zero_has_no_gradient(weighed):
    f, norm = latents(3, 6)
    leaf = f.detach().masked_fill(torch.arange(6) % 2 == 0, 0).requires_grad_()
    options = {"decoder_norm": norm} if weighed else {}
    # The recipe for SAELens' lp_norm: latents times norms, one of which is 0.
    scale = norm.detach() * (torch.arange(6) > 0)
    x = torch.zeros(3, 6, dtype=torch.float64)
    vanilla = sae.vanilla_loss(x, leaf * scale, x, sparsity_coeff=3.0, p=0.5, **options)
    matryoshka = sae.matryoshka_loss(
        x,
        leaf * scale,
        torch.eye(6).double(),
        None,
        prefixes=(6,),
        sparsity_coeff=3.0,
        p=0.5,
        **options,
    )
    for penalty in (
        lp_penalty(leaf * scale, p=0.5, **options).sum(),
        vanilla.sparsity,
        matryoshka.sparsity,
    ):
        (slope,) = torch.autograd.grad(penalty, leaf, retain_graph=True)
        zero = leaf * scale == 0
        assert slope[zero].count_nonzero() == 0
        size = (leaf * scale).abs()
        factor = norm if weighed else 1
        expected = (0.5 * size.pow(-0.5) * leaf.sign() * scale * factor)[~zero]
        torch.testing.assert_close(slope[~zero], expected)
    theirs = torch.linalg.vector_norm(leaf, ord=0.5, dim=1).sum()
    assert torch.autograd.grad(theirs, leaf)[0][leaf == 0].count_nonzero() == 0


def test_a_latent_costs_at_most_one():
    f = torch.tensor([[0.0, 1e6, -1e6, 1e-3]], dtype=torch.float64)
    assert tanh_penalty(f).item() == pytest.approx(2 + math.tanh(1e-3))
    assert lp_penalty(f, p=1).item() == pytest.approx(2e6 + 1e-3)


@pytest.mark.parametrize("number", [0, -1.0, math.nan])
def test_values_that_make_no_sense_are_refused(number):
    f = torch.ones(2, 3)
    with pytest.raises(ValueError, match=f"^tanh_penalty needs scale > 0, got {number}$"):
        tanh_penalty(f, scale=number)
    with pytest.raises(ValueError, match=f"^lp_penalty needs p > 0, got {number}$"):
        lp_penalty(f, p=number)
    with pytest.raises(tw.ContractError, match="tanh_penalty: decoder_norm.*d_sae is 2, but it"):
        tanh_penalty(f, decoder_norm=torch.ones(2))


@pytest.mark.parametrize("penalty", [tanh_penalty, lambda f, **n: lp_penalty(f, p=1, **n)])
def test_halves_are_lifted_and_autocast_changes_nothing(penalty):
    f, norm = (x.detach() for x in latents(4, 64, dtype=torch.bfloat16))
    ours = penalty(f, decoder_norm=norm)
    assert ours.dtype == torch.float32
    expected = penalty(f.double(), decoder_norm=norm.double())
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(penalty(f, decoder_norm=norm), ours)


def test_compiled_and_mapped():
    f, norm = (x.detach() for x in latents(4, 6))

    def both(f, norm):
        return tanh_penalty(f, scale=2.0, decoder_norm=norm) + lp_penalty(f, p=1.0)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(f, norm), both(f, norm))
    torch.testing.assert_close(
        torch.vmap(both, (0, None))(torch.stack([f, -2 * f]), norm)[1], both(-2 * f, norm)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_latents_that_are_not_0_are_counted_exactly(dtype):
    """More of them than bfloat16 can count, NaN and infinity among them, and no -0."""
    f = torch.ones(3, 1001, dtype=dtype)
    f[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    f[1, :4] = torch.tensor([0.0, -0.0, 0.0, -2.0])
    for latents in (f, f.T.contiguous().T):
        terms = sae.vanilla_loss(latents[:, :2], latents, latents[:, :2], sparsity_coeff=0.1)
        assert terms.l0.item() == pytest.approx((1001 + 998 + 1001) / 3)
    one = torch.tensor([[0.0, -0.0, 5.0, -math.inf, torch.finfo(dtype).tiny, -1e-7]], dtype=dtype)
    one.requires_grad_()
    (slope,) = torch.autograd.grad(lp_penalty(one, p=1.0).sum(), one)
    assert slope.tolist() == [[1, 1, 1, -1, 1, -1]]
