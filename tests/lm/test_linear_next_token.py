"""The next-token loss of a linear head is that of its logits, which it never holds."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import termwise as tw
from termwise.lm import LinearNextTokenLoss, NextTokenTerms, _linear_rows, linear_next_token_loss

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def draw(batch, time, vocab, *, d_model=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, time, d_model), (vocab, d_model), (vocab,)
    tensors = [2 * torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    tokens = torch.randint(-1, vocab, (batch, time), generator=g)
    mask, samples = (torch.rand(n, generator=g) < 0.7 for n in ((batch, time), (batch,)))
    return [x.to(dtype).requires_grad_() for x in tensors], tokens, mask, samples


def oracle(hidden, weight, bias, tokens, softcap, counted):
    """Return the mean of -log softmax over the positions that count, of whole logits in float64."""
    x = hidden @ weight.T
    x = x if bias is None else x + bias
    x = x if softcap is None else softcap * (x / softcap).tanh()
    total, count = 0 * x.sum(), 0
    for b in range(tokens.shape[0]):
        for t in range(tokens.shape[1] - 1):
            if counted[b, t + 1]:
                total = total - x[b, t].log_softmax(0)[tokens[b, t + 1]]
                count += 1
    return total / max(count, 1), count


pytestmark = pytest.mark.usefixtures("path_of_a_head")


@given(
    batch=st.integers(1, 3),
    time=st.integers(1, 5),
    vocab=st.integers(1, 6),
    seed=st.integers(0, 2**30),
    softcap=st.none() | st.sampled_from([0.5, 5.0]),
    biased=st.booleans(),
    masked=st.booleans(),
    by_sample=st.booleans(),
)
def test_terms_and_gradients_are_the_formulas(
    batch, time, vocab, seed, softcap, biased, masked, by_sample
):
    (hidden, weight, bias), tokens, mask, samples = draw(batch, time, vocab, seed=seed)
    counted = tokens >= 0
    options = {"softcap": softcap, "bias": bias if biased else None}
    if masked:
        options["mask"], counted = mask, counted & mask
    if by_sample:
        options["sample_mask"], counted = samples, counted & samples[:, None]
    terms = linear_next_token_loss(hidden, weight, tokens, **options)
    loss, count = oracle(hidden, weight, options["bias"], tokens, softcap, counted)
    torch.testing.assert_close(terms.loss, loss, **EXACT)
    assert terms.num_tokens == count
    inputs = [hidden, weight, *([bias] if biased else [])]
    ours, theirs = (torch.autograd.grad(value, inputs) for value in (terms.loss, loss))
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_gradcheck_and_one_input_alone():
    tensors, tokens, _, _ = draw(2, 4, 5)
    loss = lambda h, w, b: linear_next_token_loss(h, w, tokens, bias=b, softcap=3.0).loss  # noqa: E731
    assert torch.autograd.gradcheck(loss, tensors)
    every = torch.autograd.grad(loss(*tensors), tensors)
    for place, expected in enumerate(every):
        alone = [x.detach() for x in tensors]
        alone[place].requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(loss(*alone), alone[place])[0], expected)


def test_by_hand():
    # log(1 + e) and log(1 + e) - 1, of logits (0, 1) of which the first, then the last is right.
    hidden, weight = torch.ones(1, 3, 1), torch.tensor([[0.0], [1.0]])
    terms = linear_next_token_loss(hidden, weight, torch.tensor([[0, 0, 1]]))
    assert terms.loss.item() == pytest.approx(math.log(1 + math.e) - 0.5, rel=1e-6)
    assert terms.accuracy == 0.5
    capped = linear_next_token_loss(hidden, 1e6 * weight, torch.tensor([[0, 0, 0]]), softcap=2.0)
    assert capped.loss.item() == pytest.approx(math.log(1 + math.exp(2)), rel=1e-6)


def test_positions_that_do_not_count_may_hold_anything():
    (hidden, weight, bias), tokens, _, _ = draw(3, 4, 5)
    tokens[0, 2], tokens[1, 1] = -100, -1
    samples = torch.tensor([True, True, False])
    changed = hidden.detach().clone()
    changed[:, -1], changed[0, 1], changed[1, 0] = torch.nan, torch.inf, torch.nan
    changed[2] = torch.nan
    changed.requires_grad_()
    for options in ({}, {"softcap": 2.0}):
        pair = [
            linear_next_token_loss(x, weight, tokens, bias=bias, sample_mask=samples, **options)
            for x in (changed, hidden)
        ]
        assert torch.equal(pair[0].loss, pair[1].loss)
        found, expected = (
            torch.autograd.grad(terms.loss, [x, weight, bias])
            for terms, x in zip(pair, (changed, hidden), strict=True)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert (found[0][:, -1] == 0).all()


def test_no_token_is_no_loss_and_in_the_graph():
    tensors, tokens, _, _ = draw(2, 3, 4)
    for options in ({}, {"normalizer": 0}):
        terms = linear_next_token_loss(*tensors[:2], torch.full_like(tokens, -100), **options)
        assert terms.metrics() == {"loss": 0.0, "num_tokens": 0.0, "accuracy": 0.0}
        assert all((g == 0).all() for g in torch.autograd.grad(terms.loss, tensors[:2]))


def test_what_is_not_finite_shows():
    (hidden, weight, bias), tokens, _, _ = draw(2, 3, 4)
    tokens = tokens.clamp_min(0)
    for index, at in ((0, (0, 0, 1)), (1, (2, 0)), (2, (1,))):
        tensors = [x.detach().clone() for x in (hidden, weight, bias)]
        tensors[index][at] = torch.nan
        assert linear_next_token_loss(*tensors[:2], tokens, bias=tensors[2]).loss.isnan()
    tokens[0, 1] = 4  # beyond the vocabulary
    loss = linear_next_token_loss(hidden, weight, tokens).loss
    assert loss.isnan()
    assert torch.autograd.grad(loss, hidden)[0][0, 0].isnan().all()


def test_a_token_that_the_bias_rules_out_has_no_gradient():
    (hidden, weight, _), _, _, _ = draw(2, 3, 4)
    bias = torch.tensor([0.0, 0.0, 0.0, -torch.inf]).double()
    terms = linear_next_token_loss(hidden, weight, torch.ones(2, 3).long(), bias=bias)
    expected = F.cross_entropy((hidden[:, :2] @ weight[:3].T).flatten(0, 1), torch.ones(4).long())
    torch.testing.assert_close(terms.loss, expected)
    ours, theirs = (torch.autograd.grad(x, [hidden, weight]) for x in (terms.loss, expected))
    torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_rounds_only_the_gradients(dtype, autocast):
    tensors, tokens, _, _ = draw(2, 9, 300, d_model=16, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = linear_next_token_loss(*tensors[:2], tokens, bias=tensors[2])
        ours = torch.autograd.grad(1024 * terms.loss, tensors)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = linear_next_token_loss(*wide[:2], tokens, bias=wide[2]).loss
    assert terms.loss.dtype == torch.float32
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    exact = torch.autograd.grad(1024 * expected, wide)
    for found, like in zip(ours, exact, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), like, rtol=0.51 * torch.finfo(dtype).eps, atol=2e-4
        )


def test_it_compiles_whole_and_maps():
    tensors, tokens, mask, samples = draw(2, 4, 5)

    def loss(h, w, b):
        return linear_next_token_loss(
            h, w, tokens, bias=b, softcap=2.0, mask=mask, sample_mask=samples
        ).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*tensors), tensors)
    torch.testing.assert_close(compiled(*tensors), loss(*tensors))
    torch.testing.assert_close(torch.autograd.grad(compiled(*tensors), tensors), expected)
    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    plain = [x.detach() for x in tensors]
    torch.testing.assert_close(gradient(*plain), expected)
    batched = torch.vmap(gradient, in_dims=(0, None, None))(plain[0][None], *plain[1:])
    torch.testing.assert_close([x[0] for x in batched], list(expected))


def test_no_block_holds_more_than_its_rows(monkeypatch):
    if _linear_rows.FEW:
        pytest.skip("few logits are in one block")
    seen = []
    whole = _linear_rows.Head.logits

    def counted(head, *arguments):
        found = whole(head, *arguments)
        seen.append(len(found[1]))
        return found

    monkeypatch.setattr(_linear_rows.Head, "logits", counted)
    (hidden, weight, _), tokens, _, _ = draw(4, 9, 5)
    linear_next_token_loss(hidden, weight, tokens.clamp_min(0))
    assert max(seen) <= 3
    assert sum(seen) in (32, 36)


def test_refusals():
    (hidden, weight, bias), tokens, _, samples = draw(2, 3, 4)
    call = functools.partial(linear_next_token_loss, hidden, weight, tokens)
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(
            ValueError,
            match=rf"^linear_next_token_loss needs softcap positive and finite, got {value}$",
        ):
            call(softcap=value)
    with pytest.raises(tw.ContractError, match="bias needs .*axis vocab is 3, but it is 4 in"):
        call(bias=bias[1:])
    with pytest.raises(tw.ContractError, match="sample_mask needs .*batch is 1, but it is 2 in"):
        call(sample_mask=samples[:1])
    with pytest.raises(tw.ContractError, match="weight needs .*d_model is 2, but it is 3 in"):
        linear_next_token_loss(hidden, weight[:, 1:], tokens)


def test_the_module_is_the_function():
    (hidden, weight, bias), tokens, mask, samples = draw(2, 3, 4)
    named = {"bias": bias, "mask": mask, "sample_mask": samples, "normalizer": 3}
    terms = LinearNextTokenLoss(softcap=2.0)(hidden, weight, tokens, **named)
    expected = linear_next_token_loss(hidden, weight, tokens, softcap=2.0, **named)
    assert isinstance(terms, NextTokenTerms)
    torch.testing.assert_close(dict(terms.items()), dict(expected.items()), rtol=0, atol=0)
