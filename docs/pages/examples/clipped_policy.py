"""PPO: the clipped objective, a value term and an entropy bonus."""

import torch
from hypothesis import strategies as st
from jaxtyping import Float, Int
from torch import Tensor

import termwise as tw
from termwise import testing


@tw.terms
class PolicyTerms(tw.Terms):
    """Terms of `clipped_policy_loss`."""

    loss: Float[Tensor, ""]
    """policy + value_weight * value - entropy_weight * entropy."""
    policy: Float[Tensor, ""]
    """Minus the smaller of the two surrogate objectives, mean over the batch."""
    value: Float[Tensor, ""]
    """Half the squared error of the value, mean over the batch."""
    entropy: Float[Tensor, ""]
    """Of the policy in nats, mean over the batch: larger explores more."""
    clipped: Float[Tensor, ""]
    """Fraction of samples whose ratio is outside of the clip; detached."""


@tw.contract
def clipped_policy_loss(
    logits: Float[Tensor, "batch actions"],
    values: Float[Tensor, " batch"],
    actions: Int[Tensor, " batch"],
    old_log_probs: Float[Tensor, " batch"],
    advantages: Float[Tensor, " batch"],
    returns: Float[Tensor, " batch"],
    *,
    clip: float = 0.2,
    value_weight: float = 0.5,
    entropy_weight: float = 0.01,
) -> PolicyTerms:
    """Compute PPO's loss, Schulman et al. (2017), equations 7 and 9.

    What was recorded with the samples gets no gradient: old_log_probs, advantages and returns.
    """
    old_log_probs, advantages, returns = (x.detach() for x in (old_log_probs, advantages, returns))
    logs = logits.log_softmax(1)
    ratio = (logs.gather(1, actions.long()[:, None])[:, 0] - old_log_probs).exp()
    bounded = ratio.clamp(1 - clip, 1 + clip)
    policy = -torch.minimum(ratio * advantages, bounded * advantages).mean()
    value = (values - returns).square().mean() / 2
    entropy = -(logs.exp() * logs).sum(1).mean()
    return PolicyTerms(
        loss=policy + value_weight * value - entropy_weight * entropy,
        policy=policy,
        value=value,
        entropy=entropy,
        clipped=(ratio != bounded).to(logits.dtype).mean(),
    )


class ClippedPolicyLoss(tw.LossModule):
    """`clipped_policy_loss` as a module."""

    clip: float = 0.2
    value_weight: float = 0.5
    entropy_weight: float = 0.01

    def __call__(
        self,
        logits: Float[Tensor, "batch actions"],
        values: Float[Tensor, " batch"],
        actions: Int[Tensor, " batch"],
        old_log_probs: Float[Tensor, " batch"],
        advantages: Float[Tensor, " batch"],
        returns: Float[Tensor, " batch"],
    ) -> PolicyTerms:
        """Compute the terms."""
        return clipped_policy_loss(
            logits,
            values,
            actions,
            old_log_probs,
            advantages,
            returns,
            **self.hyperparameters(),
        )


def formula(
    logits: Tensor,
    values: Tensor,
    actions: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    returns: Tensor,
    *,
    clip: float,
    **_: float,
) -> dict[str, Tensor]:
    """Return the terms in a loop over samples."""
    old_log_probs, advantages, returns = (x.detach() for x in (old_log_probs, advantages, returns))
    policy, value, entropy = [], [], []
    for row, action, old, advantage in zip(logits, actions, old_log_probs, advantages, strict=True):
        probabilities = row.exp() / row.exp().sum()
        ratio = probabilities[action] / old.exp()
        low, high = 1 - clip, 1 + clip
        # Where a step further is not rewarded, nothing pushes.
        too_far = ratio > high if advantage > 0 else ratio < low
        policy.append(-advantage * ((high if advantage > 0 else low) if too_far else ratio))
        entropy.append(-(probabilities * probabilities.log()).sum())
    value = [(one - other) ** 2 / 2 for one, other in zip(values, returns, strict=True)]
    means = [
        torch.stack([torch.as_tensor(x) for x in of]).mean() for of in (policy, value, entropy)
    ]
    return dict(zip(("policy", "value", "entropy"), means, strict=True))


def check() -> None:
    """Hold the loss to what it promises."""
    drawn = {
        "sizes": {"batch": st.integers(1, 4), "actions": 3},
        "overrides": {"actions": lambda sizes: torch.arange(sizes["batch"]) % 3},
    }
    weights = {
        "policy": 1.0,
        "value": "value_weight",
        "entropy": lambda call: -call["entropy_weight"],
    }
    testing.assert_formula(clipped_policy_loss, formula, max_examples=15, **drawn)
    testing.assert_terms_sum(clipped_policy_loss, weights, max_examples=4, **drawn)
    testing.assert_pure(clipped_policy_loss, max_examples=3, **drawn)
