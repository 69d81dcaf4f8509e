"""Prefixes of latents, drawn at random, for Matryoshka sparse autoencoders."""

from collections.abc import Sequence
from typing import Literal, cast

import torch

from .._contract import contract

PrefixLaw = Literal["nabeshima", "saev"]


@contract
def sample_prefixes(
    d_sae: int,
    n: int,
    *,
    law: PrefixLaw = "nabeshima",
    generator: torch.Generator | None = None,
) -> tuple[int, ...]:
    r"""Draw the prefix lengths of one step: n of them, increasing, the last one d_sae.

    The other n - 1 are drawn one after the other without replacement, with probabilities
    proportional to

    $$\mathrm{nabeshima}: P(m) \propto \sqrt{m} - \sqrt{m - 1}, \quad 1 \le m < d$$

    $$\mathrm{saev}: P(m) \propto \frac{1}{\sqrt{m - 1}} - \frac{1}{\sqrt{m}}, \quad 2 \le m < d$$

    Under "nabeshima" the median of the first draw is near d_sae / 4: its distribution function is
    sqrt(m / (d_sae - 1)). Under "saev" the median is 4 for any d_sae, since the distribution
    function is 1 - 1 / sqrt(m): most prefixes have a few latents, and a length of 1 has probability
    0.

    The numbers are drawn on the host and returned as Python ints, since a loss slices its matrices
    with them. Does not synchronize with the device. `torch.compile` cannot trace it: draw outside
    of the compiled function. All ranks need the same prefixes, and so generators in the same state.

    Args:
        d_sae: number of latents.
        n: number of prefixes; 10 in the authors' code.
        law: "nabeshima", the distribution of the authors' code, or "saev".
        generator: on the CPU. None: PyTorch's global one.

    Returns:
        Strictly increasing lengths; the last is d_sae.

    Raises:
        ValueError: n is less than 1 or more than the number of possible lengths (d_sae, or d_sae -
            1 under "saev" with n > 1), or the generator is not on the CPU.

    References:
        Nabeshima, Matryoshka Sparse Autoencoders (2024), https://sparselatents.com/matryoshka.html,
        and its code, https://github.com/noanabeshima/matryoshka-saes: a Pareto-like law with power
        1/2, counted down from d_sae. saev, https://github.com/OSU-NLP-Group/saev, intends the same
        law but counts up from 1; its distribution function is 0 at m = 1, so that 1 is never drawn.
        It computes differences in float32, where they are 0 for many large m; ours are exact.

    Examples:
        >>> import torch
        >>> from termwise.sae import sample_prefixes
        >>> sample_prefixes(64, 4, generator=torch.Generator().manual_seed(0))
        (42, 48, 59, 64)
        >>> sample_prefixes(3, 3)
        (1, 2, 3)
    """
    if d_sae < 1:
        raise ValueError(f"sample_prefixes needs d_sae >= 1, got {d_sae}")
    least = 2 if law == "saev" else 1
    most = max(1, d_sae - least + 1)
    if not 1 <= n <= most:
        raise ValueError(
            f'sample_prefixes needs n in 1..{most} for d_sae {d_sae} under "{law}", got {n}'
        )
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(f"sample_prefixes needs a generator on cpu, got {generator.device}")
    if n == 1:
        return (d_sae,)
    # Differences of neighboring roots, without cancellation.
    m = torch.arange(least, d_sae, dtype=torch.float64, device="cpu")
    above, below = m.sqrt(), (m - 1).sqrt()
    weights = 1 / (above + below)
    if law == "saev":
        weights /= above * below
    # Gumbel top-k, in its exponential form: draws without replacement, for any number of lengths;
    # multinomial supports at most 2^24 categories.
    keys = torch.empty_like(weights).exponential_(generator=generator) / weights
    first = keys.topk(n - 1, largest=False).indices + least
    return (*cast("list[int]", first.sort().values.tolist()), d_sae)


def check_prefixes(caller: str, prefixes: Sequence[int], d_sae: int) -> tuple[int, ...]:
    """Return prefixes if they increase strictly within 0..d_sae, or raise an error."""
    cuts = tuple(prefixes)
    if not cuts:
        raise ValueError(f"{caller} needs at least one prefix, got none")
    if any(low >= high for low, high in zip((-1, *cuts), (*cuts, d_sae + 1), strict=True)):
        raise ValueError(
            f"{caller} needs prefixes that increase strictly within 0..{d_sae}, got {list(cuts)}"
        )
    return cuts
