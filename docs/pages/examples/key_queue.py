"""Contrast with a queue: one positive key for each query, and negatives of earlier steps."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor

import termwise as tw
from termwise import testing


@tw.terms
class QueueTerms(tw.Terms):
    """Terms of `queue_loss`."""

    loss: Float[Tensor, ""]
    """Cross-entropy of the positive key among it and the queue, in nats, mean over the batch."""
    alignment: Float[Tensor, ""]
    """Cosine of query and key, mean over the batch; detached."""


@tw.contract
def queue_loss(
    queries: Float[Tensor, "batch dim"],
    keys: Float[Tensor, "batch dim"],
    queue: Float[Tensor, "size dim"],
    *,
    temperature: float = 0.2,
) -> QueueTerms:
    """Compute MoCo's loss, He et al. (2020), equation 1: keys and queue get no gradient."""
    q, k, old = (F.normalize(x, dim=1) for x in (queries, keys.detach(), queue.detach()))
    positive = (q * k).sum(1, keepdim=True)
    logits = torch.cat((positive, q @ old.T), 1) / temperature
    return QueueTerms(loss=-logits.log_softmax(1)[:, 0].mean(), alignment=positive.detach().mean())


class QueueLoss(tw.LossModule):
    """`queue_loss` and the queue itself: a buffer, whose oldest keys each call replaces."""

    dim: int
    size: int = 4096
    temperature: float = 0.2

    def __post_init__(self) -> None:
        self.register_buffer("queue", F.normalize(torch.randn(self.size, self.dim), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    def __call__(
        self, queries: Float[Tensor, "batch dim"], keys: Float[Tensor, "batch dim"]
    ) -> QueueTerms:
        """Compute the terms with the queue as it is, then put the keys into it."""
        terms = queue_loss(queries, keys, self.queue.clone(), temperature=self.temperature)
        with torch.no_grad():
            places = (self.place + torch.arange(len(keys), device=keys.device)) % self.size
            self.queue[places] = F.normalize(keys.detach(), dim=1)
            self.place.copy_((self.place + len(keys)) % self.size)
        return terms


def formula(queries: Tensor, keys: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """Return the loss of one query after the other."""
    total = torch.zeros((), dtype=queries.dtype)
    for query, key in zip(queries, keys.detach(), strict=True):
        unit = query / query.square().sum().sqrt()
        others = torch.stack([x / x.square().sum().sqrt() for x in (key, *queue.detach())])
        powers = (others @ unit / temperature).exp()
        total = total - (powers[0] / powers.sum()).log()
    return total / len(queries)


def check() -> None:
    """Hold the loss to what it promises."""
    drawn = {
        "sizes": {"batch": st.integers(1, 3), "size": st.integers(1, 3), "dim": 2},
        "elements": st.floats(0.5, 2.0),
    }
    testing.assert_formula(queue_loss, formula, max_examples=8, **drawn)
    testing.assert_permutation_invariant(queue_loss, "size", max_examples=3, **drawn)
    testing.assert_pure(queue_loss, max_examples=3, **drawn)
    module = QueueLoss(dim=2, size=3)
    before = module.queue.clone()
    keys = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    expected = queue_loss(keys, keys, before)
    assert module(keys, keys).loss == expected.loss  # with the queue before the keys enter it
    assert torch.equal(module.queue, torch.tensor([[0.6, 0.8], [0.0, 1.0], before[2].tolist()]))
    module(keys, keys)
    assert torch.equal(module.queue[:1], torch.tensor([[0.0, 1.0]]))  # the oldest went
