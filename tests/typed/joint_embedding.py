"""What a type checker knows of the joint-embedding losses. Never run: pyright and mypy read it."""

from typing import assert_type

from torch import Tensor
from torch.distributed import ProcessGroup

from termwise.joint_embedding import VICRegLoss, VICRegTerms, vicreg_loss


def functions(z1: Tensor, z2: Tensor, group: ProcessGroup) -> None:
    terms = vicreg_loss(z1, z2, variance_views="mean", batch_group=group)
    assert_type(terms, VICRegTerms)
    assert_type(terms.metrics(), dict[str, float])
    assert_type(terms.detach(), VICRegTerms)
    for name, value in terms.items():
        assert_type(name, str)
        assert_type(value, Tensor)
    for field in (terms.loss, terms.sim, terms.var, terms.cov, terms.std, terms.rank):
        assert_type(field, Tensor)


def modules(z1: Tensor, z2: Tensor, group: ProcessGroup) -> None:
    loss_fn = VICRegLoss(sim_weight=25, covariance_path="gram")
    assert_type(loss_fn(z1, z2), VICRegTerms)
    assert_type(loss_fn(z1, z2, batch_group=group), VICRegTerms)
    assert_type(loss_fn.gamma, float)
