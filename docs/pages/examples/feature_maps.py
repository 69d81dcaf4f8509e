"""A loss on a dict of feature maps: each level by its name, each of a size of its own."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

import termwise as tw
from termwise import testing


@tw.terms
class FeatureTerms(tw.Terms):
    """Terms of `feature_loss`."""

    loss: Float[Tensor, ""]
    """Mean over levels."""
    per_level: Float[Tensor, " levels"]
    """Squared difference of unit vectors at each position, in the order of the student's keys."""


@tw.contract
def feature_loss(
    student: dict[str, Float[Tensor, "batch _ _ _"]],
    teacher: dict[str, Float[Tensor, "batch _ _ _"]],
) -> FeatureTerms:
    """Match a student's feature maps with a teacher's, which get no gradient."""
    if not student or student.keys() != teacher.keys():
        raise ValueError(
            f"feature_loss needs the same levels, at least one, got {sorted(student)} of student "
            f"and {sorted(teacher)} of teacher"
        )
    levels = []
    for name, features in student.items():
        if features.shape != teacher[name].shape:
            raise ValueError(
                f"feature_loss needs maps of one shape, got {list(features.shape)} of student and "
                f"{list(teacher[name].shape)} of teacher for {name!r}"
            )
        ours, theirs = (F.normalize(x, dim=1) for x in (features, teacher[name].detach()))
        levels.append((ours - theirs).square().sum(1).mean())
    per_level = torch.stack(levels)
    return FeatureTerms(loss=per_level.mean(), per_level=per_level)


class FeatureLoss(tw.LossModule):
    """`feature_loss` as a module."""

    def __call__(
        self,
        student: dict[str, Float[Tensor, "batch _ _ _"]],
        teacher: dict[str, Float[Tensor, "batch _ _ _"]],
    ) -> FeatureTerms:
        """Compute the terms."""
        return feature_loss(student, teacher)


def of_two_levels(
    coarse: Float[Tensor, "batch c 1 2"],
    fine: Float[Tensor, "batch c 2 2"],
    their_coarse: Float[Tensor, "batch c 1 2"],
    their_fine: Float[Tensor, "batch c 2 2"],
) -> FeatureTerms:
    """Call it as the kit draws tensors: a shape for each level."""
    return feature_loss(
        {"coarse": coarse, "fine": fine}, {"coarse": their_coarse, "fine": their_fine}
    )


def formula(coarse: Tensor, fine: Tensor, their_coarse: Tensor, their_fine: Tensor) -> Tensor:
    """Return the same by cosines: the squared distance of unit vectors is 2 - 2 cos."""
    cosines = [
        (ours * theirs.detach()).sum(1)
        / (ours.square().sum(1).sqrt() * theirs.detach().square().sum(1).sqrt())
        for ours, theirs in ((coarse, their_coarse), (fine, their_fine))
    ]
    return sum((2 - 2 * cosine).mean() for cosine in cosines) / 2


def check() -> None:
    """Hold the loss to what it promises."""
    from hypothesis import strategies as st

    away_from_zero = st.floats(0.5, 2.0)
    testing.assert_formula(of_two_levels, formula, max_examples=8, elements=away_from_zero)
    testing.assert_pure(of_two_levels, max_examples=3, elements=away_from_zero)
    one = torch.ones(2, 3, 2, 2)
    for wrong in ({}, {"b": one}, {"a": one[:, :1]}):
        try:
            feature_loss({"a": one}, wrong)
        except ValueError:
            continue
        raise AssertionError(f"{list(wrong)} was taken")
