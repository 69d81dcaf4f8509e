"""The end-to-end objective: directions, blocks, padding, and tokens that cannot come."""

import math

import pytest
import torch
from losses.end_to_end import END_TO_END

import termwise as tw
from termwise.sae._end_to_end import (
    end_to_end_loss,
)
from termwise.sae._latents import SparseLatents

WEIGHTS = {"kl_coeff": 0.7, "reconstruction_coeff": 0.3, "sparsity_coeff": 0.2}


def data(n=6, vocab=7, widths=(3, 5), d_sae=4, *, seed=0, dtype=torch.float64):
    """Leaves: the patched run's logits, f and later layers; and the original run's."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = [normal(n, vocab), normal(n, d_sae), *[normal(n, width) for width in widths]]
    constants = [normal(n, vocab), *[normal(n, width) for width in widths]]
    return [leaf.requires_grad_() for leaf in leaves], constants


def call(leaves, constants, **options):
    logits, f, *x_hat = leaves
    original, *x = constants
    return end_to_end_loss(logits, original, x=x, x_hat=x_hat, f=f, **WEIGHTS | options)


def gradients(terms, leaves):
    return torch.autograd.grad(terms.loss, leaves)


def test_the_direction_is_from_the_original():
    # p = (1, 0) and q = (1/2, 1/2): KL(p || q) = log 2, and KL(q || p) is infinite.
    certain, even = torch.tensor([[0.0, -math.inf]]), torch.zeros(1, 2)
    assert end_to_end_loss(even, certain).kl.item() == pytest.approx(math.log(2))
    assert end_to_end_loss(certain, even).kl.item() == math.inf
    assert end_to_end_loss(certain, certain).kl.item() == 0
    assert end_to_end_loss(even, even + 7).kl.item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("compiled", [False, True])
def test_tokens_that_cannot_come(compiled):
    function = end_to_end_loss
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    (logits, *_), (original, *_) = data()
    both = torch.tensor([0, 3])
    with torch.no_grad():
        logits[:, both] = -math.inf
        original[:, both] = -math.inf
        original[:, 5] = -math.inf  # possible in the patched model alone
    terms = function(logits, original)
    (slope,) = torch.autograd.grad(terms.loss, logits)
    rest = [1, 2, 4, 5, 6]
    small = logits.detach()[:, rest].requires_grad_()
    p = original[:, [1, 2, 4, 6]].softmax(1)
    theirs = (p * (p.log() - small.log_softmax(1)[:, [0, 1, 2, 4]])).sum(1).mean()
    torch.testing.assert_close(terms.kl, theirs)
    assert slope[:, both].count_nonzero() == 0
    torch.testing.assert_close(slope[:, rest], torch.autograd.grad(theirs, small)[0])


def test_no_gradient_goes_into_the_original_run():
    leaves, constants = data()
    for constant in constants:
        constant.requires_grad_()
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        terms = function(leaves, constants)
        slopes = torch.autograd.grad(terms.loss, constants, materialize_grads=True)
        assert all(slope.count_nonzero() == 0 for slope in slopes)


def test_what_is_not_given_is_zero():
    (logits, f, *_), (original, *_) = data()
    terms = end_to_end_loss(logits, original)
    assert terms.reconstruction.item() == terms.sparsity.item() == 0
    torch.testing.assert_close(terms.loss, terms.kl)
    assert end_to_end_loss(logits, original, x=(), x_hat=[]).metrics() == terms.metrics()
    terms = end_to_end_loss(logits, original, f=f, sparsity_coeff=2.0)
    assert terms.sparsity.item() == pytest.approx(2 * f.abs().sum(1).mean().item())


def test_many_blocks_of_rows():
    leaves, constants = data(300, 5000, widths=())
    logits, f = leaves
    terms = call(leaves, constants)
    expected = END_TO_END.expected(logits, *constants, f=f, **WEIGHTS)
    torch.testing.assert_close(terms.kl, expected["kl"])
    torch.testing.assert_close(
        gradients(terms, leaves), torch.autograd.grad(expected["loss"], leaves)
    )


def test_padding_enters_nothing():
    leaves, constants = data(8)
    mask = torch.arange(8) % 3 != 1
    kept = [leaf.detach()[mask].requires_grad_() for leaf in leaves]
    expected = call(kept, [constant[mask] for constant in constants])
    with torch.no_grad():
        for rows in (*leaves, *constants):
            rows[~mask] = math.nan
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for function in (call, compiled):
        terms = function(leaves, constants, mask=mask)
        assert terms.metrics() == pytest.approx(expected.metrics())
        theirs = torch.autograd.grad(expected.loss, kept, retain_graph=True)
        for ours, rows in zip(gradients(terms, leaves), theirs, strict=True):
            assert ours[~mask].count_nonzero() == 0
            torch.testing.assert_close(ours[mask], rows)


def test_sparse_latents_are_dense_ones():
    (logits, f, *_), (original, *_) = data(d_sae=9)
    values, indices = f.topk(4)
    whole = torch.zeros(6, 9, dtype=f.dtype).scatter(1, indices, values)
    sparse = end_to_end_loss(logits, original, f=SparseLatents(values, indices), sparsity_coeff=0.5)
    dense = end_to_end_loss(logits, original, f=whole, sparsity_coeff=0.5)
    assert sparse.metrics() == pytest.approx(dense.metrics())


def test_the_backward_pass_keeps_the_logits_alone():
    (logits, *_), (original, *_) = data(1000, 40)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        end_to_end_loss(logits, original)
    large = {x.data_ptr() for x in kept if x.numel() >= logits.numel()}
    assert large == {logits.data_ptr(), original.data_ptr()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": []},
            "end_to_end_loss needs x and x_hat of the same layers, got 0 and 1 tensors",
        ),
        (
            {"x_hat": None},
            "end_to_end_loss needs x and x_hat of the same layers, got 1 and 0 tensors",
        ),
        (
            {"x": [torch.zeros(6, 2)]},
            r"end_to_end_loss needs x\[0\] and x_hat\[0\] of one shape with 6 rows, got "
            r"\[6, 2\] and \[6, 3\]",
        ),
        (
            {"x": [torch.zeros(1, 3)], "x_hat": [torch.zeros(1, 3)]},
            r"end_to_end_loss needs x\[0\] and x_hat\[0\] of one shape with 6 rows, got "
            r"\[1, 3\] and \[1, 3\]",
        ),
        (
            {"x": [torch.zeros(6, 3).long()]},
            r"end_to_end_loss needs floating x\[0\] and x_hat\[0\], got torch.int64 and "
            "torch.float32",
        ),
    ],
)
def test_values_that_make_no_sense_are_refused(change, message):
    options = {"x": [torch.zeros(6, 3)], "x_hat": [torch.zeros(6, 3)]} | change
    with pytest.raises(ValueError, match=f"^{message}$"):
        end_to_end_loss(torch.zeros(6, 4), torch.zeros(6, 4), **options)


def test_what_does_not_fit_is_refused():
    logits = torch.zeros(6, 4)
    with pytest.raises(tw.ContractError, match="original_logits.*axis vocab is 5, but it is 4"):
        end_to_end_loss(logits, torch.zeros(6, 5))
    with pytest.raises(tw.ContractError, match="x needs.*got float32"):
        end_to_end_loss(logits, logits, x=torch.zeros(6, 3), x_hat=torch.zeros(6, 3))
    with pytest.raises(tw.ContractError, match=r"f\.values needs .* batch is 2, but it is 6 in"):
        end_to_end_loss(logits, logits, f=SparseLatents(torch.ones(2, 3), torch.zeros(2, 3).long()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_lifted_before_any_arithmetic(dtype):
    leaves, constants = data(12, 40, dtype=dtype)
    with torch.no_grad():
        leaves[2] *= 400  # whose squares overflow in fp16
        constants[1] *= 400
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    terms = call(leaves, constants)
    expected = call(wide, [constant.double() for constant in constants])
    for (name, ours), (_, theirs) in zip(terms.items(), expected.items(), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=1e-6, msg=name)
    for ours, theirs in zip(gradients(terms, leaves), gradients(expected, wide), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-2, atol=1e-2)


def test_compiled_is_eager_and_autocast_changes_nothing():
    leaves, constants = data(9, 20, dtype=torch.float32)
    options = {"mask": torch.arange(9) % 4 != 1}
    plain = call(leaves, constants, **options)
    expected = gradients(plain, leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = call(leaves, constants, **options)
        assert terms.metrics() == plain.metrics()
        for ours, theirs in zip(gradients(terms, leaves), expected, strict=True):
            assert torch.equal(ours, theirs)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        terms = compiled(leaves, constants, **options)
        torch.testing.assert_close(gradients(terms, leaves), expected)
    torch.testing.assert_close(dict(terms.items()), dict(plain.items()))


def test_coefficients_may_be_tensors():
    generator = torch.Generator().manual_seed(0)
    logits, original, f = (torch.randn(4, 5, generator=generator) for _ in range(3))
    numbers = {"kl_coeff": 0.5, "reconstruction_coeff": 0.25, "sparsity_coeff": 2.0}
    more = {"x": [logits], "x_hat": [original], "f": f}
    expected = end_to_end_loss(logits, original, **more, **numbers)
    for dtype in (torch.float32, torch.float64):
        tensors = {name: torch.tensor(number, dtype=dtype) for name, number in numbers.items()}
        terms = end_to_end_loss(logits, original, **more, **tensors)
        assert terms.loss.dtype == torch.float32
        assert terms.metrics() == expected.metrics()
