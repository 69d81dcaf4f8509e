"""Matryoshka: what its hand-written passes must keep."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from losses.matryoshka import MATRYOSHKA
from torch._subclasses.fake_tensor import FakeTensorMode

import termwise as tw
from termwise import _numbers
from termwise.sae import SparseLatents, vanilla_loss
from termwise.sae import _prefix_errors as inside
from termwise.sae._matryoshka import Matryoshka, MatryoshkaObjective, matryoshka_loss

CLOSE = {"rtol": 1e-10, "atol": 1e-11}


@pytest.fixture(autouse=True, params=["few", "many"])
def path(request, monkeypatch):
    """Few dense latents are decoded as the formula is written."""
    if request.param == "many":
        monkeypatch.setattr(_numbers, "FEW", 0)


def errors_of(*arguments, prefixes):
    return MATRYOSHKA.expected(*arguments, prefixes=prefixes)["mse_per_prefix"]


def tensors(n, d_model, d_sae, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).requires_grad_()

    return [normal(n, d_model), normal(n, d_sae), normal(d_sae, d_model), normal(d_model)]


def sparse_and_dense(n, k, d_sae, *, seed=0):
    """Give values (a leaf), indices, and the dense matrix that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(n, d_sae, generator=generator).topk(k).indices
    values = torch.randn(n, k, generator=generator, dtype=torch.float64).requires_grad_()
    return values, indices, torch.zeros(n, d_sae, dtype=torch.float64).scatter(1, indices, values)


@st.composite
def problems(draw):
    d_sae = draw(st.integers(1, 12))
    prefixes = draw(st.sets(st.integers(0, d_sae), min_size=1, max_size=5))
    return {
        "n": draw(st.integers(1, 7)),
        "d_model": draw(st.integers(1, 6)),
        "d_sae": d_sae,
        "prefixes": sorted(prefixes),
        "seed": draw(st.integers(0, 2**30)),
        "bias": draw(st.booleans()),
        "feature_reduction": draw(st.sampled_from(["mean", "sum"])),
    }


# --- prefix 0, what the caller has decoded, the auxiliary loss -------------------------------


@pytest.mark.parametrize("sparse", [False, True])
def test_prefix_0_is_the_bias_alone_and_is_averaged_with_the_others(sparse):
    x, _, W_dec, b_dec = tensors(6, 3, 8)
    values, indices, f = sparse_and_dense(6, 3, 8)
    latents = SparseLatents(values, indices) if sparse else f
    terms = matryoshka_loss(x, latents, W_dec, b_dec, prefixes=(0, 2, 5, 8))
    three = matryoshka_loss(x, latents, W_dec, b_dec, prefixes=(2, 5, 8))
    bias = (x - b_dec).square().mean()
    torch.testing.assert_close(terms.mse, (3 * three.mse + bias) / 4, **CLOSE)
    leaves = (x, values, W_dec, b_dec)
    torch.testing.assert_close(
        torch.autograd.grad(terms.mse, leaves, retain_graph=True),
        torch.autograd.grad((3 * three.mse + bias) / 4, leaves, retain_graph=True),
        **CLOSE,
    )
    alone = matryoshka_loss(x, latents, W_dec, b_dec, prefixes=(0,))
    torch.testing.assert_close(alone.mse, bias, **CLOSE)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prefixes", [(2, 5, 8), (0, 4), (6,)])
