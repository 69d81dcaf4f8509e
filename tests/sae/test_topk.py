"""TopK, BatchTopK and AuxK against their definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import termwise as tw
from termwise.sae import (
    TopK,
    TopKObjective,
    auxiliary_k_loss,
    batch_topk,
    topk,
    topk_loss,
    vanilla_loss,
)


def draw(n, d, m, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return randn(n, d), randn(n, d), randn(n, m), randn(m, d)


# --- selection ------------------------------------------------------------------------------


@given(
    n=st.integers(0, 7),
    m=st.integers(1, 7),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    masked=st.booleans(),
    ties=st.booleans(),
)
def test_batch_topk_keeps_exactly_k_for_each_row(n, m, data, dtype, masked, ties):
    k = data.draw(st.integers(1, m))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))
    if ties:
        pre = torch.randint(-2, 4, (n, m), generator=generator).to(dtype)
    else:
        pre = torch.randn(n, m, generator=generator).to(dtype)
    mask = torch.rand(n, generator=generator) < 0.6 if masked else None
    rows = pre if mask is None else pre[mask]
    # By sorting: equals keep their order, so the first of them is kept.
    flat = rows.relu().flatten()
    kept = torch.sort(flat, descending=True, stable=True).indices[: k * len(rows)]
    expected = torch.zeros_like(flat).scatter(0, kept, flat[kept]).view(rows.shape)
    out = batch_topk(pre, k=k, mask=mask)
    assert torch.equal(out if mask is None else out[mask], expected)
    assert mask is None or not out[~mask].any()


def test_batch_topk_passes_gradients_to_what_it_keeps():
    pre = torch.tensor([[3.0, 4.0], [1.0, 2.0]], requires_grad=True)
    batch_topk(pre, k=1).square().sum().backward()
    assert pre.grad.tolist() == [[6, 8], [0, 0]]


def test_topk_keeps_the_largest_positive_ones():
    pre = torch.tensor([[3.0, -1.0, 5.0], [-1.0, -2.0, 4.0]], requires_grad=True)
    kept = topk(pre, k=2)
    assert kept.values.tolist() == [[5, 3], [4, 0]]
    kept.values.sum().backward()
    assert pre.grad.tolist() == [[1, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize("select", [topk, batch_topk])
@pytest.mark.parametrize("k", [0, 4])
def test_k_is_within_the_latents(select, k):
    with pytest.raises(ValueError, match=rf"^{select.__name__} needs k from 1 to 3, got {k}$"):
        select(torch.zeros(2, 3), k=k)


def test_batch_topk_compiles_whole():
    pre = torch.randn(6, 9)
    mask = torch.arange(6) != 3
    compiled = torch.compile(batch_topk, fullgraph=True, backend="aot_eager")
    for options in ({}, {"mask": mask}):
        assert torch.equal(compiled(pre, k=2, **options), batch_topk(pre, k=2, **options))


# --- the objective --------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_terms(masked):
    x, x_hat, pre, _ = draw(5, 3, 8)
    mask = torch.arange(5) != 1 if masked else None
    dead = torch.arange(8) < 3
    aux = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    f = topk(pre, k=3)
    terms = topk_loss(x, f, x_hat, aux=aux, aux_coeff=0.25, dead=dead, mask=mask)
    rest = vanilla_loss(x, f, x_hat, sparsity_coeff=0.0, mask=mask)
    torch.testing.assert_close(terms.mse, rest.mse)
    torch.testing.assert_close(terms.l0, rest.l0)
    torch.testing.assert_close(terms.loss, rest.mse + 0.25 * aux)
    assert terms.n_dead.item() == 3
    assert torch.autograd.grad(terms.loss, aux, retain_graph=True)[0].item() == 0.25
    torch.testing.assert_close(
        torch.autograd.grad(terms.loss, x_hat), torch.autograd.grad(rest.mse, x_hat)
    )
    dense = torch.zeros(5, 8, dtype=torch.float64).scatter(1, f.indices, f.values)
    again = topk_loss(x, dense, x_hat, aux=aux, aux_coeff=0.25, dead=dead, mask=mask)
    assert again.metrics() == terms.metrics()


def test_without_aux():
    x, x_hat, pre, _ = draw(5, 3, 8)
    terms = topk_loss(x, pre, x_hat)
    assert terms.aux.item() == 0
    assert terms.n_dead.isnan()  # not 0: nobody counted
    assert terms.loss.item() == terms.mse.item()
    other = x.detach() + 1
    assert topk_loss(x, pre, x_hat, target=other).mse == topk_loss(other, pre, x_hat).mse


def test_the_module_is_the_function():
    x, x_hat, pre, _ = draw(5, 3, 8)
    aux = torch.tensor(2.0, dtype=torch.float64)
    objective = TopKObjective(TopK(aux_coeff=0.5, feature_reduction="sum"))
    named = {"aux": aux, "dead": torch.arange(8) < 3}
    expected = topk_loss(x, pre, x_hat, aux_coeff=0.5, feature_reduction="sum", **named)
    assert objective(x, pre, x_hat, **named).metrics() == expected.metrics()
    for call in (objective, topk_loss):
        with pytest.raises(ValueError, match="^topk_loss needs dead where aux is given, got None"):
            call(x, pre, x_hat, aux=aux)
    assert "aux_coeff=0.5" in repr(objective)


# --- AuxK -----------------------------------------------------------------------------------


def aux_oracle(x, x_hat, pre, W_dec, dead, k_aux, *, normalize=True, rows=None):
    rows = range(len(x)) if rows is None else rows
    left = (x - x_hat).detach()
    columns = [j for j in range(len(dead)) if dead[j]]
    mean = sum(left[i] for i in rows) / len(rows)
    error = spread = 0
    for i in rows:
        chosen = sorted(columns, key=lambda j: -pre[i, j].item())[:k_aux]
        explained = sum((pre[i, j].clamp(min=0) * W_dec[j] for j in chosen), torch.zeros(1))
        error = error + ((left[i] - explained) ** 2).sum()
        spread = spread + ((left[i] - mean) ** 2).sum()
    return error / spread if normalize else error / len(rows) / x.shape[1]


@given(
    n=st.integers(2, 6),
    d=st.integers(1, 4),
    m=st.integers(1, 8),
    k_aux=st.integers(1, 9),
    seed=st.integers(0, 2**30),
    normalize=st.booleans(),
    masked=st.booleans(),
)
def test_aux_k_is_its_definition(n, d, m, k_aux, seed, normalize, masked):
    x, x_hat, pre, W_dec = draw(n, d, m, seed)
    dead = torch.arange(m) % 2 == 0
    rows = [i for i in range(n) if i != 2] if masked else None
    mask = torch.arange(n) != 2 if masked else None
    ours = auxiliary_k_loss(
        x, x_hat, pre, W_dec, dead=dead, k_aux=k_aux, normalize=normalize, mask=mask
    )
    theirs = aux_oracle(x, x_hat, pre, W_dec, dead, k_aux, normalize=normalize, rows=rows)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (pre, W_dec)),
        torch.autograd.grad(theirs, (pre, W_dec)),
        rtol=1e-9,
        atol=1e-12,
    )


def test_aux_k_leaves_the_reconstruction_alone():
    x, x_hat, pre, W_dec = draw(5, 3, 8)
    aux = auxiliary_k_loss(x, x_hat, pre, W_dec, dead=torch.ones(8) > 0, k_aux=2)
    assert torch.autograd.grad(aux, (x, x_hat), allow_unused=True) == (None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "what", ["no residual", "constant residual", "one row", "no dead", "nothing counts but one"]
)
def test_aux_k_is_zero_with_finite_gradients_where_nothing_is_to_explain(what, dtype):
    x, x_hat, pre, W_dec = (t.detach().to(dtype) for t in draw(40, 3, 8))
    dead, mask = torch.arange(8) < 4, None
    if what == "no residual":
        x_hat = x
    elif what == "constant residual":
        x_hat = x.round() + 0.1
        x = x.round()
    elif what == "one row":
        x, x_hat, pre = x[:1], x_hat[:1], pre[:1]
    elif what == "no dead":
        dead = torch.zeros(8, dtype=torch.bool)
    else:
        mask = torch.arange(40) == 7
    pre, W_dec = pre.requires_grad_(), W_dec.requires_grad_()
    for normalize in (True, False):
        aux = auxiliary_k_loss(
            x, x_hat, pre, W_dec, dead=dead, k_aux=3, normalize=normalize, mask=mask
        )
        if normalize or what == "no dead":
            assert aux.item() == 0
        for gradient in torch.autograd.grad(aux, (pre, W_dec)):
            assert gradient.isfinite().all()


def test_aux_k_does_not_hide_a_nan():
    x, x_hat, pre, W_dec = (t.detach() for t in draw(5, 3, 8))
    x[2, 1] = math.nan
    assert auxiliary_k_loss(x, x_hat, pre, W_dec, dead=torch.ones(8) > 0, k_aux=2).isnan()


def test_aux_k_masked_rows_may_hold_anything():
    x, x_hat, pre, W_dec = (t.detach() for t in draw(5, 3, 8))
    for t in (x, x_hat, pre):
        t[2] = math.nan
    pre, W_dec = pre.requires_grad_(), W_dec.requires_grad_()
    mask = torch.arange(5) != 2
    aux = auxiliary_k_loss(x, x_hat, pre, W_dec, dead=torch.ones(8) > 0, k_aux=2, mask=mask)
    assert aux.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(aux, (pre, W_dec)))


def test_aux_k_refusals():
    x, x_hat, pre, W_dec = draw(5, 3, 8)
    with pytest.raises(ValueError, match="^auxiliary_k_loss needs k_aux >= 1, got 0$"):
        auxiliary_k_loss(x, x_hat, pre, W_dec, dead=torch.ones(8) > 0, k_aux=0)
    with pytest.raises(tw.ContractError, match="dead needs .* axis d_sae is 7, but it is 8 in pre"):
        auxiliary_k_loss(x, x_hat, pre, W_dec, dead=torch.ones(7) > 0, k_aux=1)


def test_aux_k_compiles_whole():
    x, x_hat, pre, W_dec = draw(5, 3, 8)
    options = {"dead": torch.arange(8) < 4, "k_aux": 2, "mask": torch.arange(5) != 2}
    compiled = torch.compile(auxiliary_k_loss, fullgraph=True, backend="aot_eager")
    ours = compiled(x, x_hat, pre, W_dec, **options)
    theirs = auxiliary_k_loss(x, x_hat, pre, W_dec, **options)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (pre, W_dec)), torch.autograd.grad(theirs, (pre, W_dec))
    )
