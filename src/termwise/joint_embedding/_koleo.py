"""KoLeo: spread embeddings by the distances to their nearest neighbors."""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .. import _groups
from .._autograd import transformed
from .._contract import contract
from .._groups import GradReduction, ProcessGroup
from .._module import LossModule
from .._numbers import accumulator, few, lifted, tiles, without_autocast
from .._operators import Operator, with_gradients
from .._terms import Terms, terms


@terms
class KoLeoTerms(Terms):
    """Terms of [`koleo_loss`][termwise.joint_embedding.koleo_loss]."""

    loss: Float[Tensor, ""]
    """-log(distance + eps), mean over samples and their top_k nearest neighbors."""
    nearest_distance: Float[Tensor, ""]
    """Distance to the nearest neighbor, between 0 and 2, mean over samples; detached."""
    min_distance: Float[Tensor, ""]
    """Smallest distance of two samples in a group; detached. 0: there are duplicates."""


@contract
def koleo_loss(
    z: Float[Tensor, "batch dim"],
    *,
    top_k: int = 1,
    eps: float = 1e-8,
    group_size: int | None = None,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> KoLeoTerms:
    r"""Push each sample away from its nearest neighbors, on the unit sphere.

    $$\mathrm{loss} = -\frac{1}{n k} \sum_{i} \sum_{j \in N_k(i)}
    \log \left( \lVert \hat{z}_i - \hat{z}_j \rVert + \epsilon \right), \qquad
    \hat{z}_i = \frac{z_i}{\lVert z_i \rVert}$$

    where N_k(i) are the k samples most similar to i by cosine, without i itself. Up to a constant
    and a factor this is the Kozachenko-Leonenko estimate of the negative entropy of the
    embeddings.

    Neighbors are searched in tiles: no batch x batch matrix is stored. Distances are norms of
    differences, not sqrt(2 - 2 cos), which is imprecise if samples are close. Inputs in half
    precision are converted to float32, with or without autocast, so that eps does not round to 0;
    the terms of float64 inputs are float64. A non-finite input makes the terms non-finite.

    Args:
        z (Float[Tensor, "batch dim"]): embeddings, a row for each sample, of any length: they are
            divided by their Euclidean norms (at least 1e-12). Pass one view; with two, add the
            losses of each, so that the views of a sample are not pushed apart. Feature maps have
            one row for each image, with `einops.rearrange(z, "b c h w -> b (c h w)")`; with `"b c h
            w -> (b h w) c"` positions of one image are neighbors of each other.
        top_k: number of nearest neighbors of each sample; 1 in the paper, DINOv2 and DINOv3.
        eps: added to a distance before the logarithm; 1e-8 in DINOv2. The loss of two exact
            duplicates is -log(eps), and their gradient is 0, since no direction is preferred. With
            eps 0 the loss is infinite.
        group_size: number of consecutive samples, in the order of ranks, among which neighbors are
            searched. None: all. The number of samples over all ranks must be a multiple of it.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect.

    Returns:
        The terms of the whole batch, the same on every rank. A sample's gradient has two parts:
        from its own neighbors, and from the samples whose neighbor it is, including those on other
        ranks. Which samples are neighbours is constant. Gradients, combined over ranks as
        `grad_reduction` says, equal those of one process that holds all rows. Second derivatives
        are correct without a group and raise NotImplementedError with one.

        Communication of each rank, for d = dim, N = rows over all ranks, W = ranks, in elements of
        that dtype (float32 for half precision): the rows go around a ring once and their gradients
        a second time, less than 2 * N * d in and as many out, in 2 * W - 1 messages, and sums of W
        + 3 numbers. The numbers of rows are read on the host, so with a group a call synchronizes
        with the device once. The same is sent under `torch.no_grad()`.

    Raises:
        ContractError: z is not a floating "batch dim" tensor.
        ValueError: top_k below 1, eps negative, no more samples (or a group_size no larger) than
            top_k, or a number of samples that group_size does not divide.

    References:
        Sablayrolles, Douze, Schmid, Jegou, Spreading vectors for similarity search (2019),
        https://arxiv.org/abs/1806.03198, equation 3, without eps. DINOv2's code (`koleo_loss.py`,
        b8931f7), DINOv3's (6876159) and lightly 1.6.0 also add eps to each coordinate of the
        difference. Its gradient moves duplicates in the same direction, and so does not separate
        them either: we side with the paper. In their code neighbors come from one rank (DINOv2,
        lightly) or from groups of ranks that hold equally many rows (DINOv3's
        `KoLeoLossDistributed`, whose `loss_group_size` and `topk` are ours).

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import koleo_loss
        >>> angles = torch.arange(6) * (torch.pi / 3)  # neighbours at a distance of 1
        >>> terms = koleo_loss(torch.stack((angles.cos(), angles.sin()), 1))
        >>> round(terms.min_distance.item(), 5), round(abs(terms.loss.item()), 5)
        (1.0, 0.0)
    """
    if top_k < 1 or not eps >= 0:
        raise ValueError(f"koleo_loss needs top_k >= 1 and eps >= 0, got {top_k} and {eps}")
    if batch_group is None:
        _refuse(z.shape[0], top_k, group_size)
    unit = F.normalize(lifted(z), dim=1)
    counts = _groups.row_counts(z, batch_group)
    if batch_group is None or counts is None:
        # For few samples an operator, which compilers and transforms need, takes as long as its
        # kernel.
        search = _search_kernel if few(unit) and not transformed() else _search
        _, nearest = search(_Search(unit.detach(), top_k, group_size or 0))
        distance = _distances(unit, unit[nearest])
        loss = -(distance + eps).log().mean()
        nearest_distance, min_distance = distance.detach()[:, 0].mean(), distance.detach().amin()
    else:
        inputs = _Inputs(
            unit,
            counts,
            top_k,
            group_size or 0,
            eps,
            torch.is_grad_enabled(),
            batch_group.group_name,
            _groups.gradient_scale(batch_group, grad_reduction),
        )
        loss, nearest_distance, min_distance, _ = with_gradients(_over_ranks, inputs)
    return KoLeoTerms(loss=loss, nearest_distance=nearest_distance, min_distance=min_distance)


def _distances(unit: Tensor, neighbours: Tensor) -> Tensor:
    return cast("Tensor", torch.linalg.vector_norm(unit.unsqueeze(1) - neighbours, dim=2))


def _refuse(samples: int, top_k: int, group_size: int | None) -> None:
    if group_size is not None and (group_size < 1 or samples % group_size):
        raise ValueError(
            f"koleo_loss needs a number of samples that group_size divides, got {samples} samples "
            f"and {group_size}"
        )
    if (samples if group_size is None else min(samples, group_size)) <= top_k:
        within = "" if group_size is None else f" in groups of {group_size}"
        raise ValueError(f"koleo_loss needs more samples than top_k={top_k}, got {samples}{within}")


class _Inputs(NamedTuple):
    unit: Tensor
    """Rows of length 1."""
    counts: Tensor
    top_k: int
    group_size: int
    """0: all samples form one group."""
    eps: float
    gradient: bool
    group_name: str
    weight: float
    """Of the gradient."""


def _kernel(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute loss, nearest and smallest distance, and the gradient of the loss (or nothing)."""
    unit, top_k, name = inputs.unit.detach(), inputs.top_k, inputs.group_name
    each = cast("list[int]", inputs.counts.tolist())
    samples, ranks, rank = sum(each), len(each), _groups.resolved(name).rank()
    _refuse(samples, top_k, inputs.group_size or None)
    first = [sum(each[:one]) for one in range(ranks)]
    owners = [(rank - step) % ranks for step in range(ranks)]  # of the rows now on this rank

    with without_autocast(unit):
        visiting, best = unit, _none(unit, top_k)
        neighbours = unit.new_zeros(unit.shape[0], top_k, unit.shape[1])
        for owner in owners:
            if len(visiting):
                size = inputs.group_size or samples
                found = _nearest(unit, first[rank], visiting, first[owner], top_k, size)
                rows = visiting[(found.places - first[owner]).clamp_(min=0)]
                best, chosen = _best(best, found)
                neighbours = torch.cat((neighbours, rows), 1)
                neighbours = neighbours.take_along_dim(chosen.unsqueeze(2), 1)
            if owner != owners[-1]:
                visiting = _groups.passed_on(visiting, each[owner - 1], name)
        distance = _distances(unit, neighbours)
        logs = (distance + inputs.eps).log().sum(dtype=accumulator(unit))
        sums = torch.stack((-logs / top_k, distance[:, 0].sum(dtype=logs.dtype)))
        loss, nearest = ((x / samples).to(unit.dtype) for x in _groups.all_reduce(sums, name))
        least = distance.amin() if len(unit) else unit.new_full((), torch.inf)
        least = _groups.all_reduce(least, name, "min")

        # Also without a gradient on this rank, since ranks may differ in grad mode.
        factor = inputs.weight / (samples * top_k)
        slope = factor / ((distance + inputs.eps) * distance)
        slope = slope.masked_fill_(distance == 0, 0).unsqueeze(2)
        push = (unit.unsqueeze(1) - neighbours).mul_(slope)
        pulled = torch.zeros_like(unit)
        for owner in owners:
            if len(pulled):
                at = best.places - first[owner]
                inside = (at >= 0) & (at < each[owner])
                at = at.clamp_(0, each[owner] - 1).flatten()
                pulled.index_add_(0, at, push.where(inside.unsqueeze(2), 0).flatten(0, 1))
            pulled = _groups.passed_on(pulled, each[owner - 1], name)
        # These are back on their own rank.
        gradient = pulled.sub_(push.sum(1)) if inputs.gradient else unit.new_empty(0)
        return loss, nearest, least, gradient


def _fake(inputs: _Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    unit = inputs.unit
    gradient = unit.new_empty(unit.shape if inputs.gradient else 0)
    return unit.new_empty(()), unit.new_empty(()), unit.new_empty(()), gradient


_over_ranks = Operator("koleo", _Inputs, _kernel, _fake)


class _Search(NamedTuple):
    unit: Tensor
    top_k: int
    group_size: int


def _search_kernel(inputs: _Search) -> tuple[Tensor, Tensor]:
    """Find the nearest neighbors of each row: their cosines and indices."""
    unit = inputs.unit
    with without_autocast(unit):
        size = inputs.group_size or len(unit)
        found = _nearest(unit, 0, unit, 0, inputs.top_k, size)
    return found.cosines, found.places


def _search_fake(inputs: _Search) -> tuple[Tensor, Tensor]:
    cosines = inputs.unit.new_empty(inputs.unit.shape[0], inputs.top_k)
    return cosines, torch.empty_like(cosines, dtype=torch.int64)


_search = Operator("nearest_neighbours", _Search, _search_kernel, _search_fake)


class _Nearest(NamedTuple):
    """The nearest neighbors of some rows, "rows top_k", the most similar first."""

    cosines: Tensor
    places: Tensor
    """Indices among the samples of all ranks."""


def _none(unit: Tensor, top_k: int) -> _Nearest:
    cosines = unit.new_full((unit.shape[0], top_k), -torch.inf)
    return _Nearest(cosines, torch.zeros_like(cosines, dtype=torch.int64))


def _best(one: _Nearest, other: _Nearest) -> tuple[_Nearest, Tensor]:
    """Merge two sets of neighbors: return the best cosines and their indices."""
    cosines = torch.cat((one.cosines, other.cosines), 1)
    places = torch.cat((one.places, other.places), 1)
    cosines, chosen = cosines.topk(one.cosines.shape[1], dim=1)
    return _Nearest(cosines, places.gather(1, chosen)), chosen


def _nearest(
    unit: Tensor, first: int, others: Tensor, others_first: int, top_k: int, size: int
) -> _Nearest:
    """Search among other rows of the same group, except the row itself.

    The offsets are the indices of the first rows among the samples of all ranks.
    """
    best = None
    for rows, tile in tiles(unit, len(others)):
        start, last = first + rows.start, first + min(rows.stop, len(unit)) - 1
        others_start, others_last = others_first + tile.start, others_first + tile.stop - 1
        if others_last // size < start // size or last // size < others_start // size:
            continue  # no group in common
        cosines = unit[rows] @ others[tile].T
        cosines.diagonal(start - others_start).fill_(-torch.inf)
        if min(start, others_start) // size < max(last, others_last) // size:  # not one group
            own, places = (
                torch.arange(one, one + count, device=unit.device).div_(size, rounding_mode="floor")
                for one, count in zip((start, others_start), cosines.shape, strict=True)
            )
            cosines.masked_fill_(own.unsqueeze(1) != places, -torch.inf)
        found = _Nearest(*cosines.topk(min(top_k, cosines.shape[1]), dim=1))
        found.places.add_(others_start)
        if cosines.shape == (len(unit), len(others)) and top_k <= len(others):
            return found  # all at once
        best = best or _none(unit, top_k)
        before = _Nearest(best.cosines[rows], best.places[rows])
        (best.cosines[rows], best.places[rows]), _ = _best(before, found)
    return best or _none(unit, top_k)


class KoLeoLoss(LossModule):
    """[`koleo_loss`][termwise.joint_embedding.koleo_loss] as a module.

    Has no parameters and stores no process group: pass the group with each call.

    Examples:
        >>> import torch
        >>> from termwise.joint_embedding import KoLeoLoss
        >>> loss_fn = KoLeoLoss(eps=0.0)
        >>> loss_fn(torch.tensor([[3.0], [-0.1]])).metrics()["nearest_distance"]
        2.0
    """

    top_k: int = 1
    eps: float = 1e-8
    group_size: int | None = None
    grad_reduction: GradReduction = "mean"

    def __call__(
        self, z: Float[Tensor, "batch dim"], *, batch_group: ProcessGroup | None = None
    ) -> KoLeoTerms:
        """Compute the terms of the loss of one view."""
        return koleo_loss(z, batch_group=batch_group, **self.hyperparameters())
