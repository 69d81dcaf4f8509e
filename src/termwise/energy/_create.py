"""Create a loss module from a short name."""

import inspect
from collections.abc import Callable
from typing import Any, Literal, overload

from torch import nn

from ._conditional_noise_contrastive import ConditionalNoiseContrastiveLoss
from ._contrastive_divergence import ContrastiveDivergenceLoss
from ._denoising_score_matching import DenoisingScoreMatchingLoss
from ._energies import Energy
from ._energy_discrepancy import EnergyDiscrepancyLoss
from ._energy_matching import EnergyMatchingLoss
from ._equilibrium_matching import EquilibriumMatchingLoss
from ._finite_difference_score_matching import FiniteDifferenceScoreMatchingLoss
from ._flow_matching import FlowMatchingLoss, TimedEnergy
from ._kl_term import ContrastiveDivergenceKLTerm
from ._maximum_likelihood import MaximumLikelihoodLoss
from ._noise_contrastive import NoiseContrastiveLoss
from ._penalties import EnergySquarePenalty, GradientPenalty
from ._ranking_noise_contrastive import RankingNoiseContrastiveLoss
from ._score_matching import ScoreMatchingLoss
from ._sliced_score_matching import SlicedScoreMatchingLoss

_LOSSES: dict[str, Callable[..., nn.Module]] = {
    "mle": MaximumLikelihoodLoss,
    "cd": ContrastiveDivergenceLoss,
    "nce": NoiseContrastiveLoss,
    "sm": ScoreMatchingLoss,
    "dsm": DenoisingScoreMatchingLoss,
    "ssm": SlicedScoreMatchingLoss,
    "cd_kl_term": ContrastiveDivergenceKLTerm,
    "ranking_nce": RankingNoiseContrastiveLoss,
    "conditional_nce": ConditionalNoiseContrastiveLoss,
    "energy_discrepancy": EnergyDiscrepancyLoss,
    "finite_difference_sm": FiniteDifferenceScoreMatchingLoss,
    "flow_matching": FlowMatchingLoss,
    "equilibrium_matching": EquilibriumMatchingLoss,
    "energy_matching": EnergyMatchingLoss,
    "energy_square": EnergySquarePenalty,
    "gradient_penalty": GradientPenalty,
}

_GUIDE = {
    "mle": {"alpha": "negative_weight", "reg_strength": "regularization_weight"},
    "cd": {"alpha": "negative_weight", "n_steps": "steps"},
    "nce": {"log_partition": "log_z", "learn_partition": "learn_log_z"},
    "ssm": {"n_projections": "projections"},
}
"""Keywords of TorchEBM's guide to implementing losses, and the equivalent ones here."""


