"""A variational autoencoder: the evidence lower bound, with its two terms apart."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

import termwise as tw
from termwise import testing


@tw.terms
class EvidenceTerms(tw.Terms):
    """Terms of `negative_evidence_loss`."""

    loss: Float[Tensor, ""]
    """reconstruction + beta * kl: at beta 1 minus the evidence lower bound."""
    reconstruction: Float[Tensor, ""]
    """Bernoulli cross-entropy in nats, summed over pixels, mean over the batch."""
    kl: Float[Tensor, ""]
    """KL(q(z | x) || N(0, I)) in nats, summed over latents, mean over the batch."""
    active: Float[Tensor, ""]
    """Latents of which q tells more than 0.01 nats on average; detached."""


@tw.contract
def negative_evidence_loss(
    x: Float[Tensor, "batch pixels"],
    logits: Float[Tensor, "batch pixels"],
    mean: Float[Tensor, "batch latents"],
    log_variance: Float[Tensor, "batch latents"],
    *,
    beta: float = 1.0,
) -> EvidenceTerms:
    """Compute the loss of Kingma, Welling (2014), equation 10, for pixels in 0..1."""
    pixels = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    nats = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
    reconstruction, kl = pixels.sum(1).mean(), nats.sum(1).mean()
    return EvidenceTerms(
        loss=reconstruction + beta * kl,
        reconstruction=reconstruction,
        kl=kl,
        active=(nats.mean(0) > 0.01).sum().to(kl.dtype),
    )


class NegativeEvidenceLoss(tw.LossModule):
    """`negative_evidence_loss` as a module."""

    beta: float = 1.0

    def __call__(
        self,
        x: Float[Tensor, "batch pixels"],
        logits: Float[Tensor, "batch pixels"],
        mean: Float[Tensor, "batch latents"],
        log_variance: Float[Tensor, "batch latents"],
    ) -> EvidenceTerms:
        """Compute the terms."""
        return negative_evidence_loss(x, logits, mean, log_variance, **self.hyperparameters())


def formula(
    x: Tensor, logits: Tensor, mean: Tensor, log_variance: Tensor, *, beta: float
) -> dict[str, Tensor]:
    """Return the terms by distributions of torch."""
    q = torch.distributions.Normal(mean, (log_variance / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    kl = torch.distributions.kl_divergence(q, prior).sum() / len(x)
    p = 1 / (1 + (-logits).exp())
    reconstruction = -(x * p.log() + (1 - x) * (1 - p).log()).sum() / len(x)
    return {"loss": reconstruction + beta * kl, "reconstruction": reconstruction, "kl": kl}


def check() -> None:
    """Hold the loss to what it promises."""
    testing.assert_formula(negative_evidence_loss, formula, max_examples=8)
    testing.assert_terms_sum(
        negative_evidence_loss, {"reconstruction": 1.0, "kl": "beta"}, max_examples=4
    )
    testing.assert_permutation_invariant(negative_evidence_loss, "batch", max_examples=3)
