"""SigLIP's sigmoid loss: classify each pair of a row of a and a row of b independently."""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .. import _groups
from .._autograd import on_host
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._numbers import accumulator, alike, lifted, product, softplus, tiles, without_autocast
from .._operators import Operator, with_gradients
from .._terms import Terms, terms

# Up to so many logits, storing them all is faster than the calls that avoid it.
_FEW_LOGITS = 2**18
# For logits up to this, the exponential is far from the float32 maximum.
_NO_OVERFLOW = 60


@terms
class SigmoidContrastiveTerms(Terms):
    """Terms of [`sigmoid_contrastive_loss`][termwise.joint_embedding.sigmoid_contrastive_loss]."""

    loss: Float[Tensor, ""]
    """positive + negative."""
    positive: Float[Tensor, ""]
    """softplus(-logit) of each sample's own pair, mean over the batch."""
    negative: Float[Tensor, ""]
    """softplus(logit) of the pairs of different samples, summed over all, divided by the batch."""
    accuracy: Float[Tensor, ""]
    """Fraction of rows of a whose own row of b has the largest logit, or a tied one; detached."""


@contract
def sigmoid_contrastive_loss(
    a: Float[Tensor, "batch dim"],
    b: Float[Tensor, "batch dim"],
    *,
    scale: float | Float[Tensor, ""],
    bias: float | Float[Tensor, ""],
    normalize: bool = True,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> SigmoidContrastiveTerms:
    r"""Classify each pair (a_i, b_j) as that of one sample or not, by logistic regression.

    $$\mathrm{loss} = \frac{1}{n} \sum_{i,j} \mathrm{softplus}(-l_{ij} L_{ij}), \qquad
    L_{ij} = s \, a_i^\top b_j + t, \qquad l_{ij} = \begin{cases} 1 & i = j \\ -1 & i \ne j
    \end{cases}$$

    The sum over all n x n pairs is divided by n. `positive` is the part of i = j, `negative` the
    rest. Above 2^18 pairs no n x n matrix is stored, and value and gradient are computed in one
    pass. Inputs in half precision are converted to float32, with or without autocast; the terms of
    float64 inputs are float64. A non-finite input makes the terms non-finite.

    Args:
        a (Float[Tensor, "batch dim"]): embeddings of the first kind, such as images, a row for each
            sample. Feature maps have one row for each position, with
            `einops.rearrange(a, "b c h w -> (b h w) c")`, or one for each sample, with
            `"b c h w -> b (c h w)"`.
        b (Float[Tensor, "batch dim"]): embeddings of the second kind, such as texts, in the same
            order.
        scale (float | Float[Tensor, ""]): factor of the cosines (the inverse of a temperature).
            Usually learnt: pass `log_scale.exp()`, where log_scale is a parameter that starts at
            log(10), as in the paper.
        bias (float | Float[Tensor, ""]): added to each logit. Usually a parameter that starts at
            -10, as in the paper: most pairs are negative.
        normalize: whether to divide each row by its Euclidean norm (at least 1e-12) first.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. Gradients with respect to a, b, scale
        and bias, combined over ranks as `grad_reduction` says, equal those of one process that
        holds all rows. Second derivatives are correct for up to 2^18 pairs without a group, and
        raise NotImplementedError otherwise.

        Communication of each rank, for d = dim, N = rows over all ranks, W = ranks, in elements of
        that dtype (float32 for half precision): the rows of b go around a ring with their gradient,
        2 * N * d in and 2 * N * d out in W messages, of which a rank holds two at a time, and a sum
        of W + 3 numbers. The numbers of rows are read on the host, so with a group a call
        synchronizes with the device once. The same is sent under `torch.no_grad()`.

    Raises:
        ContractError: a and b are not floating "batch dim" tensors of one shape, or scale or bias
            is neither a number nor a tensor without axes.
        ValueError: no row over all ranks.

    References:
        Zhai, Mustafa, Kolesnikov, Beyer, Sigmoid loss for language image pre-training (2023),
        https://arxiv.org/abs/2303.15343, equation 1 and algorithm 1. Divided by n as there, in the
        authors' code (big_vision, `siglip.py`) and in open_clip 3.3.0 (`SigLipLoss`). With several
        ranks open_clip returns each rank's part, divided by its own number of rows: the mean over
        ranks is this loss if all ranks hold the same number of rows.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import sigmoid_contrastive_loss
        >>> z = torch.eye(3)  # softplus(-(10 - 10)) + 2 softplus(-10)
        >>> sigmoid_contrastive_loss(z, z, scale=10.0, bias=-10.0).metrics()
        {'loss': 0.693..., 'positive': 0.693..., 'negative': 9.0...e-05, 'accuracy': 1.0}
    """
    if batch_group is None and a.shape[0] < 1:
        raise ValueError("sigmoid_contrastive_loss needs a batch of at least 1 row, got 0")
    a, b = (lifted(x) for x in alike(a, b))
    if normalize:
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    scale, bias = (
        x.to(a.dtype) if isinstance(x, Tensor) else a.new_full((), x) for x in (scale, bias)
    )
    counts = _groups.row_counts(a, batch_group)
    if counts is None and a.shape[0] ** 2 <= _FEW_LOGITS:
        positive, negative, accuracy = _as_written(a, b, scale, bias)
    else:
        rows = a.shape[0] if counts is None else counts.sum()
        weight = _groups.gradient_scale(batch_group, grad_reduction)
        own = softplus(-(scale * (a * b).sum(1) + bias)).sum()
        positive = _groups.terminal_sum(own, batch_group, weight) / rows
        inputs = _Inputs(
            a,
            b,
            torch.stack((scale, bias)),
            counts,
            torch.is_grad_enabled(),
            "" if batch_group is None else batch_group.group_name,
            weight,
        )
        negative, accuracy, *_ = with_gradients(_negatives, inputs, count=3)
    return SigmoidContrastiveTerms(
        loss=positive + negative, positive=positive, negative=negative, accuracy=accuracy
    )


def _as_written(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Compute positive, negative and accuracy by operations with derivatives of any order."""
    n = a.shape[0]
    logits = product(a * scale, b.T) + bias
    own = logits.diagonal()
    others = logits + torch.diag(a.new_full((n,), -torch.inf))
    accuracy = (own.detach() >= others.detach().amax(1)).mean(dtype=a.dtype)
    return softplus(-own).mean(), softplus(others).sum() / n, accuracy


class _Inputs(NamedTuple):
    a: Tensor
    b: Tensor
    scale_and_bias: Tensor
    """Scale and bias."""
    counts: Tensor | None
    gradient: bool
    group_name: str
    weight: float
    """Of the gradient, over ranks."""


def _kernel(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `negative`, the accuracy, and the gradients of `negative` (or empty tensors)."""
    a, b, counts = inputs.a.detach(), inputs.b.detach(), inputs.counts
    scale, bias = inputs.scale_and_bias.detach().unbind()
    each = [a.shape[0]] if counts is None else cast("list[int]", counts.tolist())
    n = sum(each)
    if n < 1:
        raise ValueError("sigmoid_contrastive_loss needs at least 1 row over all ranks, got 0")
    # Collective calls must not depend on the grad mode, which may differ over ranks.
    ascending = inputs.gradient or counts is not None
    rank = 0 if counts is None else _groups.resolved(inputs.group_name).rank()

    with without_autocast(a):
        scaled, of_scaled = a * scale, torch.zeros_like(a)
        own, hardest = a.new_empty(a.shape[0]), a.new_full(a.shape[:1], -torch.inf)
        total, of_bias = a.new_zeros(2, dtype=accumulator(a)).unbind()
        columns, of_columns = b, torch.zeros_like(b)
        for step in range(len(each)):
            for rows, tile in tiles(a, len(columns)):
                logits = torch.addmm(bias, scaled[rows], columns[tile].T)
                if step == 0:  # this rank's own rows: leave the positives out
                    diagonal = logits.diagonal(rows.start - tile.start)
                    first = max(rows.start, tile.start)
                    own[first : first + len(diagonal)] = diagonal
                    diagonal.fill_(-torch.inf)
                row_max = logits.amax(1)
                torch.maximum(hardest[rows], row_max, out=hardest[rows])
                cost, push = _softplus_and_sigmoid(logits, row_max)
                total += cost.sum(1).sum(dtype=total.dtype)
                if ascending:
                    of_bias += push.sum(1).sum(dtype=total.dtype)
                    of_scaled[rows].addmm_(push, columns[tile])
                    of_columns[tile].addmm_(push.T, scaled[rows])
            if counts is not None:  # after the last step they are back on their own rank
                visiting = torch.cat((columns, of_columns), 1)
                arriving = each[(rank - step - 1) % len(each)]
                visiting = _groups.passed_on(visiting, arriving, inputs.group_name)
                columns, of_columns = visiting.tensor_split(2, 1)
        sums = torch.stack((total, (own >= hardest).sum().to(total.dtype)))
        if counts is not None:
            sums = _groups.all_reduce(sums, inputs.group_name)
        negative, accuracy = ((x / n).to(a.dtype) for x in sums)
        if not inputs.gradient:
            return negative, accuracy, a.new_empty(0), a.new_empty(0), a.new_empty(0)
        of_scale = (of_scaled * a).sum(1).sum(dtype=total.dtype)
        of_scale_and_bias = torch.stack((of_scale, of_bias)).mul_(inputs.weight / n).to(a.dtype)
        of_a = of_scaled.mul_(scale * (inputs.weight / n))
        of_b = of_columns.mul_(inputs.weight / n).contiguous()
        return negative, accuracy, of_a, of_b, of_scale_and_bias


def _softplus_and_sigmoid(logits: Tensor, row_max: Tensor) -> tuple[Tensor, Tensor]:
    """Compute both; the sigmoid overwrites the logits, whose maxima are passed."""
    if on_host(logits) and bool(row_max.max() < _NO_OVERFLOW):  # one exponential serves both
        exp = logits.exp_()
        return exp.log1p(), exp.div_(exp + 1)
    return softplus(logits), logits.sigmoid_()


def _fake(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, scale_and_bias = inputs.a, inputs.scale_and_bias
    of_a, of_scale_and_bias = (
        x.new_empty(x.shape if inputs.gradient else 0) for x in (a, scale_and_bias)
    )
    return a.new_empty(()), a.new_empty(()), of_a, torch.empty_like(of_a), of_scale_and_bias


_negatives = Operator("sigmoid_contrastive", _Inputs, _kernel, _fake)


class SigmoidContrastiveLoss(LossModule):
    """[`sigmoid_contrastive_loss`][termwise.joint_embedding.sigmoid_contrastive_loss] as a module.

    Has no parameters and stores no process group: pass scale and bias, which the model learns, and
    the group with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import SigmoidContrastiveLoss
        >>> loss_fn = SigmoidContrastiveLoss()
        >>> z = torch.zeros(4, 3)
        >>> loss_fn(z, z, scale=10.0, bias=0.0).metrics()["loss"]  # 4 log 2
        2.77...
    """

    normalize: bool = True
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        a: Float[Tensor, "batch dim"],
        b: Float[Tensor, "batch dim"],
        *,
        scale: float | Float[Tensor, ""],
        bias: float | Float[Tensor, ""],
        batch_group: ProcessGroup | None = None,
    ) -> SigmoidContrastiveTerms:
        """Compute the terms of the loss of pairs of rows."""
        return sigmoid_contrastive_loss(
            a, b, scale=scale, bias=bias, batch_group=batch_group, **self.hyperparameters()
        )
