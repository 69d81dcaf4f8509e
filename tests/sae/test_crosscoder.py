"""The crosscoder objective: layers, norms, halves and refusals."""

import pytest
import torch

import termwise as tw
from termwise.sae._auxiliary_k import auxiliary_k_loss
from termwise.sae._crosscoder import (
    Crosscoder,
    CrosscoderObjective,
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


@pytest.mark.parametrize("options", [OPTIONS["l2"]])
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
