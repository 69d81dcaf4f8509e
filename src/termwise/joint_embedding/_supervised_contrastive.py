"""Supervised contrastive loss: samples of a class are each other's positives."""

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._terms import Terms, terms
from ._contrast import contrast, unit_rows

Positives = Literal["outside", "inside"]


@terms
class SupervisedContrastiveTerms(Terms):
    """Terms of [`supervised_contrastive_loss`][termwise.joint_embedding.supervised_contrastive_loss]."""  # noqa: E501

    loss: Float[Tensor, ""]
    """Mean over the samples that have a positive, in nats times temperature / base_temperature; 0
    if none has."""
    accuracy: Float[Tensor, ""]
    """Fraction of these samples whose most similar other sample is of their class; detached."""
    n_without_positive: Float[Tensor, ""]
    """Number of samples, over all ranks, that are alone in their class and left out; detached."""


@contract
def supervised_contrastive_loss(
    z: Float[Tensor, "batch dim"],
    labels: Int[Tensor, " batch"],
    *,
    temperature: float = 0.07,
    base_temperature: float | None = None,
    positives: Positives = "outside",
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> SupervisedContrastiveTerms:
    r"""Pull samples of a class together and all others apart.

    For $L_{ik} = \cos(z_i, z_k) / T$ and the other samples P(i) of the class of i:

    $$\mathrm{outside} = -\frac{1}{|P(i)|} \sum_{p \in P(i)}
    \log \frac{e^{L_{ip}}}{\sum_{k \ne i} e^{L_{ik}}}, \qquad
    \mathrm{inside} = -\log \frac{\sum_{p \in P(i)} e^{L_{ip}}}{\sum_{k \ne i} e^{L_{ik}}}$$

    averaged over the samples that have a positive. Several views of a sample are rows with the same
    label: for two, `supervised_contrastive_loss(torch.cat((z1, z2)), labels.repeat(2))`. If each
    sample has its own label this is NT-Xent.

    Above 2^17 logits, and with a group, logits are computed in strips, and no batch x batch tensor
    is stored. Half precision is converted to float32 first, with or without autocast. A non-finite
    input makes the loss non-finite.

    Args:
        z (Float[Tensor, "batch dim"]): embeddings, divided by their norms here. For a feature map,
            or tokens, `einops.rearrange(z, "b c h w -> (b h w) c")` makes each position a sample
            with its own label; if pooled to "b c", each image is one.
        labels (Int[Tensor, " batch"]): the class of each sample, as any integers.
        temperature: T, the divisor of the cosines; 0.07 in the authors' code, 0.1 in the paper.
        base_temperature: multiply the loss by temperature / base_temperature; 0.07 in the authors'
            code. None: no factor.
        positives: "outside" averages over positives outside of the log, equation 2 of the paper,
            which it recommends; "inside" sums over them inside, as in solo-learn: equation 3
            without the constant log |P(i)|. With one positive each, both are equal.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. Gradients, combined over ranks as
        `grad_reduction` says, equal those of one process that holds all rows. Second derivatives
        are correct up to 2^17 logits, batch^2, without a group, and raise NotImplementedError
        beyond and with one.

        Communication of each rank, for d = dim, N samples over all ranks, n of this rank, in
        elements of the embeddings' dtype (float32 for half precision): its n * d embeddings and n
        labels are sent to the others and N - n of them received, the gradients of N * d are
        reduce-scattered, and there are sums of 4 and of one count for each rank; also under
        `torch.no_grad()`. The counts are read on the host, so with a group a call synchronizes with
        the device.

    Raises:
        ContractError: z is not a floating "batch dim" tensor, or labels is not an integer " batch"
            tensor.
        ValueError: fewer than 2 samples over all ranks, dim of 0, or a temperature that is not
            positive.

    References:
        Khosla et al., Supervised contrastive learning (2020), https://arxiv.org/abs/2004.11362,
        equations 2 and 3. The authors' code (https://github.com/HobbitLong/SupContrast) has
        temperature / base_temperature as a factor, the paper has not: we side with the paper. It
        counts samples without a positive as 0 in the mean; here, as in pytorch-metric-learning
        2.9.0, they are not in it.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import supervised_contrastive_loss
        >>> z = torch.eye(2).repeat(3, 1)  # 3 samples in each of 2 classes, orthogonal
        >>> labels = torch.tensor([0, 1, 0, 1, 0, 1])  # log(2 + 3 exp(-1 / T))
        >>> supervised_contrastive_loss(z, labels, temperature=0.5).metrics()
        {'loss': 0.877..., 'accuracy': 1.0, 'n_without_positive': 0.0}
    """
    base = temperature if base_temperature is None else base_temperature
    if not (temperature > 0 and base > 0):
        raise ValueError(
            f"supervised_contrastive_loss needs temperature > 0 and base_temperature > 0, got "
            f"{temperature} and {base_temperature}"
        )
    found = contrast(
        unit_rows(z),
        None,
        1 / temperature,
        labels=labels.long(),
        form="outside" if positives == "outside" else "softmax",
        group=batch_group,
        grad_reduction=grad_reduction,
        caller="supervised_contrastive_loss",
        at_least=2,
    )
    return SupervisedContrastiveTerms(
        loss=found.loss if base_temperature is None else found.loss * (temperature / base),
        accuracy=found.accuracy,
        n_without_positive=found.without_positive,
    )


class SupervisedContrastiveLoss(LossModule):
    """[`supervised_contrastive_loss`][termwise.joint_embedding.supervised_contrastive_loss] as a module.

    Has no parameters and stores no process group: pass the group with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import SupervisedContrastiveLoss
        >>> loss_fn = SupervisedContrastiveLoss(temperature=0.1)
        >>> loss_fn(torch.ones(4, 3), torch.tensor([0, 0, 1, 1])).metrics()["loss"]  # log 3
        1.098...
    """  # noqa: E501

    temperature: float = 0.07
    base_temperature: float | None = None
    positives: Positives = "outside"
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        z: Float[Tensor, "batch dim"],
        labels: Int[Tensor, " batch"],
        *,
        batch_group: ProcessGroup | None = None,
    ) -> SupervisedContrastiveTerms:
        """Compute the terms of the loss of samples with a class each."""
        return supervised_contrastive_loss(
            z, labels, batch_group=batch_group, **self.hyperparameters()
        )