def test_a_given_x_hat_is_not_decoded_again(prefixes, masked, sparse):
    x, _, W_dec, b_dec = tensors(6, 3, 8)
    values, indices, f = sparse_and_dense(6, 3, 8)
    latents = SparseLatents(values, indices) if sparse else f
    mask = torch.arange(6) != 2 if masked else None
    x_hat = f[:, : prefixes[-1]] @ W_dec[: prefixes[-1]] + b_dec
    options = {"prefixes": prefixes, "sparsity_coeff": 0.3, "mask": mask}
    ours = matryoshka_loss(x, latents, W_dec, b_dec, x_hat=x_hat, **options)
    theirs = matryoshka_loss(x, latents, W_dec, b_dec, **options)
    for (name, left), (_, right) in zip(ours.items(), theirs.items(), strict=True):
        torch.testing.assert_close(left, right, **CLOSE, msg=name)
    leaves = (x, values, W_dec, b_dec)
    torch.testing.assert_close(
        torch.autograd.grad(ours.loss, leaves, retain_graph=True),
        torch.autograd.grad(theirs.loss, leaves, retain_graph=True),
        **CLOSE,
    )
    other = matryoshka_loss(x, latents, W_dec, b_dec, x_hat=x_hat + 1, **options)
    assert other.mse_per_prefix[-1] != ours.mse_per_prefix[-1]
    assert torch.equal(other.mse_per_prefix[:-1], ours.mse_per_prefix[:-1])


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_an_auxiliary_loss_and_coefficients_that_may_be_tensors(kind):
    x, f, W_dec, b_dec = tensors(6, 3, 8)
    aux = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    plain = matryoshka_loss(x, f, W_dec, b_dec, prefixes=(2, 8), sparsity_coeff=0.5)
    assert plain.aux == 0
    terms = matryoshka_loss(
        x,
        f,
        W_dec,
        b_dec,
        prefixes=(2, 8),
        sparsity_coeff=kind(0.5),
        aux=aux,
        aux_coeff=kind(0.25),
    )
    assert terms.aux == 2
    torch.testing.assert_close(terms.sparsity, plain.sparsity)
    torch.testing.assert_close(terms.loss, plain.loss + 0.25 * 2)
    assert torch.autograd.grad(terms.loss, aux, retain_graph=True)[0] == 0.25
    torch.testing.assert_close(
        torch.autograd.grad(terms.loss, f), torch.autograd.grad(plain.loss, f)
    )
    module = MatryoshkaObjective(Matryoshka(sparsity_coeff=0.5, aux_coeff=0.25))
    assert module(x, f, W_dec, b_dec, prefixes=(2, 8), aux=aux).metrics() == terms.metrics()


# --- values and gradients -------------------------------------------------------------------


