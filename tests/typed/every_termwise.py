"""What a type checker knows of `termwise` itself. Never run: pyright and mypy read it."""

from collections.abc import Callable, Iterator
from typing import assert_type

from jaxtyping import Float
from torch import Tensor

import termwise


class OwnTerms(termwise.Terms):
    error: Float[Tensor, ""]


def functions(own: Callable[[Tensor, float], OwnTerms]) -> None:
    assert_type(termwise.contract(own), Callable[[Tensor, float], OwnTerms])
    assert_type(termwise.terms(OwnTerms), type[OwnTerms])


def fields_of_terms(terms: termwise.Terms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.items(), Iterator[tuple[str, Tensor]])
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), termwise.Terms)
