"""Selections, measurements and states of autoencoders over uneven ranks are one process's."""

import cases
import pytest
import torch
from rows import rows

SIZES = ([11, 5], [13, 7, 4], [4, 0])
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def masks_of(sizes, masked):
    return [torch.arange(n) % 3 != 1 if masked else None for n in sizes]


def joined(masks):
    return None if masks[0] is None else torch.cat(masks)


@pytest.mark.parametrize("sizes", [*SIZES, [0, 0]], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_topk_keeps_k_for_each_row_of_all_ranks(ranks, dtype, masked, sizes):
    # Whole numbers, so that there are ties within ranks and across them.
    shards = [part.mul(2).round().to(dtype) for part in rows(sizes, columns=6)]
    masks = masks_of(sizes, masked)
    world = len(sizes)
    for k, activation in ((1.3, "none"), (3.6, "abs")):
        expected = cases.sae_selection(None, torch.cat(shards), k, joined(masks), activation)
        results = ranks(cases.sae_selection, shards, [k] * world, masks, [activation] * world)
        assert torch.equal(torch.cat(results), expected)
    expected = cases.sae_selection(None, torch.cat(shards), 2, joined(masks), "relu")
    results = ranks(cases.sae_selection, shards, [2] * world, masks, ["relu"] * world)
    assert torch.equal(torch.cat(results), expected)
    whole, mask = torch.cat(shards), joined(masks)
    counted = whole if mask is None else whole[mask]
    assert (expected != 0).sum() == min(2 * len(counted), (counted > 0).sum())


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_measurements(ranks, masked, sizes):
    x, x_hat, masks = rows(sizes), rows(sizes, seed=1), masks_of(sizes, masked)
    expected = cases.sae_measurements(None, torch.cat(x), torch.cat(x_hat), joined(masks))
    for ours in ranks(cases.sae_measurements, x, x_hat, masks):
        torch.testing.assert_close(ours, expected, **EXACT)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_latent_that_fires_anywhere_is_alive_and_all_tokens_pass(ranks, sizes):
    # Latent j fires in step j % 5, of four, and on rank j % world alone.
    latent, world = torch.arange(8), len(sizes)
    steps = [
        [
            part.abs() * ((latent % 5 == step) & (latent % world == rank))
            for rank, part in enumerate(rows(sizes, 8, step))
        ]
        for step in range(4)
    ]
    expected = cases.sae_state(None, [torch.cat(batches) for batches in steps])
    assert expected[0][4] == 4 * sum(sizes)
    assert len(expected[0].unique()) >= 3
    for ours in ranks(cases.sae_state, [list(batches) for batches in zip(*steps, strict=True)]):
        torch.testing.assert_close(ours, expected)
