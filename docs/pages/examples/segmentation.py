"""Segmentation: labels of pixels, weights of classes, pixels without a label."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from jaxtyping import Float, Int
from torch import Tensor

import termwise as tw
from termwise import testing


@tw.terms
class SegmentationTerms(tw.Terms):
    """Terms of `segmentation_loss`."""

    loss: Float[Tensor, ""]
    """Weighted mean of the cross-entropy over the pixels that have a label, in nats."""
    accuracy: Float[Tensor, ""]
    """Of these pixels those whose class is the most likely one; detached."""


@tw.contract
def segmentation_loss(
    logits: Float[Tensor, "batch classes height width"],
    labels: Int[Tensor, "batch height width"],
    class_weights: Float[Tensor, " classes"],
) -> SegmentationTerms:
    """Compute the cross-entropy of pixels; a label of -1 does not count."""
    counted = labels >= 0
    safe = labels.clamp(min=0).long()
    nats = F.cross_entropy(logits, safe, reduction="none")
    weights = class_weights[safe] * counted
    right = (logits.argmax(1) == safe) & counted
    # Without a pixel that counts the mean is 0 / 0: NaN, and not a plausible number.
    return SegmentationTerms(
        loss=(weights * nats).sum() / weights.sum(),
        accuracy=right.sum() / counted.sum(),
    )


class SegmentationLoss(tw.LossModule):
    """`segmentation_loss` with classes of equal weight."""

    def __call__(
        self,
        logits: Float[Tensor, "batch classes height width"],
        labels: Int[Tensor, "batch height width"],
    ) -> SegmentationTerms:
        """Compute the terms."""
        return segmentation_loss(logits, labels, logits.new_ones(logits.shape[1]))


def formula(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    """Return the same in a loop over pixels."""
    total, mass = torch.zeros(2, dtype=logits.dtype).unbind()
    for image, row, column in labels.ge(0).nonzero().tolist():
        label = labels[image, row, column]
        probability = logits[image, :, row, column].softmax(0)[label]
        total = total - class_weights[label] * probability.log()
        mass = mass + class_weights[label]
    return total / mass


def check() -> None:
    """Hold the loss to what it promises."""

    def some_labels(sizes: dict[str, int]) -> Tensor:
        shape = (sizes["batch"], sizes["height"], sizes["width"])
        labels = torch.arange(shape[0] * shape[1] * shape[2]).reshape(shape) % (
            sizes["classes"] + 1
        )
        return labels.flip(0) - 1  # the last class first, and some -1

    drawn = {
        "sizes": {
            "batch": 2,
            "classes": st.integers(1, 3),
            "height": 2,
            "width": st.integers(1, 3),
        },
        "overrides": {"labels": some_labels},
        "elements": {"class_weights": st.floats(0.5, 2.0)},
    }
    testing.assert_formula(segmentation_loss, formula, max_examples=8, **drawn)
    testing.assert_gradients(segmentation_loss, max_examples=2, **drawn)
    # What has no label may be anything.
    logits = torch.zeros(1, 2, 1, 2)
    logits[..., 1] = torch.nan
    assert segmentation_loss(logits, torch.tensor([[[1, -1]]]), torch.ones(2)).accuracy == 0
