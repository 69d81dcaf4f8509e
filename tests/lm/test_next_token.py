"""Next-token cross-entropy: compiled, large logits, and what does not count."""

import math

import pytest
import torch

import termwise as tw
from termwise import _numbers
from termwise.lm import NextTokenLoss, NextTokenTerms, _rows, next_token_loss


def inputs(batch, time, vocab, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, time, vocab, generator=generator, dtype=torch.float64)
    tokens = torch.randint(-1, vocab, (batch, time), generator=generator)
    mask = torch.rand(batch, time, generator=generator) < 0.7
    return logits.to(dtype).requires_grad_(), tokens, mask


def test_positions_whose_token_does_not_count_may_hold_anything():
    logits, tokens, _ = inputs(2, 4, 5)
    tokens[0, 2], tokens[1, 1] = -100, -1
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 3] = False
    changed = logits.detach().clone()
    changed[:, -1] = torch.nan  # predicts nothing
    changed[0, 1], changed[1, 0], changed[1, 2] = torch.inf, torch.nan, -torch.inf
    changed.requires_grad_()
    ours, theirs = (next_token_loss(x, tokens, mask=mask) for x in (changed, logits))
    assert torch.equal(ours.loss, theirs.loss)
    (gradient,) = torch.autograd.grad(ours.loss, changed)
    assert torch.equal(gradient, torch.autograd.grad(theirs.loss, logits)[0])
    assert torch.equal(gradient[:, -1], torch.zeros(2, 5).double())


def test_micro_batches_of_one_normalizer_add_up():
    logits, tokens, _ = inputs(4, 5, 6)
    whole = next_token_loss(logits, tokens)
    parts = [
        next_token_loss(logits[rows], tokens[rows], normalizer=whole.num_tokens)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss)


def test_no_token_is_no_loss_and_in_the_graph():
    logits, tokens, _ = inputs(2, 3, 4)
    terms = next_token_loss(logits, torch.full_like(tokens, -100))
    assert terms.metrics() == {"loss": 0.0, "num_tokens": 0.0, "accuracy": 0.0}
    (gradient,) = torch.autograd.grad(terms.loss, logits)
    assert torch.equal(gradient, torch.zeros_like(logits))


def test_a_token_beyond_the_vocabulary_is_no_number():
    logits, tokens, _ = inputs(2, 3, 4)
    tokens[0, 1] = 4
    for function in (next_token_loss, torch.compile(next_token_loss, backend="eager")):
        loss = function(logits, tokens).loss
        assert loss.isnan()
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient[0, 0].isnan().all()


def test_a_count_of_the_trainer_is_the_normalizer():
    logits, tokens, _ = inputs(2, 3, 4)
    expected = next_token_loss(logits, tokens, normalizer=7.0).loss
    for normalizer in (7, torch.tensor(7), torch.tensor(7, dtype=torch.int32), torch.tensor(7.0)):
        assert torch.equal(next_token_loss(logits, tokens, normalizer=normalizer).loss, expected)


def test_a_logit_that_is_not_finite_shows():
    logits, tokens, _ = inputs(2, 3, 4)
    tokens = tokens.clamp_min(0)
    for value in (torch.nan, torch.inf):
        broken = logits.detach().clone()
        broken[0, 0, 1] = value
        assert next_token_loss(broken, tokens).loss.isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_lifted(dtype):
    logits, tokens, _ = inputs(2, 9, 300, dtype=dtype)
    terms = next_token_loss(logits, tokens)
    exact = logits.detach().double().requires_grad_()
    expected = next_token_loss(exact, tokens)
    assert terms.loss.dtype == torch.float32
    assert terms.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    (ours,) = torch.autograd.grad(terms.loss, logits)
    (theirs,) = torch.autograd.grad(expected.loss, exact)
    torch.testing.assert_close(ours.double(), theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[[1e30, -1e30], [0.0, 0.0]]])
    assert next_token_loss(logits, torch.tensor([[0, 0]])).loss.item() == 0.0


