"""Decoupled contrastive loss: NT-Xent without the positive in the denominator."""

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _groups
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._numbers import accumulator
from .._terms import Terms, terms
from ._contrast import contrast, row_products, two_views


@terms
class DecoupledContrastiveTerms(Terms):
    """Terms of [`decoupled_contrastive_loss`][termwise.joint_embedding.decoupled_contrastive_loss]."""  # noqa: E501

    loss: Float[Tensor, ""]
    """Log of the sum over the negatives minus the weighted logit of the positive, mean over both
    views, in nats. It may be negative."""
    accuracy: Float[Tensor, ""]
    """Fraction of views whose most similar view (or a tied one) is of the same sample; detached."""


@contract
def decoupled_contrastive_loss(
    z1: Float[Tensor, "batch dim"],
    z2: Float[Tensor, "batch dim"],
    *,
    temperature: float = 0.1,
    sigma: float | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> DecoupledContrastiveTerms:
    r"""Pull two views together and push other samples apart; the positive is not in the sum.

    $$\begin{align*} \mathrm{loss} = \frac{1}{2n} \sum_{i=1}^{2n} \Big( & \log
    \sum_{k \ne i, p(i)} e^{\cos(z_i, z_k) / T} \\
    &- w_i \cos(z_i, z_{p(i)}) / T \Big) \end{align*}$$

    over the n rows of z1 and the n rows of z2, with p(i) the other view of the sample: 2 (n - 1)
    negatives for each. The weights are 1 or, with `sigma`, lower for pairs that are already close:

    $$w_i = 2 - n \, \mathrm{softmax}_i (\cos(z^1_i, z^2_i) / \sigma)$$

    over the pairs of all ranks, without a gradient.

    Above 2^17 logits, and with a group, logits are computed in strips, and no batch x batch tensor
    is stored. Half precision is converted to float32 first, with or without autocast. A non-finite
    input makes the loss non-finite.

    Args:
        z1 (Float[Tensor, "batch dim"]): embeddings of the first view, a row for each sample;
            divided by their norms here. For a feature map, or tokens, `einops.rearrange(z, "b c h w
            -> (b h w) c")` makes each position a sample; if pooled to "b c", each image is one.
        z2 (Float[Tensor, "batch dim"]): embeddings of the second view, in the same order.
        temperature: T, the divisor of the cosines; 0.1 in the paper.
        sigma: width of the weights, 0.5 in the paper (DCLW). None: no weights (DCL).
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. Gradients, combined over ranks as
        `grad_reduction` says, equal those of one process that holds all rows. Second derivatives
        are correct up to 2^17 logits, (2 batch)^2, without a group, and raise NotImplementedError
        beyond and with one; derivatives of the weights are 0 in any order.

        Communication of each rank, for d = dim, N samples over all ranks, n of this rank, in
        elements of the embeddings' dtype (float32 for half precision): its 2 n * d embeddings are
        sent to the others and 2 (N - n) * d received, the gradients of 2 N * d are
        reduce-scattered, and there are sums of 4 and of one count for each rank, with `sigma` of 3
        more; also under `torch.no_grad()`. The counts are read on the host, so with a group a call
        synchronizes with the device.

    Raises:
        ContractError: z1 and z2 are not floating "batch dim" tensors of one shape.
        ValueError: fewer than 2 samples (4 embeddings) over all ranks, dim of 0, or temperature or
            sigma not positive.

    References:
        Yeh et al., Decoupled contrastive learning (2022), https://arxiv.org/abs/2110.06848,
        equations 5 to 7: one logarithm over the negatives of both views, as in the authors' code
        (https://github.com/raminnakhli/Decoupled-Contrastive-Learning) and lightly 1.6.0.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import decoupled_contrastive_loss
        >>> z = torch.eye(4)  # orthonormal samples: log(2 (4 - 1)) - 1 / T
        >>> decoupled_contrastive_loss(z, z, temperature=0.5).metrics()
        {'loss': -0.208..., 'accuracy': 1.0}
    """
    if not (temperature > 0 and (sigma is None or sigma > 0)):
        raise ValueError(
            f"decoupled_contrastive_loss needs temperature > 0 and sigma > 0, "
            f"got {temperature} and {sigma}"
        )
    rows, other = two_views(z1, z2)
    weight = None if sigma is None else _weights(rows.detach(), sigma, batch_group)
    found = contrast(
        rows,
        None,
        1 / temperature,
        positive=other,
        weight=weight,
        form="decoupled",
        group=batch_group,
        grad_reduction=grad_reduction,
        caller="decoupled_contrastive_loss",
        at_least=4,
    )
    return DecoupledContrastiveTerms(loss=found.loss, accuracy=found.accuracy)


def _weights(rows: Tensor, sigma: float, group: ProcessGroup | None) -> Tensor:
    """Return 2 - n softmax(cosine / sigma) over the pairs of all ranks, for both views."""
    name = _groups.name_of(group)
    exponents = row_products(*rows.chunk(2)).to(accumulator(rows)) / sigma
    lowest = exponents.new_full((1,), torch.finfo(exponents.dtype).min)  # of a rank without pairs
    highest = _groups.all_reduce(torch.cat((exponents, lowest)).amax(), name, "max")
    powers = (exponents - highest).exp()
    sums = torch.stack((powers.sum(), powers.new_full((), powers.shape[0])))
    total, count = _groups.all_reduce(sums, name).unbind()
    weights: Tensor = 2 - powers * (count / total)
    return weights.to(rows.dtype).repeat(2)


class DecoupledContrastiveLoss(LossModule):
    """[`decoupled_contrastive_loss`][termwise.joint_embedding.decoupled_contrastive_loss] as a module.

    Has no parameters and stores no process group: pass the group with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import DecoupledContrastiveLoss
        >>> loss_fn = DecoupledContrastiveLoss(sigma=0.5)
        >>> loss_fn(torch.ones(8, 3), torch.ones(8, 3)).metrics()["loss"]  # collapse: log(2 n - 2)
        2.639...
    """  # noqa: E501

    temperature: float = 0.1
    sigma: float | None = None
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        z1: Float[Tensor, "batch dim"],
        z2: Float[Tensor, "batch dim"],
        *,
        batch_group: ProcessGroup | None = None,
    ) -> DecoupledContrastiveTerms:
        """Compute the terms of the loss of two views."""
        return decoupled_contrastive_loss(z1, z2, batch_group=batch_group, **self.hyperparameters())
