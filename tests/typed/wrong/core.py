"""Uses of `terms` and `contract` that a type checker refuses. Never run."""

from jaxtyping import Float
from torch import Tensor

import termwise


@termwise.terms
class ExampleTerms(termwise.Terms):
    error: Float[Tensor, ""]


@termwise.contract
def example_loss(x: Float[Tensor, "batch dim"], *, weight: float = 1.0) -> ExampleTerms:
    return ExampleTerms(loss=x.sum(), error=x.sum())


class ExampleLoss(termwise.LossModule):
    weight: float = 1.0

    def __call__(self, x: Tensor) -> ExampleTerms:
        return example_loss(x, **self.hyperparameters())


def modules(x: Tensor) -> None:
    ExampleLoss(2.0)  # error: reportCallIssue: Expected 0 positional arguments
    ExampleLoss(wieght=2.0)  # error: reportCallIssue: No parameter named "wieght"
    ExampleLoss(weight="2")  # error: reportArgumentType: "weight" of type "float"
    ExampleLoss()()  # error: reportCallIssue: Argument missing for parameter "x"
    ExampleLoss()(x).lost  # error: reportAttributeAccessIssue: Cannot access attribute "lost"


def calls(x: Tensor) -> None:
    example_loss()  # error: reportCallIssue: Argument missing for parameter "x"
    example_loss(x, 2)  # error: reportCallIssue: Expected 1 positional argument
    example_loss(x, w=2)  # error: reportCallIssue: No parameter named "w"
    example_loss(x, weight="2")  # error: reportArgumentType: "weight" of type "float"
    example_loss(x).lost  # error: reportAttributeAccessIssue: Cannot access attribute "lost"
    termwise.contract(x)  # error: reportArgumentType: parameter "fn"


def records(terms: ExampleTerms, x: Tensor) -> None:
    ExampleTerms(x, x)  # error: reportCallIssue: Expected 0 positional arguments
    ExampleTerms(loss=x, eror=x)  # error: reportCallIssue: No parameter named "eror"
    ExampleTerms(loss=x)  # error: reportCallIssue: Argument missing for parameter "error"
    terms.error = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "error"
    terms.loss = x  # error: reportAttributeAccessIssue: Cannot assign to attribute "loss"
    termwise.terms(Tensor)  # error: reportArgumentType: parameter "cls"
    termwise.term_gradients(terms, ["error"])  # error: reportCallIssue: Argument missing for parameter "inputs"
    termwise.term_gradients(terms, {"error": "2"}, [x])  # error: reportArgumentType: parameter "weights_or_names"
    termwise.cached_gradients(example_loss, [x])  # error: reportCallIssue: Argument missing for parameter "loss"
    termwise.cached_gradients(lambda x: x, ["x"], example_loss)  # error: reportArgumentType: parameter "embed"
    termwise.TermAverage().update(x)  # error: reportArgumentType: parameter "terms"
    terms[0]  # error: reportArgumentType: parameter "name"