@given(problem=problems(), k=st.integers(1, 5), masked=st.booleans())
def test_sparse_latents_are_the_dense_ones(problem, k, masked):
    n, d_sae = problem["n"], problem["d_sae"]
    x, _, W_dec, b_dec = tensors(n, problem["d_model"], d_sae, seed=problem["seed"])
    values, indices, dense = sparse_and_dense(n, min(k, d_sae), d_sae, seed=problem["seed"])
    options = {key: problem[key] for key in ("prefixes", "feature_reduction")}
    options["mask"] = torch.arange(n) % 3 != 2 if masked else None
    options["sparsity_coeff"] = 0.1
    b_dec = b_dec if problem["bias"] else None
    ours = matryoshka_loss(x, SparseLatents(values, indices), W_dec, b_dec, **options)
    theirs = matryoshka_loss(x, dense, W_dec, b_dec, **options)
    leaves = [leaf for leaf in (x, values, W_dec, b_dec) if leaf is not None]
    for (name, left), (_, right) in zip(ours.items(), theirs.items(), strict=True):
        torch.testing.assert_close(left, right, **CLOSE, msg=name)
    torch.testing.assert_close(
        torch.autograd.grad(ours.loss, leaves), torch.autograd.grad(theirs.loss, leaves), **CLOSE
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_more_rows_than_are_taken_at_a_time(sparse):
    n, d_sae, prefixes = 701, 40, (3, 10, 11, 30)
    x, f, W_dec, b_dec = tensors(n, 5, d_sae)
    values, indices, dense = sparse_and_dense(n, 4, d_sae)
    latents = (values, indices) if sparse else (f, None)
    given = inside.Given(x, *latents, W_dec, b_dec, None, prefixes, "mean", not sparse)
    rows = list(inside._some_rows(given))
    assert len(rows) >= 4
    assert n % (rows[0].stop - rows[0].start)
    latents = SparseLatents(values, indices) if sparse else f
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    leaves = [x, values if sparse else f, W_dec, b_dec]
    ours = matryoshka_loss(x, latents, W_dec, b_dec, prefixes=prefixes).mse_per_prefix
    theirs = errors_of(x, dense if sparse else f, W_dec, b_dec, prefixes=prefixes)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.testing.assert_close(
        torch.autograd.grad(weights @ ours, leaves),
        torch.autograd.grad(weights @ theirs, leaves),
        **CLOSE,
    )


def test_known_values():
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    f = torch.tensor([[1.0, 0.0, 1.0], [2.0, 0.0, 0.0]], requires_grad=True)
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    b_dec = torch.tensor([0.5, 0.0])
    terms = matryoshka_loss(x, f, W_dec, b_dec, prefixes=(1, 2, 3), feature_reduction="sum")
    torch.testing.assert_close(terms.mse_per_prefix, torch.tensor([2.75, 2.75, 2.25]))
    assert terms.mse.item() == pytest.approx(31 / 12)
    expected = torch.tensor([[5 / 6, -1, 1 / 6], [-1 / 2, 2 / 3, 1 / 6]])
    torch.testing.assert_close(torch.autograd.grad(terms.mse, f)[0], expected)
    assert (terms.l0.item(), terms.l1.item(), terms.sparsity.item()) == (1.5, 2.0, 0.0)


@pytest.mark.parametrize("options", [{}, {"p": 0.5}, {"p": 2.0}, {"normed": True}])
@pytest.mark.parametrize("feature_reduction", ["mean", "sum"])
def test_one_prefix_of_all_is_vanilla(options, feature_reduction):
    x, f, W_dec, b_dec = tensors(6, 4, 9)
    target = x.detach().flip(0)
    options = {**options, "target": target, "feature_reduction": feature_reduction}
    if options.pop("normed", False):
        options["decoder_norm"] = W_dec.norm(dim=1)
    ours = matryoshka_loss(x, f, W_dec, b_dec, prefixes=[9], sparsity_coeff=0.2, **options)
    theirs = vanilla_loss(x, f, f @ W_dec + b_dec, sparsity_coeff=0.2, **options)
    for name, value in theirs.items():
        torch.testing.assert_close(getattr(ours, name), value, **CLOSE, msg=name)
    assert ours.l1.requires_grad == theirs.l1.requires_grad
    leaves = (f, W_dec, b_dec)
    torch.testing.assert_close(
        torch.autograd.grad(ours.loss, leaves, retain_graph=True),
        torch.autograd.grad(theirs.loss, leaves),
        **CLOSE,
    )


def test_latents_beyond_the_last_prefix_pay_alone():
    x, f, W_dec, b_dec = tensors(5, 3, 8)
    terms = matryoshka_loss(x, f, W_dec, b_dec, prefixes=(2, 5), sparsity_coeff=0.5)
    for_f, for_W = torch.autograd.grad(terms.loss, (f, W_dec))
    torch.testing.assert_close(for_f[:, 5:], 0.5 / 5 * f[:, 5:].sign())
    assert not for_W[5:].any()
    assert for_W[:5].all()


def test_zero_where_every_prefix_reconstructs():
    _, f, W_dec, b_dec = tensors(5, 3, 6)
    f = f.detach().clone()
    f[:, 2:] = 0
    x = f @ W_dec + b_dec
    terms = matryoshka_loss(x, f, W_dec, b_dec, prefixes=(2, 4, 6))
    assert terms.mse_per_prefix.max().item() < 1e-25


# --- masks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masked_rows_enter_nothing(sparse, bad):
    x, f, W_dec, b_dec = tensors(6, 3, 8)
    values, indices, _ = sparse_and_dense(6, 3, 8)
    mask = torch.tensor([True, False, True, True, False, True])
    with torch.no_grad():
        for rows in (x, f, values):
            rows[~mask] = bad
        indices[~mask] = -1
    options = {"prefixes": (2, 5, 7), "sparsity_coeff": 0.1}

    def run(here, **more):
        latents = SparseLatents(values[here], indices[here]) if sparse else f[here]
        return matryoshka_loss(x[here], latents, W_dec, b_dec, **options, **more)

    leaves = (x, values if sparse else f, W_dec, b_dec)
    ours, theirs = run(slice(None), mask=mask), run(mask)
    for (name, left), (_, right) in zip(ours.items(), theirs.items(), strict=True):
        torch.testing.assert_close(left, right, **CLOSE, msg=name)
    gradients = torch.autograd.grad(ours.loss, leaves)
    torch.testing.assert_close(gradients, torch.autograd.grad(theirs.loss, leaves), **CLOSE)
    assert not gradients[0][~mask].any()


def test_no_row_counts():
    x, f, W_dec, b_dec = tensors(4, 3, 5)
    nothing = matryoshka_loss(
        x, f, W_dec, b_dec, prefixes=(2, 5), mask=torch.zeros(4, dtype=torch.bool)
    )
    empty = matryoshka_loss(x[:0], f[:0], W_dec, b_dec, prefixes=(2, 5))
    for terms in (nothing, empty):
        assert terms.loss.isnan()
        assert terms.mse_per_prefix.isnan().all()
    torch.autograd.grad(empty.loss, (W_dec, b_dec))


# --- derivatives ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("sparse", [False, True])
def test_a_gradient_of_one_input_alone(place, sparse):
    inputs = tensors(5, 3, 6)
    values, indices, _ = sparse_and_dense(5, 2, 6)
    if sparse:
        inputs[1] = values

    def gradient(*inputs):
        x, latents, W_dec, b_dec = inputs
        latents = SparseLatents(latents, indices) if sparse else latents
        loss = matryoshka_loss(x, latents, W_dec, b_dec, prefixes=(2, 5), sparsity_coeff=0.1).loss
        return torch.autograd.grad(loss, inputs[place])[0]

    alone = [t if here == place else t.detach() for here, t in enumerate(inputs)]
    torch.testing.assert_close(gradient(*alone), gradient(*inputs))


def test_one_residual_is_kept(monkeypatch):
    monkeypatch.setattr(_numbers, "FEW", 0)
    x, f, W_dec, b_dec = tensors(300, 16, 64, dtype=torch.float32)
    own = {t.untyped_storage().data_ptr() for t in (x, f, W_dec, b_dec)}
    for latents, allowed in (
        (f, x.nbytes),
        (SparseLatents(f[:, :4], torch.arange(4).expand(300, 4)), 0),
    ):
        saved = {}

        def pack(tensor, saved=saved):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            terms = matryoshka_loss(x, latents, W_dec, b_dec, prefixes=range(1, 65))
        assert allowed <= sum(saved.values()) <= allowed + 300 * 4 * 8 + 1000, terms


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefixes": ()}, r"matryoshka_loss needs at least one prefix, got none"),
        ({"prefixes": (-1, 2)}, r"matryoshka_loss needs prefixes that .* 0..4, got \[-1, 2\]"),
        ({"prefixes": (2, 5)}, r"matryoshka_loss needs prefixes that .* 0..4, got \[2, 5\]"),
        ({"prefixes": (2, 2)}, r"matryoshka_loss needs prefixes that .* 0..4, got \[2, 2\]"),
        ({"prefixes": [3, 2]}, r"matryoshka_loss needs prefixes that .* 0..4, got \[3, 2\]"),
        (
            {"weights": (1.0,)},
            r"matryoshka_loss needs a weight for each of 2 prefixes, got \(1.0,\)",
        ),
        ({"weights": (0, 0)}, r"matryoshka_loss needs weights of at least 0 .* got \[0, 0\]"),
        ({"weights": (2, -1)}, r"matryoshka_loss needs weights of at least 0 .* got \[2, -1\]"),
        ({"weights": (1, math.nan)}, r"matryoshka_loss needs weights of at least 0 .* \[1, nan\]"),
        ({"weights": (1, math.inf)}, r"matryoshka_loss needs weights of at least 0 .* \[1, inf\]"),
        ({"p": 0}, "matryoshka_loss needs p > 0, got 0"),
    ],
)
def test_values_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        matryoshka_loss(
            torch.zeros(3, 2),
            torch.zeros(3, 4),
            torch.zeros(4, 2),
            None,
            **{"prefixes": (2, 4), **options},
        )


