"""A loss on a graph: its edges are pairs of indices, so that not every node counts."""

import torch
from hypothesis import strategies as st
from jaxtyping import Float, Int
from torch import Tensor

import termwise as tw
from termwise import testing


@tw.terms
class GraphTerms(tw.Terms):
    """Terms of `smoothness_loss`."""

    loss: Float[Tensor, ""]
    """smoothness + anchor_weight * anchor."""
    smoothness: Float[Tensor, ""]
    """Squared difference along an edge, times its weight, mean over edges."""
    anchor: Float[Tensor, ""]
    """Squared distance of a node from where it was, mean over nodes and features."""


@tw.contract
def smoothness_loss(
    nodes: Float[Tensor, "nodes features"],
    before: Float[Tensor, "nodes features"],
    edges: Int[Tensor, "2 edges"],
    weights: Float[Tensor, " edges"],
    *,
    anchor_weight: float = 0.1,
) -> GraphTerms:
    """Make neighbours alike, and let no node go far: Laplacian smoothing."""
    start, end = edges.long()
    apart = (nodes[start] - nodes[end]).square().sum(1)
    smoothness = (weights * apart).mean()
    anchor = (nodes - before).square().mean()
    return GraphTerms(
        loss=smoothness + anchor_weight * anchor, smoothness=smoothness, anchor=anchor
    )


class SmoothnessLoss(tw.LossModule):
    """`smoothness_loss` as a module."""

    anchor_weight: float = 0.1

    def __call__(
        self,
        nodes: Float[Tensor, "nodes features"],
        before: Float[Tensor, "nodes features"],
        edges: Int[Tensor, "2 edges"],
        weights: Float[Tensor, " edges"],
    ) -> GraphTerms:
        """Compute the terms."""
        return smoothness_loss(nodes, before, edges, weights, **self.hyperparameters())


def formula(
    nodes: Tensor, before: Tensor, edges: Tensor, weights: Tensor, *, anchor_weight: float
) -> Tensor:
    """Return the loss by the graph's Laplacian matrix."""
    count = len(nodes)
    laplacian = torch.zeros(count, count, dtype=nodes.dtype)
    for (start, end), weight in zip(edges.T.tolist(), weights, strict=True):
        step = torch.zeros(count, dtype=nodes.dtype)
        step[start] += 1
        step[end] -= 1
        laplacian = laplacian + weight * torch.outer(step, step)
    smoothness = torch.einsum("if,ij,jf->", nodes, laplacian, nodes) / len(weights)
    return smoothness + anchor_weight * ((nodes - before) ** 2).sum() / nodes.numel()


def check() -> None:
    """Hold the loss to what it promises."""

    def ring(sizes: dict[str, int]) -> Tensor:
        start = torch.arange(sizes["edges"]) % sizes["nodes"]
        return torch.stack((start, (start + 1) % sizes["nodes"]))

    drawn = {
        "sizes": {"nodes": st.integers(1, 4), "edges": st.integers(1, 5)},
        "overrides": {"edges": ring},
    }
    testing.assert_formula(smoothness_loss, formula, max_examples=8, **drawn)
    weights = {"smoothness": 1.0, "anchor": "anchor_weight"}
    testing.assert_terms_sum(smoothness_loss, weights, max_examples=4, **drawn)
    testing.assert_gradients(smoothness_loss, second=True, max_examples=2, **drawn)
