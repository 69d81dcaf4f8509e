"""NT-Xent: identify the other view of each sample in the batch, as in SimCLR."""

from jaxtyping import Float
from torch import Tensor

from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._terms import Terms, terms
from ._contrast import contrast, two_views


@terms
class NTXentTerms(Terms):
    """Terms of [`nt_xent_loss`][termwise.joint_embedding.nt_xent_loss]."""

    loss: Float[Tensor, ""]
    """Cross-entropy of identifying the other view of a sample, mean over both views, in nats."""
    accuracy: Float[Tensor, ""]
    """Fraction of views whose most similar view (or a tied one) is of the same sample; detached."""


@contract
def nt_xent_loss(
    z1: Float[Tensor, "batch dim"],
    z2: Float[Tensor, "batch dim"],
    *,
    temperature: float = 0.5,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> NTXentTerms:
    r"""Classify which of the 2 n - 1 other embeddings is the second view of the same sample.

    $$\mathrm{loss} = \frac{1}{2n} \sum_{i=1}^{2n} \log \sum_{k \ne i}
    e^{\cos(z_i, z_k) / T} - \cos(z_i, z_{p(i)}) / T$$

    over the n rows of z1 and the n rows of z2, with p(i) the other view of the sample.

    Above 2^17 logits, and with a group, they are formed in strips, and no batch x batch tensor is
    stored; on one rank those of the upper triangle, for the matrix is symmetric. Half precision is
    converted to float32 first, with or without autocast. A non-finite input makes the loss
    non-finite.

    Args:
        z1 (Float[Tensor, "batch dim"]): embeddings of the first view, a row for each sample;
            divided by their norms here. For a feature map, or tokens, `einops.rearrange(z, "b c h w
            -> (b h w) c")` makes each position a sample; if pooled to "b c", each image is one.
        z2 (Float[Tensor, "batch dim"]): embeddings of the second view, in the same order.
        temperature: T, the divisor of the cosines; 0.5 in the paper for small batches, 0.1 for
            large ones.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. Gradients, combined over ranks as
        `grad_reduction` says, equal those of one process that holds all rows. Second derivatives
        are correct up to 2^17 logits, (2 batch)^2, without a group, and raise NotImplementedError
        beyond and with one.

        Communication of each rank, for d = dim, N samples over all ranks, n of this rank, in
        elements of the embeddings' dtype (float32 for half precision): its 2 n * d embeddings are
        sent to the others and 2 (N - n) * d received, the gradients of 2 N * d are
        reduce-scattered, and there are sums of 4 and of one count for each rank; also under
        `torch.no_grad()`. The counts are read on the host, so with a group a call synchronizes with
        the device.

    Raises:
        ContractError: z1 and z2 are not floating "batch dim" tensors of one shape.
        ValueError: no sample over all ranks, dim of 0, or a temperature that is not positive.

    References:
        Chen et al., SimCLR (2020), https://arxiv.org/abs/2002.05709, equation 1 and algorithm 1.
        Sohn, Improved deep metric learning with multi-class N-pair loss objective (2016).

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import nt_xent_loss
        >>> z = torch.eye(4)  # orthonormal samples: log(1 + 2 (4 - 1) exp(-1 / T))
        >>> nt_xent_loss(z, z, temperature=0.5).metrics()
        {'loss': 0.594..., 'accuracy': 1.0}
    """
    if not temperature > 0:
        raise ValueError(f"nt_xent_loss needs temperature > 0, got {temperature}")
    rows, other = two_views(z1, z2)
    found = contrast(
        rows,
        None,
        1 / temperature,
        positive=other,
        group=batch_group,
        grad_reduction=grad_reduction,
        caller="nt_xent_loss",
        at_least=2,
    )
    return NTXentTerms(loss=found.loss, accuracy=found.accuracy)


class NTXentLoss(LossModule):
    """[`nt_xent_loss`][termwise.joint_embedding.nt_xent_loss] as a module.

    Has no parameters and stores no process group: pass the group with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import NTXentLoss
        >>> loss_fn = NTXentLoss(temperature=0.1)
        >>> loss_fn(torch.ones(8, 3), torch.ones(8, 3)).metrics()["loss"]  # collapse: log(2 n - 1)
        2.708...
    """

    temperature: float = 0.5
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        z1: Float[Tensor, "batch dim"],
        z2: Float[Tensor, "batch dim"],
        *,
        batch_group: ProcessGroup | None = None,
    ) -> NTXentTerms:
        """Compute the terms of the loss of two views."""
        return nt_xent_loss(z1, z2, batch_group=batch_group, **self.hyperparameters())
