"""What a type checker knows of `termwise` itself. Never run: pyright and mypy read it."""

from collections.abc import Callable, Iterator
from typing import Any, assert_type

from jaxtyping import Float
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

import termwise
from termwise.joint_embedding import VICRegTerms, vicreg_loss


class OwnTerms(termwise.Terms):
    error: Float[Tensor, ""]


def functions(own: Callable[[Tensor, float], OwnTerms]) -> None:
    assert_type(termwise.contract(own), Callable[[Tensor, float], OwnTerms])
    assert_type(termwise.terms(OwnTerms), type[OwnTerms])


def statistics(terms: OwnTerms, x: Tensor, group: ProcessGroup) -> None:
    found = termwise.term_gradients(terms, {"error": 2.0}, [x], batch_group=group)
    assert_type(found, termwise.TermGradients)
    assert_type(termwise.term_gradients(terms, ["error"], [x]), termwise.TermGradients)


def micro_batches(
    parts: list[tuple[Tensor, Tensor]],
    embed: Callable[[tuple[Tensor, Tensor]], list[Tensor]],
    loss: Callable[[Tensor, Tensor], OwnTerms],
    model: DistributedDataParallel,
    backward: Callable[[Tensor], None],
) -> None:
    assert_type(termwise.cached_gradients(embed, parts, loss), OwnTerms)
    assert_type(
        termwise.cached_gradients(
            model, parts, vicreg_loss, no_sync=[model.no_sync], backward=backward
        ),
        VICRegTerms,
    )


def fields_of_term_gradients(gradients: termwise.TermGradients) -> None:
    assert_type(gradients.names, tuple[str, ...])
    assert_type(gradients.norms, Tensor)
    assert_type(gradients.cosines, Tensor)
    assert_type(gradients.metrics("train/"), dict[str, float])


def fields_of_term_average(average: termwise.TermAverage, terms: OwnTerms) -> None:
    assert_type(average.sums, dict[str, Tensor])
    assert_type(average.weights, dict[str, Tensor])
    assert_type(average.update(terms, weight=2), termwise.TermAverage)
    assert_type(average.metrics(), dict[str, float])


class OwnLoss(termwise.LossModule):
    weight: float = 1.0

    def __call__(self, x: Tensor) -> OwnTerms:
        raise NotImplementedError


def modules(x: Tensor) -> None:
    assert_type(OwnLoss(weight=2)(x), OwnTerms)
    assert_type(OwnLoss().weight, float)


def fields_of_loss_module(module: termwise.LossModule) -> None:
    assert_type(module.hyperparameters(), dict[str, Any])


def fields_of_terms(terms: termwise.Terms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.items(), Iterator[tuple[str, Tensor]])
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), termwise.Terms)
    assert_type(terms.to("cpu", non_blocking=True), termwise.Terms)
    assert_type(terms["error"], Tensor)