def test_wrong_shapes_and_types_are_refused():
    x, f, W_dec = torch.zeros(3, 2), torch.zeros(3, 4), torch.zeros(4, 2)
    with pytest.raises(
        tw.ContractError,
        match=r'^matryoshka_loss: W_dec needs Float\[Tensor, "d_sae d_model"\], got '
        r"float32\[2, 4\]: axis d_sae is 2, but it is 4 in f$",
    ):
        matryoshka_loss(x, f, W_dec.T, None, prefixes=(4,))
    with pytest.raises(tw.ContractError, match="^matryoshka_loss: b_dec needs"):
        matryoshka_loss(x, f, W_dec, torch.zeros(4), prefixes=(4,))
    with pytest.raises(tw.ContractError, match="^matryoshka_loss: prefixes needs .* got int64"):
        matryoshka_loss(x, f, W_dec, None, prefixes=torch.tensor([2, 4]))
    latents = SparseLatents(torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"f\.values needs .* batch is 2, but it is 3 in x$"):
        matryoshka_loss(x, latents, W_dec, None, prefixes=(4,))


# --- precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_lifted_before_any_arithmetic(dtype, sparse):
    halves = tensors(200, 6, 20, dtype=dtype)
    wide = [t.detach().double().requires_grad_() for t in halves]
    indices = torch.arange(20).expand(200, 20)
    gradients = []
    results = []
    for inputs in (halves, wide):
        x, f, W_dec, b_dec = inputs
        latents = SparseLatents(f, indices) if sparse else f
        # Sums of such squares pass what float16 holds.
        terms = matryoshka_loss(
            x * 200,
            latents,
            W_dec,
            b_dec,
            prefixes=(3, 9, 18),
            sparsity_coeff=0.1,
            feature_reduction="sum",
        )
        results.append(terms)
        gradients.append(torch.autograd.grad(1e-3 * terms.loss, inputs))
    for (name, ours), (_, theirs) in zip(results[0].items(), results[1].items(), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=4e-3, atol=1e-3, msg=name)
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-2, atol=2e-2)


