"""Latents of sparse autoencoders, dense or sparse: validation, counting and decoding."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .._autograd import Function, on_host, transformed
from .._groups import ProcessGroup
from .._means import kept_rows
from .._numbers import block_rows, blocks, few, lifted, lifted_dtype, may_look_at, product

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SparseLatents:
    """The k latents of each row that may be active; all others are zero.

    Every loss that takes latents accepts these instead of the dense matrix, and reads only k
    columns of it. The indices of a row must be distinct; a latent that is not active has the value
    0, at any unused index.

    Raises:
        ValueError: values is not a floating tensor, indices not one of integers, or their shapes
            differ. An index that is negative, or d_sae or more, raises an error when it is used, in
            rows that count. On the CPU, in eager mode and outside of `torch.func`, the error names
            it; elsewhere PyTorch raises it, since reading the index would synchronize with the
            device.

    Examples:
        >>> import torch
        >>> from termwise.sae import SparseLatents
        >>> f = SparseLatents(torch.tensor([[2.0, 1.0]]), torch.tensor([[2, 0]]))
        >>> f.dense(4)
        tensor([[1., 0., 2., 0.]])
        >>> f.fired(4)
        tensor([ True, False,  True, False])
        >>> f.decode(torch.tensor([[1.0], [10.0], [100.0], [1000.0]]))
        tensor([[201.]])
    """

    values: Float[Tensor, "batch k"]
    """Float[Tensor, "batch k"]: activations, in the graph."""
    indices: Int[Tensor, "batch k"]
    """Int[Tensor, "batch k"]: the column of each activation, of any signed integer dtype."""

    def __post_init__(self) -> None:
        values, indices = cast("Any", self.values), cast("Any", self.indices)
        if not (isinstance(values, Tensor) and values.is_floating_point()):
            raise ValueError(
                f"SparseLatents needs values as a floating tensor, got {_kind(values)}"
            )
        if not (isinstance(indices, Tensor) and indices.dtype in _INTEGERS):
            raise ValueError(
                f"SparseLatents needs indices as a tensor of signed integers, got {_kind(indices)}"
            )
        if values.shape != indices.shape:
            raise ValueError(
                "SparseLatents needs values and indices of one shape, got "
                f"{list(values.shape)} and {list(indices.shape)}"
            )

    def dense(self, d_sae: int) -> Float[Tensor, "batch d_sae"]:
        """Return the latents as a dense matrix, with zeros at all other indices.

        Args:
            d_sae: number of latents, its columns.

        Returns:
            Float[Tensor, "batch d_sae"]: in the dtype of values, in the graph.

        Raises:
            ValueError: an index is not within 0..d_sae - 1.
        """
        _check_indices("SparseLatents.dense", self.indices, d_sae)
        zeros = self.values.new_zeros((self.values.shape[0], d_sae))
        return zeros.scatter_add(1, self.indices.long(), self.values)

    def decode(
        self,
        W_dec: Float[Tensor, "d_sae d_model"],
        b_dec: Float[Tensor, " d_model"] | None = None,
    ) -> Float[Tensor, "batch d_model"]:
        """Return the reconstruction from these latents, reading only their rows of the decoder.

        Args:
            W_dec (Float[Tensor, "d_sae d_model"]): decoder, a row for each latent.
            b_dec (Float[Tensor, " d_model"] | None): its bias. None: 0.

        Returns:
            Float[Tensor, "batch d_model"]: sum_j f_j W_j + b, in float32 at least. Derivatives of
            any order are correct; those beyond the first hold "batch k d_model" elements. Compiled,
            only the first is available.

        Raises:
            ValueError: shapes do not fit, or an index is not within 0..d_sae - 1.
        """
        # Not by a contract: Dynamo cannot trace one on an object that its own graph created.
        bias = list(W_dec.shape[1:] if b_dec is None else b_dec.shape)
        if W_dec.ndim != 2 or bias != list(W_dec.shape[1:]):
            raise ValueError(
                "SparseLatents.decode needs W_dec of shape [d_sae, d_model] and b_dec of [d_model],"
                f" got {list(W_dec.shape)} and {None if b_dec is None else bias}"
            )
        _check_indices("SparseLatents.decode", self.indices, W_dec.shape[0])
        return decode(self, W_dec, b_dec)

    def fired(self, d_sae: int) -> Bool[Tensor, " d_sae"]:
        """Return which latents are not zero in at least one row, for `DeadLatents.update`.

        Args:
            d_sae: number of latents.

        Returns:
            Bool[Tensor, " d_sae"]: without a gradient. A value of NaN counts as active.

        Raises:
            ValueError: an index is not within 0..d_sae - 1.
        """
        _check_indices("SparseLatents.fired", self.indices, d_sae)
        active = (self.values.detach() != 0).flatten()
        counts = active.new_zeros(d_sae, dtype=torch.int64)
        return counts.scatter_add(0, self.indices.flatten().long(), active.long()) > 0


torch.export.register_dataclass(SparseLatents, serialized_type_name="termwise.sae.SparseLatents")

Latents: TypeAlias = Float[Tensor, "batch d_sae"] | SparseLatents


def check_latents(
    caller: str, f: Latents, batch: int, *, mask: Tensor | None, d_sae: int | None = None
) -> None:
    """Check what a contract does not: the number of rows of sparse latents, and their indices."""
    if not isinstance(f, SparseLatents):
        return
    if f.values.shape[0] != batch:
        raise ValueError(f"{caller} needs f of {batch} rows, got {f.values.shape[0]}")
    _check_indices(caller, f.indices, d_sae, mask)


def check_indices(caller: str, f: Latents, decoder_norm: Tensor | None) -> None:
    """Check the indices of sparse latents, against d_sae if it is known."""
    if isinstance(f, SparseLatents):
        _check_indices(caller, f.indices, None if decoder_norm is None else len(decoder_norm))


def counted(f: Latents, mask: Tensor | None) -> Latents:
    """Return the latents with 0 in rows that do not count, even if these are NaN."""
    if mask is None:
        return f
    if isinstance(f, SparseLatents):
        return SparseLatents(kept_rows(f.values, mask), kept_rows(f.indices, mask))
    return kept_rows(f, mask)


def active(f: Latents, mask: Tensor | None, batch_group: ProcessGroup | None) -> Tensor:
    """Count the latents of each row that are not zero: " batch", float, without a gradient.

    Where they are few, all rows count and none is on another rank, it is their mean already, "".
    """
    values = (f.values if isinstance(f, SparseLatents) else f).detach()
    if mask is None and batch_group is None and few(values) and not transformed():
        return _nonzero(values).sum(dtype=lifted_dtype(values)) / values.shape[0]
    return row_norms(values, 0)


def row_norms(values: Tensor, order: int) -> Tensor:
    """Sum |f| over each row (order 1), or count what is not 0 (order 0), in float32 at least.

    No gradient; no temporary is as large as f.
    """
    dtype = lifted_dtype(values)
    if torch.compiler.is_compiling() or transformed():  # a compiler fuses it
        return lifted(values).abs().sum(1) if order else (values != 0).sum(1, dtype=dtype)
    if not on_host(values):  # in one pass
        return cast("Tensor", torch.linalg.vector_norm(values, order, dim=1, dtype=dtype))
    # On the CPU that is many times slower than this, which stays in cache.
    return by_blocks(values, _sum_of_sizes if order else _count)


def _sum_of_sizes(rows: Tensor) -> Tensor:
    return lifted(rows).abs().sum(1)


def _count(rows: Tensor) -> Tensor:
    return _nonzero(rows).sum(1, dtype=lifted_dtype(rows))


def _nonzero(values: Tensor) -> Tensor:
    # In the dtype of f: summing booleans takes 3 times as long.
    return torch.ne(values, 0, out=torch.empty_like(values))


def decode(f: Latents, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Return f W_dec + b_dec in float32 or float64, without autocast.

    If f is sparse, only the active rows of W_dec are read.
    """
    values = f.values if isinstance(f, SparseLatents) else f
    dtype = torch.promote_types(lifted_dtype(values), lifted_dtype(W_dec))
    if isinstance(f, SparseLatents):
        decoded = _weighted_sum(f.values.to(dtype), W_dec.to(dtype), f.indices)
    else:
        decoded = product(f.to(dtype), W_dec.to(dtype))
    return decoded if b_dec is None else decoded + b_dec


