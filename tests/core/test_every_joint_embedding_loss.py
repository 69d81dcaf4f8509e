"""What holds for every loss, of the joint-embedding family."""

from every_loss import *  # noqa: F403
from losses import PAIR, Case

import termwise as tw
from termwise.joint_embedding import VICRegLoss, vicreg_loss

FAMILY = tw.joint_embedding
VICREG = {"sim_weight": 5.0, "gamma": 2.0, "eps": 0.01}
CASES = {
    "vicreg": Case(vicreg_loss, VICRegLoss(**VICREG), VICREG, PAIR),
    "vicreg gram": Case(
        vicreg_loss,
        VICRegLoss(covariance_path="gram", variance_views="mean"),
        {"covariance_path": "gram", "variance_views": "mean"},
        PAIR,
    ),
}
