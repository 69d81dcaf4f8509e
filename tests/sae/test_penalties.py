"""The penalties of single rows against their formulas in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import termwise as tw
from termwise.sae._penalties import lp_penalty, tanh_penalty
from termwise.sae._shared import SparseLatents


def latents(n, d_sae, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(n, d_sae, generator=generator, dtype=torch.float64) * 2
    norm = torch.rand(d_sae, generator=generator, dtype=torch.float64) + 0.5
    return f.to(dtype).requires_grad_(), norm.to(dtype).requires_grad_()


def tanh_oracle(f, norm, scale):
    return sum(torch.tanh(scale * f[:, j].abs() * norm[j]) for j in range(f.shape[1]))


def lp_oracle(f, norm, p):
    return sum(norm[j] * f[:, j].abs() ** p for j in range(f.shape[1]))


@given(
    n=st.integers(1, 6),
    d_sae=st.integers(1, 9),
    seed=st.integers(0, 2**30),
    number=st.floats(0.25, 4),
    weighed=st.booleans(),
    kind=st.sampled_from(["tanh", "lp"]),
)
def test_rows_and_gradients_are_the_formulas(n, d_sae, seed, number, weighed, kind):
    f, norm = latents(n, d_sae, seed=seed)
    ones = norm if weighed else torch.ones(d_sae, dtype=f.dtype)
    given_norm = norm if weighed else None
    if kind == "tanh":
        ours = tanh_penalty(f, scale=number, decoder_norm=given_norm)
        theirs = tanh_oracle(f, ones, number)
    else:
        ours = lp_penalty(f, p=number, decoder_norm=given_norm)
        theirs = lp_oracle(f, ones, number)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.arange(1.0, n + 1, dtype=f.dtype)
    leaves = (f, norm) if weighed else (f,)
    torch.testing.assert_close(
        torch.autograd.grad(ours @ weights, leaves),
        torch.autograd.grad(theirs @ weights, leaves),
        rtol=1e-10,
        atol=1e-12,
    )


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


def test_a_latent_costs_at_most_one():
    f = torch.tensor([[0.0, 1e6, -1e6, 1e-3]], dtype=torch.float64)
    assert tanh_penalty(f).item() == pytest.approx(2 + math.tanh(1e-3))
    assert lp_penalty(f, p=1).item() == pytest.approx(2e6 + 1e-3)


def test_gradcheck_to_second_order():
    f, norm = latents(3, 4)
    for penalty in (
        lambda f, norm: tanh_penalty(f, scale=0.5, decoder_norm=norm),
        lambda f, norm: lp_penalty(f, p=1.7, decoder_norm=norm),
    ):
        assert torch.autograd.gradcheck(penalty, (f, norm))
        assert torch.autograd.gradgradcheck(penalty, (f, norm))


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
