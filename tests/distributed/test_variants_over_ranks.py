"""Each loss over ranks with different and uneven rows, or none, is one process's."""

import inspect

import pytest
import torch
import variant_cases
from declared import CASES

SIZES = ([4, 3], [3, 1, 2], [5, 0])
EXACT = {"rtol": 1e-12, "atol": 1e-12}
BY_ROWS = [
    name
    for name, case in CASES.items()
    if "batch_group" in inspect.signature(case.loss).parameters
    # All patches of an image are of one rank: test_prototypes_over_ranks.py shares images.
    and name != "joint_embedding.ibot_loss"
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("how", ["mean", "sum"])
@pytest.mark.parametrize("name", BY_ROWS)
def test_terms_and_gradients(ranks, name, how, sizes):
    world, shapes = len(sizes), CASES[name].held.shapes
    expected, gradients = variant_cases.on_a_rank(None, name, sizes, how)
    results = ranks(variant_cases.on_a_rank, [name] * world, [sizes] * world, [how] * world)
    own = ("negatives",)  # of each rank
    for terms, _ in results:
        for key, value in terms.items():
            if key not in own:
                torch.testing.assert_close(value, expected[key], **EXACT)
    divisor = world if how == "mean" else 1
    for place, (whole, shape) in enumerate(zip(gradients, shapes, strict=True)):
        parts = [found[place] for _, found in results]
        axes = shape.split()
        total = torch.cat(parts, axes.index("rows")) if "rows" in axes else sum(parts)
        torch.testing.assert_close(total / divisor, whole, **EXACT, msg=shape)
