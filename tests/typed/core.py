"""What a type checker knows of `contract` and `terms`. Never run: pyright and mypy read it."""

from collections.abc import Callable
from typing import assert_type

from jaxtyping import Float
from torch import Tensor

import termwise as tw


@tw.terms
class ExampleTerms(tw.Terms):
    """A record of one's own."""

    error: Float[Tensor, ""]
    """Squared error."""


@tw.contract
def example_loss(x: Float[Tensor, "batch dim"], *, weight: float = 1.0) -> ExampleTerms:
    """Keep the signature."""
    error = x.square().sum()
    return ExampleTerms(loss=weight * error, error=error)


def uses(x: Tensor, losses: list[Callable[[Tensor], tw.Terms]]) -> None:
    terms = example_loss(x, weight=2)
    assert_type(terms, ExampleTerms)
    assert_type(terms.error, Tensor)
    losses.append(example_loss)
    for loss in losses:
        assert_type(loss(x).loss, Tensor)
