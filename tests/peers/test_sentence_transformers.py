"""sentence-transformers' MultipleNegativesRankingLoss beside ours."""

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.testing import assert_close

from termwise.joint_embedding import info_nce_loss


def columns(number, n=9, dim=5):
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(number, n, dim, generator=generator, dtype=torch.float64)
    return [one.clone().requires_grad_() for one in made]


def theirs(embeddings, **options):
    loss = MultipleNegativesRankingLoss(None, **options)
    return loss.compute_loss_from_embeddings(embeddings, None)


@pytest.mark.parametrize("hard", [0, 1, 3])
@pytest.mark.parametrize("n", [9, 400])  # as written, and in strips
def test_ranking_with_hard_negatives(hard, n):
    queries, *documents = embeddings = columns(2 + hard, n)
    expected = theirs(embeddings, scale=20.0)
    ours = info_nce_loss(queries, torch.cat(documents), scale=20.0).loss
    assert_close(ours, expected)
    assert_close(torch.autograd.grad(ours, embeddings), torch.autograd.grad(expected, embeddings))


def test_both_directions():
    embeddings = columns(2)
    both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    expected = theirs(embeddings, scale=20.0, **both)
    ours = info_nce_loss(*embeddings, scale=20.0, symmetric=True).loss
    assert_close(ours, expected)
    assert_close(torch.autograd.grad(ours, embeddings), torch.autograd.grad(expected, embeddings))
