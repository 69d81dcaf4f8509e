"""TopK, BatchTopK and AuxK against their definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from losses.auxiliary_k import BY_LEVEL

import termwise as tw
from termwise.sae import (
    ActivationThreshold,
    TopK,
    TopKObjective,
    _selection,
    auxiliary_k_loss,
    batch_topk,
    matryoshka_auxiliary_k_loss,
    threshold_gate,
    topk,
    topk_loss,
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
    scored=st.booleans(),
    activation=st.sampled_from(["relu", "none", "abs"]),
)
def test_batch_topk_keeps_exactly_k_for_each_row(
    n, m, data, dtype, masked, ties, scored, activation
):
    k = data.draw(st.integers(1, m) | st.sampled_from([0.5, m - 0.5, m / 3]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**30)))

    def drawn():
        if ties:
            return torch.randint(-2, 4, (n, m), generator=generator).to(dtype)
        return torch.randn(n, m, generator=generator).to(dtype)

    pre = drawn()
    score = drawn() if scored else None
    mask = torch.rand(n, generator=generator) < 0.6 if masked else None
    rows, scores = (t if mask is None or t is None else t[mask] for t in (pre, score))
    if scores is None:
        scores = {"relu": rows.relu(), "none": rows, "abs": rows.abs()}[activation]
    # By sorting: equals keep their order, so the first of them is kept.
    flat = (rows.relu() if activation == "relu" else rows).flatten()
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    kept = order[: math.floor(k * len(rows))]
    expected = torch.zeros_like(flat).scatter(0, kept, flat[kept]).view(rows.shape)
    out = batch_topk(pre, k=k, mask=mask, score=score, activation=activation)
    assert torch.equal(out if mask is None else out[mask], expected)
    assert mask is None or not out[~mask].any()


def test_batch_topk_of_a_k_that_is_not_whole_by_hand():
    pre = torch.rand(10, 4) + 1
    for mask in (None, torch.ones(10) > 0):
        assert (batch_topk(pre, k=1.5, mask=mask) != 0).sum() == 15
        assert (batch_topk(pre, k=1.59, mask=mask) != 0).sum() == 15
        assert (batch_topk(pre, k=0.01, mask=mask) != 0).sum() == 0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_batch_topk_hides_no_nan_of_either_sign(masked, dtype):
    inf = torch.tensor(math.inf, dtype=dtype)
    mask = torch.ones(2) > 0 if masked else None
    for nan in (inf - inf, -(inf - inf)):  # the sign bit is set in one of them
        pre = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype)
        pre[0, 0] = nan
        for activation in ("relu", "none", "abs"):
            assert batch_topk(pre, k=1, mask=mask, activation=activation)[0, 0].isnan()


def test_selection_by_hand():
    pre = torch.tensor([[-5.0, 1.0, 0.5]], requires_grad=True)
    for activation, values, indices in (("relu", [1, 0.5], [1, 2]), ("abs", [-5, 1], [0, 1])):
        kept = topk(pre, k=2, activation=activation)
        assert kept.values.tolist() == [values]
        assert kept.indices.tolist() == [indices]
        expected = torch.zeros(1, 3).scatter(1, kept.indices, kept.values)
        assert torch.equal(batch_topk(pre, k=2, activation=activation), expected)
        (gradient,) = torch.autograd.grad(kept.values.sum(), pre)
        assert gradient.tolist() == [[float(place in indices) for place in range(3)]]
    assert topk(pre, k=3, activation="none").values.tolist() == [[1, 0.5, -5]]
    pre, score = torch.tensor([[3.0, 2.0]]), torch.tensor([[1.0, 4.0]])
    kept = topk(pre, k=1, score=score)
    assert (kept.indices.item(), kept.values.item()) == (1, 2)
    assert batch_topk(pre, k=1, score=score).tolist() == [[0, 2]]


def test_threshold_gate():
    pre = torch.tensor([[-2.0, 0.5, 3.0], [1.0, math.nan, 0.0]], requires_grad=True)
    gated = threshold_gate(pre, 0.5)
    assert gated[0].tolist() == [0, 0, 3]
    assert gated[1, 1].isnan()
    assert torch.autograd.grad(gated.sum(), pre)[0][0].tolist() == [0, 0, 1]
    each = torch.tensor([0.0, 0.4, 5.0], requires_grad=True)
    assert threshold_gate(pre, each)[0].tolist() == [0, 0.5, 0]
    start = ActivationThreshold.start().value
    assert threshold_gate(pre[:1], start).tolist() == pre[:1].relu().tolist()
    assert threshold_gate(pre, torch.tensor(math.nan)).isnan().all()


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


@pytest.mark.parametrize("k", [0, 4])
def test_k_is_within_the_latents(k):
    with pytest.raises(ValueError, match=rf"^topk needs k from 1 to 3, got {k}$"):
        topk(torch.zeros(2, 3), k=k)
    for other in (k, k + 0.0, math.nan):
        with pytest.raises(ValueError, match=rf"^batch_topk needs k above 0 .* 3, got {other}$"):
            batch_topk(torch.zeros(2, 3), k=other)


@pytest.mark.parametrize("kind", ["normal", "few values", "columns", "sorted"])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_batch_topk_of_many_latents_is_that_of_all(monkeypatch, kind, activation):
    pre = torch.randn(64, 1000)
    if kind == "few values":
        pre = pre.round()
    if kind == "columns":
        pre[:, ::61] += 9
    if kind == "sorted":
        pre = pre.flatten().sort().values.view(64, 1000)
    ours = batch_topk(pre, k=7, activation=activation)
    monkeypatch.setattr(_selection, "_candidates", lambda numbers, n: numbers)
    torch.testing.assert_close(ours, batch_topk(pre, k=7, activation=activation), rtol=0, atol=0)


def test_batch_topk_compiles_whole():
    pre = torch.randn(6, 9)
    mask = torch.arange(6) != 3
    compiled = torch.compile(batch_topk, fullgraph=True, backend="eager")
    for options in ({"k": 2}, {"k": 2, "mask": mask}, {"k": 1.7, "activation": "none"}):
        assert torch.equal(compiled(pre, **options), batch_topk(pre, **options))


# --- the objective --------------------------------------------------------------------------


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


SUMMED = {"normalize": "none", "feature_reduction": "sum"}


def test_aux_k_by_hand():
    x, x_hat, W_dec = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.eye(2)
    pre, dead = torch.tensor([[-2.0, -1.0]]), torch.ones(2) > 0
    for activation, expected in (("relu", 1), ("none", 2), ("abs", 1)):
        aux = auxiliary_k_loss(
            x, x_hat, pre, W_dec, dead=dead, k_aux=1, activation=activation, **SUMMED
        )
        assert aux.item() == expected
    few = {"k_aux": 4, "activation": "none", "scale_by_count": True, **SUMMED}
    assert auxiliary_k_loss(x, x_hat, pre, W_dec, dead=dead, **few).item() == 1


def test_aux_k_takes_no_living_latent_where_few_are_dead():
    x, x_hat, pre, W_dec = draw(5, 3, 8)
    dead = torch.arange(8) == 3
    for activation in ("relu", "none", "abs"):
        aux = auxiliary_k_loss(x, x_hat, pre, W_dec, dead=dead, k_aux=5, activation=activation)
        alone = auxiliary_k_loss(
            x, x_hat, pre[:, 3:4], W_dec[3:4], dead=dead[3:4], k_aux=1, activation=activation
        )
        torch.testing.assert_close(aux, alone)
        assert not torch.autograd.grad(aux, pre)[0][:, ~dead].any()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("prefixes", [(2, 5, 8), (0, 3, 6), (8,)])
def test_aux_k_of_each_matryoshka_level(prefixes, sparse):
    x, _, pre, W_dec = draw(5, 3, 8)
    b_dec = torch.ones(3, dtype=torch.float64)
    kept = topk(pre, k=3)
    dead = torch.tensor([1, 1, 0, 0, 0, 1, 1, 1]) > 0  # none in the middle level
    options = {"activation": "none", "normalize": "none", "scale_by_count": True}
    ours = matryoshka_auxiliary_k_loss(
        x,
        kept if sparse else kept.dense(8),
        pre,
        W_dec,
        b_dec,
        prefixes=prefixes,
        dead=dead,
        k_aux=2,
        **options,
    )
    theirs = BY_LEVEL.expected(
        x, kept, pre, W_dec, b_dec, prefixes=prefixes, dead=dead, k_aux=2, **options
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (pre, W_dec)), torch.autograd.grad(theirs, (pre, W_dec))
    )


def test_a_coefficient_may_be_a_tensor():
    x, x_hat, pre, _ = draw(5, 3, 8)
    given = {"aux": torch.tensor(2.0, dtype=torch.float64), "dead": torch.ones(8) > 0}
    for dtype in (torch.float32, torch.float64):
        terms = topk_loss(x, pre, x_hat, aux_coeff=torch.tensor(0.5, dtype=dtype), **given)
        assert terms.loss == topk_loss(x, pre, x_hat, aux_coeff=0.5, **given).loss
    wide = torch.tensor(0.5, dtype=torch.float64)
    low = topk_loss(x.float(), pre, x_hat.float(), aux_coeff=wide, **given)
    assert low.loss.dtype == torch.float32


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
    for normalize in ("residual", "target", "none"):
        aux = auxiliary_k_loss(
            x, x_hat, pre, W_dec, dead=dead, k_aux=3, normalize=normalize, mask=mask
        )
        if normalize == "residual" or what == "no dead":
            assert aux.item() == 0
        for gradient in torch.autograd.grad(aux, (pre, W_dec)):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("size", [3e28, 3e-25, 1e37, 1e-36])
@pytest.mark.parametrize("normalize", ["residual", "target"])
@pytest.mark.parametrize("masked", [False, True])
def test_aux_k_does_not_depend_on_the_size(size, normalize, masked):
    """Neither its value nor, but for the factor, its gradient: squares of these leave float32."""
    mask = torch.arange(6) != 2 if masked else None
    dead = torch.arange(8) != 1
    calls = {
        "aux": lambda x, x_hat, pre, W_dec: auxiliary_k_loss(
            x, x_hat, pre, W_dec, k_aux=3, detach_residual=False, **options
        ),
        "by level": lambda x, x_hat, pre, W_dec: matryoshka_auxiliary_k_loss(
            x, pre, pre, W_dec, x_hat[0], k_aux=2, prefixes=(2, 5, 8), **options
        ),
    }
    options = {"normalize": normalize, "dead": dead, "mask": mask}
    for name, call in calls.items():
        pairs = []
        for scale, dtype in ((1.0, torch.float64), (size, torch.float32)):
            scales = (scale, scale, scale, 1.0)
            leaves = [
                (t.detach() * by).to(dtype).requires_grad_()
                for t, by in zip(draw(6, 3, 8), scales, strict=True)
            ]
            value = call(*leaves)
            assert value.dtype == dtype
            slopes = torch.autograd.grad(value, leaves, materialize_grads=True)
            rescaled = [slope.double() * by for slope, by in zip(slopes, scales, strict=True)]
            pairs.append((value.double(), *rescaled))
        torch.testing.assert_close(*pairs, rtol=2e-5, atol=2e-6, msg=name)


def test_aux_k_does_not_hide_a_nan():
    x, x_hat, pre, W_dec = (t.detach() for t in draw(5, 3, 8))
    x[2, 1] = math.nan
    assert auxiliary_k_loss(x, x_hat, pre, W_dec, dead=torch.ones(8) > 0, k_aux=2).isnan()


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
