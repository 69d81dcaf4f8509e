"""The crosscoder objective against its formula in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import termwise as tw
from termwise.sae._auxiliary_k import auxiliary_k_loss
from termwise.sae._crosscoder import (
    Crosscoder,
    CrosscoderObjective,
    CrosscoderTerms,
    crosscoder_loss,
)
from termwise.sae._latents import SparseLatents
from termwise.sae._vanilla import vanilla_loss

OPTIONS = {
    "l1": {},
    "l2": {"decoder_norm": "l2"},
    "summed": {"feature_reduction": "sum"},
}
NAMES = ("f", "x_hat", "W_dec")


def data(n=6, layers=3, d_model=4, d_sae=5, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = {
        "f": normal(n, d_sae),
        "x_hat": normal(n, layers, d_model),
        "W_dec": normal(d_sae, layers, d_model),
    }
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    return normal(n, layers, d_model), leaves


def call(x, leaves, **options):
    return crosscoder_loss(
        x, *[leaves[name] for name in NAMES], **{"sparsity_coeff": 0.3} | options
    )


def gradients(terms, leaves):
    return torch.autograd.grad(terms.loss, list(leaves.values()))


def oracle(x, leaves, *, sparsity_coeff=0.3, decoder_norm="l1", feature_reduction="mean"):
    f, x_hat, W_dec = (leaves[name] for name in NAMES)
    n, layers, d_model = x.shape
    divisor = 1 if feature_reduction == "sum" else d_model
    each = [((x[:, k] - x_hat[:, k]) ** 2).sum() / (n * divisor) for k in range(layers)]
    squares = [(W_dec[:, k] ** 2).sum(1) for k in range(layers)]
    norm = sum(s.sqrt() for s in squares) if decoder_norm == "l1" else sum(squares).sqrt()
    sparsity = sparsity_coeff * (f.abs() * norm).sum() / n
    return {
        "loss": sum(each) + sparsity,
        "mse_per_layer": torch.stack(each),
        "mse": sum(each),
        "sparsity": sparsity,
        "l0": (f != 0).to(x.dtype).sum(1).mean(),
    }


@given(
    n=st.integers(1, 8),
    layers=st.integers(1, 4),
    d_model=st.integers(1, 6),
    d_sae=st.integers(1, 8),
    seed=st.integers(0, 2**30),
    sparsity_coeff=st.floats(-2, 2),
    decoder_norm=st.sampled_from(["l1", "l2"]),
    feature_reduction=st.sampled_from(["mean", "sum"]),
)
def test_terms_and_gradients_are_the_formulas(
    n, layers, d_model, d_sae, seed, sparsity_coeff, decoder_norm, feature_reduction
):
    x, leaves = data(n, layers, d_model, d_sae, seed=seed)
    options = {
        "sparsity_coeff": sparsity_coeff,
        "decoder_norm": decoder_norm,
        "feature_reduction": feature_reduction,
    }
    terms, expected = call(x, leaves, **options), oracle(x, leaves, **options)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(terms, name), value, rtol=1e-11, atol=1e-12, msg=name)
    for name in ("mse_per_layer", "mse", "sparsity", "loss"):
        if name == "sparsity" and sparsity_coeff == 0:
            assert not terms.sparsity.requires_grad
            continue
        ours, theirs = (
            torch.autograd.grad(
                value.sum(), list(leaves.values()), retain_graph=True, materialize_grads=True
            )
            for value in (getattr(terms, name), expected[name])
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_one_layer_is_the_vanilla_objective():
    x, leaves = data(layers=1)
    norm = leaves["W_dec"].norm(dim=(1, 2))
    expected = vanilla_loss(
        x[:, 0], leaves["f"], leaves["x_hat"][:, 0], sparsity_coeff=0.3, decoder_norm=norm
    )
    for decoder_norm in ("l1", "l2"):
        terms = call(x, leaves, decoder_norm=decoder_norm)
        torch.testing.assert_close(terms.loss, expected.loss)
        torch.testing.assert_close(terms.mse_per_layer[0], expected.mse)


def test_l1_charges_layers_and_l2_shares_them():
    # One latent writes 5 to one layer; another spreads the same length over two, as 3 and 4.
    W_dec = torch.tensor([[[5.0], [0.0]], [[3.0], [4.0]]])
    x = torch.zeros(2, 2, 1)
    for decoder_norm, price in (("l1", 7.0), ("l2", 5.0)):
        for latent, paid in ((0, 5.0), (1, price)):
            f = torch.zeros(2, 2)
            f[:, latent] = -1
            terms = crosscoder_loss(x, f, x, W_dec, sparsity_coeff=1, decoder_norm=decoder_norm)
            assert terms.sparsity.item() == paid


def test_each_layer_has_its_own_error():
    x, leaves = data()
    with torch.no_grad():
        leaves["x_hat"].copy_(x)
        leaves["x_hat"][:, 1] += 2
    terms = call(x, leaves)
    torch.testing.assert_close(terms.mse_per_layer, torch.tensor([0.0, 4.0, 0.0]).double())
    assert terms.mse.item() == pytest.approx(4)
    assert terms.metrics()["mse_per_layer[1]"] == pytest.approx(4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_padding_enters_nothing(options):
    x, leaves = data(8)
    mask = torch.arange(8) % 3 != 1
    target = torch.randn_like(x)
    kept = {name: leaves[name].detach()[mask].requires_grad_() for name in ("f", "x_hat")}
    kept["W_dec"] = leaves["W_dec"]
    expected = call(x[mask], kept, target=target[mask], **options)
    with torch.no_grad():
        for rows in (x, target, leaves["f"], leaves["x_hat"]):
            rows[~mask] = math.nan
    terms = call(x, leaves, mask=mask, target=target, **options)
    assert terms.metrics() == pytest.approx(expected.metrics())
    *ours, for_decoder = gradients(terms, leaves)
    *theirs, expected_for_decoder = gradients(expected, kept)
    torch.testing.assert_close(for_decoder, expected_for_decoder)
    for rows, rows_kept in zip(ours, theirs, strict=True):
        assert rows[~mask].count_nonzero() == 0
        torch.testing.assert_close(rows[mask], rows_kept)


def test_a_transcoder_reconstructs_its_target():
    x, leaves = data()
    assert call(x, leaves, target=2 * x).metrics() == call(2 * x, leaves).metrics()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_sparse_latents_are_dense_ones(options):
    x, leaves = data(d_sae=9)
    values, indices = leaves["f"].topk(4)
    whole = torch.zeros(6, 9, dtype=x.dtype).scatter(1, indices, values)
    mask = torch.arange(6) != 2
    sparse = call(x, leaves | {"f": SparseLatents(values, indices)}, mask=mask, **options)
    dense = call(x, leaves | {"f": whole}, mask=mask, **options)
    assert sparse.metrics() == pytest.approx(dense.metrics())
    ours, theirs = (
        torch.autograd.grad(terms.loss, list(leaves.values()), retain_graph=True)
        for terms in (sparse, dense)
    )
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(TypeError, match=r"f\.values needs .* batch is 2, but it is 6 in x$"):
        call(x, leaves | {"f": SparseLatents(values[:2], indices[:2])})


@pytest.mark.parametrize("decoder_norm", ["l1", "l2"])
def test_gradcheck_to_second_order(decoder_norm):
    x, leaves = data(3, 2, 3, 3)

    def loss(*values):
        terms = call(x, dict(zip(NAMES, values, strict=True)), decoder_norm=decoder_norm)
        return terms.loss, terms.mse_per_layer, terms.sparsity

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(loss, tuple(leaves.values()))


def test_what_does_not_fit_is_refused():
    x, leaves = data(dtype=torch.float32)
    with pytest.raises(tw.ContractError, match="W_dec.*axis layers is 2, but it is 3 in x"):
        call(x, leaves | {"W_dec": leaves["W_dec"][:, :2]})
    with pytest.raises(tw.ContractError, match="x_hat.*axis batch is 1, but it is 6 in x"):
        call(x, leaves | {"x_hat": leaves["x_hat"][:1]})
    with pytest.raises(tw.ContractError, match='decoder_norm needs Literal.*got str "max"'):
        call(x, leaves, decoder_norm="max")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_halves_are_lifted_before_any_arithmetic(dtype, options):
    x, leaves = data(12, 2, 8, dtype=dtype)
    with torch.no_grad():
        for leaf in (x, leaves["x_hat"], leaves["W_dec"]):
            leaf *= 200  # whose squares overflow in fp16
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    terms, expected = call(x, leaves, **options), call(x.double(), wide, **options)
    for (name, ours), (_, theirs) in zip(terms.items(), expected.items(), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-6, msg=name)
    for ours, theirs in zip(gradients(terms, leaves), gradients(expected, wide), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("options", [OPTIONS["l1"], OPTIONS["l2"]])
def test_compiled_is_eager_and_autocast_changes_nothing(options):
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x, leaves = data(9, 2, 8, 12, dtype=torch.float32)
    options = options | {"mask": torch.arange(9) % 4 != 1}
    plain = call(x, leaves, **options)
    expected = gradients(plain, leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = call(x, leaves, **options)
        assert eager.metrics() == plain.metrics()
        for ours, theirs in zip(gradients(eager, leaves), expected, strict=True):
            assert torch.equal(ours, theirs)
        terms = compiled(x, leaves, **options)
        torch.testing.assert_close(gradients(terms, leaves), expected)
    torch.testing.assert_close(dict(terms.items()), dict(plain.items()))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_functional_transforms(options):
    x, leaves = data()
    expected = call(x, leaves, **options)
    slopes = dict(zip(NAMES, gradients(expected, leaves), strict=True))
    constant = {name: leaf.detach() for name, leaf in leaves.items()}

    def loss(leaves):
        terms = call(x, leaves, **options)
        return terms.loss, terms

    ours, terms = torch.func.grad(loss, has_aux=True)(constant)
    assert isinstance(terms, CrosscoderTerms)
    torch.testing.assert_close(ours, slopes)
    torch.testing.assert_close(dict(terms.items()), dict(expected.items()))
    stacked = {name: torch.stack([leaf, leaf * 0.7]) for name, leaf in constant.items()}
    mapped, terms = torch.vmap(torch.func.grad(loss, has_aux=True))(stacked)
    torch.testing.assert_close({name: rows[0] for name, rows in mapped.items()}, slopes)
    second = loss({name: rows[1] for name, rows in stacked.items()})[1]
    torch.testing.assert_close(terms.mse_per_layer[1], second.mse_per_layer)


def test_nothing_waits_for_the_device():
    # A fake tensor has no data: .item(), a boolean index or nonzero would raise.
    with FakeTensorMode() as mode:
        x, leaves = data()
        leaves = {name: mode.from_tensor(leaf.detach()) for name, leaf in leaves.items()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        for options in OPTIONS.values():
            call(mode.from_tensor(x), leaves, mask=torch.ones(6).bool(), **options).loss.backward()


def test_the_module_is_the_function():
    x, leaves = data()
    numbers = {"sparsity_coeff": 0.5, "decoder_norm": "l2", "feature_reduction": "sum"}
    objective = CrosscoderObjective(Crosscoder(**numbers))
    options = {"mask": x[:, 0, 0] < 1, "target": 2 * x}
    terms = objective(x, *leaves.values(), **options)
    assert terms.metrics() == call(x, leaves, **numbers, **options).metrics()
    assert repr(objective.cfg) in repr(objective)
    assert not list(objective.parameters())


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_an_auxiliary_loss_and_coefficients_that_may_be_tensors(kind):
    x, leaves = data()
    plain = call(x, leaves)
    assert plain.aux == 0
    dead, flat = torch.arange(5) < 3, leaves["x_hat"].flatten(1)
    W_dec = leaves["W_dec"].flatten(1)
    aux = auxiliary_k_loss(x.flatten(1), flat, leaves["f"], W_dec, dead=dead, k_aux=2)
    terms = call(x, leaves, sparsity_coeff=kind(0.3), aux=aux, aux_coeff=kind(0.25))
    torch.testing.assert_close(terms.loss, plain.loss + 0.25 * aux)
    torch.testing.assert_close(terms.aux, aux)
    module = CrosscoderObjective(Crosscoder(sparsity_coeff=0.3, aux_coeff=0.25))
    torch.testing.assert_close(module(x, *leaves.values(), aux=aux).loss, terms.loss)