@overload
def create_loss(
    name: Literal["mle"], energy: Energy, **hyperparameters: Any
) -> MaximumLikelihoodLoss: ...
@overload
def create_loss(
    name: Literal["cd"], energy: Energy, **hyperparameters: Any
) -> ContrastiveDivergenceLoss: ...
@overload
def create_loss(
    name: Literal["nce"], energy: Energy, **hyperparameters: Any
) -> NoiseContrastiveLoss: ...
@overload
def create_loss(
    name: Literal["sm"], energy: Energy, **hyperparameters: Any
) -> ScoreMatchingLoss: ...
@overload
def create_loss(
    name: Literal["dsm"], energy: Energy, **hyperparameters: Any
) -> DenoisingScoreMatchingLoss: ...
@overload
def create_loss(
    name: Literal["ssm"], energy: Energy, **hyperparameters: Any
) -> SlicedScoreMatchingLoss: ...
@overload
def create_loss(
    name: Literal["cd_kl_term"], energy: Energy, **hyperparameters: Any
) -> ContrastiveDivergenceKLTerm: ...
@overload
def create_loss(
    name: Literal["ranking_nce"], energy: Energy, **hyperparameters: Any
) -> RankingNoiseContrastiveLoss: ...
@overload
def create_loss(
    name: Literal["conditional_nce"], energy: Energy, **hyperparameters: Any
) -> ConditionalNoiseContrastiveLoss: ...
@overload
def create_loss(
    name: Literal["energy_discrepancy"], energy: Energy, **hyperparameters: Any
) -> EnergyDiscrepancyLoss: ...
@overload
def create_loss(
    name: Literal["finite_difference_sm"], energy: Energy, **hyperparameters: Any
) -> FiniteDifferenceScoreMatchingLoss: ...
@overload
def create_loss(
    name: Literal["flow_matching"], energy: TimedEnergy, **hyperparameters: Any
) -> FlowMatchingLoss: ...
@overload
def create_loss(
    name: Literal["equilibrium_matching"], energy: Energy, **hyperparameters: Any
) -> EquilibriumMatchingLoss: ...
@overload
def create_loss(
    name: Literal["energy_matching"], energy: Energy, **hyperparameters: Any
) -> EnergyMatchingLoss: ...
@overload
def create_loss(
    name: Literal["energy_square"], energy: Energy, **hyperparameters: Any
) -> EnergySquarePenalty: ...
@overload
def create_loss(
    name: Literal["gradient_penalty"], energy: Energy, **hyperparameters: Any
) -> GradientPenalty: ...
@overload
def create_loss(name: str, energy: Energy, **hyperparameters: Any) -> nn.Module: ...
def create_loss(name: str, energy: Energy | TimedEnergy, **hyperparameters: Any) -> nn.Module:
    """Return the module of a loss by its short name in papers.

    Args:
        name: "mle" (maximum likelihood), "cd" (contrastive divergence), "cd_kl_term"; "nce",
            "ranking_nce", "conditional_nce" (noise-contrastive estimation); "energy_discrepancy";
            "sm", "ssm", "dsm", "finite_difference_sm" (score matching: exact, sliced, denoising, by
            finite differences); "flow_matching", "equilibrium_matching", "energy_matching";
            "energy_square" and "gradient_penalty" (penalties). Case does not matter.
        energy: returns the energy of each row; for "flow_matching" at its time, `energy(x, time)`.
        hyperparameters: hyperparameters of the module. Equivalent ones of TorchEBM's guide are
            accepted too: `alpha` for `negative_weight`, `reg_strength` for `regularization_weight`,
            `n_steps` for `steps`, `log_partition` for `log_z`, `learn_partition` for `learn_log_z`,
            `n_projections` for `projections`, and `implicit=False`, which is "sm" itself.

    Returns:
        The module, with the energy and the hyperparameters.

    Raises:
        ValueError: no loss has this name.
        TypeError: the loss has no hyperparameter of this name, a required one is missing, or one is
            passed under both names; `implicit=True`, which is another loss; a `sampler` object of
            TorchEBM, which ours cannot call.
        ContractError: a hyperparameter has the wrong type.

    Examples:
        >>> from termwise.energy import create_loss
        >>> create_loss("dsm", lambda x: x.square().sum(1), sigma=0.1).sigma
        0.1
        >>> create_loss("mle", lambda x: x.square().sum(1), alpha=0.5).negative_weight
        0.5
        >>> create_loss("sm", lambda x: x.square().sum(1), sigma=0.1)
        Traceback (most recent call last):
        TypeError: create_loss("sm") takes trace, chunk_size, row_space, higher_order_safe,
        differentiation, grad_reduction, got sigma
    """
    short = name.lower()
    kind = _LOSSES.get(short)
    if kind is None:
        raise ValueError(f"create_loss needs one of {', '.join(_LOSSES)}, got {name!r}")
    hyperparameters = _ours(short, hyperparameters)
    parameters = inspect.signature(kind).parameters
    known = [number for number in parameters if number != "energy"]
    for number in hyperparameters:
        if number not in known:
            raise TypeError(f'create_loss("{name}") takes {", ".join(known)}, got {number}')
    for number in known:
        if parameters[number].default is inspect.Parameter.empty and number not in hyperparameters:
            guide = "; that of TorchEBM's guide is 0.01" if number == "sigma" else ""
            raise TypeError(f'create_loss("{name}") needs {number}, got no such number{guide}')
    return kind(energy, **hyperparameters)


def _ours(name: str, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    """Translate keywords of TorchEBM's guide to ours."""
    ours: dict[str, Any] = {}
    names = _GUIDE.get(name, {})
    for given, number in hyperparameters.items():
        if name == "sm" and given == "implicit":
            if number is not False:
                raise TypeError(
                    'create_loss("sm") is exact, the guide\'s implicit=False, got '
                    f"implicit={number!r}: the guide's implicit loss is denoising score matching "
                    'with the sign turned; write create_loss("dsm", energy, sigma=0.01)'
                )
            continue
        if given == "sampler" and (hasattr(number, "sample") or hasattr(number, "sample_chain")):
            raise TypeError(
                f'create_loss("{name}") calls sampler(energy, x), got {type(number).__name__}: '
                "write sampler=lambda energy, x: sampler.sample(x=x, n_steps=10), or leave it out "
                "and give steps and step_size of the built-in Langevin dynamics"
            )
        our = names.get(given, given)
        if our in ours or (our != given and our in hyperparameters):
            raise TypeError(f'create_loss("{name}") takes {our} once, got {given} too')
        ours[our] = number
    return ours
