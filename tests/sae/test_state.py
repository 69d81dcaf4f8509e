"""State that outlives a step: dead latents and BatchTopK's threshold."""

import pytest
import torch

import termwise as tw
from termwise.sae import ActivationThreshold, DeadLatents


def test_tokens_are_counted_since_a_latent_fired():
    state = DeadLatents.start(4)
    for fired, tokens in (([1, 0, 0, 0], 10), ([0, 1, 0, 0], 20), ([0, 0, 1, 0], torch.tensor(30))):
        state = state.update(torch.tensor(fired) > 0, tokens)
    assert state.tokens_since_fired.tolist() == [50, 30, 0, 60]
    assert state.dead(after=50).tolist() == [True, False, False, True]
    assert state.tokens_since_fired.dtype == torch.int64


def test_an_update_leaves_the_old_state_alone():
    state = DeadLatents.start(2)
    state.update(torch.tensor([True, False]), 5)
    assert state.tokens_since_fired.tolist() == [0, 0]
    with pytest.raises(AttributeError):
        state.tokens_since_fired = None


def test_refusals():
    with pytest.raises(ValueError, match=r"^DeadLatents.update needs fired of 2 latents, got 3$"):
        DeadLatents.start(2).update(torch.zeros(3) > 0, 5)
    with pytest.raises(tw.ContractError, match="fired needs Bool"):
        DeadLatents.start(2).update(torch.zeros(2), 5)
    with pytest.raises(ValueError, match=r"needs decay in 0..1, got 1.0"):
        ActivationThreshold.start().update(torch.ones(1, 1), decay=1.0)


def test_the_threshold_is_the_corrected_mean_of_minima():
    state = ActivationThreshold.start()
    assert state.value == 0  # which gates nothing
    minima = [0.5, 0.25, 1.0]
    for least in minima:
        state = state.update(torch.tensor([[0.0, least], [-3.0, 2.0]]), decay=0.9)
    weights = [0.1 * 0.9**2, 0.1 * 0.9, 0.1]
    expected = sum(w * m for w, m in zip(weights, minima, strict=True)) / sum(weights)
    assert state.value.item() == pytest.approx(expected)


def test_a_batch_without_a_positive_latent_changes_nothing():
    state = ActivationThreshold.start().update(torch.tensor([[0.5]]))
    for nothing in (torch.zeros(2, 3), torch.zeros(0, 3)):
        assert state.update(nothing).value == state.value
    assert state.update(torch.tensor([[float("nan")]])).value.isnan()


def test_the_threshold_starts_as_dictionary_learnings():
    batches = [torch.tensor([[0.0, 0.5], [3.0, 2.0]]), torch.tensor([[1.0, 4.0], [0.0, 8.0]])]
    minimum = mean = ActivationThreshold.start()
    for place, (by_minimum, by_mean) in enumerate([(0.5, 1.25), (0.55, 1.575)]):
        # 0.9 * 0.5 + 0.1 * 1 and 0.9 * (0.5 + 2) / 2 + 0.1 * (1 + 8) / 2
        minimum = minimum.update(batches[place], decay=0.9, first="minimum")
        mean = mean.update(batches[place], decay=0.9, first="mean")
        assert minimum.value.item() == pytest.approx(by_minimum)
        assert mean.value.item() == pytest.approx(by_mean)


@pytest.mark.parametrize("first", [None, "minimum", "mean"])
def test_rows_without_a_positive_latent_change_no_threshold(first):
    state = ActivationThreshold.start()
    for nothing in (torch.zeros(2, 3), torch.zeros(0, 3), -torch.ones(1, 3)):
        assert state.update(nothing, first=first).value == 0
    state = state.update(torch.tensor([[0.0, 0.0], [0.5, 4.0]]), first=first)
    assert state.value.item() == pytest.approx(0.5)
    assert state.update(torch.zeros(2, 3), first=first).value == state.value
    assert state.update(torch.tensor([[float("nan")]]), first=first).value.isnan()
