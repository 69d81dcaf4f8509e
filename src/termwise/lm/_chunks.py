"""Chunks of logits, their means, and the shift between logits and tokens."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import _groups
from .._contract import contract
from .._groups import ProcessGroup, all_reduce, name_of
from .._numbers import accumulator, lifted
from ._alignment import Alignment, chunk_sizes, out_of_range
from ._checks import check_normalizer, check_temperature, divisor


def logit_chunks(chunk_id: Tensor, sequence_group: ProcessGroup | None = None) -> Tensor:
    """Return the chunk of the token that each logit predicts: the ids shifted by one, then -1.

    If ranks hold parts of the sequence, in the order of ranks, a rank's last logit predicts the
    first token of the next rank that has tokens.
    """
    if sequence_group is None:
        later = chunk_id[:, 1:]
        return F.pad(later, (0, chunk_id.shape[1] - later.shape[1]), value=-1)
    # Each rank's first id, +2, so that 0 means that the rank has no positions.
    ranks, rank = sequence_group.size(), sequence_group.rank()
    firsts = chunk_id.new_zeros(ranks + 1, chunk_id.shape[0])
    firsts[ranks] = 1  # nothing follows the last rank: -1
    if chunk_id.shape[1]:
        firsts[rank] = chunk_id[:, 0] + 2
    firsts[:ranks] = _groups.all_reduce(firsts[:ranks], sequence_group.group_name)
    later = firsts[rank + 1 :]
    following = later.gather(0, later.ne(0).to(torch.int8).argmax(0, keepdim=True)) - 2
    return torch.cat([chunk_id[:, 1:], following.T[:, : chunk_id.shape[1]]], dim=1)


class Chunks(NamedTuple):
    """The chunk of each logit on this rank, and which chunks count."""

    student_id: Tensor
    """[batch, student_time], the chunk of each logit, -1 for none."""
    teacher_id: Tensor
    """[batch, teacher_time]."""
    student_size: Tensor
    """[batch, chunks], number of logits, over the sequence's ranks."""
    teacher_size: Tensor
    """[batch, chunks]."""
    valid: Tensor
    """[batch, chunks], whether the chunk counts."""


def chunks_of(
    name: str,
    alignment: Alignment,
    mask: Tensor | None,
    sample_mask: Tensor | None,
    exact_only: bool,
    sequence_group: ProcessGroup | None,
) -> Chunks:
    """Shift the ids from tokens to logits, and determine which chunks count."""
    if mask is not None and mask.shape != alignment.student_chunk_id.shape:
        raise ValueError(
            f"{name} needs a mask of the student's tokens "
            f"{list(alignment.student_chunk_id.shape)}, got {list(mask.shape)}"
        )
    if sample_mask is not None and sample_mask.shape[0] != alignment.pair_valid.shape[0]:
        raise ValueError(
            f"{name} needs a sample_mask for the {alignment.pair_valid.shape[0]} samples of the "
            f"alignment, got {sample_mask.shape[0]}"
        )
    student = logit_chunks(alignment.student_chunk_id, sequence_group)
    teacher = logit_chunks(alignment.teacher_chunk_id, sequence_group)
    counted = [("student_chunk_id", student), ("teacher_chunk_id", teacher)]
    if mask is not None:  # of tokens, which are not shifted
        left_out = alignment.student_chunk_id.masked_fill(mask, -1)
        counted.append(("student_chunk_id", left_out))
    sizes = torch.stack(
        [chunk_sizes(name, which, ids, alignment.max_chunks) for which, ids in counted]
    )
    if sequence_group is not None:
        # The same is sent whether this rank has a mask or not.
        sizes = F.pad(sizes, (0, 0, 0, 0, 0, 3 - len(sizes)))
        sizes = _groups.all_reduce(sizes, sequence_group.group_name)
    valid = (sizes[:2] > 0).all(0) & (sizes[2:] == 0).all(0) & alignment.pair_valid
    if exact_only:
        valid = valid & alignment.pair_exact
    if sample_mask is not None:
        valid = valid & sample_mask[:, None]
    return Chunks(student, teacher, sizes[0], sizes[1], valid)


