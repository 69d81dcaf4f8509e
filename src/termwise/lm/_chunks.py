"""Means over chunks, and the one place where logits are shifted against tokens."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import _groups
from .._contract import contract
from .._groups import ProcessGroup
from .._numbers import lifted
from ._alignment import out_of_range


def logit_chunks(chunk_id: Tensor, sequence_group: ProcessGroup | None = None) -> Tensor:
    """Return the chunk of the token that each logit predicts: the ids moved by one, -1 at the end.

    Where ranks hold parts of the sequence, in the order of ranks, a rank's last logit predicts the
    first token of the next rank that has any.
    """
    if sequence_group is None:
        end = chunk_id.new_full((chunk_id.shape[0], 1), -1)
        return torch.cat([chunk_id[:, 1:], end[:, : chunk_id.shape[1]]], dim=1)
    # Each rank's first id, +2, so that 0 says that the rank holds no position.
    ranks, rank = sequence_group.size(), sequence_group.rank()
    firsts = chunk_id.new_zeros(ranks + 1, chunk_id.shape[0])
    firsts[ranks] = 1  # after the last rank comes nothing: -1
    if chunk_id.shape[1]:
        firsts[rank] = chunk_id[:, 0] + 2
    firsts[:ranks] = _groups.all_reduce(firsts[:ranks], sequence_group.group_name)
    later = firsts[rank + 1 :]
    following = later.gather(0, later.ne(0).to(torch.int8).argmax(0, keepdim=True)) - 2
    return torch.cat([chunk_id[:, 1:], following.T[:, : chunk_id.shape[1]]], dim=1)


@contract
def chunk_average_log_probs(
    log_probs: Float[Tensor, "batch time vocab"],
    chunk_id: Int[Tensor, "batch time"],
    max_chunks: int,
    *,
    sequence_group: ProcessGroup | None = None,
) -> tuple[Float[Tensor, "batch chunks vocab"], Float[Tensor, "batch chunks"]]:
    r"""Average log-probabilities over the positions of each chunk.

    $$\mathrm{mean}_{bcv} = \frac{1}{n_{bc}} \sum_{t :\, i_{bt} = c} \log\, p_{btv}, \qquad
    n_{bc} = |\{t : i_{bt} = c\}|$$

    Positions outside every chunk are never read: what they hold, infinities and NaN included,
    reaches neither the value nor the gradient.

    Args:
        log_probs (Float[Tensor, "batch time vocab"]): a row for each position. Half precision is
            lifted to float32.
        chunk_id (Int[Tensor, "batch time"]): the chunk of each position, -1 for none. Positions are
            those of log_probs: where the ids are of tokens, shift them by one first.
        max_chunks: how many chunks a sample has room for; ids are below it.
        sequence_group: ranks that hold other positions, in any numbers; a chunk may straddle
            them. None: this rank alone, nothing is sent.

    Returns:
        tuple[Float[Tensor, "batch chunks vocab"], Float[Tensor, "batch chunks"]]: the means, 0 for
        an empty chunk, and the sizes n, as floats; the same on every rank. Gradient: where what
        follows is the same on every rank, each rank's is its positions' part of the whole gradient;
        nothing is to be averaged. Sent by each rank: one sum of batch * max_chunks * (vocab + 1)
        elements.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: max_chunks is negative.
        IndexError: an id is max_chunks or more, or below -1 (on CPU; on CUDA an assertion of the
            device).

    References:
        NeMo-RL's function of this name (https://github.com/NVIDIA-NeMo/RL,
        nemo_rl/algorithms/x_token/loss_utils.py), which divides by n + 1e-10 and multiplies by a
        one-hot matrix, so that a -inf at an unused position makes every chunk NaN there.

    Examples:
        >>> import torch
        >>> from termwise.lm import chunk_average_log_probs
        >>> log_probs = torch.tensor([[[-1.0, -3.0], [-3.0, -5.0], [float("-inf"), 0.0]]])
        >>> means, sizes = chunk_average_log_probs(log_probs, torch.tensor([[0, 0, -1]]), 2)
        >>> means.tolist(), sizes.tolist()
        ([[[-2.0, -4.0], [0.0, 0.0]]], [[2.0, 0.0]])
    """
    if max_chunks < 0:
        raise ValueError(f"chunk_average_log_probs needs max_chunks >= 0, got {max_chunks}")
    batch, time, vocab = log_probs.shape
    rows = lifted(log_probs).reshape(batch * time, vocab)
    # One bucket more for each sample, before its first, takes the positions outside every chunk
    # and is dropped; so no row is multiplied by 0, and no gradient reaches them but 0 itself.
    sample = torch.arange(batch, device=chunk_id.device)[:, None] * (max_chunks + 1)
    ids = chunk_id.long()
    within = (ids >= -1) & (ids < max_chunks)
    bucket = torch.where(within, sample + ids + 1, batch * (max_chunks + 1)).reshape(-1)
    try:
        sums = rows.new_zeros(batch * (max_chunks + 1), vocab).index_add(0, bucket, rows)
    except (IndexError, RuntimeError) as error:  # on the CPU; so nothing waits for a device
        raise IndexError(
            f"chunk_average_log_probs needs {out_of_range('chunk_id', ids, max_chunks)}, "
            "which is out of range"
        ) from error
    sizes = rows.new_zeros(batch * (max_chunks + 1)).index_add(0, bucket, rows.new_ones(len(rows)))
    sums = sums.view(batch, max_chunks + 1, vocab)[:, 1:]
    sizes = sizes.view(batch, max_chunks + 1)[:, 1:]
    if sequence_group is not None:
        both = torch.cat([sums, sizes[..., None]], dim=2)
        both = _groups.terminal_sum(both, sequence_group, 1.0)
        sums, sizes = both[..., :-1], both[..., -1].detach()
    return sums / sizes.where(sizes > 0, 1)[..., None], sizes


@contract
def valid_chunk_mask(
    student_sizes: Float[Tensor, "batch chunks"] | Int[Tensor, "batch chunks"],
    teacher_sizes: Float[Tensor, "batch chunks"] | Int[Tensor, "batch chunks"],
    pair_valid: Bool[Tensor, "batch chunks"],
) -> Bool[Tensor, "batch chunks"]:
    """Return which chunks count: those that are valid and hold a position on both sides.

    Args:
        student_sizes (Float[Tensor, "batch chunks"] | Int[Tensor, "batch chunks"]): positions in
            each chunk, as [`chunk_average_log_probs`][termwise.lm.chunk_average_log_probs] returns
            them, or counted as integers.
        teacher_sizes (Float[Tensor, "batch chunks"] | Int[Tensor, "batch chunks"]): the same of the
            teacher.
        pair_valid (Bool[Tensor, "batch chunks"]): whether the chunk is one.

    Returns:
        Bool[Tensor, "batch chunks"]: whether the chunk counts.

    Raises:
        ContractError: shapes or dtypes do not fit.

    References:
        NeMo-RL's function of this name (https://github.com/NVIDIA-NeMo/RL,
        nemo_rl/algorithms/x_token/loss_utils.py).

    Examples:
        >>> import torch
        >>> from termwise.lm import valid_chunk_mask
        >>> sizes = torch.tensor([[2.0, 0.0, 1.0]])
        >>> valid_chunk_mask(sizes, sizes, torch.tensor([[True, True, False]]))
        tensor([[ True, False, False]])
    """
    return (student_sizes > 0) & (teacher_sizes > 0) & pair_valid