def test_equal_logits_are_a_uniform_guess():
    terms = NextTokenLoss()(torch.zeros(2, 5, 8), torch.ones(2, 5, dtype=torch.int64))
    assert isinstance(terms, NextTokenTerms)
    assert terms.loss.item() == pytest.approx(math.log(8))


def test_it_compiles_whole_and_maps():
    logits, tokens, mask = inputs(2, 4, 5)
    compiled = torch.compile(next_token_loss, fullgraph=True, backend="eager")
    pair = [function(logits, tokens, mask=mask).loss for function in (compiled, next_token_loss)]
    torch.testing.assert_close(*pair)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in pair))
    several = torch.stack([logits.detach(), logits.detach().flip(1)])
    gradient = torch.func.grad(lambda x: next_token_loss(x, tokens, mask=mask).loss)
    expected = torch.stack([gradient(x) for x in several])
    torch.testing.assert_close(torch.vmap(gradient)(several), expected)


def test_refusals():
    logits, tokens, mask = inputs(2, 3, 4)
    with pytest.raises(tw.ContractError, match="tokens needs .* axis time is 2, but it is 3 in"):
        next_token_loss(logits, tokens[:, 1:])
    with pytest.raises(tw.ContractError, match="tokens needs Int.* float32 is not a dtype of Int"):
        next_token_loss(logits, tokens.float())
    with pytest.raises(tw.ContractError, match="mask needs Bool"):
        next_token_loss(logits, tokens, mask=mask.int())


@pytest.mark.parametrize("small", [0, 2**14])
def test_both_sides_of_the_size_that_is_small_agree(monkeypatch, small):
    monkeypatch.setattr(_numbers, "FEW", small)
    monkeypatch.setattr(_rows, "FUSED", small)
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.tensor([[0, 1, -1, 6, 7], [3, 3, 2, 6, 0]])
    for counted in (tokens, tokens.clamp(max=6), tokens.clamp(0, 6)):
        terms = next_token_loss(logits, counted)
        wide = logits[:, :-1].double().log_softmax(2)
        beyond = counted[:, 1:] > 6
        nats = -wide.gather(2, counted[:, 1:, None].clamp(0, 6))[..., 0]
        nats = (nats * torch.where(beyond, torch.nan, 1.0))[counted[:, 1:] >= 0]
        assert terms.num_tokens == len(nats)
        torch.testing.assert_close(terms.loss, nats.mean().float(), equal_nan=True)
        ours, theirs = (
            torch.autograd.grad(loss, logits, retain_graph=True)[0]
            for loss in (terms.loss, nats.mean())
        )
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_last_of_few_positions_may_hold_anything(bad, monkeypatch):
    """It predicts nothing, though it is read with the others."""
    monkeypatch.setattr(_rows, "FUSED", 2**18)
    logits, tokens = torch.randn(2, 5, 4, generator=torch.manual_seed(0)), torch.ones(2, 5).long()
    results = []
    for last in (0.0, bad):
        x = logits.clone()
        x[:, -1] = last
        terms = next_token_loss(x.requires_grad_(), tokens)
        results.append((*terms.metrics().values(), torch.autograd.grad(terms.loss, x)[0]))
    torch.testing.assert_close(*results)
    assert not results[1][-1][:, -1].any()


def test_of_few_tokens_those_that_cross_entropy_ignores_do_not_count(monkeypatch):
    monkeypatch.setattr(_rows, "FUSED", 2**18)
    logits, tokens = torch.randn(2, 5, 4, generator=torch.manual_seed(0)), torch.ones(2, 5).long()
    tokens[0, 2:], tokens[1, 3] = -100, 2
    ours = next_token_loss(logits, tokens).metrics()
    assert ours == pytest.approx(next_token_loss(logits, tokens, mask=tokens >= 0).metrics())
    assert ours["num_tokens"] == 5
