"""A VICReg-like loss, right, and with one defect planted at a time: what the laws are tested on."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import termwise as tw
from termwise._groups import ProcessGroup, gradient_scale, terminal_sum


@tw.terms
class ViewTerms(tw.Terms):
    sim: Float[Tensor, ""]
    var: Float[Tensor, ""]
    cov: Float[Tensor, ""]
    std: Float[Tensor, " dim"]


class HalfSquare(torch.autograd.Function):
    """x^2 / 2, with a backward of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square() / 2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * grad


class WrongHalfSquare(HalfSquare):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class NoVmapHalfSquare(HalfSquare):
    generate_vmap_rule = False


def mean_over_ranks(rows: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    count = terminal_sum(rows.new_full((), rows.shape[0]), group, 1.0)
    return terminal_sum(rows.detach().sum(0), group, 1.0) / count, count


LAST = [0.0]  # where a function with a memory keeps what it saw


def compute(
    defect: str,
    z1: Tensor,
    z2: Tensor,
    sim_weight: float,
    var_weight: float,
    cov_weight: float,
    eps: float,
    batch_group: ProcessGroup | None,
) -> Any:
    """Compute the terms, with the defect of that name, if it is one."""
    scale = 1.0 if defect == "gradient not scaled" else gradient_scale(batch_group, "mean")
    if defect == "in-place":
        z1.detach().sub_(z1.detach().mean(0))
    if defect == "repaired":
        z1, z2 = torch.nan_to_num(z1), torch.nan_to_num(z2)
    if defect == "global noise":
        z1 = z1 + torch.randn_like(z1)
    if defect == "memory":
        seen = float(z1.detach().sum())
        z1, LAST[0] = z1 + LAST[0], seen
    if defect == "branch" and z1.mean().item() > 0:
        z1 = z1 * 1.0
    if defect == "dtype leak":
        z1, z2 = z1.float(), z2.float()
    half = {"wrong backward": WrongHalfSquare, "no vmap rule": NoVmapHalfSquare}.get(
        defect, HalfSquare
    )
    dim = z1.shape[1]
    distance = half.apply(z1 - z2).sum(1) * 2
    if defect == "no square":
        distance = (z1 - z2).abs().sum(1)
    if defect == "last row dropped":
        distance = distance[:-1]
    variances, covs = [], []
    for z in (z1, z2):
        mean, n = mean_over_ranks(z, batch_group)
        deviations = z if defect == "not centred" else z - mean
        divisor = n if defect == "n for n-1" else n - 1
        c = terminal_sum(deviations.T @ deviations, batch_group, scale) / divisor
        diagonal = c.diagonal()
        kept = c if defect == "diagonal kept" else c - torch.diag(diagonal)
        variances.append(diagonal)
        covs.append(kept.square().sum() / dim)
    sim = terminal_sum(distance.sum(), batch_group, scale) / (n * dim)
    views = variances[:1] * 2 if defect == "one view ignored" else variances
    if defect == "eps outside":
        roots = [v.sqrt() + eps for v in views]
    else:
        roots = [(v + eps).sqrt() for v in views]
    var = sum(torch.relu(1 - root).mean() for root in roots)
    cov = covs[0] + covs[1]
    std = (variances[0] + variances[1]).sqrt().detach()
    if defect == "diagnostic in graph":
        std = (variances[0] + variances[1] + 1).sqrt()
    if defect.startswith("field's shape"):
        std = std[None]  # a vector in a matrix
    if defect == "weights swapped":
        var_weight, cov_weight = cov_weight, var_weight
    return ViewTerms(
        loss=sim_weight * sim + var_weight * var + cov_weight * cov,
        sim=sim,
        var=var,
        cov=cov,
        std=std,
    )


def with_defect(defect: str, *, checked: bool = True) -> Any:
    """Make the loss with a defect, as a function of this module that is named after it."""

    def function(
        z1: Float[Tensor, "batch dim"],
        z2: Float[Tensor, "batch dim"],
        *,
        sim_weight: float = 25.0,
        var_weight: float = 25.0,
        cov_weight: float = 1.0,
        eps: float = 1e-4,
        batch_group: ProcessGroup | None = None,
    ) -> ViewTerms:
        return compute(defect, z1, z2, sim_weight, var_weight, cov_weight, eps, batch_group)

    name = "".join(letter if letter.isalnum() else "_" for letter in defect)
    function.__name__ = function.__qualname__ = name
    globals()[name] = tw.contract(function) if checked else function
    return globals()[name]


right = with_defect("right")
DEFECTS = {
    defect: with_defect(defect, checked=not defect.endswith("no contract"))
    for defect in (
        "branch",
        "diagnostic in graph",
        "diagonal kept",
        "dtype leak",
        "eps outside",
        "field's shape",
        "field's shape, no contract",
        "global noise",
        "gradient not scaled",
        "in-place",
        "last row dropped",
        "memory",
        "n for n-1",
        "no contract",
        "no square",
        "no vmap rule",
        "not centred",
        "one view ignored",
        "repaired",
        "weights swapped",
        "wrong backward",
    )
}


def formula(z1: Tensor, z2: Tensor, eps: float, **_: Any) -> dict[str, Tensor]:
    """Write the terms from the paper's equations, in the plainest way."""
    covariances = [torch.cov(z.T).reshape(z.shape[1], z.shape[1]) for z in (z1, z2)]
    off = [c - torch.diag(torch.diag(c)) for c in covariances]
    return {
        "sim": (z1 - z2).square().mean(),
        "var": sum(torch.relu(1 - (c.diagonal() + eps).sqrt()).mean() for c in covariances),
        "cov": sum(c.square().sum() for c in off) / z1.shape[1],
    }
