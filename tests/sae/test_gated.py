"""The gated objective: known values, its frozen decoder, halves and refusals."""

import pytest
import torch

import termwise as tw
from termwise.sae._gated import gated_loss
from termwise.sae._latents import SparseLatents

OPTIONS = {
    "frozen": {},
    "trained": {"stop_decoder": False, "feature_reduction": "sum"},
    "weighed": {"weighed": True, "stop_decoder": False},
}
NAMES = ("f_gate", "x_hat", "W_dec", "b_dec", "decoder_norm")


def data(n=6, d_model=3, d_sae=5, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = {
        "f_gate": normal(n, d_sae),
        "x_hat": normal(n, d_model),
        "W_dec": normal(d_sae, d_model),
        "b_dec": normal(d_model),
        "decoder_norm": normal(d_sae).abs(),
    }
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    return normal(n, d_model), normal(n, d_sae).relu(), leaves


def call(x, f, leaves, *, weighed=False, **options):
    f_gate, x_hat, W_dec, b_dec, norm = (leaves[name] for name in NAMES)
    return gated_loss(
        x,
        f,
        x_hat,
        f_gate,
        W_dec,
        b_dec,
        decoder_norm=norm if weighed else None,
        **{"sparsity_coeff": 0.25} | options,
    )


def gradients(terms, leaves):
    return torch.autograd.grad(terms.loss, list(leaves.values()), materialize_grads=True)


def test_the_decoder_is_frozen_in_the_auxiliary_term_alone():
    x, f, leaves = data()
    decoder = [leaves["W_dec"], leaves["b_dec"]]
    leaves["x_hat"] = f @ decoder[0] + decoder[1]
    for stop_decoder in (True, False):
        terms = call(x, f, leaves, stop_decoder=stop_decoder)
        by_aux = torch.autograd.grad(
            terms.aux, decoder, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        assert all((slope.count_nonzero() == 0) == stop_decoder for slope in by_aux)
        by_mse = torch.autograd.grad(terms.mse, decoder, retain_graph=True)
        assert all(slope.count_nonzero() > 0 for slope in by_mse)


def test_one_row_by_hand():
    # The gate passes 2 and blocks -1; its penalty is 2 * 3, and it reconstructs 2 * 1 + 1.
    terms = gated_loss(
        torch.tensor([[5.0]]),
        torch.tensor([[4.0, 0.0]]),
        torch.tensor([[7.0]]),
        torch.tensor([[2.0, -1.0]]),
        torch.tensor([[1.0], [10.0]]),
        torch.tensor([1.0]),
        sparsity_coeff=0.5,
        decoder_norm=torch.tensor([3.0, 100.0]),
    )
    assert terms.metrics() == {"loss": 11.0, "mse": 4.0, "sparsity": 3.0, "aux": 4.0, "l0": 1.0}


def test_a_transcoder_reconstructs_its_target_twice():
    x, f, leaves = data()
    assert call(x, f, leaves, target=2 * x).metrics() == call(2 * x, f, leaves).metrics()


def test_sparse_latents_are_counted_as_dense_ones():
    x, f, leaves = data()
    values, indices = f.topk(3)
    sparse = call(x, SparseLatents(values, indices), leaves)
    dense = torch.zeros_like(f).scatter(1, indices, values)
    assert sparse.metrics() == call(x, dense, leaves).metrics()
    with pytest.raises(TypeError, match=r"f\.values needs .* batch is 2, but it is 6 in x$"):
        call(x, SparseLatents(values[:2], indices[:2]), leaves)


def test_what_does_not_fit_is_refused():
    x, f, leaves = data(dtype=torch.float32)
    with pytest.raises(tw.ContractError, match="W_dec.*axis d_sae is 4, but it is 5 in f"):
        call(x, f, leaves | {"W_dec": leaves["W_dec"][:4]})
    with pytest.raises(tw.ContractError, match="f .*axis batch is 1, but it is 6 in x"):
        call(x, f[:1], leaves)
    with pytest.raises(tw.ContractError, match="stop_decoder needs bool"):
        call(x, f, leaves, stop_decoder="yes")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_halves_are_lifted_before_any_arithmetic(dtype, options):
    x, f, leaves = data(12, 8, 6, dtype=dtype)
    with torch.no_grad():
        for leaf in (x, leaves["x_hat"]):
            leaf *= 200  # whose squares overflow in fp16
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    terms = call(x, f, leaves, **options)
    expected = call(x.double(), f.double(), wide, **options)
    for (name, ours), (_, theirs) in zip(terms.items(), expected.items(), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-6, msg=name)
    for ours, theirs in zip(gradients(terms, leaves), gradients(expected, wide), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("options", [OPTIONS["weighed"]])
def test_compiled_is_eager_and_autocast_changes_nothing(options):
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    x, f, leaves = data(9, 8, 12, dtype=torch.float32)
    options = options | {"mask": torch.arange(9) % 4 != 1}
    plain = call(x, f, leaves, **options)
    expected = gradients(plain, leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        eager = call(x, f, leaves, **options)
        assert eager.metrics() == plain.metrics()
        for ours, theirs in zip(gradients(eager, leaves), expected, strict=True):
            assert torch.equal(ours, theirs)
        terms = compiled(x, f, leaves, **options)
        torch.testing.assert_close(gradients(terms, leaves), expected)
    torch.testing.assert_close(dict(terms.items()), dict(plain.items()))
