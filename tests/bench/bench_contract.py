"""What a contract costs in eager, with Dynamo imported: `python tests/bench/bench_contract.py`.

Asked: at most 4 us for two tensors, four floats and a record of six fields, and 5 us for
`vanilla_loss`, whose latents are a matrix or a record; at most 0.35 s of CPU for `import termwise`
above what it imports.
"""

import inspect
import os
import subprocess
import sys
import tempfile

import measure
import torch
import torch._dynamo
from jaxtyping import Float
from torch import Tensor

import termwise as tw
from termwise.joint_embedding import VICRegTerms
from termwise.sae import SparseLatents, VanillaTerms, vanilla_loss

ZERO = torch.zeros(())
IMPORT = """
import time
import torch, jaxtyping, beartype.door, torch.distributed
start = time.process_time()
import termwise
print(time.process_time() - start)
"""


@tw.contract
def checked(
    z1: Float[Tensor, "batch dim"],
    z2: Float[Tensor, "batch dim"],
    *,
    sim_weight: float = 25.0,
    var_weight: float = 25.0,
    cov_weight: float = 1.0,
    eps: float = 1e-4,
) -> VICRegTerms:
    return SIX


SIX = VICRegTerms(loss=ZERO, sim=ZERO, var=ZERO, cov=ZERO, std=ZERO, rank=ZERO)


def main() -> None:
    torch.set_num_threads(1)
    z1, z2 = (torch.randn(256, 128) for _ in range(2))
    values = torch.randn(256, 8)
    latents = SparseLatents(values=values, indices=torch.zeros(256, 8, dtype=torch.int64))
    tensors = {"x": z1, "x_hat": z2, "sparsity_coeff": 1.0}
    terms = vanilla_loss(f=z1, **tensors)

    # The signature of vanilla_loss, with a body that costs nothing.
    def body(*args: object, **kwargs: object) -> VanillaTerms:
        return terms

    body.__signature__ = inspect.signature(vanilla_loss)  # type: ignore[attr-defined]
    body.__annotations__ = vanilla_loss.__annotations__
    body.__name__ = body.__qualname__ = "vanilla_loss"
    vanilla = tw.contract(body)
    wide = torch.randn(256, 512)
    calls = {
        "two tensors, four floats, six fields (asked 4)": (checked, (z1, z2), {}),
        "vanilla_loss, a matrix (asked 5)": (vanilla, (), {**tensors, "f": wide}),
        "vanilla_loss, a record (asked 5)": (vanilla, (), {**tensors, "f": latents}),
    }
    print(f"torch {torch.__version__}, one thread")
    for name, (fn, args, kwargs) in calls.items():
        both = {
            "checked": lambda fn=fn, a=args, k=kwargs: fn(*a, **k),
            "unchecked": lambda fn=fn.__wrapped__, a=args, k=kwargs: fn(*a, **k),
        }
        taken = measure.seconds(both, repeats=20_000)
        print(f"{name}: {1e6 * (taken['checked'] - taken['unchecked']):.1f} us")
    with tempfile.TemporaryDirectory() as cache:  # of bytecode, as an installed package has it
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        took = [
            float(subprocess.check_output([sys.executable, "-c", IMPORT], env=environment))
            for _ in range(4)
        ]
    print(f"import termwise: {min(took):.2f} s of CPU (asked 0.35)")


if __name__ == "__main__":
    main()
