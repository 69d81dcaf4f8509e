"""VISReg: invariance, and the scale, shape and center of an isotropic normal distribution."""

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _groups
from .._autograd import link_to
from .._coefficients import is_zero, weighted
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._numbers import accumulator, lifted
from .._terms import Terms, terms
from . import _slices
from ._views import refuse_views, spread


@terms
class VISRegTerms(Terms):
    """Terms of [`visreg_loss`][termwise.joint_embedding.visreg_loss]."""

    loss: Float[Tensor, ""]
    """(1 - weight) * invariance + weight * (center_weight * center + scale_weight * scale +
    shape_weight * shape), without terms of weight 0."""
    invariance: Float[Tensor, ""]
    """Squared difference of each view from the mean of the global ones, mean over views, batch and
    dim."""
    center: Float[Tensor, ""]
    """Squared mean of a column, mean over dim and views."""
    scale: Float[Tensor, ""]
    """(1 - standard deviation of a column)^2, mean over dim and views. Near 1: collapse."""
    shape: Float[Tensor, ""]
    """Squared difference of sorted projections of the standardized columns and normal quantiles,
    mean over views, slices and batch."""


@contract
def visreg_loss(
    z: Float[Tensor, "views batch dim"],
    *,
    num_global: int | None = None,
    weight: float = 0.9,
    scale_weight: float = 1.0,
    shape_weight: float = 1.0,
    center_weight: float = 1.0,
    slices: Float[Tensor, "dim slices"] | None = None,
    num_slices: int = 4096,
    eps: float = 1e-4,
    generator: torch.Generator | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> VISRegTerms:
    r"""Pull the views of a sample together, with one term each for center, scale and shape.

    $$\mathrm{center} = \frac{1}{d} \sum_j \mu_j^2, \qquad
    \mathrm{scale} = \frac{1}{d} \sum_j (1 - \sigma_j)^2$$

    $$\mathrm{shape} = \frac{1}{S n} \sum_{s, i}
    \left( \langle \hat{z}, a_s \rangle_{(i)} - \Phi^{-1}\!\left(\frac{i}{n + 1}\right) \right)^2,
    \qquad \hat{z}_j = \frac{z_j - \mu_j}{\mathrm{sg}(\sigma_j) + \epsilon}$$

    for n rows, S unit directions a (slices), the mean and the biased standard deviation (over n) of
    each column, the i-th smallest of the n projections, and no gradient through sg; each term is a
    mean over views. `invariance` is that of
    [`lejepa_loss`][termwise.joint_embedding.lejepa_loss] with `centre="global"`. `loss = (1 -
    weight) * invariance + weight * (center_weight * center + scale_weight * scale + shape_weight *
    shape)`.

    Inputs in half precision are converted to float32 before anything is subtracted or multiplied,
    with or without autocast; the terms of float64 inputs are float64. A non-finite input makes the
    terms non-finite.

    Args:
        z (Float[Tensor, "views batch dim"]): embeddings of at least two views of each sample, the
            global ones first. Do not normalize them: `scale` sets their scale. Feature maps: with
            `einops.rearrange(z, "v b c h w -> v (b h w) c")` each position is a sample, so the
            views must be aligned; with `"v b c h w -> v b (c h w)"` an image is one.
        num_global: number of global views, which come first. None: all.
        weight: weight of the three terms of the distribution; that of `invariance` is 1 - weight.
            0.9 in the paper for large datasets, 0.6 for small ones (lambda). If the product of a
            term's weights is exactly 0, the term is removed from the loss and the gradient, even if
            it is infinite.
        scale_weight: weight of `scale`; 1 in the paper.
        shape_weight: weight of `shape`; 1 in the paper, more for long-tailed data.
        center_weight: weight of `center`; 1 in the paper.
        slices (Float[Tensor, "dim slices"] | None): the directions, columns of length 1, used as
            they are and without a gradient. None: drawn at each call.
        num_slices: number of slices to draw; 4096 in the paper. Ignored if `slices` is passed.
        eps: added to the standard deviation before dividing columns by it, in units of z.
        generator: generator that draws the slices, in float32. None: the default generator of z's
            device. All ranks must draw the same slices: pass generators with the same seed, and use
            them for nothing that differs between ranks. torch.compile cannot trace a generator:
            pass `slices = F.normalize(torch.randn(dim, num_slices, generator=generator), dim=0)`
            then.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. Without a row they are NaN. Gradients,
        combined over ranks as `grad_reduction` says, equal those of one process that holds all
        rows. A column without variance has no gradient in `scale`. Second derivatives of `shape`
        are correct for up to 32,768 elements and projections, and raise NotImplementedError beyond;
        with a group those of any term do.

        Communication of each rank, for S slices, V views, d = dim, n rows here and N over W ranks,
        in elements of that dtype (float32 for half precision) unless stated otherwise: one sum of 2
        W int64 (numbers of rows, and fingerprints of the slices), two of V d float64, one of 1 or
        2, one float64, and two exchanges of rows for slices, n V S out and N V S / W in, and back,
        also under `torch.no_grad()`. A rank holds the whole batch only for its share of the slices.
        The numbers of rows are read on the host, so with a group a call synchronizes with the
        device once. If the slices of ranks differ by a bit, an error is raised on the CPU in eager
        mode; on an accelerator, or compiled, all terms are NaN. No GPU has run this yet.

    Raises:
        ContractError: z or slices are not floating tensors of these shapes.
        ValueError: fewer than 2 views, num_global not among them, no row without a group, dim or
            slices of 0, a negative eps, or slices that differ between ranks.

    References:
        Wu, Balestriero, Levine, VISReg (2026), https://arxiv.org/abs/2606.02572, equations 1, 2, 5
        and 6. In the paper each rank uses its own slices for its own rows (section 3.2), which
        gives the mean of the ranks' losses; here the statistics are those of all rows.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import visreg_loss
        >>> terms = visreg_loss(torch.full((2, 8, 3), 2.0), num_slices=16)  # collapsed
        >>> terms.metrics()
        {'loss': ..., 'invariance': 0.0, 'center': 4.0, 'scale': 1.0, 'shape': 0.56...}
    """
    refuse_views(z, num_global, "visreg_loss")
    if not eps >= 0:
        raise ValueError(f"visreg_loss needs eps >= 0, got {eps}")
    slices = _slices.slices_of("visreg_loss", z, slices, num_slices, generator)
    counts, rows = _slices.counted_rows("visreg_loss", z, slices, batch_group)
    share = _groups.gradient_scale(batch_group, grad_reduction)

    def mean(x: Tensor) -> Tensor:
        total = _groups.terminal_sum(x.sum(1).to(accumulator(x)), batch_group, share)
        return (total / rows).to(x.dtype)

    views = lifted(z)
    means = mean(views)
    # Over ranks the rows are centered without a gradient, which would sum to 0 over all rows.
    centred = views - (means if batch_group is None else means.detach())[:, None]
    std = _root(mean(centred.square()))
    standardized = centred / (std.detach() + eps)[:, None]
    shape = _slices.quantile_distance(
        standardized, slices, counts, group=batch_group, grad_reduction=grad_reduction
    )
    apart = spread(z, num_global, rows, group=batch_group, grad_reduction=grad_reduction)
    invariance = apart.from_the_mean().to(views.dtype)
    center, scale = means.square().mean(), (1 - std).square().mean()
    weights = (1 - weight, weight * center_weight, weight * scale_weight, weight * shape_weight)
    parts = (invariance, center, scale, shape)
    loss = sum(weighted(*pair) for pair in zip(weights[1:], parts[1:], strict=True))
    loss = loss + weighted(weights[0], invariance)
    if all(map(is_zero, weights)):
        # 0 with a gradient of 0, so that a trainer can call backward.
        loss = loss + link_to(views)
    return VISRegTerms(loss=loss, invariance=invariance, center=center, scale=scale, shape=shape)


def _root(variance: Tensor) -> Tensor:
    """Return the root, with a derivative of 0 at 0, as in torch.std."""
    positive = variance != 0
    return variance.where(positive, 1).sqrt().where(positive, 0)


class VISRegLoss(LossModule):
    """[`visreg_loss`][termwise.joint_embedding.visreg_loss] as a module.

    Has no parameters, and stores no slices, generator or process group: pass them with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import VISRegLoss
        >>> loss_fn = VISRegLoss(weight=0.6, num_slices=64)
        >>> loss_fn(torch.zeros(2, 8, 3)).metrics()["scale"]
        1.0
    """

    num_global: int | None = None
    weight: float = 0.9
    scale_weight: float = 1.0
    shape_weight: float = 1.0
    center_weight: float = 1.0
    num_slices: int = 4096
    eps: float = 1e-4
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        z: Float[Tensor, "views batch dim"],
        *,
        slices: Float[Tensor, "dim slices"] | None = None,
        generator: torch.Generator | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> VISRegTerms:
        """Compute the terms of the loss, with these slices or new random ones."""
        return visreg_loss(
            z,
            slices=slices,
            generator=generator,
            batch_group=batch_group,
            **self.hyperparameters(),
        )
