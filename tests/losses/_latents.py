"""What declarations of sparse autoencoders share."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from losses import GROUPS, Declaration
from termwise.sae import SparseLatents

CODED = ("rows columns", "rows latents", "rows columns")
DECODED = ("rows columns", "rows latents", "latents columns", "columns")
SPLIT = {"mse": 1.0, "sparsity": 1.0}
# At p < 1 the penalty's gradient is infinite where a latent is 0.
POWERS = {"p": st.sampled_from((1.0, 2.0))}
SIZES = {"d_sae": st.integers(2, 4), "k": st.integers(1, 2), "batch": st.integers(2, 4)}


def rows_of_indices(sizes: dict[str, Any]) -> st.SearchStrategy[Tensor]:
    """Draw k latents of each row, none twice."""
    latents, k, batch = sizes.get("d_sae", sizes["k"]), sizes["k"], sizes["batch"]
    row = st.permutations(range(latents)).map(lambda order: order[:k])
    rows = st.lists(row, min_size=batch, max_size=batch)
    return rows.map(lambda drawn: torch.tensor(drawn, dtype=torch.int64).reshape(batch, k))


def some_rows(sizes: dict[str, Any]) -> st.SearchStrategy[Tensor | None]:
    """Draw a mask that leaves a row: a mean of nothing is NaN, and has no gradient to compare."""
    rows = st.lists(st.booleans(), min_size=sizes["batch"], max_size=sizes["batch"])
    return st.none() | rows.filter(any).map(torch.tensor)


# By finite differences every row counts.
MASKS = {"assert_gradients": {"mask": None}, "assert_formula": {"mask": some_rows}}
SPARSE = {"f.indices": rows_of_indices}
# Few latents, many, and as on an accelerator, where nobody looks at a value.
LOOK = ("_squared_errors", "_penalties")
MANY = {"termwise._numbers.FEW": 0}
PATHS = ({}, MANY, MANY | {f"termwise.sae.{name}.may_look_at": lambda x: False for name in LOOK})


def of_latents(
    *,
    overrides: Mapping[str, Any] | None = None,
    ignores: Sequence[str] = (),
    more: Mapping[str, Mapping[str, Any]] | None = None,
    **others: Any,
) -> Declaration:
    """Declare a function of latents, dense or sparse."""
    own = more or {}
    masked = "mask" in inspect.signature(others["function"]).parameters
    return Declaration(
        sizes=SIZES,
        overrides={**SPARSE, **(overrides or {})},
        ignores=tuple(ignores),
        more={**own, **{law: {**masks, **own.get(law, {})} for law, masks in MASKS.items()}},
        **{
            "shards": GROUPS,
            "paths": PATHS,
            "masked": {"mask": {"nothing": math.nan}}
            if masked
            else {},  # a mean of no row is 0 / 0
            **others,
        },
    )


def dense(f: Tensor | SparseLatents, like: Tensor | None = None) -> Tensor:
    """Return latents as a matrix, of as many columns as `like` has entries or rows."""
    if isinstance(f, Tensor):
        return f
    columns = int(f.indices.max()) + 1 if like is None else len(like)
    return f.values.new_zeros(len(f.values), columns).scatter(1, f.indices, f.values)


def counted(mask: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Keep the rows that count."""
    return tensors if mask is None else tuple(tensor[mask] for tensor in tensors)


def squared_error(x: Tensor, x_hat: Tensor, feature_reduction: str) -> Tensor:
    squares = ((x - x_hat) ** 2).sum(-1)
    return (squares if feature_reduction == "sum" else squares / max(x.shape[-1], 1)).mean(0)


def size(f: Tensor) -> Tensor:
    """|f|, with the derivative 1 at 0."""
    return torch.where(f >= 0, f, -f)


def mean_count(f: Tensor) -> Tensor:
    return (f != 0).to(f.dtype).sum(1).mean()
