"""SIGReg: push embeddings to an isotropic normal distribution, along random directions."""

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _groups
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._numbers import lifted, lifted_dtype
from .._terms import Terms, terms
from . import _slices


@terms
class SIGRegTerms(Terms):
    """Terms of [`sigreg_loss`][termwise.joint_embedding.sigreg_loss]."""

    loss: Float[Tensor, ""]
    """Distance of characteristic functions times the number of rows, mean over slices and views."""
    mean_square: Float[Tensor, ""]
    """z^2, mean over batch, dim and views; detached. 1 for a standard normal distribution."""
    std: Float[Tensor, ""]
    """Standard deviation (over n) of a column, mean over dim and views; detached. Near 0:
    collapse."""
    worst_slice: Float[Tensor, ""]
    """The largest distance, as in `loss`, of any slice of any view; detached."""


@contract
def sigreg_loss(
    z: Float[Tensor, "batch dim"] | Float[Tensor, "views batch dim"],
    *,
    slices: Float[Tensor, "dim slices"] | None = None,
    num_slices: int = 1024,
    t_max: float = 3.0,
    knots: int = 17,
    per_sample: bool = False,
    generator: torch.Generator | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> SIGRegTerms:
    r"""Push embeddings to the isotropic normal distribution N(0, I), along random directions.

    $$\mathrm{loss} = \frac{1}{S} \sum_s n \int_{-T}^{T}
    \left| \varphi_s(t) - e^{-t^2/2} \right|^2 e^{-t^2/2} \, dt, \qquad
    \varphi_s(t) = \frac{1}{n} \sum_j e^{i t \langle z_j, a_s \rangle}$$

    for S unit directions a (slices) and n rows, mean over views; the integral is a trapezoid sum on
    [0, T], doubled. This is the statistic of Epps and Pulley: 0.40205 n for embeddings of 0, and
    1.05246 on average for samples of N(0, I), for any n.

    The gradient vanishes at collapse: for two views of 256 x 64 embeddings with a standard
    deviation of 1e-6 its norm is 5e-6, while that of the scale term of
    [`visreg_loss`][termwise.joint_embedding.visreg_loss] is 1e-2.

    Inputs in half precision are converted to float32 before anything is multiplied, with or without
    autocast; the terms of float64 inputs are float64. A non-finite input makes the terms
    non-finite.

    Args:
        z (Float[Tensor, "batch dim"] | Float[Tensor, "views batch dim"]): embeddings, or those of
            several views along the first axis, each compared with N(0, I) separately. Do not
            normalize them: the loss sets their scale. Feature maps: with `einops.rearrange(z, "b c
            h w -> (b h w) c")` each position is a sample, and the dependence between positions of
            one image makes the statistic larger than 1.05; with `"b c h w -> b (c h w)"` an image
            is one. Three axes are views, not positions.
        slices (Float[Tensor, "dim slices"] | None): the directions, columns of length 1, used as
            they are and without a gradient. None: drawn at each call.
        num_slices: number of slices to draw; 1024 in the authors' code. Ignored if `slices` is
            passed.
        t_max: upper limit of the integral (T), in units of 1 / z; 3 in the authors' code.
        knots: number of knots of the trapezoid rule on [0, t_max], including both ends; 17 in the
            authors' code.
        per_sample: whether to omit the factor n, so that for a given distance the loss does not
            grow with the batch. The paper and other implementations include the factor.
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
        rows. Derivatives of any order, in eager and in reverse mode, are correct without a group;
        second ones raise NotImplementedError with one.

        Communication of each rank, for S slices, V views, K knots and W ranks: one sum of 2 W int64
        (numbers of rows, and fingerprints of the slices), and one of 2 V (S (K - 1) + dim) float64;
        no row is sent. Does not synchronize with the device. If the slices of ranks differ by a
        bit, an error is raised on the CPU in eager mode; on an accelerator, or compiled, all terms
        are NaN. No GPU has run this yet.

    Raises:
        ContractError: z or slices are not floating tensors of these shapes.
        ValueError: no view, no row without a group, dim or slices of 0, t_max that is not positive,
            fewer than 2 knots, or slices that differ between ranks.

    References:
        Balestriero, LeCun, LeJEPA (2025), https://arxiv.org/abs/2511.08544, Algorithm 1, whose
        interval is [-5, 5]. Defaults and quadrature are those of the authors' code,
        https://github.com/rbalestr-lab/lejepa at eddffdd, which integrates over half the interval.
        It averages the ranks' means, which assumes equal numbers of rows.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import sigreg_loss
        >>> sigreg_loss(torch.zeros(100, 8), num_slices=16).metrics()
        {'loss': 40.204..., 'mean_square': 0.0, 'std': 0.0, 'worst_slice': 40.204...}
    """
    if not (t_max > 0 and knots >= 2):
        raise ValueError(f"sigreg_loss needs t_max > 0 and knots >= 2, got {t_max} and {knots}")
    slices = _slices.slices_of("sigreg_loss", z, slices, num_slices, generator)
    _, rows = _slices.counted_rows("sigreg_loss", z, slices, batch_group)
    views = z if z.ndim == 3 else z[None]
    if len(views) == 0:
        raise ValueError("sigreg_loss needs at least one view, got 0")
    sums = _slices.characteristic_sums(views, slices, t_max, knots)
    mean, variance = _column_moments(views)
    if batch_group is not None:
        squares = torch.stack((mean, variance + mean.square())) * z.shape[-2]
        scale = _groups.gradient_scale(batch_group, grad_reduction)
        sums, squares = _groups.terminal_sums([sums, squares.to(sums.dtype)], batch_group, scale)
        mean, mean_square = (squares / rows).unbind(0)
        variance = (mean_square - mean.square()).clamp(min=0)  # of a rounding error
    distances = _slices.epps_pulley(sums, rows, t_max, knots)
    if not per_sample:
        distances = distances * rows
    dtype = lifted_dtype(z)
    return SIGRegTerms(
        loss=distances.mean().to(dtype),
        mean_square=(variance + mean.square()).mean().to(dtype),
        std=variance.sqrt().mean().to(dtype),
        worst_slice=distances.detach().max().to(dtype),
    )


def _column_moments(views: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of this rank's columns, "views dim", or 0 without rows."""
    if views.shape[1] == 0:
        zero = lifted(views).sum(1).detach()
        return zero, zero
    z = lifted(views.detach())
    mean = z.mean(1, keepdim=True)
    return mean[:, 0], (z - mean).square().mean(1)


class SIGRegLoss(LossModule):
    """[`sigreg_loss`][termwise.joint_embedding.sigreg_loss] as a module.

    Has no parameters, and stores no slices, generator or process group: pass them with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import SIGRegLoss
        >>> loss_fn = SIGRegLoss(num_slices=16, per_sample=True)
        >>> loss_fn(torch.zeros(8, 3)).metrics()["loss"]
        0.40204...
    """

    num_slices: int = 1024
    t_max: float = 3.0
    knots: int = 17
    per_sample: bool = False
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        z: Float[Tensor, "batch dim"] | Float[Tensor, "views batch dim"],
        *,
        slices: Float[Tensor, "dim slices"] | None = None,
        generator: torch.Generator | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> SIGRegTerms:
        """Compute the terms of the loss, with these slices or new random ones."""
        return sigreg_loss(
            z,
            slices=slices,
            generator=generator,
            batch_group=batch_group,
            **self.hyperparameters(),
        )
