"""Shared code of losses for energy-based models: calling and differentiating energies.

A model is a density p(x) proportional to exp(-E(x)). Rows are samples; axes of a sample are its
event. Sums run over the event, means over rows, weighted, on all ranks of `batch_group`.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal, TypeAlias, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from .._autograd import transformed
from .._contract import ContractError, show
from .._groups import GradReduction, ProcessGroup
from .._numbers import lifted
from . import _higher_order

Energy: TypeAlias = Callable[[Float[Tensor, "batch *event"]], Float[Tensor, " batch"]]
"""A callable that returns the energy of each row; pass conditions or times by a closure."""

Differentiation = Literal["auto", "autograd", "func"]


def energies_of(caller: str, energy: Energy, x: Tensor, argument: str = "x") -> Tensor:
    """Return the energy of each row of x, " batch", in float32 or float64.

    Args:
        caller: the loss that an error names.
        energy: the model.
        x: the argument of the energy, passed unchanged.
        argument: name of x in the caller.

    Raises:
        ContractError: the result is not one floating number for each row. An energy "batch 1" minus
            a log-density " batch" would broadcast.
    """
    result: Any = _called(caller, energy, x)
    if (
        not isinstance(result, Tensor)
        or result.shape != x.shape[:1]
        or not result.is_floating_point()
    ):
        raise ContractError(
            f'{caller}: energy({argument}) needs Float[Tensor, " batch"] with batch '
            f"{x.shape[0]}, got {show(result)}{_advice(result, x)}"
        )
    return lifted(result)


def _advice(result: object, x: Tensor) -> str:
    """Return what to write instead for a result of another shape, or ""."""
    if not isinstance(result, Tensor) or result.shape == x.shape[:1]:
        return ""
    one_each = result.shape[:1] == x.shape[:1] and result.numel() == x.shape[0]
    if one_each and result.ndim == 2:
        return ": write energy(x).squeeze(-1)"
    if one_each and result.ndim > 2:
        return ": write energy(x).flatten()"
    if result.ndim > 1 and result.shape == x.shape:
        return (
            ": that is a vector field (a velocity, a score or a denoiser), which is no energy: an "
            "energy is one number for each sample, and its field is its gradient"
        )
    if result.ndim == 0:
        return ": give the energy of each sample, not their sum or mean over the batch"
    if result.shape[:1] == x.shape[:1]:
        return (
            ": give one number for each sample, such as a sum over the other axes, where these are "
            "the parts of one energy"
        )
    return ""


def _called(caller: str, energy: Energy, x: Tensor) -> object:
    if torch.compiler.is_compiling():  # a graph break inside of a try is an error
        return energy(x)
    try:
        return energy(x)
    except _higher_order.CoupledRowsError as problem:
        raise ValueError(f"{caller} {problem}") from None
    except _higher_order.MissingDerivativeError as problem:
        raise NotImplementedError(f"{caller} {problem}") from None


def energies_and_gradients(
    caller: str,
    energy: Energy,
    x: Tensor,
    differentiation: Differentiation = "auto",
    argument: str = "x",
    higher_order_safe: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the energy of each row and its gradient with respect to x, in float32 or float64.

    Under no_grad neither is in a graph. x and its `requires_grad` are not modified; if x requires a
    gradient, it gets one.

    With `higher_order_safe` the energy runs with functions that have correct higher derivatives,
    since the gradient is in a graph and is differentiated again.
    """
    if differentiation_of(differentiation) == "func":
        safe = _higher_order.higher_order_safe(higher_order_safe, order=2)
        with safe, _higher_order.in_our_words(caller):
            gradient, values = gradient_function(caller, energy, argument)(x)
        return values, lifted(gradient)
    create_graph = creates_graph()
    if create_graph or higher_order_safe:  # functions inside compiled code cannot be replaced
        energy = uncompiled(energy)
    order: Literal[1, 2] = 2 if create_graph else 1
    with recording(), _higher_order.higher_order_safe(higher_order_safe, order=order):
        point = point_of(x)
        values = energies_of(caller, energy, point, argument)
        refuse_static_graph(caller, values)
        gradient = gradient_of(caller, values.sum(), point, create_graph, argument)
    return (values if create_graph else values.detach()), lifted(gradient)


