"""The loss of BYOL and SimSiam: the cosine of a prediction and its target."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import means_over_rows
from .._module import LossModule
from .._numbers import alike, lifted
from .._terms import Terms, terms

PredictiveForm = Literal["byol", "simsiam"]


@terms
class PredictiveCosineTerms(Terms):
    """Terms of [`predictive_cosine_loss`][termwise.joint_embedding.predictive_cosine_loss]."""

    loss: Float[Tensor, ""]
    """2 - 2 cosine ("byol") or -cosine ("simsiam"), mean over the batch."""
    cosine: Float[Tensor, ""]
    """Cosine of a prediction and its target, mean over the batch."""


@contract
def predictive_cosine_loss(
    prediction: Float[Tensor, "batch dim"],
    target: Float[Tensor, "batch dim"],
    *,
    form: PredictiveForm = "byol",
    stop_gradient: bool = True,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> PredictiveCosineTerms:
    r"""Align the prediction of each sample with its target, from another view.

    $$\mathrm{byol} = \frac{1}{n} \sum_i \left\| \frac{p_i}{\|p_i\|} - \frac{t_i}{\|t_i\|}
    \right\|^2 = 2 - 2 \mathrm{cosine}, \qquad \mathrm{simsiam} = -\mathrm{cosine}$$

    The first is computed as a squared difference, without cancellation if the directions agree. In
    training both losses are made symmetric: add the loss with the views exchanged. Half precision
    is converted to float32 first, with or without autocast. A row of zeros stays zero: its cosine
    is 0, its squared difference 1.

    For feature maps, einops.rearrange(z, "b c h w -> (b h w) c") compares each position, "b c h w
    -> b (c h w)" whole images.

    Args:
        prediction (Float[Tensor, "batch dim"]): output of the predictor, a row for each sample.
        target (Float[Tensor, "batch dim"]): output of the target network (BYOL), or of the same
            projector on the other view (SimSiam), in the same order.
        form: "byol" or "simsiam": gradients of the first are twice those of the second.
        stop_gradient: whether to detach the target. Otherwise SimSiam collapses, and BYOL's target
            network is trained.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. Gradients, combined over ranks as
        `grad_reduction` says, equal those of one process that holds all rows. Second derivatives
        are correct without a group and raise NotImplementedError with one. Without a row on any
        rank they are NaN. Communication of each rank: one sum of 3 numbers in float64, 24 bytes.

    Raises:
        ContractError: prediction and target are not floating "batch dim" tensors of one shape.

    References:
        Grill et al., BYOL (2020), https://arxiv.org/abs/2006.07733, equation 2; Chen, He, SimSiam
        (2021), https://arxiv.org/abs/2011.10566, equation 1. Both papers stop the gradient of the
        target; stable-pretraining's BYOLLoss (d15ec96d) and lightly's NegativeCosineSimilarity
        leave that to the caller.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import predictive_cosine_loss
        >>> prediction, target = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
        >>> predictive_cosine_loss(prediction, target).metrics()  # cosine 3 / 5
        {'loss': 0.8..., 'cosine': 0.6...}
        >>> predictive_cosine_loss(prediction, target, form="simsiam").loss.item()
        -0.6...
    """
    prediction, target = alike(prediction, target.detach() if stop_gradient else target)
    p, t = (F.normalize(lifted(x), dim=1, eps=1e-12) for x in (prediction, target))
    per_row = [(p * t).sum(1)]
    if form == "byol":
        per_row.append((p - t).square().sum(1))
    cosine, *distance = means_over_rows(per_row, None, batch_group, grad_reduction)
    return PredictiveCosineTerms(loss=distance[0] if distance else -cosine, cosine=cosine)


class PredictiveCosineLoss(LossModule):
    """[`predictive_cosine_loss`][termwise.joint_embedding.predictive_cosine_loss] as a module.

    Has no parameters and stores no process group: pass the group with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import PredictiveCosineLoss
        >>> PredictiveCosineLoss(form="simsiam")(torch.eye(3), torch.eye(3)).loss.item()
        -1.0
    """

    form: PredictiveForm = "byol"
    stop_gradient: bool = True
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        prediction: Float[Tensor, "batch dim"],
        target: Float[Tensor, "batch dim"],
        *,
        batch_group: ProcessGroup | None = None,
    ) -> PredictiveCosineTerms:
        """Compute the terms of the loss of predictions and targets."""
        return predictive_cosine_loss(
            prediction, target, batch_group=batch_group, **self.hyperparameters()
        )
