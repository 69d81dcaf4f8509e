"""From a short name to a loss module."""

import inspect
from typing import Any, Literal, overload

from torch import nn

from ._contrastive_divergence import ContrastiveDivergenceLoss
from ._denoising_score_matching import DenoisingScoreMatchingLoss
from ._maximum_likelihood import MaximumLikelihoodLoss
from ._noise_contrastive import NoiseContrastiveLoss
from ._score_matching import ScoreMatchingLoss
from ._shared import Energy
from ._sliced_score_matching import SlicedScoreMatchingLoss

_LOSSES: dict[str, type[nn.Module]] = {
    "mle": MaximumLikelihoodLoss,
    "cd": ContrastiveDivergenceLoss,
    "nce": NoiseContrastiveLoss,
    "sm": ScoreMatchingLoss,
    "dsm": DenoisingScoreMatchingLoss,
    "ssm": SlicedScoreMatchingLoss,
}


@overload
def create_loss(name: Literal["mle"], energy: Energy, **numbers: Any) -> MaximumLikelihoodLoss: ...
@overload
def create_loss(
    name: Literal["cd"], energy: Energy, **numbers: Any
) -> ContrastiveDivergenceLoss: ...
@overload
def create_loss(name: Literal["nce"], energy: Energy, **numbers: Any) -> NoiseContrastiveLoss: ...
@overload
def create_loss(name: Literal["sm"], energy: Energy, **numbers: Any) -> ScoreMatchingLoss: ...
@overload
def create_loss(
    name: Literal["dsm"], energy: Energy, **numbers: Any
) -> DenoisingScoreMatchingLoss: ...
@overload
def create_loss(
    name: Literal["ssm"], energy: Energy, **numbers: Any
) -> SlicedScoreMatchingLoss: ...
@overload
def create_loss(name: str, energy: Energy, **numbers: Any) -> nn.Module: ...
def create_loss(name: str, energy: Energy, **numbers: Any) -> nn.Module:
    """Give the module of a loss by the short name that papers call it by.

    Args:
        name: "mle" (maximum likelihood), "cd" (contrastive divergence), "nce" (noise-contrastive),
            "sm", "dsm" or "ssm" (score matching: exact, denoising, sliced). Case does not matter.
        energy: gives the energy of each row.
        numbers: keywords of the module's own.

    Returns:
        The module, with the energy and the numbers held.

    Raises:
        ValueError: no loss has this name.
        TypeError: the loss has no number of that name, or one that it needs is not given.
        ContractError: a number is not of its type.

    Examples:
        >>> from termwise.energy import create_loss
        >>> create_loss("dsm", lambda x: x.square().sum(1), sigma=0.1).sigma
        0.1
        >>> create_loss("sm", lambda x: x.square().sum(1), sigma=0.1)
        Traceback (most recent call last):
        TypeError: create_loss("sm") takes trace, chunk_size, higher_order_safe, differentiation,
        grad_reduction, got sigma
    """
    kind = _LOSSES.get(name.lower())
    if kind is None:
        raise ValueError(f"create_loss needs one of {', '.join(_LOSSES)}, got {name!r}")
    parameters = inspect.signature(kind).parameters
    known = [number for number in parameters if number != "energy"]
    for number in numbers:
        if number not in known:
            raise TypeError(f'create_loss("{name}") takes {", ".join(known)}, got {number}')
    for number in known:
        if parameters[number].default is inspect.Parameter.empty and number not in numbers:
            raise TypeError(f'create_loss("{name}") needs {number}, got no such number')
    return kind(energy, **numbers)
