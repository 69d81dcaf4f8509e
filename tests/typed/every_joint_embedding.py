"""What a type checker knows of `termwise.joint_embedding`. Never run: pyright and mypy read it."""

from typing import assert_type

from torch import Tensor

from termwise import joint_embedding


def functions(x: Tensor) -> None:
    assert_type(joint_embedding.vicreg_loss(x, x), joint_embedding.VICRegTerms)


def modules(x: Tensor) -> None:
    assert_type(joint_embedding.VICRegLoss()(x, x), joint_embedding.VICRegTerms)


def fields_of_vicreg_terms(terms: joint_embedding.VICRegTerms) -> None:
    assert_type(terms.loss, Tensor)
    assert_type(terms.sim, Tensor)
    assert_type(terms.var, Tensor)
    assert_type(terms.cov, Tensor)
    assert_type(terms.std, Tensor)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), joint_embedding.VICRegTerms)
