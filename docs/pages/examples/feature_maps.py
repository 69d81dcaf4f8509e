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


def formula(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
    """Return the same by cosines: the squared distance of unit vectors is 2 - 2 cos."""
    total = torch.zeros((), dtype=torch.float64)
    for name, ours in student.items():
        theirs = teacher[name].detach()
        lengths = ours.square().sum(1).sqrt() * theirs.square().sum(1).sqrt()
        total = total + (2 - 2 * (ours * theirs).sum(1) / lengths).mean()
    return total / len(student)


def check() -> None:
    """Hold the loss to what it promises."""
    from hypothesis import strategies as st

    def of_two_levels(sizes: dict[str, int]) -> st.SearchStrategy[dict[str, dict[str, Tensor]]]:
        """Draw maps of two levels for both: levels have sizes of their own, and the same names."""

        def maps(seed: int) -> dict[str, dict[str, Tensor]]:
            generator = torch.Generator().manual_seed(seed)
            shapes = {"coarse": (1, 2), "fine": (2, 2)}
            first = (sizes["batch"], sizes["channels"])
            return {
                model: {
                    level: torch.rand(*first, *shape, generator=generator) + 0.5
                    for level, shape in shapes.items()
                }
                for model in ("student", "teacher")
            }

        return st.integers(0, 99).map(maps)

    drawn = {
        "sizes": {"batch": st.integers(1, 3), "channels": st.integers(1, 3)},
        "given": of_two_levels,
    }
    testing.assert_formula(feature_loss, formula, max_examples=8, **drawn)
    testing.assert_pure(feature_loss, max_examples=3, **drawn)
    testing.assert_recompiles(feature_loss, "batch", **drawn)
    one = torch.ones(2, 3, 2, 2)
    for wrong in ({}, {"b": one}, {"a": one[:, :1]}):
        try:
            feature_loss({"a": one}, wrong)
        except ValueError:
            continue
        raise AssertionError(f"{list(wrong)} was taken")
