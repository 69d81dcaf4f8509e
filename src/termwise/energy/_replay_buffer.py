"""A buffer of chains that continue over training steps, for persistent contrastive divergence."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._contract import ContractError, contract, show

InitFn: TypeAlias = Callable[[int, torch.Generator | None], Float[Tensor, "n *event"]]
"""A callable that returns n samples to start chains from, drawn with a generator."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ReplayBuffer:
    """Samples of a model, drawn to continue chains and overwritten with the chains' new samples.

    The object is immutable, but its tensor is modified in place: all references share the state.
    Save it with `torch.save(buffer.samples, ...)`, or with a model after
    `model.register_buffer("replay", buffer.samples)`. It copies, pickles, and is a pytree. Under
    several ranks, each rank has its own buffer and its own generator.

    References:
        Tieleman, Training Restricted Boltzmann Machines using Approximations to the Likelihood
        Gradient (2008); Du, Mordatch, Implicit Generation and Modeling with Energy-Based Models
        (2019), https://arxiv.org/abs/1903.08689, where 5% of the starts are fresh. TorchEBM (0.8.9)
        adds noise of 0.01 to this fraction of samples instead of replacing them, and overwrites the
        oldest samples in turn, not those that it drew.

    Examples:
        >>> import torch
        >>> from termwise.energy import ReplayBuffer, langevin
        >>> generator = torch.Generator().manual_seed(0)
        >>> fresh = lambda n, generator: torch.rand(n, 2, generator=generator)
        >>> buffer = ReplayBuffer.start(fresh, 100, generator=generator)
        >>> start, places = buffer.draw(8, init_fn=fresh, generator=generator)
        >>> energy = lambda x: 0.5 * x.square().sum(1)
        >>> moved = langevin(energy, start, steps=20, step_size=0.1, generator=generator)
        >>> buffer.write(moved, places) is moved
        True
    """

    samples: Float[Tensor, "capacity *event"]
    """Float[Tensor, "capacity *event"]: the chains' last samples."""

    def __post_init__(self) -> None:
        if isinstance(self.samples, Tensor) and self.samples.ndim == 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError("ReplayBuffer needs samples with an axis of capacity, got a scalar")

    @classmethod
    def start(
        cls, init_fn: InitFn, capacity: int, generator: torch.Generator | None = None
    ) -> Self:
        """Fill a buffer with fresh samples, and adopt their device and dtype.

        Args:
            init_fn: called as init_fn(capacity, generator).
            capacity: number of chains, at least 1.
            generator: passed to init_fn; use a different one on each rank.

        Raises:
            ContractError: init_fn does not return `capacity` floating samples.
            ValueError: capacity is less than 1.
        """
        if capacity < 1:
            raise ValueError(f"ReplayBuffer.start needs a capacity of at least 1, got {capacity}")
        return cls(_fresh("ReplayBuffer.start", init_fn, capacity, generator).clone())

    @contract
    def draw(
        self,
        n: int,
        *,
        init_fn: InitFn | None = None,
        reinit: float = 0.05,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "n *event"], Int[Tensor, " n"]]:
        """Draw distinct chains to continue, and restart a few of them.

        Args:
            n: number of chains, at most the capacity.
            init_fn: called as init_fn(n, generator); chains that restart use its samples, on any
                device. None: no chain restarts.
            reinit: probability for each chain to restart.
            generator: draws the indices, then init_fn's samples, then which chains restart; use a
                different one on each rank. None: the default generator of the samples' device.

        Returns:
            tuple[Float[Tensor, "n *event"], Int[Tensor, " n"]]: copies of the samples, detached,
            and their indices in the buffer, int64, for `write`. Does not synchronize with the
            device.

        Raises:
            ContractError: init_fn does not return n samples like those of the buffer.
            ValueError: n is out of range, or reinit is not in [0, 1].
        """
        capacity = self.samples.shape[0]
        if not 0 <= n <= capacity:
            raise ValueError(f"ReplayBuffer.draw needs n in 0..{capacity}, got {n}")
        if not 0 <= reinit <= 1:
            raise ValueError(f"ReplayBuffer.draw needs reinit in [0, 1], got {reinit}")
        device = self.samples.device if generator is None else generator.device
        places = torch.randperm(capacity, generator=generator, device=device)[:n]
        places = places.to(self.samples.device)
        samples = self.samples.detach().index_select(0, places)
        if init_fn is None:
            return samples, places
        fresh = _fresh("ReplayBuffer.draw", init_fn, n, generator, self.samples)
        anew = torch.rand(n, generator=generator, device=device) < reinit
        anew = anew.to(self.samples.device).view(-1, *[1] * (self.samples.ndim - 1))
        return fresh.where(anew, samples), places

    @contract
    def write(
        self, samples: Float[Tensor, "n *event"], places: Int[Tensor, " n"]
    ) -> Float[Tensor, "n *event"]:
        """Write samples into the buffer, in place.

        Args:
            samples (Float[Tensor, "n *event"]): the new samples of the chains; detached, and
                converted to the buffer's dtype and device, so a buffer on the CPU may hold chains
                that run on a GPU.
            places (Int[Tensor, " n"]): the indices that `draw` returned, or any other distinct
                indices.

        Returns:
            Float[Tensor, "n *event"]: the samples as passed, so that a sampler can return the
            result.

        Raises:
            ContractError: shapes or dtypes do not fit, one of them those of the buffer.
        """
        if samples.shape[1:] != self.samples.shape[1:]:
            raise ContractError(
                f"ReplayBuffer.write: samples need event {list(self.samples.shape[1:])}, got "
                f"{show(samples)}"
            )
        with torch.no_grad():
            device, dtype = self.samples.device, self.samples.dtype
            moved = samples.detach().to(device, dtype)
            self.samples.index_copy_(0, places.to(device), moved)
        return samples


def _fresh(
    caller: str,
    init_fn: InitFn,
    n: int,
    generator: torch.Generator | None,
    like: Tensor | None = None,
) -> Tensor:
    with torch.no_grad():
        fresh: Any = init_fn(n, generator)
    if (
        not isinstance(fresh, Tensor)
        or not fresh.is_floating_point()
        or fresh.shape[:1] != (n,)
        or (like is not None and (fresh.shape[1:] != like.shape[1:] or fresh.dtype != like.dtype))
    ):
        wanted = show(like[:1].expand(n, *like.shape[1:])) if like is not None else f"{n} samples"
        raise ContractError(f"{caller}: init_fn({n}, generator) needs {wanted}, got {show(fresh)}")
    return fresh.detach() if like is None else fresh.detach().to(like.device)


torch.export.register_dataclass(ReplayBuffer, serialized_type_name="termwise.energy.ReplayBuffer")
