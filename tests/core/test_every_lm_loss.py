"""What holds for every loss, of the language-model family."""

from every_loss import *  # noqa: F403
from losses import Case

import termwise as tw
from termwise.lm import TargetedVarianceLoss, targeted_variance_loss

FAMILY = tw.lm
VARIANCE = {"coefficient": 0.7, "target": 2.0}
CASES = {
    "targeted variance": Case(targeted_variance_loss, TargetedVarianceLoss(**VARIANCE), VARIANCE),
    "targeted variance, masked": Case(
        targeted_variance_loss,
        TargetedVarianceLoss(**VARIANCE),
        VARIANCE,
        masks=("valid_rows",),
    ),
}