def differentiation_of(differentiation: Differentiation) -> str:
    """Choose a way: Dynamo and torch.func transforms need torch.func, export needs autograd."""
    if differentiation != "auto":
        return differentiation
    return "func" if torch.compiler.is_dynamo_compiling() or transformed() else "autograd"


def uncompiled(energy: Energy) -> Energy:
    """Return the energy without `torch.compile`, which has no second derivative."""
    for original in ("_orig_mod", "_torchdynamo_orig_callable"):
        energy = getattr(energy, original, energy)
    return energy


@contextmanager
def recording() -> Generator[None, None, None]:
    """Record a graph, even if the caller disabled gradients."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def creates_graph() -> bool:
    """Whether results are differentiated: by backpropagation, or by forward mode.

    `torch.no_grad` does not disable forward mode, and `detach` would drop its tangents.
    """
    levels = cast("Any", forward_ad)
    forward_mode: bool = not torch.compiler.is_compiling() and levels._current_level >= 0
    return torch.is_grad_enabled() or forward_mode


def point_of(x: Tensor) -> Tensor:
    """Return a tensor to differentiate with respect to, connected to x's graph if it has one.

    A view, and not `detach`, which drops the tangent of forward mode.
    """
    x = recordable(x)
    return x.view_as(x).requires_grad_()


def recordable(x: Tensor) -> Tensor:
    """Return a tensor that a graph may save; Dynamo does not support inference tensors."""
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x


def gradient_of(
    caller: str, energy_sum: Tensor, point: Tensor, create_graph: bool, argument: str = "x"
) -> Tensor:
    """Differentiate a sum of energies with respect to their argument."""
    gradient = None
    if energy_sum.requires_grad:
        with _higher_order.in_our_words(caller):
            (gradient,) = torch.autograd.grad(
                energy_sum, point, create_graph=create_graph, allow_unused=True
            )
    if gradient is None:
        raise _independent(caller, argument)
    return gradient


def gradient_function(
    caller: str, energy: Energy, argument: str = "x"
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return a function of x for torch.func: the gradient with respect to x, and the energies."""

    def energy_sum(point: Tensor) -> tuple[Tensor, Tensor]:
        values = energies_of(caller, energy, point, argument)
        # torch.func would return the gradient 0. Dynamo does not know which tensors require one.
        if not (values.requires_grad or torch.compiler.is_compiling()):
            raise _independent(caller, argument)
        return values.sum(), values

    return torch.func.grad(energy_sum, has_aux=True)


def _independent(caller: str, argument: str) -> ValueError:
    return ValueError(
        f"{caller} needs an energy that can be differentiated by {argument}, got a result that "
        "does not depend on it (is it detached, computed under no_grad, or by a function "
        "without a derivative?)"
    )


def anchored(per_row: Tensor, energies: Tensor) -> Tensor:
    """Connect per_row to the graph of the energies, with a gradient of zeros.

    A gradient with respect to x does not depend on the bias of an energy's last layer. Without
    this, that parameter would get no gradient, and DistributedDataParallel would wait for it
    forever.
    """
    nothing = energies.masked_fill(torch.ones_like(energies, dtype=torch.bool), 0)
    return per_row + nothing.to(per_row.dtype)


