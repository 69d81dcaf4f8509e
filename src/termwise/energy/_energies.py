"""What the losses of energy-based models share: how an energy is called, differentiated, averaged.

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

from .._autograd import transformed
from .._contract import ContractError, show
from .._groups import GradReduction, ProcessGroup
from .._numbers import lifted
from . import _higher_order

Energy: TypeAlias = Callable[[Float[Tensor, "batch *event"]], Float[Tensor, " batch"]]
"""Returns the energy of each row. Any callable; a condition or a time is in its closure."""

Differentiation = Literal["auto", "autograd", "func"]


def energies_of(caller: str, energy: Energy, x: Tensor, argument: str = "x") -> Tensor:
    """Return the energy of each row of x, " batch", in float32 at least.

    Args:
        caller: the loss that an error names.
        energy: the model.
        x: what it is called with, as it is.
        argument: what the caller calls x.

    Raises:
        ContractError: the result is not one floating number for each row. A "batch 1" energy less
            a " batch" log-density would broadcast.
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
    """Advise what to write instead of a result of another shape; empty where nothing is known."""
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
    if torch.compiler.is_compiling():  # a graph that breaks cannot go on inside of a try
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
    """Return the energy of each row, and its gradient with respect to x, both lifted.

    Without grad mode neither is in a graph. x itself is not changed, nor its `requires_grad`; where
    it requires a gradient, it gets one.

    With `higher_order_safe` the energy runs on functions whose higher derivatives are right, for
    what keeps the gradient in a graph and will differentiate it once more.
    """
    if differentiation_of(differentiation) == "func":
        safe = _higher_order.higher_order_safe(higher_order_safe, order=2)
        with safe, _higher_order.in_our_words(caller):
            gradient, values = gradient_function(caller, energy, argument)(x)
        return values, lifted(gradient)
    create_graph = torch.is_grad_enabled()
    if create_graph or higher_order_safe:  # a swap does not reach into what is compiled
        energy = uncompiled(energy)
    order: Literal[1, 2] = 2 if create_graph else 1
    with recording(), _higher_order.higher_order_safe(higher_order_safe, order=order):
        point = point_of(x)
        values = energies_of(caller, energy, point, argument)
        refuse_static_graph(caller, values)
        gradient = gradient_of(caller, values.sum(), point, create_graph, argument)
    return (values if create_graph else values.detach()), lifted(gradient)


def differentiation_of(differentiation: Differentiation) -> str:
    """Choose: Dynamo traces torch.func alone, its transforms nest in it alone, export neither."""
    if differentiation != "auto":
        return differentiation
    return "func" if torch.compiler.is_dynamo_compiling() or transformed() else "autograd"


def uncompiled(energy: Energy) -> Energy:
    """Return what an energy was before `torch.compile`, which takes its second derivative away."""
    for original in ("_orig_mod", "_torchdynamo_orig_callable"):
        energy = getattr(energy, original, energy)
    return energy


@contextmanager
def recording() -> Generator[None, None, None]:
    """Record a graph, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def point_of(x: Tensor) -> Tensor:
    """Return x as a tensor of its own to differentiate by, in x's graph where it has one."""
    x = recordable(x)
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def recordable(x: Tensor) -> Tensor:
    """Return a tensor that a graph may hold; Dynamo knows no inference tensors."""
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x


def gradient_of(
    caller: str, total: Tensor, point: Tensor, create_graph: bool, argument: str = "x"
) -> Tensor:
    """Differentiate a sum of energies by the point that they were taken at."""
    gradient = None
    if total.requires_grad:
        with _higher_order.in_our_words(caller):
            (gradient,) = torch.autograd.grad(
                total, point, create_graph=create_graph, allow_unused=True
            )
    if gradient is None:
        raise _independent(caller, argument)
    return gradient


