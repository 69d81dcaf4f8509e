"""SwAV: each view predicts the assignment of the other views of its sample."""

import torch
from jaxtyping import Float
from torch import Tensor

from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._terms import Terms, terms
from ._assignments import assigned, check_temperature
from ._prototypes import cross_entropy_of_views, over_ranks
from ._views import refuse_views


@terms
class SwappedPredictionTerms(Terms):
    """Terms of [`swapped_prediction_loss`][termwise.joint_embedding.swapped_prediction_loss]."""

    loss: Float[Tensor, ""]
    """cross_entropy."""
    cross_entropy: Float[Tensor, ""]
    """Of assignment and prediction in nats: mean over the pairs of a global view and another view,
    and over the batch."""
    teacher_entropy: Float[Tensor, ""]
    """Entropy of the assignments in nats, mean over global views and batch; detached."""
    kl: Float[Tensor, ""]
    """KL divergence of prediction from assignment, cross_entropy - teacher_entropy; detached."""
    marginal_entropy: Float[Tensor, ""]
    """Entropy of the mean assignment, over global views and batch, in nats; detached. It is near
    log prototypes, since Sinkhorn balances the prototypes; more iterations bring it closer."""


@contract
def swapped_prediction_loss(
    logits: Float[Tensor, "views batch prototypes"],
    *,
    num_global: int | None = None,
    queue: Float[Tensor, "global_views queue prototypes"] | None = None,
    temperature: float = 0.1,
    sinkhorn_temperature: float = 0.05,
    iterations: int = 3,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> SwappedPredictionTerms:
    r"""Predict from each view how Sinkhorn assigns the other views to prototypes (SwAV).

    $$\mathrm{cross\_entropy} = \frac{1}{G (V - 1) n} \sum_{g=1}^G \sum_{v \ne g}
    \sum_{b=1}^n H(p_{gb}, q_{vb}), \qquad H(p, q) = -\sum_k p_k \log q_k, \qquad
    q_{vb} = \mathrm{softmax}(\mathrm{logits}_{vb} / T)$$

    over V views, of which the first G are global. The assignments p_g are those of
    [`sinkhorn`][termwise.joint_embedding.sinkhorn] of global view g's logits over all ranks, at the
    temperature `sinkhorn_temperature`, and get no gradient. `cross_entropy = teacher_entropy + kl`.
    All logits equal: log prototypes.

    Args:
        logits (Float[Tensor, "views batch prototypes"]): cosines of the embeddings of each view
            and the prototypes, both of unit length, the global views first. Positions of a map can
            be samples of their own, and then assign and predict each for itself:
            `einops.rearrange(x, "views batch prototypes h w -> views (batch h w) prototypes")`.
        num_global: G, how many of the first views are assigned; 2 in SwAV. None: all views.
        queue (Float[Tensor, "global_views queue prototypes"] | None): logits of earlier samples,
            for each global view, that Sinkhorn assigns with the batch; in the loss only the batch
            is. They get no gradient.
        temperature: T of the predictions, positive; 0.1 in SwAV.
        sinkhorn_temperature: of the assignments, positive; 0.05 in SwAV (epsilon).
        iterations: of Sinkhorn; 3 in SwAV.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication. Each rank has its own queue.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank; NaN without a sample. Gradients,
        combined over ranks as `grad_reduction` says, equal those of one process that holds all
        samples. Second derivatives of up to 262,144 logits are correct without a group; otherwise
        they raise NotImplementedError.

        Communication of each rank: one maximum and `iterations` sums of num_global * prototypes
        elements, the sums in float64; one sum of prototypes + 2 elements in float64, and one of an
        integer. Does not synchronize with the device.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: fewer than 2 views, num_global is not within 1..views, a queue is not of
            num_global views, a temperature is not positive, iterations less than 1, or no
            prototype.

    References:
        Caron et al., SwAV (2020), https://arxiv.org/abs/2006.09882, equations 2 to 4 and section
        3.2. The authors' code (https://github.com/facebookresearch/swav) and lightly 1.6.0 take the
        mean over pairs as here. lightly's gathers samples from ranks only if configured to.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import swapped_prediction_loss
        >>> swapped_prediction_loss(torch.zeros(2, 8, 16)).loss  # log 16
        tensor(2.7726)
    """
    name = "swapped_prediction_loss"
    refuse_views(logits, num_global, name)
    for value in (temperature, sinkhorn_temperature):
        check_temperature(name, value)
    if iterations < 1:
        raise ValueError(f"{name} needs iterations >= 1, got {iterations}")
    views, rows, prototypes = logits.shape
    if prototypes == 0:
        raise ValueError(f"{name} needs at least 1 prototype, got 0")
    count = views if num_global is None else num_global
    if queue is not None and len(queue) != count:
        raise ValueError(f"{name} needs a queue of the {count} global views, got {len(queue)}")
    with torch.no_grad():
        scores = logits[:count]
        if queue is not None:
            scores = torch.cat((scores, queue.to(scores.dtype)), 1)
        targets = assigned(scores, sinkhorn_temperature, iterations, batch_group)[:, :rows]
    means = cross_entropy_of_views(
        logits,
        targets,
        None,
        count * (views - 1) * over_ranks((rows,), logits, batch_group)[0],
        temperature=temperature,
        skip_same_view=True,
        group=batch_group,
        grad_reduction=grad_reduction,
    )
    return SwappedPredictionTerms(loss=means.cross_entropy, **means._asdict())


class SwappedPredictionLoss(LossModule):
    """[`swapped_prediction_loss`][termwise.joint_embedding.swapped_prediction_loss] as a module.

    Has no parameters and stores no queue: pass it with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import SwappedPredictionLoss
        >>> loss_fn = SwappedPredictionLoss(num_global=2)
        >>> loss_fn(torch.zeros(8, 4, 16)).loss  # log 16
        tensor(2.7726)
    """

    num_global: int | None = None
    temperature: float = 0.1
    sinkhorn_temperature: float = 0.05
    iterations: int = 3
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        logits: Float[Tensor, "views batch prototypes"],
        *,
        queue: Float[Tensor, "global_views queue prototypes"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> SwappedPredictionTerms:
        """Compute the terms of the loss of all views."""
        return swapped_prediction_loss(
            logits, queue=queue, batch_group=batch_group, **self.hyperparameters()
        )
