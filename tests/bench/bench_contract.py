"""What a contract costs in eager: `python tests/bench/bench_contract.py`.

Asked: at most 80 us for two tensors and a record of five fields, and at most 10% of forward plus
backward of a 256 x 128 VICReg.
"""

import measure
import torch
from jaxtyping import Float
from torch import Tensor

import termwise as tw
from termwise.joint_embedding import VICRegTerms, vicreg_loss


@tw.contract
def checked(z1: Float[Tensor, "batch dim"], z2: Float[Tensor, "batch dim"]) -> VICRegTerms:
    return VICRegTerms(loss=ZERO, sim=ZERO, var=ZERO, cov=ZERO, std=ZERO)


ZERO = torch.zeros(())


def main() -> None:
    torch.set_num_threads(1)
    z1, z2 = (torch.randn(256, 128, requires_grad=True) for _ in range(2))
    taken: dict[str, float] = {}
    for calls in (
        {
            "checked": lambda: checked(z1, z2),
            "unchecked": lambda: checked.__wrapped__(z1, z2),
        },
        {
            "vicreg": lambda: vicreg_loss(z1, z2).loss.backward(),
            "vicreg unchecked": lambda: vicreg_loss.__wrapped__(z1, z2).loss.backward(),
        },
    ):
        measure.seconds(calls, repeats=100)
        taken |= {name: 1e6 * s for name, s in measure.seconds(calls, repeats=1000).items()}
    cost, bare = taken["checked"] - taken["unchecked"], taken["vicreg unchecked"]
    print(f"torch {torch.__version__}, one thread")
    print(f"two tensors, five fields: {cost:.0f} us (asked 80)")
    print(
        f"vicreg_loss 256 x 128, forward and backward: {bare:.0f} us and its contract "
        f"{taken['vicreg'] - bare:.0f} us: {100 * (taken['vicreg'] / bare - 1):.1f}% (asked 10%)"
    )


if __name__ == "__main__":
    main()