def gradient_function(
    caller: str, energy: Energy, argument: str = "x"
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return a function of x for torch.func: the gradient with respect to x, and the energies."""

    def total(point: Tensor) -> tuple[Tensor, Tensor]:
        values = energies_of(caller, energy, point, argument)
        # torch.func would give the gradient 0. Dynamo does not know what requires one.
        if not (values.requires_grad or torch.compiler.is_compiling()):
            raise _independent(caller, argument)
        return values.sum(), values

    return torch.func.grad(total, has_aux=True)


def _independent(caller: str, argument: str) -> ValueError:
    return ValueError(
        f"{caller} needs an energy that can be differentiated by {argument}, got a result that "
        "does not depend on it (is it detached, computed under no_grad, or by a function "
        "without a derivative?)"
    )


def anchored(per_row: Tensor, energies: Tensor) -> Tensor:
    """Return per_row in the graph of the energies too, to which it sends zeros.

    A gradient with respect to x does not depend on the bias of an energy's last layer. Without this
    that parameter would get no gradient at all, for which DistributedDataParallel waits for ever.
    """
    nothing = energies.masked_fill(torch.ones_like(energies, dtype=torch.bool), 0)
    return per_row + nothing.to(per_row.dtype)


def refuse_static_graph(caller: str, energies: Tensor) -> None:
    """Refuse DistributedDataParallel(static_graph=True), whose gradients would be wrong.

    It reduces at the end of the first backward pass that it sees, which is that to x.
    """
    seen: set[Any] = set()
    front: list[Any] = [energies.grad_fn]
    while front and len(seen) < 64:  # the sink stands at the end of the model
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
    """Refuse batch normalisation in training mode, where one row's energy depends on the others."""
    for module in modules_of(energy):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (  # pyright: ignore[reportPrivateUsage]
            module.training or module.running_mean is None
        ):
            raise ValueError(
                f"{caller} needs energies of each row alone, got {type(module).__name__} in "
                "training mode, which couples the rows of a batch: call eval() on it, or use a "
                "normalisation of each row"
            )


def modules_of(energy: Energy) -> Iterator[nn.Module]:
    """Yield the modules that an energy holds, however it holds them.

    A function holds what it closes over, its defaults and, if it is the energy itself, the globals
    that it names; a method holds its object, and an object that can be called its attributes. In
    collections, and in functions that are held so, they are found too.
    """
    if torch.compiler.is_compiling():  # which does not trace a look into closures
        if isinstance(energy, nn.Module):
            yield from energy.modules()
        return
    front: list[Any] = [energy]
    seen: set[int] = set()
    while front and len(seen) < 64:  # a model is held near; what else is held may be large
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
    # What cannot be called, such as a trainer, may hold models that the energy does not use.
    return tuple(getattr(held, "__dict__", {}).values()) if callable(held) else ()


def replicated(
    value: Tensor, batch_group: ProcessGroup | None, grad_reduction: GradReduction
) -> Tensor:
    """Return what every rank computes alike from its own copy of the parameters, for a loss.

    Where a trainer sums gradients, each rank sends its share of this one's.
    """
    if batch_group is None or grad_reduction == "mean":
        return value
    share = 1 / batch_group.size()
    return value * share + value.detach() * (1 - share)


def normal_like(x: Tensor, generator: torch.Generator | None, copies: int | None = None) -> Tensor:
    """Draw standard normal noise for x, lifted; for several copies along a first axis."""
    shape = x.shape if copies is None else (copies, *x.shape)
    device = x.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=lifted(x[:0]).dtype, device=device).to(
        x.device
    )


def displaced(x: Tensor, displacement: Tensor) -> tuple[Tensor, Tensor]:
    """Add in float32 at least; return the sum in x's dtype, and the displacement.

    In half precision the two differ: a small step may be rounded away.
    """
    moved = lifted(x) + displacement
    if moved.dtype == x.dtype:
        return moved, displacement
    rounded = moved.to(x.dtype)
    return rounded, lifted(rounded) - lifted(x)


def per_row_sum(x: Tensor) -> Tensor:
    """Sum over the axes of the event."""
    return x.flatten(1).sum(1) if x.ndim > 1 else x
