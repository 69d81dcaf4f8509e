"""Sparse latents against the matrix that they stand for."""

import copy

import pytest
import torch
from declared import CASES
from losses import SIZES

from termwise.sae import SparseLatents, lp_penalty, tanh_penalty

TWO = SparseLatents(torch.tensor([[2.0, 1.0]]), torch.tensor([[2, 0]]))


def draw(n=4, k=3, m=6, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(n, m, generator=generator).topk(k).indices
    values = torch.randn(n, k, generator=generator, dtype=torch.float64)
    W_dec = torch.randn(m, d, generator=generator, dtype=torch.float64)
    b_dec = torch.randn(d, generator=generator, dtype=torch.float64)
    return indices, values.requires_grad_(), W_dec.requires_grad_(), b_dec.requires_grad_()


def test_by_hand():
    assert TWO.dense(4).tolist() == [[1, 0, 2, 0]]
    assert TWO.fired(4).tolist() == [True, False, True, False]
    assert TWO.decode(torch.eye(4)).tolist() == [[1, 0, 2, 0]]
    assert TWO.decode(torch.eye(4), torch.ones(4)).tolist() == [[2, 1, 3, 1]]


@pytest.mark.parametrize("kind", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_indices_are_of_any_signed_integer_type(kind):
    f = SparseLatents(TWO.values, TWO.indices.to(kind))
    assert f.dense(4).tolist() == [[1, 0, 2, 0]]
    assert f.fired(4).tolist() == [True, False, True, False]
    assert f.decode(torch.eye(4)).tolist() == [[1, 0, 2, 0]]
    norm = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    assert lp_penalty(f, p=1.0, decoder_norm=norm).tolist() == [201]


def test_it_is_the_matrix_to_the_second_derivative():
    indices, values, W_dec, b_dec = draw()

    def decoded(values, W_dec, b_dec):
        return SparseLatents(values, indices).decode(W_dec, b_dec)

    matrix = torch.zeros(4, 6, dtype=torch.float64).scatter(1, indices, values)
    torch.testing.assert_close(SparseLatents(values, indices).dense(6), matrix)
    torch.testing.assert_close(decoded(values, W_dec, b_dec), matrix @ W_dec + b_dec)
    assert torch.autograd.gradcheck(decoded, (values, W_dec, b_dec))
    assert torch.autograd.gradgradcheck(decoded, (values, W_dec, b_dec))
    # One input alone in the graph.
    frozen = (values.detach(), W_dec.detach())
    assert torch.autograd.gradgradcheck(lambda v: decoded(v, frozen[1], b_dec), (values,))
    assert torch.autograd.gradgradcheck(lambda W: decoded(frozen[0], W, b_dec), (W_dec,))


def test_it_compiles_where_the_graph_makes_it():
    indices, values, W_dec, b_dec = draw()

    def together(values, W_dec):
        f = SparseLatents(values, indices)
        return f.decode(W_dec, b_dec).square().sum() + f.dense(6).square().sum(), f.fired(6)

    ours = torch.compile(together, fullgraph=True, backend="aot_eager")(values, W_dec)
    theirs = together(values, W_dec)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(one[0], (values, W_dec)) for one in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_fired_counts_what_is_not_zero():
    f = SparseLatents(
        torch.tensor([[0.0, -1.0], [float("nan"), 0.0]]), torch.tensor([[0, 1], [2, 0]])
    )
    assert f.fired(4).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("values", "indices", "message"),
    [
        ([[1.0]], torch.tensor([[0]]), "values as a floating tensor, got list"),
        (torch.tensor([[1]]), torch.tensor([[0]]), "values .*, got a tensor of torch.int64"),
        (torch.tensor([[1.0]]), [[0]], "indices as a tensor of signed integers, got list"),
        (torch.tensor([[1.0]]), torch.tensor([[0.0]]), "indices .*, got a tensor of torch.float32"),
        (torch.tensor([[1.0]]), torch.tensor([[True]]), "indices .*, got a tensor of torch.bool"),
        (
            torch.tensor([[1.0]]),
            torch.tensor([0]),
            r"values and indices of one shape, got \[1, 1\] and \[1\]",
        ),
    ],
)
def test_what_it_is_made_of_is_refused_by_name(values, indices, message):
    with pytest.raises(ValueError, match=f"^SparseLatents needs {message}"):
        SparseLatents(values, indices)


NORM, EYE = torch.ones(SIZES["latents"]), torch.eye(SIZES["latents"])
# Every objective that takes latents, as it is declared.
LOSSES = {
    case.loss.__name__: case
    for case in CASES.values()
    if "SparseLatents" in str(case.loss.__annotations__.get("f")) and case.held.masks
}
TAKERS = {
    "SparseLatents.dense": lambda f, mask: f.dense(len(EYE)),
    "SparseLatents.fired": lambda f, mask: f.fired(len(EYE)),
    "SparseLatents.decode": lambda f, mask: f.decode(EYE),
    "lp_penalty": lambda f, mask: lp_penalty(f, p=1.0, decoder_norm=NORM),
    "tanh_penalty": lambda f, mask: tanh_penalty(f, decoder_norm=NORM),
    **{
        name: lambda f, mask, case=case: case.changed(2, f=f, mask=mask)
        for name, case in LOSSES.items()
    },
}
WITHOUT_D_SAE = {"topk_loss", "end_to_end_loss"}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("index", [-1, len(EYE)])
def test_an_index_that_no_latent_has_is_refused_by_name(taker, index):
    f = SparseLatents(torch.ones(2, 2), torch.tensor([[0, 1], [2, index]]))
    if index > 0 and taker in WITHOUT_D_SAE:
        return
    wanted = "of at least 0, got -1: give .* the value 0" if index < 0 else "below d_sae = 5, got 5"
    with pytest.raises(ValueError, match=f"^{taker} needs sparse latents with indices {wanted}"):
        TAKERS[taker](f, None)


@pytest.mark.parametrize("taker", LOSSES)
@pytest.mark.parametrize("index", [-1, len(EYE)])
def test_a_row_that_does_not_count_may_hold_any_index(taker, index):
    mask = torch.tensor([True, False])
    padded = SparseLatents(torch.ones(2, 2), torch.tensor([[0, 1], [index, index]]))
    clean = SparseLatents(torch.ones(2, 2), torch.tensor([[0, 1], [2, 3]]))
    assert TAKERS[taker](padded, mask).metrics() == TAKERS[taker](clean, mask).metrics()


def test_decode_refuses_what_does_not_fit():
    message = r"^SparseLatents.decode needs W_dec of shape \[d_sae, d_model\] and b_dec of \[d_mod"
    for wrong in ((torch.ones(4), None), (EYE, torch.ones(3)), (EYE, EYE)):
        with pytest.raises(ValueError, match=message):
            TWO.decode(*wrong)


def test_a_decoder_without_columns_has_a_reconstruction_without_elements():
    f = SparseLatents(torch.ones(3, 2).requires_grad_(), torch.zeros(3, 2).long())
    W_dec = torch.zeros(4, 0).requires_grad_()
    decoded = f.decode(W_dec)
    decoded.sum().backward()
    assert decoded.shape == (3, 0)
    assert f.values.grad.count_nonzero() == 0
    assert W_dec.grad.shape == (4, 0)


def test_it_is_copied_and_mapped():
    torch.testing.assert_close(copy.deepcopy(TWO).dense(4), TWO.dense(4))
    values = torch.randn(3, 1, 2)
    rows = torch.func.vmap(lambda one: SparseLatents(one, TWO.indices).dense(4))(values)
    torch.testing.assert_close(rows[1], SparseLatents(values[1], TWO.indices).dense(4))