def refuse_static_graph(caller: str, energies: Tensor) -> None:
    """Raise an error under DistributedDataParallel(static_graph=True), where gradients are wrong.

    It reduces gradients at the end of the first backward pass, which is the one to x.
    """
    seen: set[Any] = set()
    front: list[Any] = [energies.grad_fn]
    while front and len(seen) < 64:  # the sink is at the end of the model
        node = front.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        model = getattr(node, "ddp_weakref", lambda: None)()
        if model is not None and model.static_graph:
            raise ValueError(
                f"{caller} differentiates the energy by its input, which "
                "DistributedDataParallel(static_graph=True) takes for the backward pass: "
                "its gradients would be wrong. Wrap the energy without static_graph"
            )
        front.extend(previous for previous, _ in node.next_functions)


def refuse_batch_statistics(caller: str, energy: Energy) -> None:
    """Raise an error for batch normalization in training mode, which couples the rows."""
    for module in modules_of(energy):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (  # pyright: ignore[reportPrivateUsage]
            module.training or module.running_mean is None
        ):
            raise ValueError(
                f"{caller} needs energies of each row alone, got {type(module).__name__} in "
                "training mode, which couples the rows of a batch: call eval() on it, or use a "
                "normalization of each row"
            )


def modules_of(energy: Energy) -> Iterator[nn.Module]:
    """Yield the modules that an energy refers to.

    A function refers to what it closes over, its defaults and, if it is the energy itself, the
    globals that it names; a method to its object; a callable object to its attributes. Collections
    and functions that are found in this way are searched too.
    """
    if torch.compiler.is_compiling():  # which cannot trace access to closures
        if isinstance(energy, nn.Module):
            yield from energy.modules()
        return
    front: list[Any] = [energy]
    seen: set[int] = set()
    while front and len(seen) < 64:  # models are found at a small depth; other objects may be large
        held = front.pop(0)
        if id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, nn.Module):
            yield from held.modules()
        else:
            front += _members(held, named_globals=held is energy)


def _members(held: Any, named_globals: bool) -> Sequence[Any]:
    if isinstance(held, Tensor | str | bytes | type | ModuleType):
        return ()
    if isinstance(held, functools.partial):
        return (held.func, *held.args, *held.keywords.values())
    if inspect.ismethod(held):
        return (held.__self__, held.__func__)
    if inspect.isfunction(held):
        variables = inspect.getclosurevars(held)
        of_globals = variables.globals.values() if named_globals else ()
        defaults = (*(held.__defaults__ or ()), *(held.__kwdefaults__ or {}).values())
        return (*variables.nonlocals.values(), *defaults, *of_globals)
    if isinstance(held, dict):
        return tuple(itertools.islice(cast("Any", held).values(), 64))
    if isinstance(held, list | tuple):
        return cast("Sequence[Any]", held)[:64]
    # An object that is not callable, such as a trainer, may have models that the energy does not
    # use.
    return tuple(getattr(held, "__dict__", {}).values()) if callable(held) else ()


def replicated(
    value: Tensor, batch_group: ProcessGroup | None, grad_reduction: GradReduction
) -> Tensor:
    """Return a term that every rank computes from its own copy of the parameters, for a loss.

    If a trainer sums gradients, each rank contributes its share of the gradient.
    """
    if batch_group is None or grad_reduction == "mean":
        return value
    share = 1 / batch_group.size()
    return value * share + value.detach() * (1 - share)


def normal_like(x: Tensor, generator: torch.Generator | None, copies: int | None = None) -> Tensor:
    """Draw standard normal noise for x, in float32 or float64; copies are along a first axis."""
    shape = x.shape if copies is None else (copies, *x.shape)
    device = x.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=lifted(x[:0]).dtype, device=device).to(
        x.device
    )


def displaced(x: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """Add in float32 or float64; return the sum in x's dtype, and the actual displacement.

    In half precision the displacement differs from the step, which rounding may change.
    """
    moved = lifted(x) + displacement
    if moved.dtype == x.dtype:
        return moved, displacement
    rounded = moved.to(x.dtype)
    return rounded, lifted(rounded) - lifted(x)


def per_row_sum(x: Tensor) -> Tensor:
    """Sum over the axes of the event."""
    return x.flatten(1).sum(1) if x.ndim > 1 else x