def test_halves_give_the_float32_numbers():
    halves = tensors(9, 6, 20, dtype=torch.bfloat16)
    lifted = [t.detach().float().requires_grad_() for t in halves]
    ours = matryoshka_loss(*halves, prefixes=(3, 9), sparsity_coeff=0.1)
    theirs = matryoshka_loss(*lifted, prefixes=(3, 9), sparsity_coeff=0.1)
    assert ours.metrics() == theirs.metrics()
    for left, right in zip(
        torch.autograd.grad(ours.loss, halves),
        torch.autograd.grad(theirs.loss, lifted),
        strict=True,
    ):
        assert torch.equal(left, right.bfloat16())


def test_mixed_types():
    x, f, W_dec, b_dec = tensors(9, 6, 20, dtype=torch.float32)
    mixed = [x.detach(), f.detach().bfloat16().requires_grad_(), W_dec, b_dec]
    terms = matryoshka_loss(*mixed, prefixes=(3, 9))
    expected = matryoshka_loss(mixed[0], mixed[1].float(), W_dec, b_dec, prefixes=(3, 9))
    assert terms.metrics() == expected.metrics()
    for ours, leaf in zip(torch.autograd.grad(terms.loss, mixed[1:]), mixed[1:], strict=True):
        assert ours.dtype == leaf.dtype


@pytest.mark.parametrize("sparse", [False, True])
def test_autocast_changes_nothing(sparse):
    x, f, W_dec, b_dec = tensors(9, 6, 20, dtype=torch.float32)
    latents = SparseLatents(f, torch.arange(20).expand(9, 20)) if sparse else f

    def run():
        terms = matryoshka_loss(x, latents, W_dec, b_dec, prefixes=(3, 9), sparsity_coeff=0.1)
        first = torch.autograd.grad(terms.loss, (f, W_dec), create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), W_dec)
        return terms.metrics(), first, second

    plain = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run()
    assert cast[0] == plain[0]
    torch.testing.assert_close(cast[1:], plain[1:], rtol=0, atol=0)


def test_inputs_are_left_alone_and_strides_are_welcome():
    x, f, W_dec, b_dec = tensors(5, 3, 8)
    copies = [t.detach().clone() for t in (x, f, W_dec, b_dec)]
    strided = (x.T.contiguous().T, f.T.contiguous().T, W_dec.T.contiguous().T, b_dec[:1].expand(3))
    ours = matryoshka_loss(*strided, prefixes=(3, 7))
    ours.loss.backward()
    for left, right in zip((x, f, W_dec, b_dec), copies, strict=True):
        assert torch.equal(left, right)
    theirs = matryoshka_loss(*(t.detach().contiguous() for t in strided), prefixes=(3, 7))
    torch.testing.assert_close(ours.loss, theirs.loss)
    b_dec = b_dec.detach()[:1].expand(3)
    expected = errors_of(x, f, W_dec, b_dec, prefixes=(3, 7)).mean()
    torch.testing.assert_close(f.grad, torch.autograd.grad(expected, f)[0])


