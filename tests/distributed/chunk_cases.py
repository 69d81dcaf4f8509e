"""What each rank runs for chunks: functions of the group and of the rank's own arguments."""

from termwise.lm import chunk_average_log_probs
from termwise.lm._chunks import logit_chunks


def shifted(group, chunk_id):
    return logit_chunks(chunk_id, group)


def means(group, log_probs, chunk_id, weights):
    """Means, sizes, and the gradient that reaches this rank's positions."""
    log_probs = log_probs.clone().requires_grad_()
    found, sizes = chunk_average_log_probs(
        log_probs, chunk_id, weights.shape[1], sequence_group=group
    )
    (found * weights).exp().sum().backward()
    return found.detach(), sizes, log_probs.grad
