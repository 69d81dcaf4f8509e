"""Noise-contrastive estimation: distinguish data from noise of a known density, and learn log Z."""

import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .. import _groups
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._means import weighted_means
from .._module import LossModule
from .._numbers import accumulator, lifted, without_autocast
from .._terms import Terms, terms
from ._decisions import share_right
from ._energies import Energy, energies_of, refuse_batch_statistics


@terms
class NoiseContrastiveTerms(Terms):
    """Terms of [`noise_contrastive_loss`][termwise.energy.noise_contrastive_loss]."""

    loss: Float[Tensor, ""]
    """data + noise."""
    data: Float[Tensor, ""]
    """-log p(data | x), weighted mean over rows of data; nats."""
    noise: Float[Tensor, ""]
    """-log p(noise | y), mean over rows of noise, times nu; nats."""
    accuracy: Float[Tensor, ""]
    """Fraction of all rows, data and noise, that are classified correctly, ties as half; detached.

    Rows of data count by their weights: (right data + nu * right noise) / (1 + nu).
    """
    log_z: Float[Tensor, ""]
    """A copy of log Z; detached."""


@contract
def noise_contrastive_loss(
    energy: Energy,
    x: Float[Tensor, "batch *event"],
    noise: Float[Tensor, "noise *event"],
    *,
    log_noise_x: Float[Tensor, " batch"],
    log_noise_noise: Float[Tensor, " noise"],
    log_z: Float[Tensor, ""],
    weights: Float[Tensor, " batch"] | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> NoiseContrastiveTerms:
    r"""Classify rows as data or as noise of density q, by the ratio of the model to q.

    $$G(u) = -E(u) - \log\, Z - \log\, q(u) - \log\, \nu, \qquad
    \mathrm{loss} = \sum_i w_i \log(1 + e^{-G(x_i)}) + \nu \frac{1}{m} \sum_j \log(1 + e^{G(y_j)})$$

    over the rows of data x, whose weights w sum to 1, and m rows of noise y; nu = m / batch. The
    true density, with its log Z, is the only minimum for any q that is positive wherever the
    density of the data is. If the model is q, the loss is log(1 + nu) + nu * log(1 + 1 / nu).

    Args:
        energy: returns the energy of each row. It is called twice, on x and on the noise.
        x (Float[Tensor, "batch *event"]): data, with the axes of a sample that the energy takes.
        noise (Float[Tensor, "noise *event"]): samples of q, in any number; not detached, so a model
            that generates them gets a gradient.
        log_noise_x (Float[Tensor, " batch"]): normalized log q of the rows of x.
        log_noise_noise (Float[Tensor, " noise"]): log q of the rows of noise.
        log_z (Float[Tensor, ""]): estimate of the log of the model's normalizer, learnt like a
            parameter.
        weights (Float[Tensor, " batch"] | None): weights of the rows of x, normalized over all
            ranks. None: equal weights. They do not affect nu.
        batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
            None: no communication. nu is that of all rows of all ranks.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of all rows, the same on every rank. Without a row of either kind they are NaN.
        Gradient: combined over ranks as `grad_reduction` says, it is the gradient of one process
        that holds all rows. Each rank sends two counts, then one sum of 6 float64 elements. Does
        not synchronize with the device. Autocast is disabled inside, also for the energy unless it
        enables autocast itself.

    Raises:
        ContractError: wrong shapes or dtypes, or the energy does not return one floating number for
            each row.
        ValueError: the energy has batch normalization in training mode.

    References:
        Gutmann, Hyvarinen, Noise-Contrastive Estimation of Unnormalized Statistical Models, with
        Applications to Natural Image Statistics (JMLR 2012),
        https://jmlr.org/papers/v13/gutmann12a.html, of which this is the loss for any nu. Code that
        classifies by -E - log Z, without log q and log nu, learns the ratio to the density of the
        noise instead of the density.

    Examples:
        Noise from the model's own density cannot be distinguished from data:

        >>> import torch
        >>> from termwise.energy import noise_contrastive_loss
        >>> x, noise = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0]])
        >>> energy = lambda x: x[:, 0]
        >>> terms = noise_contrastive_loss(
        ...     energy, x, noise, log_noise_x=-x[:, 0] - 1, log_noise_noise=-noise[:, 0] - 1,
        ...     log_z=torch.tensor(1.0),
        ... )
        >>> terms.metrics()
        {'loss': 1.386..., 'data': 0.693..., 'noise': 0.693..., 'accuracy': 0.5, 'log_z': 1.0}
    """
    refuse_batch_statistics("noise_contrastive_loss", energy)
    with without_autocast(x):
        of_data = energies_of("noise_contrastive_loss", energy, x)
        of_noise = energies_of("noise_contrastive_loss", energy, noise, "noise")
        ratio = noise_ratio(of_data, of_noise, batch_group)
        offset = lifted(log_z) + ratio.log().to(of_data.dtype)
        data_logits = -of_data - lifted(log_noise_x) - offset
        noise_logits = -of_noise - lifted(log_noise_noise) - offset
        data, data_right, noise_term, noise_right = weighted_means(
            ([F.softplus(-data_logits), share_right(data_logits)], weights),
            ([F.softplus(noise_logits), share_right(-noise_logits)], None),
            batch_group=batch_group,
            grad_reduction=grad_reduction,
        )
        ratio = ratio.to(data.dtype)
        noise_term = ratio * noise_term
        return NoiseContrastiveTerms(
            loss=data + noise_term,
            data=data,
            noise=noise_term,
            accuracy=((data_right + ratio * noise_right) / (1 + ratio)).detach(),
            log_z=lifted(log_z).detach().clone(),  # a view would change with the next step
        )


def noise_ratio(of_data: Tensor, of_noise: Tensor, batch_group: ProcessGroup | None) -> Tensor:
    """Return nu, rows of noise for each row of data, over all ranks."""
    # Filled on the device, since copying a Python number to it would synchronize.
    counts = torch.cat(
        [
            torch.full((1,), of.shape[0], dtype=accumulator(of), device=of.device)
            for of in (of_noise, of_data)
        ]
    )
    if batch_group is not None:
        counts = _groups.all_reduce(counts, batch_group.group_name)
    return counts[0] / counts[1]


class NoiseContrastiveLoss(LossModule):
    """[`noise_contrastive_loss`][termwise.energy.noise_contrastive_loss] as a module, with log Z.

    `log_z` is a parameter without axes, or a buffer if it is not learnt. Pass it to the optimizer
    with the energy's parameters (`loss_fn.parameters()` has both). With DistributedDataParallel,
    wrap this module, not the energy alone. FSDP's `fully_shard` does not support parameters without
    axes: apply it to the energy, and reduce the gradient of `log_z` yourself.

    Args:
        energy: returns the energy of each row.
        log_z: initial value of the estimate of log Z.
        learn_log_z: whether to learn it. False: it is constant, for a model that is already
            normalized.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Examples:
        >>> import torch
        >>> from termwise.energy import NoiseContrastiveLoss
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0))
        >>> loss_fn = NoiseContrastiveLoss(model)
        >>> q = torch.distributions.Normal(torch.zeros(3), 1.0)
        >>> x, noise = torch.ones(4, 3), torch.zeros(8, 3)
        >>> log_noise = {"log_noise_x": q.log_prob(x).sum(1)}
        >>> terms = loss_fn(x, noise, **log_noise, log_noise_noise=q.log_prob(noise).sum(1))
        >>> terms.loss.backward()
        >>> loss_fn.log_z.grad.shape
        torch.Size([])
    """

    energy: Energy = dataclasses.field(kw_only=False)
    log_z: Tensor
    """The estimate of log Z, with no axes."""
    learn_log_z: bool = True
    grad_reduction: GradReduction = "mean"

    # Written out, since log_z is passed as a number.
    def __init__(
        self,
        energy: Energy,
        *,
        log_z: float = 0.0,
        learn_log_z: bool = True,
        grad_reduction: GradReduction = "mean",
    ) -> None:
        self.energy = energy
        self.learn_log_z = learn_log_z
        self.grad_reduction: GradReduction = grad_reduction
        if learn_log_z:
            self.log_z = nn.Parameter(torch.tensor(float(log_z)))
        else:
            self.register_buffer("log_z", torch.tensor(float(log_z)))

    def __call__(
        self,
        x: Float[Tensor, "batch *event"],
        noise: Float[Tensor, "noise *event"],
        *,
        log_noise_x: Float[Tensor, " batch"],
        log_noise_noise: Float[Tensor, " noise"],
        weights: Float[Tensor, " batch"] | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> NoiseContrastiveTerms:
        """Compute the terms of the loss."""
        return noise_contrastive_loss(
            self.energy,
            x,
            noise,
            log_noise_x=log_noise_x,
            log_noise_noise=log_noise_noise,
            log_z=self.log_z,
            weights=weights,
            batch_group=batch_group,
            grad_reduction=self.grad_reduction,
        )
