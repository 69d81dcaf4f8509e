"""LeJEPA: pull views together, and push embeddings to an isotropic normal distribution."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _groups
from .._coefficients import weighted
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._numbers import lifted_dtype
from .._terms import Terms, terms
from . import _slices
from ._views import refuse_views, spread

Centre = Literal["all", "global"]


@terms
class LeJEPATerms(Terms):
    """Terms of [`lejepa_loss`][termwise.joint_embedding.lejepa_loss]."""

    loss: Float[Tensor, ""]
    """(1 - sigreg_weight) * invariance + sigreg_weight * sigreg, or the same without "1 -
    sigreg_weight" if `convex` is False; without terms of weight 0."""
    invariance: Float[Tensor, ""]
    """Squared difference of each view from the mean of views, mean over views, batch and dim."""
    sigreg: Float[Tensor, ""]
    """`sigreg_loss` of all views: distance of characteristic functions times the number of rows,
    mean over slices and views."""


@contract
def lejepa_loss(
    z: Float[Tensor, "views batch dim"],
    *,
    num_global: int | None = None,
    sigreg_weight: float = 0.05,
    convex: bool = True,
    centre: Centre = "all",
    slices: Float[Tensor, "dim slices"] | None = None,
    num_slices: int = 1024,
    t_max: float = 3.0,
    knots: int = 17,
    generator: torch.Generator | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> LeJEPATerms:
    r"""Pull the views of a sample together while their distribution becomes N(0, I).

    $$\mathrm{invariance} = \frac{1}{V n d} \sum_{v, i} \| z^v_i - m_i \|^2, \qquad
    m_i = \frac{1}{G} \sum_{g \le G} z^g_i$$

    for V views; the center m is the mean of the first G, which are all views or the global ones.
    `sigreg` is [`sigreg_loss`][termwise.joint_embedding.sigreg_loss] of all views. `loss = (1 -
    sigreg_weight)
    * invariance + sigreg_weight * sigreg`.

    Inputs in half precision are converted to float32 before anything is subtracted or multiplied,
    with or without autocast; the terms of float64 inputs are float64. A non-finite input makes the
    terms non-finite.

    Args:
        z (Float[Tensor, "views batch dim"]): embeddings of at least two views of each sample, the
            global ones first. Do not normalize them: `sigreg` sets their scale. Feature maps: with
            `einops.rearrange(z, "v b c h w -> v (b h w) c")` each position is a sample, so the
            views must be aligned; with `"v b c h w -> v b (c h w)"` an image is one.
        num_global: number of global views, which come first. None: all. Used only with
            `centre="global"`.
        sigreg_weight: weight of `sigreg` (lambda); 0.05 as in lightly, 0.02 in the authors' minimal
            example. A weight of exactly 0 removes its term from the loss and the gradient, even if
            the term is infinite.
        convex: whether the weight of `invariance` is 1 - sigreg_weight, as in the paper, or 1.
        centre: compare each view with the mean of all views ("all"), or of the global ones.
        slices (Float[Tensor, "dim slices"] | None): as in `sigreg_loss`.
        num_slices: number of slices to draw; 1024 in the authors' package, 256 in their minimal
            example.
        t_max: as in `sigreg_loss`.
        knots: as in `sigreg_loss`.
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
        (numbers of rows, and fingerprints of the slices), one of 2 V S (K - 1) float64, and one of
        1 or 2 elements of z's dtype (float32 for half precision); no row is sent. Does not
        synchronize with the device. If the slices of ranks differ by a bit, an error is raised on
        the CPU in eager mode; on an accelerator, or compiled, all terms are NaN. No GPU has run
        this yet.

    Raises:
        ContractError: z or slices are not floating tensors of these shapes.
        ValueError: fewer than 2 views, num_global not among them, no row without a group, dim or
            slices of 0, t_max that is not positive, fewer than 2 knots, or slices that differ
            between ranks.

    References:
        Balestriero, LeCun, LeJEPA (2025), https://arxiv.org/abs/2511.08544. The default is the
        authors' minimal example (https://github.com/rbalestr-lab/lejepa at eddffdd, MINIMAL.md),
        which has no local views; with local ones the paper, and lightly 1.6.0, have
        `centre="global"`; stable-pretraining at 9aa93f8 has `centre="global", convex=False,
        sigreg_weight=0.02`.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import lejepa_loss
        >>> z = torch.stack((torch.full((4, 3), 1.0), torch.full((4, 3), -1.0)))
        >>> lejepa_loss(z, num_slices=8).metrics()["invariance"]
        1.0
    """
    refuse_views(z, num_global, "lejepa_loss")
    if not (t_max > 0 and knots >= 2):
        raise ValueError(f"lejepa_loss needs t_max > 0 and knots >= 2, got {t_max} and {knots}")
    slices = _slices.slices_of("lejepa_loss", z, slices, num_slices, generator)
    _, rows = _slices.counted_rows("lejepa_loss", z, slices, batch_group)
    scale = _groups.gradient_scale(batch_group, grad_reduction)
    sums = _groups.terminal_sum(
        _slices.characteristic_sums(z, slices, t_max, knots), batch_group, scale
    )
    distances = _slices.epps_pulley(sums, rows, t_max, knots) * rows
    sigreg = distances.mean().to(lifted_dtype(z))
    apart = spread(
        z,
        num_global if centre == "global" else None,
        rows,
        group=batch_group,
        grad_reduction=grad_reduction,
    )
    invariance = apart.from_the_mean().to(sigreg.dtype)
    rest = 1 - sigreg_weight if convex else 1.0
    return LeJEPATerms(
        loss=weighted(rest, invariance) + weighted(sigreg_weight, sigreg),
        invariance=invariance,
        sigreg=sigreg,
    )


class LeJEPALoss(LossModule):
    """[`lejepa_loss`][termwise.joint_embedding.lejepa_loss] as a module.

    Has no parameters, and stores no slices, generator or process group: pass them with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import LeJEPALoss
        >>> loss_fn = LeJEPALoss(num_global=2, centre="global", num_slices=64)
        >>> loss_fn(torch.zeros(8, 10, 3)).metrics()["sigreg"]
        4.02047...
    """

    num_global: int | None = None
    sigreg_weight: float = 0.05
    convex: bool = True
    centre: Centre = "all"
    num_slices: int = 1024
    t_max: float = 3.0
    knots: int = 17
    grad_reduction: GradReduction = "mean"

    def __call__(
        self,
        z: Float[Tensor, "views batch dim"],
        *,
        slices: Float[Tensor, "dim slices"] | None = None,
        generator: torch.Generator | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> LeJEPATerms:
        """Compute the terms of the loss, with these slices or new random ones."""
        return lejepa_loss(
            z,
            slices=slices,
            generator=generator,
            batch_group=batch_group,
            **self.hyperparameters(),
        )
