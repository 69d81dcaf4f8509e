"""A teacher's logits in shared memory: written in place, read without a copy."""

import dataclasses
import math
import mmap
import os
import secrets
from typing import Any, Self, cast

import torch
import torch.multiprocessing.reductions as reductions
from jaxtyping import Float
from torch import Tensor

from .._contract import contract

_TOKEN, _OPEN, _WRITES = range(3)  # int64 numbers before the logits
_HEAD = 3
_BEFORE = 64  # bytes, so that the logits are aligned to a cache line


@dataclasses.dataclass(frozen=True, slots=True)
class SharedLogitsHandle:
    """A small, picklable handle to open a [`SharedLogits`][termwise.lm.SharedLogits] elsewhere."""

    process: int
    """Id of the producer's process."""
    descriptor: int
    """File descriptor of the memory in that process."""
    token: int
    """A random number that is also stored in the memory, to identify it."""
    shape: tuple[int, int, int]
    """Sizes of batch, teacher_time and teacher_vocab."""
    dtype: torch.dtype
    """Dtype of the logits."""
    cuda: tuple[Any, ...] | None
    """Data that CUDA needs to open the memory in another process; None on the CPU."""


class SharedLogits:
    """A buffer [batch, teacher_time, teacher_vocab] that a producer writes and consumers read.

    The producer, which runs the teacher, creates it once and writes the logits of each step in
    place. A consumer, which trains the student, opens the handle once and slices: a slice is a view
    of the producer's memory, in its dtype, and shows later writes. There is no locking: synchronize
    writes and reads by a barrier or a queue; `writes` is the number of writes so far.

    On the CPU the memory is anonymous and is freed with the last process that maps it, even if that
    is killed; this needs Linux, and processes of one user in the same PID namespace. On CUDA it is
    shared by IPC, between processes on one machine that see the same device; no GPU has run this
    yet.

    Once the producer has closed the buffer or ended, opening and slicing raise errors. On the CPU,
    existing views stay readable and have the last values; on CUDA delete them first.

    Examples:
        >>> import torch
        >>> from termwise.lm import SharedLogits
        >>> producer = SharedLogits.create((2, 3, 5), dtype=torch.bfloat16)
        >>> consumer = SharedLogits.open(producer.handle)  # the handle pickles: send it anywhere
        >>> view = consumer[0:1]
        >>> producer.write(torch.ones(2, 3, 5, dtype=torch.bfloat16))
        >>> view.sum().item(), consumer.writes
        (15.0, 1)
        >>> producer.close()
        >>> consumer[0:1]
        Traceback (most recent call last):
        RuntimeError: SharedLogits needs its producer, but process ... has closed it
    """

    def __init__(self, handle: SharedLogitsHandle, head: Tensor, logits: Tensor) -> None:
        self.handle = handle
        self._head = head
        self._logits = logits
        self._inode = _inode(handle)
        self._owner: int | None = None

    @classmethod
    @contract
    def create(
        cls,
        shape: tuple[int, int, int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Create the buffer, filled with zeros, in the process that will write it.

        Args:
            shape: batch, teacher_time, teacher_vocab.
            dtype: a floating dtype, the same in all processes.
            device: "cpu", or a CUDA device.

        Raises:
            ValueError: a size below 1, a dtype that is not floating, or a device of another kind.
            RuntimeError: the system is not Linux, or does not have enough shared memory.
        """
        device = torch.device(device)
        if min(shape) < 1 or not dtype.is_floating_point or device.type not in ("cpu", "cuda"):
            raise ValueError(
                "SharedLogits.create needs sizes from 1 up, a floating dtype and a device cpu or "
                f"cuda, got {shape}, {dtype} and {device}"
            )
        if not hasattr(os, "memfd_create"):
            raise RuntimeError("SharedLogits.create needs Linux, for its anonymous shared memory")
        logits = torch.zeros(shape, dtype=dtype, device=device) if device.type == "cuda" else None
        cuda = None if logits is None else cast("Any", reductions).reduce_tensor(logits)[1]
        descriptor = os.memfd_create("termwise")
        try:
            handle = SharedLogitsHandle(
                process=os.getpid(),
                descriptor=descriptor,
                token=secrets.randbits(63),
                shape=shape,
                dtype=dtype,
                cuda=cuda,
            )
            memory = _mapped(handle)
            head = torch.frombuffer(memory, dtype=torch.int64, count=_HEAD)
            head[_TOKEN], head[_OPEN] = handle.token, 1
            logits = _logits_in(memory, shape, dtype) if logits is None else logits
            producer = cls(handle, head, logits)
        except BaseException:
            os.close(descriptor)
            raise
        producer._owner = os.getpid()
        return producer

    @classmethod
    @contract
    def open(cls, handle: SharedLogitsHandle) -> Self:
        """Map the producer's buffer into this process. Call it once, not at every step.

        Raises:
            RuntimeError: the producer has ended or closed it, or the handle belongs to another
                buffer.
        """
        try:
            descriptor = os.open(_path(handle), os.O_RDWR)
        except OSError as error:
            raise RuntimeError(
                f"SharedLogits.open needs a live producer, but process {handle.process} has ended, "
                f"has closed it, or is of another user or container ({error.strerror})"
            ) from error
        try:
            about = os.fstat(descriptor)
            # The process may have reused this file descriptor.
            memory = mmap.mmap(descriptor, about.st_size) if about.st_size == _size(handle) else b""
        finally:
            os.close(descriptor)
        head = torch.frombuffer(memory, dtype=torch.int64, count=_HEAD) if memory else None
        if head is None or int(head[_TOKEN]) != handle.token:
            raise RuntimeError(
                f"SharedLogits.open needs a handle of a buffer that is there, but process "
                f"{handle.process} holds another one, or none of shape {list(handle.shape)} in "
                f"{handle.dtype}: the handle is stale, or is not this producer's"
            )
        if handle.cuda is None:
            logits = _logits_in(memory, handle.shape, handle.dtype)
        else:
            logits = cast("Any", reductions).rebuild_cuda_tensor(*handle.cuda)
        return cls(handle, head, logits)

    @property
    def writes(self) -> int:
        """Number of completed writes."""
        return int(self._head[_WRITES])

    @contract
    def write(self, logits: Float[Tensor, "rows time vocab"], *, start: int = 0) -> None:
        """Copy logits to the rows from start on, in the process that created the buffer.

        Args:
            logits (Float[Tensor, "rows time vocab"]): logits of the buffer's time, vocabulary and
                dtype, for at most as many rows as fit.
            start: the first sample to write.

        Raises:
            RuntimeError: this process did not create the buffer, or has closed it.
            ValueError: shape or dtype do not fit.
        """
        if self._owner != os.getpid():
            raise RuntimeError("SharedLogits.write needs the process that made the buffer")
        self._check()
        batch, *sample = self.handle.shape
        stop = start + logits.shape[0]
        if [*logits.shape[1:]] != sample or logits.dtype != self.handle.dtype:
            raise ValueError(
                f"SharedLogits.write needs logits of [rows, {sample[0]}, {sample[1]}] in "
                f"{self.handle.dtype}, got {list(logits.shape)} in {logits.dtype}"
            )
        if not 0 <= start <= stop <= batch:
            raise ValueError(
                f"SharedLogits.write needs rows within 0 to {batch}, got {start} to {stop}"
            )
        self._logits[start:stop].copy_(logits.detach())
        if self._logits.is_cuda:  # the count must not include unfinished writes
            torch.cuda.synchronize(self._logits.device)
        self._head[_WRITES] += 1

    def __getitem__(self, samples: slice) -> Tensor:
        """Return a view of samples start to stop - 1, without a copy.

        Raises:
            TypeError: the index is not a slice, but for example a number, as in a loop over the
                buffer.
            IndexError: the slice does not have step 1 or exceeds the batch; nothing is clipped
                silently.
            RuntimeError: the producer has closed the buffer or ended.
        """
        batch = self.handle.shape[0]
        given = cast("object", samples)
        if not isinstance(given, slice):
            shown = f"[{given}:{given + 1}]" if type(given) is int and given >= 0 else "[0:1]"
            raise TypeError(f"SharedLogits needs a slice, such as {shown}, got {given!r}")
        start = 0 if samples.start is None else samples.start
        stop = batch if samples.stop is None else samples.stop
        if samples.step not in (None, 1) or not 0 <= start <= stop <= batch:
            raise IndexError(f"SharedLogits needs a slice within 0 to {batch}, got {samples}")
        self._check()
        return self._logits[start:stop]

    def close(self) -> None:
        """Close the buffer: for all processes in the producer, only for itself in a consumer."""
        if self._owner == os.getpid() and int(self._head[_OPEN]):
            self._head[_OPEN] = 0
            os.close(self.handle.descriptor)
        self._logits = self._logits.new_empty(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_owner", None) is not None:
            self.close()

    def _check(self) -> None:
        if self._logits.numel() == 0:
            raise RuntimeError("SharedLogits was closed in this process")
        producer = f"process {self.handle.process}"
        if not int(self._head[_OPEN]):
            raise RuntimeError(f"SharedLogits needs its producer, but {producer} has closed it")
        if _inode(self.handle) != self._inode:
            raise RuntimeError(f"SharedLogits needs its producer, but {producer} has ended")


def _path(handle: SharedLogitsHandle) -> str:
    return f"/proc/{handle.process}/fd/{handle.descriptor}"


def _size(handle: SharedLogitsHandle) -> int:
    on_cpu = handle.cuda is None
    return _BEFORE + on_cpu * math.prod(handle.shape) * handle.dtype.itemsize


def _mapped(handle: SharedLogitsHandle) -> mmap.mmap:
    """Map the producer's memory."""
    try:
        os.ftruncate(handle.descriptor, _size(handle))
        return mmap.mmap(handle.descriptor, _size(handle))
    except (OSError, OverflowError, ValueError) as error:
        raise RuntimeError(
            f"SharedLogits.create needs {_size(handle)} bytes of shared memory for shape "
            f"{list(handle.shape)} in {handle.dtype}, and the system gives none: {error}"
        ) from error


def _logits_in(memory: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(memory, dtype=dtype, offset=_BEFORE).view(shape)


def _inode(handle: SharedLogitsHandle) -> int | None:
    """Return the inode, which identifies a file even if its descriptor is reused, or None."""
    try:
        return os.stat(_path(handle)).st_ino
    except OSError:
        return None
