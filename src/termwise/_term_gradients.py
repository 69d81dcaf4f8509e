"""Gradients of the terms of a loss: their norms, and the cosines between them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from . import _groups
from ._groups import GradReduction, ProcessGroup
from ._numbers import accumulator, lifted
from ._terms import Terms, host_numbers, html_table, is_readable, text_table


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class TermGradients:
    """Result of [`term_gradients`][termwise.term_gradients], on the device."""

    names: tuple[str, ...]
    """Names of the terms, in the order of `norms` and `cosines`."""
    norms: Float[Tensor, " terms"]
    """Float[Tensor, " terms"]: Euclidean norm of each term's gradient, times its
    weight, over all inputs together."""
    cosines: Float[Tensor, "terms terms"]
    """Float[Tensor, "terms terms"]: cosine of the angle between each two gradients; NaN where
    one of them is zero."""

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Return all numbers with one transfer to the host: `norm[sim]`, `cosine[sim, var]`, ..."""
        pairs = [(i, j) for i in range(len(self.names)) for j in range(i)]
        tensors = {f"norm[{name}]": self.norms[i] for i, name in enumerate(self.names)}
        for j, i in pairs:
            tensors[f"cosine[{self.names[i]}, {self.names[j]}]"] = self.cosines[i, j]
        return host_numbers(tensors, prefix)

    def __repr__(self) -> str:
        """Return a table with a row for each term. Synchronizes with the device."""
        return text_table(type(self).__name__, self._table())

    def _repr_html_(self) -> str:
        """Return the table of `repr` as HTML, for notebooks."""
        return html_table(type(self).__name__, self._table())

    def _table(self) -> list[list[str]]:
        several = range(len(self.names))
        if is_readable(self.norms):
            values = host_numbers({"norm": self.norms, "cosine": self.cosines.flatten()})
            cells = [
                [f"{values[f'norm[{i}]']:.6g}"]
                + [f"{values[f'cosine[{i * len(self.names) + j}]']:.3f}" for j in several]
                for i in several
            ]
        else:
            cells = [["..."] * (1 + len(self.names)) for _ in several]
        rows = [[name, *row] for name, row in zip(self.names, cells, strict=True)]
        return [["", "norm", *(f"cosine[{name}]" for name in self.names)], *rows]


def term_gradients(
    terms: Terms,
    weights_or_names: Mapping[str, float | Tensor] | Sequence[str],
    inputs: Tensor | Iterable[Tensor],
    *,
    batch_group: ProcessGroup | None = None,
    grad_reduction: GradReduction = "mean",
) -> TermGradients:
    r"""Compare the gradients of the terms of a loss, to tune their weights.

    With $g_t = w_t \, \partial\,\mathrm{term}_t / \partial\,\mathrm{inputs}$, concatenated over all
    inputs:

    $$\mathrm{norm}_t = \lVert g_t \rVert, \qquad
    \mathrm{cosine}_{st} = \frac{\langle g_s, g_t \rangle}{\lVert g_s \rVert \lVert g_t \rVert}$$

    A term whose norm is a hundredth of another's has little effect on the update; two terms with a
    cosine near -1 oppose each other.

    Args:
        terms: what a loss returned, with its graph.
        weights_or_names: weights of the terms to compare by name, or names alone, for weights of 1.
        inputs: tensor or tensors to differentiate with respect to: the model's parameters or, at
            lower cost, the embeddings. The gradient is zero for those that a term does not depend
            on, or that do not require a gradient.
        batch_group: process group whose ranks hold different samples, in any numbers, 0 included.
            None: no communication. Pass it if the terms were computed with it and the inputs are
            parameters: gradients are then first combined over the ranks, as the trainer does.
        grad_reduction: how the trainer combines the ranks' gradients: "mean" (DDP, FSDP) or "sum".
            Without a group it has no effect. It must be the same as in the loss.

    Returns:
        Norms and cosines, detached, the same on every rank. Makes one backward pass for each term,
        and retains the graph, so `terms.loss.backward()` still works; writes no `.grad`. The
        gradients of all terms are in memory at once, and with a group each rank sends them all.
        Does not synchronize with the device.

    Raises:
        TypeError: the names are one string.
        ValueError: there are no names or no inputs, or a term does not exist or is not in the
            graph.

    Examples:
        >>> import torch
        >>> import termwise as tw
        >>> z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-2.0, 0.0]], requires_grad=True)
        >>> terms = tw.joint_embedding.vicreg_loss(z, torch.zeros(3, 2), gamma=2.0)
        >>> tw.term_gradients(terms, {"sim": 25.0, "var": 25.0}, [z]).metrics()
        {'norm[sim]': 23.57..., 'norm[var]': 12.49..., 'cosine[sim, var]': -0.96...}
    """
    if isinstance(weights_or_names, str):
        raise TypeError(
            f"term_gradients needs a dict of weights or a list of names, got the string "
            f"{weights_or_names!r}: pass [{weights_or_names!r}]"
        )
    if isinstance(weights_or_names, Mapping):
        weights = dict(weights_or_names)
    else:
        weights = cast("dict[str, float | Tensor]", dict.fromkeys(weights_or_names, 1.0))
    if not weights:
        raise ValueError("term_gradients needs the name of at least one term, got none")
    given = [inputs] if isinstance(inputs, Tensor) else inputs
    reached = [x for x in given if x.requires_grad]
    if not reached:
        raise ValueError(
            "term_gradients needs an input that requires a gradient, got none: give it "
            "model.parameters(), or a tensor that the terms were computed from"
        )
    named = dict(terms.items())
    rows: list[list[Tensor]] = []
    for name, weight in weights.items():
        if name not in named or not named[name].requires_grad or named[name].ndim:
            usable = [n for n, value in named.items() if value.requires_grad and not value.ndim]
            raise ValueError(
                f"term_gradients needs a scalar term in the graph of {type(terms).__name__}, "
                f"one of {', '.join(usable) or '(none)'}; got {name!r}"
            )
        found = torch.autograd.grad(
            named[name], reached, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append([lifted(_combined(g, batch_group, grad_reduction)) * weight for g in found])
    several = range(len(rows))
    half = {(i, j): _inner(rows[i], rows[j]) for i in several for j in several if i <= j}
    products = torch.stack(
        [torch.stack([half[min(i, j), max(i, j)] for j in several]) for i in several]
    )
    norms = products.diagonal().sqrt()
    return TermGradients(
        names=tuple(weights), norms=norms, cosines=products / (norms[:, None] * norms)
    )


def _combined(
    gradient: Tensor, group: ProcessGroup | None, grad_reduction: GradReduction
) -> Tensor:
    if group is None:
        return gradient
    return _groups.all_reduce(gradient, group.group_name) / _groups.gradient_scale(
        group, grad_reduction
    )


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Sum all products: within each tensor in its dtype, over tensors in the wider one."""
    sums = [(a * b).sum(dtype=accumulator(a)) for a, b in zip(left, right, strict=True)]
    return torch.stack(sums).sum()
