"""NT-Xent."""

from losses import GROUPS, Declaration, Variant
from losses._contrast import ELEMENTS, PATHS, log_sum, nearest, two_views
from termwise.joint_embedding import NTXentLoss, nt_xent_loss


def formula(z1, z2, *, temperature, **_):
    cosines, itself, pair = two_views(z1, z2)
    L = cosines / temperature
    losses = log_sum(L, ~itself) - L[pair]
    return {"loss": losses.mean(), "accuracy": nearest(L, pair, itself).double().mean()}


SHARP = {"temperature": 0.2}
NT_XENT = Declaration(
    function=nt_xent_loss,
    formula=formula,
    paths=PATHS,
    second=("right", "refused"),
    variants={
        "": Variant(
            module=NTXentLoss(**SHARP), options=SHARP, shapes=("rows columns", "rows columns")
        )
    },
    elements={"z1": ELEMENTS, "z2": ELEMENTS},
    weights={},
    permuted=("batch", "dim"),
    symmetric=(("z1", "z2"),),
    scaled={("z1",): {"loss": 0}, ("z2",): {"loss": 0}},
    shards=GROUPS,
)