def test_no_nan_is_repaired():
    x, f, W_dec, b_dec = (t.detach() for t in tensors(5, 3, 8))
    f[2, 4] = math.nan
    terms = matryoshka_loss(x, f, W_dec, b_dec, prefixes=(3, 7))
    assert terms.mse_per_prefix.isnan().tolist() == [False, True]
    assert terms.loss.isnan()


# --- transforms -----------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
def test_compiled_is_eager(sparse):
    x, f, W_dec, b_dec = tensors(6, 4, 9)
    values, indices, _ = sparse_and_dense(6, 3, 9)
    leaves = (x, values if sparse else f, W_dec, b_dec)
    mask = torch.arange(6) != 3

    def loss(x, latents, W_dec, b_dec, mask, prefixes):
        latents = SparseLatents(latents, indices) if sparse else latents
        return matryoshka_loss(
            x, latents, W_dec, b_dec, prefixes=prefixes, sparsity_coeff=0.1, mask=mask
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for prefixes in ((2, 5, 9), (1, 6, 8))[: 1 if sparse else 2]:
        ours, theirs = (run(*leaves, mask, prefixes) for run in (compiled, loss))
        assert ours.metrics() == pytest.approx(theirs.metrics(), rel=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(ours.loss, leaves),
            torch.autograd.grad(theirs.loss, leaves),
            **CLOSE,
        )
    with pytest.raises(Exception, match="matryoshka_loss needs prefixes"):
        compiled(*leaves, mask, (5, 2))


@pytest.mark.parametrize("sparse", [False, True])
def test_vmap_and_grad(sparse):
    x, f, W_dec, b_dec = (t.detach() for t in tensors(12, 4, 9))
    values, indices, _ = sparse_and_dense(12, 3, 9)
    latents = values.detach() if sparse else f

    def terms(W_dec, x, latents, indices):
        latents = SparseLatents(latents, indices) if sparse else latents
        found = matryoshka_loss(x, latents, W_dec, b_dec, prefixes=(2, 5, 9), sparsity_coeff=0.1)
        return found.loss, found

    batched = [t.unflatten(0, (3, 4)) for t in (x, latents, indices)]
    per_sample = torch.func.vmap(torch.func.grad(terms, has_aux=True), in_dims=(None, 0, 0, 0))
    gradients, found = per_sample(W_dec, *batched)
    assert found.mse_per_prefix.shape == (3, 3)
    for place in range(3):
        leaf = W_dec.clone().requires_grad_()
        loss, expected = terms(leaf, *(t[place] for t in batched))
        torch.testing.assert_close(gradients[place], torch.autograd.grad(loss, leaf)[0], **CLOSE)
        torch.testing.assert_close(found.mse_per_prefix[place], expected.mse_per_prefix)


@pytest.mark.parametrize("sparse", [False, True])
def test_nothing_is_read_on_the_host(sparse):
    prefixes, needed = [2, 5, 8], [True] * 4
    with FakeTensorMode():
        x, W_dec, b_dec = torch.empty(300, 4), torch.empty(9, 4), torch.empty(4)
        values = torch.empty(300, 3 if sparse else 9)
        indices = torch.empty(300, 3, dtype=torch.int64) if sparse else None
        mask = torch.empty(300, dtype=torch.bool)
        leaves = [t.requires_grad_() for t in (x, values, W_dec, b_dec)]
        latents = SparseLatents(values, indices) if sparse else values
        terms = matryoshka_loss(
            x, latents, W_dec, b_dec, prefixes=prefixes, sparsity_coeff=0.1, mask=mask
        )
        terms.loss.backward()
        assert [t.grad.shape for t in leaves] == [t.shape for t in leaves]
        # The operators' own code, which the above replaces by their shapes.
        tensors = [t.detach() for t in (x, values, W_dec, b_dec)]
        given = inside.Given(
            *tensors[:2], indices, *tensors[2:], mask, prefixes, "mean", not sparse
        )
        measured, last = inside.compute_errors(given)
        assert measured.shape == (300, 4)
        inside.compute_gradients(inside.Pulled(torch.empty(300, 4), last, given, needed))


# --- the module -----------------------------------------------------------------------------
