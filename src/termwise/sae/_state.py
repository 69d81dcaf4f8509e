"""State that is kept between training steps: dead latents, and the threshold of BatchTopK."""

import dataclasses
from typing import Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import _groups
from .._contract import contract
from .._groups import ProcessGroup
from .._numbers import accumulator, lifted

FirstThreshold = Literal["minimum", "mean"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class DeadLatents:
    """The number of tokens since each latent fired.

    Immutable: `update` returns the next state.

    Examples:
        >>> import torch
        >>> from termwise.sae import DeadLatents
        >>> state = DeadLatents.start(3)
        >>> state = state.update(torch.tensor([True, False, False]), n_tokens=100)
        >>> state.tokens_since_fired
        tensor([  0, 100, 100])
        >>> state.dead(after=100)
        tensor([False,  True,  True])
    """

    tokens_since_fired: Int[Tensor, " d_sae"]
    """Int[Tensor, " d_sae"]: number of tokens since each latent was active, int64."""

    @classmethod
    def start(cls, d_sae: int, *, device: torch.device | str | None = None) -> Self:
        """Return the state before the first step, with no dead latents."""
        return cls(torch.zeros(d_sae, dtype=torch.int64, device=device))

    @contract
    def update(
        self,
        fired: Bool[Tensor, " d_sae"],
        n_tokens: int | Int[Tensor, ""],
        *,
        batch_group: ProcessGroup | None = None,
    ) -> Self:
        """Return the state after one more step.

        Args:
            fired (Bool[Tensor, " d_sae"]): which latents were active for at least one of this
                rank's tokens that count, as `(f != 0).any(0)`, or `fired(d_sae)` of
                [`SparseLatents`][termwise.sae.SparseLatents].
            n_tokens (int | Int[Tensor, ""]): number of this rank's tokens; with a mask,
                `mask.sum()`.
            batch_group: process group whose ranks hold different tokens, in any numbers, 0
                included. None: no communication. A latent fired if it fired on any rank, and the
                tokens of all ranks are counted.

        Returns:
            The next state, the same on every rank. Communication: one all-reduce of d_sae + 1
            integers. Does not synchronize with the device.

        Raises:
            ValueError: fired is not as long as the state.
        """
        since = self.tokens_since_fired
        if fired.shape != since.shape:
            raise ValueError(
                f"DeadLatents.update needs fired of {len(since)} latents, got {len(fired)}"
            )
        if isinstance(n_tokens, int):
            tokens = since.new_full((), n_tokens)
        else:
            tokens = n_tokens.to(since.dtype)
        seen = torch.cat([fired.to(since.dtype), tokens[None]])
        if batch_group is not None:
            seen = _groups.all_reduce(seen, batch_group.group_name)
        passed = (since + seen[-1]).where(seen[:-1] == 0, 0)
        return dataclasses.replace(self, tokens_since_fired=passed)

    def dead(self, *, after: int) -> Bool[Tensor, " d_sae"]:
        """Return which latents have not fired for this many tokens or more."""
        return self.tokens_since_fired >= after


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ActivationThreshold:
    """A running mean of the smallest positive activation: BatchTopK's threshold at inference.

    [`threshold_gate`][termwise.sae.threshold_gate] applies it. Before the first update it is 0, so
    that all positive latents pass. Immutable: `update` returns the next state.

    Examples:
        >>> import torch
        >>> from termwise.sae import ActivationThreshold
        >>> state = ActivationThreshold.start()
        >>> state.value
        tensor(0.)
        >>> state.update(torch.tensor([[0.0, 0.5, 2.0]])).value
        tensor(0.5000)

    References:
        Bussmann et al., BatchTopK Sparse Autoencoders (2024), https://arxiv.org/abs/2412.06410,
        where it is a mean over batches. dictionary_learning's running means start at their first
        value: `first`.
    """

    total: Float[Tensor, ""]
    """Decayed sum of (1 - decay) * minimum."""
    weight: Float[Tensor, ""]
    """Decayed sum of (1 - decay)."""

    @classmethod
    def start(cls, *, device: torch.device | str | None = None) -> Self:
        """Return the state before the first update: the value is 0."""
        return cls(torch.zeros((), device=device), torch.zeros((), device=device))

    @contract
    def update(
        self,
        f: Float[Tensor, "batch d_sae"],
        *,
        decay: float = 0.999,
        first: FirstThreshold | None = None,
        batch_group: ProcessGroup | None = None,
    ) -> Self:
        """Return the state after one more step.

        Args:
            f (Float[Tensor, "batch d_sae"]): latents of this rank as
                [`batch_topk`][termwise.sae.batch_topk] returns them, zero where not kept.
            decay: decay of the running mean, in 0..1.
            first: initial value of the running mean; pass the same at each update. None: 0 with
                bias correction, as in Adam. "minimum": the first batch's smallest positive
                activation, without bias correction, as in dictionary_learning's BatchTopK. "mean":
                at this and every update, the mean over rows of each row's smallest positive
                activation, as in its TopK; rows without a positive one are omitted (in theirs they
                become infinite).
            batch_group: process group whose ranks hold different rows, in any numbers, 0 included.
                None: no communication. The minimum, or the mean, is taken over all ranks.

        Returns:
            The next state, the same on every rank; unchanged if no activation is positive.
            Communication: one all-reduce of 1 element (a minimum), or of 2 ("mean"). Does not
            synchronize with the device.

        Raises:
            ValueError: decay is not in 0..1.
        """
        if not 0 <= decay < 1:
            raise ValueError(f"ActivationThreshold.update needs decay in 0..1, got {decay}")
        positive = lifted(f.detach()).masked_fill(f.detach() <= 0, torch.inf)
        if first == "mean":
            least = _mean_of_row_minima(positive, batch_group)
        else:
            least = torch.cat([positive.flatten(), positive.new_full((1,), torch.inf)]).min()
            if batch_group is not None:
                least = _groups.all_reduce(least, batch_group.group_name, "min")
        least = least.to(self.total.dtype)
        found = ~least.isposinf()
        total = decay * self.total + (1 - decay) * least
        weight = decay * self.weight + (1 - decay)
        if first is not None:
            begins = self.weight == 0
            total, weight = least.where(begins, total), weight.where(~begins, 1)
        return dataclasses.replace(
            self, total=total.where(found, self.total), weight=weight.where(found, self.weight)
        )

    @property
    def value(self) -> Float[Tensor, ""]:
        """The threshold; 0 before the first positive activation."""
        started = self.weight != 0
        return (self.total / self.weight.where(started, 1)).where(started, 0)


def _mean_of_row_minima(positive: Tensor, batch_group: ProcessGroup | None) -> Tensor:
    """Average the finite minima of rows; infinite if there are none."""
    inf = positive.new_full((positive.shape[0], 1), torch.inf)
    least = torch.cat([positive, inf], 1).amin(1)
    counts = ~least.isposinf()
    dtype = accumulator(positive)
    sums = torch.stack([least.where(counts, 0).sum(dtype=dtype), counts.sum().to(dtype)])
    if batch_group is not None:
        sums = _groups.all_reduce(sums, batch_group.group_name)
    return (sums[0] / sums[1].clamp(min=1)).where(sums[1] != 0, torch.inf)
