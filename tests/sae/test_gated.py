"""The gated objective against its formula in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import termwise as tw
from termwise.sae._gated import Gated, GatedObjective, GatedTerms, gated_loss
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


def oracle(x, f, leaves, *, sparsity_coeff=0.25, stop_decoder=True, weighed=False, **options):
    f_gate, x_hat, W_dec, b_dec, norm = (leaves[name] for name in NAMES)
    divisor = 1 if options.get("feature_reduction") == "sum" else x.shape[1]
    frozen = (W_dec.detach(), b_dec.detach()) if stop_decoder else (W_dec, b_dec)
    gate = f_gate * (f_gate > 0)
    paid = sum(gate[:, j] * (norm[j] if weighed else 1) for j in range(gate.shape[1]))
    values = {
        "mse": ((x - x_hat) ** 2).sum(1).mean() / divisor,
        "sparsity": sparsity_coeff * paid.mean(),
        "aux": ((x - gate @ frozen[0] - frozen[1]) ** 2).sum(1).mean() / divisor,
    }
    return values | {"loss": sum(values.values()), "l0": (f != 0).to(x.dtype).sum(1).mean()}


@given(
    n=st.integers(1, 8),
    d_model=st.integers(1, 6),
    d_sae=st.integers(1, 8),
    seed=st.integers(0, 2**30),
    sparsity_coeff=st.floats(-2, 2),
    stop_decoder=st.booleans(),
    weighed=st.booleans(),
    feature_reduction=st.sampled_from(["mean", "sum"]),
)
def test_terms_and_gradients_are_the_formulas(
    n, d_model, d_sae, seed, sparsity_coeff, stop_decoder, weighed, feature_reduction
):
    x, f, leaves = data(n, d_model, d_sae, seed=seed)
    options = {
        "sparsity_coeff": sparsity_coeff,
        "stop_decoder": stop_decoder,
        "weighed": weighed,
        "feature_reduction": feature_reduction,
    }
    terms, expected = call(x, f, leaves, **options), oracle(x, f, leaves, **options)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(terms, name), value, rtol=1e-11, atol=1e-12, msg=name)
    for name in ("mse", "sparsity", "aux", "loss"):
        if name == "sparsity" and sparsity_coeff == 0:
            assert not terms.sparsity.requires_grad
            continue
        ours, theirs = (
            torch.autograd.grad(
                value, list(leaves.values()), retain_graph=True, materialize_grads=True
            )
            for value in (getattr(terms, name), expected[name])
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


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


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_padding_enters_nothing(options):
    x, f, leaves = data(8)
    mask = torch.arange(8) % 3 != 1
    target = torch.randn(8, 3, dtype=torch.float64)
    kept = dict(leaves)
    for name in ("f_gate", "x_hat"):
        kept[name] = leaves[name].detach()[mask].requires_grad_()
    expected = call(x[mask], f[mask], kept, target=target[mask], **options)
    with torch.no_grad():
        for rows in (x, f, target, leaves["f_gate"], leaves["x_hat"]):
            rows[~mask] = math.nan
    terms = call(x, f, leaves, mask=mask, target=target, **options)
    assert terms.metrics() == pytest.approx(expected.metrics())
    pairs = zip(gradients(terms, leaves), gradients(expected, kept), NAMES, strict=True)
    for ours, theirs, name in pairs:
        if name in ("f_gate", "x_hat"):
            assert ours[~mask].count_nonzero() == 0
            ours = ours[mask]
        torch.testing.assert_close(ours, theirs)


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


def test_gradcheck_to_second_order():
    x, f, leaves = data(4)

    def loss(*values):
        terms = call(x, f, dict(zip(NAMES, values, strict=True)), weighed=True, stop_decoder=False)
        return terms.loss, terms.aux, terms.sparsity

    assert torch.autograd.gradcheck(loss, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(loss, tuple(leaves.values()))


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


@pytest.mark.parametrize("options", [OPTIONS["frozen"], OPTIONS["weighed"]])
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


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_functional_transforms(options):
    x, f, leaves = data()
    expected = call(x, f, leaves, **options)
    slopes = dict(zip(NAMES, gradients(expected, leaves), strict=True))
    constant = {name: leaf.detach() for name, leaf in leaves.items()}

    def loss(leaves):
        terms = call(x, f, leaves, **options)
        return terms.loss, terms

    ours, terms = torch.func.grad(loss, has_aux=True)(constant)
    assert isinstance(terms, GatedTerms)
    torch.testing.assert_close(ours, slopes)
    torch.testing.assert_close(dict(terms.items()), dict(expected.items()))
    stacked = {name: torch.stack([leaf, leaf * 0.7]) for name, leaf in constant.items()}
    mapped, terms = torch.vmap(torch.func.grad(loss, has_aux=True))(stacked)
    torch.testing.assert_close({name: rows[0] for name, rows in mapped.items()}, slopes)
    second = loss({name: rows[1] for name, rows in stacked.items()})[0]
    torch.testing.assert_close(terms.loss[1], second)


def test_nothing_waits_for_the_device():
    # A fake tensor has no data: .item(), a boolean index or nonzero would raise.
    with FakeTensorMode() as mode:
        x, f, leaves = data()
        leaves = {name: mode.from_tensor(leaf.detach()) for name, leaf in leaves.items()}
        for leaf in leaves.values():
            leaf.requires_grad_()
        mask = torch.ones(6).bool()
        for options in OPTIONS.values():
            x, f = mode.from_tensor(x), mode.from_tensor(f)
            call(x, f, leaves, mask=mask, **options).loss.backward()


def test_the_module_is_the_function():
    x, f, leaves = data()
    numbers = {"sparsity_coeff": 0.5, "stop_decoder": False, "feature_reduction": "sum"}
    objective = GatedObjective(Gated(**numbers))
    f_gate, x_hat, W_dec, b_dec, norm = leaves.values()
    options = {"mask": x[:, 0] < 1, "target": 2 * x}
    terms = objective(x, f, x_hat, f_gate, W_dec, b_dec, decoder_norm=norm, **options)
    expected = call(x, f, leaves, weighed=True, **numbers, **options)
    assert terms.metrics() == expected.metrics()
    assert repr(objective.cfg) in repr(objective)
    assert not list(objective.parameters())