def check_times(name: str, alignment: Alignment, student: Tensor, teacher: Tensor) -> None:
    """Raise an error for an alignment whose positions do not match the tensors."""
    for side, ids, x in (
        ("student", alignment.student_chunk_id, student),
        ("teacher", alignment.teacher_chunk_id, teacher),
    ):
        if ids.shape != x.shape[:2]:
            raise ValueError(
                f"{name} needs an alignment of the {side}'s positions {list(x.shape[:2])}, "
                f"got {list(ids.shape)}"
            )


def padding(**widths: tuple[int, int]) -> str:
    """Return advice to cut logits that are wider than a vocabulary, or ""."""
    cuts = [f"{name}[..., :{vocab}]" for name, (width, vocab) in widths.items() if width > vocab]
    return f"; if the model's vocabulary is padded, pass {' and '.join(cuts)}" if cuts else ""


def normalized(
    name: str,
    chunks: Chunks,
    temperature: float,
    normalizer: Tensor | float | None,
    batch_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Count the chunks over the batch, and return temperature^2 / normalizer too."""
    check_temperature(name, temperature)
    check_normalizer(name, normalizer)
    count = all_reduce(chunks.valid.sum(), name_of(batch_group))
    count = count.to(accumulator(count))
    return count, temperature**2 / divisor(normalizer, count)


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

    Positions outside every chunk are never read: infinities and NaN there affect neither the value
    nor the gradient.

    Args:
        log_probs (Float[Tensor, "batch time vocab"]): a row for each position. Half precision is
            converted to float32.
        chunk_id (Int[Tensor, "batch time"]): the chunk of each position of log_probs, -1 for none.
            Ids of tokens have to be shifted by one first.
        max_chunks: number of chunks that a sample can have; ids are below it.
        sequence_group: process group whose ranks hold different positions, in any numbers; a chunk
            may extend over several ranks. None: no communication.

    Returns:
        tuple[Float[Tensor, "batch chunks vocab"], Float[Tensor, "batch chunks"]]: the means, 0 for
        an empty chunk, and the sizes n, as floats; the same on every rank. Gradient: if the
        following computation is the same on every rank, each rank gets the whole gradient at its
        positions, which is not to be averaged. Each rank sends one sum of batch * max_chunks *
        (vocab + 1) elements.

    Raises:
        ContractError: shapes or dtypes do not fit.
        ValueError: max_chunks is negative.
        IndexError: an id is max_chunks or more, or below -1 (on the CPU; on CUDA an assertion of
            the device; no GPU has run this yet).

    References:
        NeMo-RL's function of this name (https://github.com/NVIDIA-NeMo/RL,
        nemo_rl/algorithms/x_token/loss_utils.py), which divides by n + 1e-10 and multiplies by a
        one-hot matrix, so that a -inf at an unused position makes every chunk NaN.

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
    # An additional bucket for each sample, before its first chunk, receives the positions outside
    # every chunk and is dropped. So no row is multiplied by 0, and the gradient of these positions
    # is exactly 0.
    sample = torch.arange(batch, device=chunk_id.device)[:, None] * (max_chunks + 1)
    ids = chunk_id.long()
    within = (ids >= -1) & (ids < max_chunks)
    bucket = torch.where(within, sample + ids + 1, batch * (max_chunks + 1)).reshape(-1)
    try:
        sums = rows.new_zeros(batch * (max_chunks + 1), vocab).index_add(0, bucket, rows)
    except (IndexError, RuntimeError) as error:  # on the CPU; no device is synchronized
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
    """Return which chunks count: those that are valid and have positions in both models.

    Args:
        student_sizes (Float[Tensor, "batch chunks"] | Int[Tensor, "batch chunks"]): positions in
            each chunk, as [`chunk_average_log_probs`][termwise.lm.chunk_average_log_probs] returns
            them, or counted as integers.
        teacher_sizes (Float[Tensor, "batch chunks"] | Int[Tensor, "batch chunks"]): the same for
            the teacher.
        pair_valid (Bool[Tensor, "batch chunks"]): whether the chunk exists.

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
