"""Chunks of a sequence whose positions are split over ranks are one process's."""

import chunk_cases
import pytest
import torch

SIZES = ([5, 2], [0, 4, 3], [3, 0, 4], [0, 7], [7, 0], [2, 0, 0])


def sequence(sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(sizes))
    time = sum(sizes)
    ids = torch.randint(-1, 3, (2, time), generator=generator).sort(1).values
    return torch.randn(2, time, 4, generator=generator, dtype=dtype), ids


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_ranks_last_logit_predicts_the_next_ranks_first_token(ranks, sizes):
    _, ids = sequence(sizes)
    parts = ranks(chunk_cases.shifted, ids.split(sizes, 1))
    assert torch.equal(torch.cat(parts, 1), chunk_cases.shifted(None, ids))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_means_over_chunks_that_straddle_ranks(ranks, sizes):
    log_probs, ids = sequence(sizes)
    weights = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(9)).double()
    expected, expected_sizes, gradient = chunk_cases.means(None, log_probs, ids, weights)
    results = ranks(
        chunk_cases.means, log_probs.split(sizes, 1), ids.split(sizes, 1), [weights] * len(sizes)
    )
    for found, found_sizes, _ in results:
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
        assert torch.equal(found_sizes, expected_sizes)
    together = torch.cat([part for _, _, part in results], 1)
    torch.testing.assert_close(together, gradient, rtol=1e-13, atol=1e-13)
