"""What a type checker knows of the language-model losses. Never run: pyright and mypy read it."""

from typing import assert_type

from torch import Tensor
from torch.distributed import ProcessGroup

from termwise.lm import TargetedVarianceLoss, TargetedVarianceTerms, targeted_variance_loss


def functions(weight: Tensor, rows: Tensor, group: ProcessGroup) -> None:
    terms = targeted_variance_loss(weight, target=2, valid_rows=rows, vocab_group=group)
    assert_type(terms, TargetedVarianceTerms)
    for field in (terms.loss, terms.squared_error, terms.variance):
        assert_type(field, Tensor)


def modules(weight: Tensor, rows: Tensor, group: ProcessGroup) -> None:
    loss_fn = TargetedVarianceLoss(coefficient=0.5)
    assert_type(loss_fn(weight, valid_rows=rows, vocab_group=group), TargetedVarianceTerms)
    assert_type(loss_fn.target, float)
