"""Return the objective of a config."""

from typing import overload

from torch import nn

from ._crosscoder import Crosscoder, CrosscoderObjective
from ._end_to_end import EndToEnd, EndToEndObjective
from ._gated import Gated, GatedObjective
from ._jumprelu import JumpReLU, JumpReLUObjective
from ._matryoshka import Matryoshka, MatryoshkaObjective
from ._topk import TopK, TopKObjective
from ._vanilla import Vanilla, VanillaObjective

Config = Vanilla | TopK | JumpReLU | Gated | Matryoshka | Crosscoder | EndToEnd


@overload
def get_objective(cfg: Vanilla) -> VanillaObjective: ...
@overload
def get_objective(cfg: TopK) -> TopKObjective: ...
@overload
def get_objective(cfg: JumpReLU) -> JumpReLUObjective: ...
@overload
def get_objective(cfg: Gated) -> GatedObjective: ...
@overload
def get_objective(cfg: Matryoshka) -> MatryoshkaObjective: ...
@overload
def get_objective(cfg: Crosscoder) -> CrosscoderObjective: ...
@overload
def get_objective(cfg: EndToEnd) -> EndToEndObjective: ...
def get_objective(cfg: Config) -> nn.Module:
    """Return the module that computes the objective of a config.

    Args:
        cfg: config of an objective.

    Returns:
        The objective of the same name.

    Raises:
        TypeError: cfg is not a config of this family.

    Examples:
        >>> from termwise.sae import Vanilla, get_objective
        >>> get_objective(Vanilla(sparsity_coeff=4e-4)).cfg.sparsity_coeff
        0.0004
    """
    match cfg:
        case Vanilla():
            return VanillaObjective(cfg)
        case TopK():
            return TopKObjective(cfg)
        case JumpReLU():
            return JumpReLUObjective(cfg)
        case Gated():
            return GatedObjective(cfg)
        case Matryoshka():
            return MatryoshkaObjective(cfg)
        case Crosscoder():
            return CrosscoderObjective(cfg)
        case EndToEnd():
            return EndToEndObjective(cfg)
    raise TypeError(f"get_objective needs a config of termwise.sae, got {type(cfg).__name__}")
