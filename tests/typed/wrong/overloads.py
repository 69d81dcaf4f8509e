"""Calls of overloaded functions that a type checker refuses. Never run."""

from torch import Tensor

from termwise import energy, sae


def bowl(x: Tensor) -> Tensor:
    return x.square().sum(1)


def calls() -> None:
    energy.create_loss("mle")  # error: reportCallIssue: No overloads for "create_loss" match
    energy.create_loss("mle", bowl, 1.0)  # error: reportCallIssue: No overloads for "create_loss" match
    sae.get_objective()  # error: reportCallIssue: No overloads for "get_objective" match
    sae.get_objective(sae.Vanilla(), 1.0)  # error: reportCallIssue: No overloads for "get_objective" match
