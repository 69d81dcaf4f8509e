"""Gradient caching: the gradients of a large batch with the memory of a micro-batch."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ._terms import Terms

B = TypeVar("B")
T = TypeVar("T", bound=Terms)


def cached_gradients(
    embed: Callable[[B], Tensor | Sequence[Tensor]],
    micro_batches: Iterable[B],
    loss: Callable[..., T],
    *,
    no_sync: Sequence[Callable[[], AbstractContextManager[Any]]] = (),
    backward: Callable[[Tensor], Any] = Tensor.backward,
) -> T:
    r"""Accumulate the gradient of a loss of a large batch, one micro-batch in memory at a time.

    Contrastive and second-moment losses do not add up over micro-batches: a sample's negatives, or
    a covariance, depend on the whole batch. With embeddings $z_i = f(x_i)$ of micro-batches $x_i$,
    the chain rule needs the graph of one of them at a time:

    $$\frac{dL}{d\theta} = \sum_i \left\langle \frac{\partial L}{\partial z_i},
    \frac{\partial f(x_i)}{\partial \theta} \right\rangle$$

    1. `embed` runs on each micro-batch without a graph.
    2. `loss` runs once on all embeddings; its gradient with respect to them is stored.
    3. `embed` runs on each micro-batch again, with a graph, and back-propagates its part.

    Args:
        embed: returns the embeddings of one micro-batch: a tensor, or a tuple or list of several
            (of two encoders, or of the views of a sample). The first axis of each is the axis of
            samples. A tensor without axes, such as a learnt scale that the model returns, is taken
            from the last micro-batch alone. Integers, such as labels, are passed to the loss
            without a gradient.
        micro_batches: the arguments of `embed`, one for each call, such as `images.split(64)` or
            `zip(images.split(64), texts.split(64))`; at least one, of any sizes. All are in memory
            at once.
        loss: computes the terms of the whole batch from the tensors of `embed`, each concatenated
            over the micro-batches. Detach constants, such as a teacher's embeddings, in it.
        no_sync: the `no_sync` method of each DistributedDataParallel module that `embed` calls, or
            another function that returns a context in which gradients are not reduced. Gradients
            are then reduced once, with the last micro-batch of the second pass.
        backward: calls backward on the loss, such as `lambda loss: scaler.scale(loss).backward()`
            for fp16, or `accelerator.backward`.

    Returns:
        The terms of the whole batch, detached. Gradients are added to `.grad` of the parameters of
        `embed`, and of those that `loss` uses itself: they equal those of one backward pass through
        all micro-batches.

        Both passes draw the same random numbers: the state of the global generators (of the CPU and
        of the current accelerator device; no GPU has run this yet) before a micro-batch's first
        pass is restored for its second one, so dropout is the same. Afterwards the generators have
        the state after the first pass and the loss. A `torch.Generator` that `embed` draws from is
        not restored, so draw augmentations before the call. Batch normalization computes its
        statistics for each micro-batch, and updates its running statistics twice.

        Cost: one more forward pass. Memory: all inputs, all embeddings with their gradients, and
        the graph of one micro-batch.

        Communication: what `loss` sends over its own group, and what the modules send in their
        forward and backward. Pass the group to the loss, as in `lambda z1, z2: vicreg_loss(z1, z2,
        batch_group=group)`. Ranks may hold different numbers of micro-batches if their modules do
        not communicate inside `no_sync` (DistributedDataParallel does not). A rank without samples
        passes a micro-batch without samples. A parameter of a DistributedDataParallel module that
        `loss` uses has to come through `embed` (as a tensor without axes), or its gradient is not
        averaged. Does not synchronize with the device.

    Raises:
        ValueError: there are no micro-batches, `embed` returns different numbers of tensors, or
            nothing requires a gradient.
        TypeError: `embed` does not return tensors, or `loss` does not return `Terms`.

    References:
        Gao, Zhang, Han, Callan, Scaling deep contrastive learning batch size under memory limited
        setup (2021), https://arxiv.org/abs/2101.06983, section 3.2. The authors' code
        (https://github.com/luyug/GradCache) back-propagates a product of embeddings and gradients;
        here the gradients are passed to the backward pass directly, which is equivalent.

    Examples:
        >>> import torch
        >>> import termwise as tw
        >>> encoder = torch.nn.Linear(8, 4)
        >>> view1, view2 = torch.randn(2, 256, 8)
        >>> terms = tw.cached_gradients(
        ...     lambda views: [encoder(view) for view in views],
        ...     zip(view1.split(64), view2.split(64)),
        ...     tw.joint_embedding.vicreg_loss,
        ... )
        >>> accumulated = encoder.weight.grad.clone()
        >>> encoder.zero_grad()
        >>> tw.joint_embedding.vicreg_loss(encoder(view1), encoder(view2)).loss.backward()
        >>> torch.allclose(encoder.weight.grad, accumulated, atol=1e-4)
        True
    """
    batches = list(micro_batches)
    if not batches:
        raise ValueError(
            "cached_gradients needs at least one micro-batch, got none: a rank without rows passes "
            "one without rows"
        )
    states: list[list[Tensor]] = []
    embedded: list[Sequence[Tensor]] = []
    with torch.no_grad(), _all_of(no_sync):
        for batch in batches:
            states.append(_random_states())
            embedded.append(_tensors(embed(batch)))
    # PyTorch 2.10 would otherwise reuse the weights that autocast converted without a graph.
    torch.clear_autocast_cache()
    counts = [len(tensors) for tensors in embedded]
    if len(set(counts)) > 1:
        raise ValueError(
            f"cached_gradients needs as many tensors from embed for each micro-batch, got {counts}"
        )
    parts_of_each = [*zip(*embedded, strict=True)]
    embeddings = [_joined(parts) for parts in parts_of_each]
    terms = loss(*embeddings)
    if not isinstance(terms, Terms):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"cached_gradients needs loss to return a termwise.Terms, got {type(terms).__name__}"
        )
    backward(terms.loss)
    gradients = [
        _divided(whole.grad, parts) for whole, parts in zip(embeddings, parts_of_each, strict=True)
    ]
    result = terms.detach()
    del embeddings, embedded, parts_of_each, terms

    for place, (batch, state) in enumerate(zip(batches, states, strict=True)):
        is_last = place == len(batches) - 1
        with _all_of(() if is_last else no_sync):
            with _random_states_as(state):
                again = _tensors(embed(batch))
            pulled = [
                (tensor, each[place])
                for tensor, each in zip(again, gradients, strict=True)
                if tensor.requires_grad and each[place] is not None
            ]
            if is_last and not pulled:
                raise ValueError(
                    "cached_gradients needs a tensor of embed that requires a gradient and that "
                    "loss depends on, got none"
                )
            if pulled:
                torch.autograd.backward([z for z, _ in pulled], [pull for _, pull in pulled])
    return result


def _tensors(embedded: Any) -> Sequence[Tensor]:
    tensors = [embedded] if isinstance(embedded, Tensor) else embedded
    if isinstance(tensors, tuple | list):
        sequence = cast("Sequence[Any]", tensors)
        if all(isinstance(x, Tensor) for x in sequence):
            return sequence
    raise TypeError(
        "cached_gradients needs embed to return a tensor, or a tuple or list of tensors, "
        f"got {type(embedded).__name__}"
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the embedding of all micro-batches as a leaf that requires a gradient."""
    whole = torch.cat([*parts]) if parts[-1].ndim else parts[-1].detach().clone()
    return whole.requires_grad_(whole.is_floating_point())


def _divided(gradient: Tensor | None, parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return each micro-batch's part of the gradient."""
    if gradient is None:
        return [None for _ in parts]
    if gradient.ndim == 0:
        return [*(None for _ in parts[1:]), gradient]
    sizes = [len(part) for part in parts]
    return cast("tuple[Tensor, ...]", gradient.split(sizes))


@contextmanager
def _all_of(
    contexts: Sequence[Callable[[], AbstractContextManager[Any]]],
) -> Generator[None, None, None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        yield


@contextmanager
def _random_states_as(states: Sequence[Tensor]) -> Generator[None, None, None]:
    now = _random_states()
    _set_random_states(states)
    try:
        yield
    finally:
        _set_random_states(now)


def _random_states() -> list[Tensor]:
    return [module.get_rng_state() for module in _random_modules()]


def _set_random_states(states: Sequence[Tensor]) -> None:
    for module, state in zip(_random_modules(), states, strict=True):
        module.set_rng_state(state)


def _random_modules() -> list[Any]:
    """Return the modules that have a global generator: those of the CPU and the accelerator."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [torch.random, *([torch.get_device_module(accelerator)] if accelerator else [])]