def _weighted_sum(values: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    """Sum rows[indices] * values over the latents of each row."""
    indices = indices.long()
    if torch.compiler.is_compiling():  # a compiled graph has no second derivative
        return _bag(values, rows, indices)
    return cast("Tensor", _WeightedSum.apply(values, rows, indices))


def _bag(values: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    if rows.shape[1] == 0:  # which embedding_bag does not take
        return (values[..., None] * rows[indices]).sum(1)
    return F.embedding_bag(indices, rows, per_sample_weights=values, mode="sum")


class _WeightedSum(Function):
    """`embedding_bag`, without a tensor of "batch k d_model", with derivatives of any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
        return _bag(values, rows, indices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = tuple(bool(need) for need in ctx.needs_input_grad[:2])
        found = _WeightedSumGradients.apply(gradients[0], *ctx.saved_tensors, needed)
        given = iter(cast("tuple[Tensor, ...]", found))
        return (*(next(given) if need else None for need in needed), None)


class _WeightedSumGradients(Function):
    """The backward pass of `_WeightedSum`, by PyTorch's kernels; twice differentiable."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        gradient: Tensor, values: Tensor, rows: Tensor, indices: Tensor, needed: tuple[bool, bool]
    ) -> tuple[Tensor, ...]:
        # The product is recomputed here, in a hundredth of the time of its gradients.
        inputs = [one for one, need in zip((values, rows), needed, strict=True) if need]

        def product(*moved: Tensor) -> Tensor:
            return _bag(*_filled(moved, (values, rows), needed), indices)

        pull = cast("Callable[[Tensor], tuple[Tensor, ...]]", torch.func.vjp(product, *inputs)[1])
        return pull(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.needed = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, values, rows, indices = ctx.saved_tensors

        def formula(gradient: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
            picked = rows.index_select(0, indices.flatten()).view(*indices.shape, -1)
            for_values = (gradient[:, None] * picked).sum(2)
            pulled = (values[:, :, None] * gradient[:, None]).flatten(0, 1)
            for_rows = torch.zeros_like(rows).index_add(0, indices.flatten(), pulled)
            found = zip((for_values, for_rows), ctx.needed, strict=True)
            return tuple(one for one, need in found if need)

        _, pull = cast("Any", torch.func.vjp)(formula, gradient, values, rows)
        return (*pull(gradients), None, None)


def _filled(
    moved: tuple[Tensor, ...], fixed: tuple[Tensor, Tensor], needed: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    given = iter(moved)
    first, second = (next(given) if need else one for one, need in zip(fixed, needed, strict=True))
    return first, second


def _check_indices(
    caller: str, indices: Tensor, d_sae: int | None, mask: Tensor | None = None
) -> None:
    """Raise an error for indices out of range (or negative) in rows that count."""
    if not (may_look_at(indices) and indices.numel()):
        return
    least, most = torch.aminmax(kept_rows(indices, mask))
    if int(least) < 0:
        raise ValueError(
            f"{caller} needs sparse latents with indices of at least 0, got {int(least)}: give a "
            "latent that did not fire the value 0 at any index not in use"
        )
    if d_sae is not None and int(most) >= d_sae:
        raise ValueError(
            f"{caller} needs sparse latents with indices below d_sae = {d_sae}, got {int(most)}"
        )


def _kind(value: object) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def by_blocks(x: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduce each row, in blocks, so that no temporary is as large as x."""
    if x.shape[0] <= block_rows(x):
        return of(x)
    return torch.cat([of(x[block]) for block in blocks(x)])
